"""Where torch runs a language model, and what JAX leaves of that GPU: decided here with
a stand-in for a machine with GPUs."""

import importlib.util
from types import SimpleNamespace

import pytest
from tiny_runs import call

from vsae_jax import lm
from vsae_jax.lm.torch_device import leave_room, resolve
from vsae_jax.system.errors import UserError

PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def machine(n_gpus: int, *, mps: bool = False) -> SimpleNamespace:
    """What is asked of torch."""
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: n_gpus > 0, device_count=lambda: n_gpus
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )


@pytest.fixture
def jax_has_gpus(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: True if name == "jax_cuda13_plugin" else find(name),
    )


@pytest.mark.parametrize(
    "device, there, resolved",
    [
        ("auto", machine(2), "cuda:0"),
        ("auto", machine(0), "cpu"),
        ("auto", machine(0, mps=True), "cpu"),
        ("cpu", machine(2), "cpu"),
        ("cuda", machine(1), "cuda:0"),
        ("cuda:1", machine(2), "cuda:1"),
        ("mps", machine(0, mps=True), "mps"),
    ],
)
def test_a_device_that_is_there(device, there, resolved):
    assert resolve(device, there) == resolved


@pytest.mark.parametrize(
    "device, there, said",
    [
        ("cuda", machine(0), "torch finds 0 GPUs"),
        ("cuda:2", machine(2), "--device=cuda:2, but torch finds 2 GPUs"),
        ("mps", machine(1), "--device=mps, but torch finds none"),
        ("gpu", machine(1), "--device=gpu must be auto, cpu, cuda, cuda:N or mps"),
        ("cuda:", machine(1), "--device=cuda: must be"),
        ("cpu:0", machine(1), "--device=cpu:0 must be"),
    ],
)
def test_a_device_that_is_not_there_is_named(device, there, said):
    with pytest.raises(UserError, match=said):
        resolve(device, there)


def test_on_a_shared_gpu_jax_takes_no_more_than_it_needs(jax_has_gpus):
    environ = {}
    said = leave_room("cuda:1", environ)
    assert environ == {PREALLOCATE: "false"}
    assert "torch and JAX share cuda:1" in said and "\n" not in said
    assert leave_room("cuda:1", environ) == ""


@pytest.mark.parametrize(
    "device, environ",
    [
        ("cpu", {}),
        ("mps", {}),
        ("cuda:0", {"JAX_PLATFORMS": "cpu"}),
        ("cuda:0", {PREALLOCATE: "true"}),
        ("cuda:0", {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
    ],
)
def test_nothing_is_set_where_nothing_is_shared_or_all_is_said(
    jax_has_gpus, device, environ
):
    before = dict(environ)
    assert leave_room(device, environ) == "" and environ == before


def test_without_jax_on_the_gpu_nothing_is_shared():
    environ = {}
    assert leave_room("cuda:0", environ) == "" and environ == {}


def test_jax_takes_no_torch_device(tiny_model):
    with pytest.raises(UserError, match="--device=cpu is torch's; add --backend=tr"):
        lm.load_language_model(str(tiny_model), device="cpu")


@pytest.mark.parametrize("command", ["evaluate", "features", "dashboard"])
def test_commands_refuse_a_device_before_they_read(command, tiny_run, capfd):
    pytest.importorskip("torch")
    flags = {"run": tiny_run, "backend": "transformers", "device": "tpu"}
    assert call(command, **flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--device=tpu must be auto, cpu" in line
