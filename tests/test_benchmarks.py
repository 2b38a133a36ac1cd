"""The benchmarks' arithmetic, their workers' protocol, and what they refuse."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import released, table, train_step, trained
from benchmarks.gpu_cases import Case
from benchmarks.grid import GridConfig
from benchmarks.released import ReleasedConfig
from benchmarks.table import Timed
from benchmarks.train_step import Shape, StepConfig
from benchmarks.turns import Task, Worker, WorkerEnded
from vsae_jax import losses
from vsae_jax.config import TrainConfig, resolve_train, sae_config
from vsae_jax.system.errors import UserError

TASK = Task("sleep", "float32", 8, 2, 4, "rows.npy")
WORKER = """
import time
from benchmarks.turns import serve

def make(task):
    {first}
    print("what a library prints")

    def steps(count):
        {each}
        return 5.0 * count

    return steps, {{"sleep": task.mode}}

serve(make)
"""


def worker(first: str = "pass", each: str = "time.sleep(0.002 * count)") -> Worker:
    script = WORKER.format(first=first, each=each)
    return Worker(TASK, [sys.executable, "-c", script])


def timed(implementation: str, mode: str, ms: list[float], *, is_peer=True) -> Timed:
    return Timed(implementation, mode, ms, 10**9, 0.5, is_peer)


def test_a_worker_times_its_steps():
    asleep = worker()
    assert asleep.versions == {"sleep": "float32"} and not asleep.refusal
    asleep.calibrate(0.02, multiple=4)
    asleep.take_turn()
    asleep.close()
    (turn,) = asleep.turns
    count = turn.rate / 5.0
    assert count % 4 == 0 and 2 <= turn.ms < 20 and turn.cpu_seconds < 0.02
    assert asleep.peak_bytes > 10**6


def test_a_worker_that_cannot_start_says_why():
    missing = worker(first="import no_such_library")
    broken = worker(first="raise ValueError('no such mode')")
    assert missing.missing == "No module named 'no_such_library'"
    assert "ended with status 1: ValueError: no such mode" in broken.refusal
    missing.kill()
    broken.kill()


def test_a_worker_that_dies_in_its_turn_is_named():
    dies = worker(each="assert count == 1, 'too many'")
    with pytest.raises(WorkerEnded, match="sleep float32 ended .* too many"):
        dies.calibrate(1.0, multiple=3)
    dies.kill()


def test_ratios_are_of_the_same_round():
    ours = timed("vsae_jax_topk", "bfloat16", [1.0, 2.0, 4.0], is_peer=False)
    peer = timed("dictionary_learning", "float32", [4.0, 10.0, 12.0])
    assert table.times_faster(ours, peer) == (4.0, 3.5, 4.5)
    (row, _) = table.rows(
        [ours, peer], batch=8, floor_ms=dict.fromkeys(train_step.MODES, 0.5)
    )
    assert row["activations/s"] == 4000.0
    assert row["of the matmul floor"] == 0.25
    assert row["times dictionary_learning float32"].median == 4.0


def test_the_fastest_peer_is_a_topk_of_another_library():
    rows = [
        timed("vsae_jax_topk", "bfloat16", [1.0, 1.0], is_peer=False),
        timed("authors_vsae_topk", "bfloat16", [2.0, 2.0]),
        timed("saelens", "bfloat16", [3.0, 3.0]),
        timed("saelens", "float32", [4.0, 4.0]),
    ]
    assert table.fastest_peer(rows) == rows[2]
    assert table.fastest_peer(rows[:2]) is None
    assert table.comparisons(rows) == [
        "vsae_jax_topk bfloat16 is 3.00 (3.00 to 3.00) times as fast as saelens "
        "bfloat16"
    ]


def test_a_table_without_a_baseline_has_a_dash():
    ours = timed("vsae_jax_topk", "float32", [2.0], is_peer=False)
    text = table.markdown(table.rows([ours], batch=4, floor_ms={"float32": 1.0}))
    assert text.splitlines()[2] == (
        "| vsae_jax_topk | float32 | 2.0 (2.0 to 2.0) | 2,000 | - | - | 50 % | 1.00 | "
        "0.50 |"
    )


def test_activations_are_exact_in_bfloat16_and_nearly_of_low_rank(tmp_path):
    x = np.load(train_step.write_activations(tmp_path, batch=32, d_model=64))
    assert x.shape == (8, 32, 64)
    assert np.array_equal(x, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32))
    assert np.square(x).sum(-1).mean() == pytest.approx(64, rel=0.02)
    spectrum = np.linalg.svd(x.reshape(-1, 64), compute_uv=False) ** 2
    assert 0.7 < spectrum[:8].sum() / spectrum.sum() < 0.99


def test_shapes():
    assert train_step.read_shapes("2048x64x1024, 8x2x4") == [
        Shape(2048, 64, 1024),
        Shape(8, 2, 4),
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"shapes": "2048x64"}, "no comma list of d_sae x k x batch"),
        ({"shapes": "64x65x8"}, "1 <= k <= d_sae"),
        ({"peers": "sae_lens"}, "'sae_lens' is none of dictionary_learning, saelens"),
        ({"modes": "float16"}, "'float16' is none of float32, bfloat16"),
        ({"peers": "saelens"}, "--peer_python='' is no interpreter"),
        ({"checkout": "saelens=/no/such/folder"}, "is no peer=FOLDER"),
        ({"rounds": 0}, "--rounds=0 must be at least 1"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        StepConfig(**{"peers": ""} | flags)


def test_a_grid_needs_activations(tmp_path):
    with pytest.raises(UserError, match="holds no activations"):
        GridConfig(activations=str(tmp_path))


@pytest.fixture
def released_flags(tmp_path):
    """Flags of `released` that nothing is wrong with, though nothing could run."""
    trainer = tmp_path / "authors/dictionary_learning/trainers/vsae_topk.py"
    trainer.parent.mkdir(parents=True)
    for path in (tmp_path / "manifest.json", trainer):
        path.touch()
    folders = {"activations": tmp_path, "authors": tmp_path / "authors"}
    flags = {**folders, "peer_python": sys.executable, "out": tmp_path / "new"}
    return {name: str(value) for name, value in flags.items()}


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"activations": "no-such"}, "--activations='no-such' holds no activations"),
        ({"authors": "no-such"}, "'no-such' has no .*vsae_topk.py; name a checkout of"),
        ({"peer_python": ""}, "--peer_python='' is no interpreter"),
        ({"out": ""}, "--out='' must name a folder that is not there"),
        ({"out": "."}, "--out='.' must name a folder that is not there"),
        ({"steps": 251}, "--steps=251 must be at least 252: the authors' trainer"),
        ({"k": 1025}, "--k=1025 must not exceed --d_sae=1024"),
        ({"batch_size": 0}, "--batch_size=0 must be at least 1"),
    ],
)
def test_bad_flags_of_released_are_refused(flags, message, released_flags):
    ReleasedConfig(**released_flags)
    with pytest.raises(UserError, match=message):
        ReleasedConfig(**released_flags | flags)


def test_released_takes_differences_seed_by_seed():
    def arm(value: float) -> dict[str, float]:
        names = ("explained_variance", "frac_alive", "entropy_effective_latents")
        return dict.fromkeys(names, value)

    arms = released.OURS, released.SAME, released.OWN
    seeds = [
        dict(zip(arms, map(arm, values), strict=True))
        for values in ((1.0, 0.5, 0.0), (3.0, 2.5, 0.0))
    ]
    means, differences = released.tables(seeds).values()
    assert [row["alive"] for row in means] == [
        "2.0000 ± 1.4142",
        "1.5000 ± 1.4142",
        "0.0000 ± 0.0000",
    ]
    assert [row["alive"] for row in differences] == [
        "0.5000 ± 0.0000",
        "2.0000 ± 1.4142",
    ]


@pytest.mark.parametrize("variant", ["topk", "vsae_topk"])
def test_the_torch_step_has_our_loss(variant, monkeypatch):
    torch = pytest.importorskip("torch")
    gpu_torch = pytest.importorskip("benchmarks.gpu_torch")
    rng = np.random.default_rng(0)
    shapes = {"w_enc": (8, 32), "b_enc": (32,), "w_dec": (32, 8), "b_dec": (8,)}
    arrays = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    x = rng.standard_normal((16, 8), np.float32)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if variant == "topk":
        value, index = gpu_torch.topk_loss(tensors, torch.from_numpy(x), 4)
        expected, _ = losses.topk_loss(arrays, x, k=4)
    else:
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        value, index = gpu_torch.vsae_loss(tensors, torch.from_numpy(x), 4)
        expected, _ = losses.vsae_topk_loss(
            arrays, x, jax.random.key(0), k=4, beta=gpu_torch.BETA, noise_std=0.0
        )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert index.shape == (16, 4)


def test_the_torch_step_trains_and_keeps_unit_rows(monkeypatch):
    torch = pytest.importorskip("torch")
    gpu_torch = pytest.importorskip("benchmarks.gpu_torch")
    kept = {}

    def loss(parameters, x, k):
        kept["w_dec"] = parameters["w_dec"]
        value, index = topk_loss(parameters, x, k)
        kept.setdefault("losses", []).append(value.item())
        return value, index

    topk_loss = gpu_torch.topk_loss
    monkeypatch.setattr(gpu_torch, "topk_loss", loss)
    case = Case(
        *("torch", "eager", "topk", "float32"), 8, 32, 4, 16, "cpu", 0.01, rounds=1
    )
    torch.manual_seed(0)
    step = gpu_torch.make_step(case, torch.device("cpu"))
    x = torch.randn(16, 8)
    for _ in range(50):
        step(x)
    norms = kept["w_dec"].norm(dim=1).detach().numpy()
    assert np.allclose(norms, 1, atol=1e-5)
    assert kept["losses"][-1] < 0.9 * kept["losses"][0]


@pytest.mark.slow
def test_our_step_is_measured_end_to_end(tmp_path, capsys):
    out = tmp_path / "steps.json"
    config = StepConfig(
        shapes="64x4x16",
        d_model=16,
        peers="",
        rounds=2,
        turn_seconds=0.01,
        out=str(out),
    )
    train_step.command([config])
    (shape,) = json.loads(out.read_text())["shapes"]
    assert len(shape["rounds_ms"]) == 4 and min(shape["floor_ms"].values()) > 0
    assert "vsae_jax_vsae_topk bfloat16 is" in capsys.readouterr().out


@pytest.mark.parametrize("library", list(trained.FLAGS))
def test_every_trainer_of_a_peer_has_flags_of_ours(library):
    settings = trained.NUMBERS | trained.DEFAULTS | {"lr": 1e-3}
    settings |= {"warmup": 100, "decay_start": 1600}
    for kind in trained.FLAGS[library]:
        asked = TrainConfig(**trained.flags_of(library, kind, settings))
        config = resolve_train(asked, d_model=128)
        assert sae_config(config, d_model=128, dtype="float32").d_sae == 512
        assert config.variant == kind and config.lr_decay_start == 1600


def test_a_peer_without_auxk_is_held_to_ours_without_it():
    beside = {row: trained.stem_of_ours(*row) for row in trained.ROWS}
    assert beside["saelens", "relu", "unit rows"] == "ours_saelens-relu"
    assert beside["saelens", "relu", ""] == "ours_saelens-relu"
    assert (
        beside["saelens", "matryoshka", "no AuxK"] == "ours_saelens-matryoshka-no AuxK"
    )
    changed = {(library, kind) for library, kind, how in trained.ROWS if how}
    assert changed <= {
        (lib, kind) for lib, kinds in trained.FLAGS.items() for kind in kinds
    }


def test_trained_pairs_agree_within_twice_the_standard_error(tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "ROWS", [("saelens", "topk", "")])
    for seed, value in enumerate((0.80, 0.82, 0.84)):
        for stem, moved in (("saelens-topk-as it is", 0), ("ours_saelens-topk", 0.03)):
            found = {"explained_variance": value + moved, "l0": 32, "alive": 1 - moved}
            (tmp_path / f"{stem}-{seed}.json").write_text(json.dumps(found))
    (row,) = trained.table(tmp_path).splitlines()[2:]
    assert row.split(" | ")[3:5] == ["0.8200 ± 0.0200", "0.8500 ± 0.0200"]
    assert row.split(" | ")[-1] == "alive |"
