"""The package as a whole: what an import pulls in, what is bundled, --help."""

import dataclasses
import json
import math
import runpy
import subprocess
import sys
import tomllib
import warnings
from importlib import resources
from pathlib import Path

import pytest
from safetensors import safe_open

import vsae_jax
from vsae_jax import __main__ as package
from vsae_jax.config import cli
from vsae_jax.config.fields import REQUIRED
from vsae_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "vsae_jax.extract",
    "vsae_jax.train",
    "vsae_jax.evaluate",
    "vsae_jax.convert",
    "vsae_jax.maximise",
    "vsae_jax.tsne",
    "vsae_jax.plots",
    "vsae_jax.features",
    "vsae_jax.dashboard",
    "vsae_jax.demo",
    "experiments.make_small_lm",
]
LAZY = (
    "flax torch transformers datasets sklearn matplotlib tensorboardX wandb tokenizers "
    "numba"
).split()


def test_import_is_light():
    code = (
        "import sys, vsae_jax\n"
        f"print(*sorted(set({LAZY}) & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_requirements_cuda_covers_the_core():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements-cuda.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {name.partition("[")[0] for name in pins}
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["torch"] + extras["analysis"]
    assert {need.split(">=")[0] for need in wanted} <= pinned
    assert "jax[cuda13]" in pins


def test_bundled_model_and_stories():
    folder = resources.files(vsae_jax) / "data" / "neox-stories"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("gpt_neox", 4)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == config["vocab_size"] == 2048
    with resources.as_file(folder / "model.safetensors") as path:
        with safe_open(path, framework="numpy") as weights:
            shapes = {
                name: weights.get_slice(name).get_shape() for name in weights.keys()
            }
    assert shapes["gpt_neox.embed_in.weight"] == [2048, 128]
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_317_632
    lines = (folder / "sampled_stories.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2145
    assert all(set(json.loads(line)) == {"text"} for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_each_flag_with_its_default(command, monkeypatch):
    config_class = config_of(command, monkeypatch)
    text = cli.help_text(config_class)
    for field in dataclasses.fields(config_class):
        line = text.partition(f"\n  --{field.name}=")[2].split("\n  --")[0]
        assert field.metadata["help"] in line, field.name
        required = field.metadata.get("default_help") == REQUIRED
        assert ("(required)" if required else "(default: ") in line, field.name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_required_flag_is_asked_for_by_its_name(command, monkeypatch):
    config_class = config_of(command, monkeypatch)
    names = [
        field.name
        for field in dataclasses.fields(config_class)
        if field.metadata.get("default_help") == REQUIRED
    ]
    for name in names:
        others = {other: "0" for other in names if other != name}
        with pytest.raises(UserError, match=f"--{name}"):
            config_class(**others)


def test_the_package_lists_its_commands(monkeypatch, capsys):
    assert package.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    ours = [command for command in COMMANDS if command.startswith("vsae_jax.")]
    for command in ours:
        name = command.removeprefix("vsae_jax.")
        (line,) = (line for line in lines if line.split()[:1] == [name])
        about = " ".join(config_of(command, monkeypatch).__doc__.split())
        assert line.split(maxsplit=1)[1] in about
    assert {f"vsae_jax.{name}" for name in package.COMMANDS} == set(ours)


def test_versions_are_what_an_issue_should_say(capsys):
    assert package.main(["--versions"]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["vsae_jax"] == vsae_jax.__version__ and "cpu" in said["devices"]
    extras = {"torch", "matplotlib", "scikit-learn", "tensorboardX", "wandb"}
    assert {"python", "jax", "transformers"} | extras <= said.keys()


@pytest.mark.parametrize("argument", ["train", "trian", "--version"])
def test_what_the_package_cannot_do_is_said(argument, capsys):
    assert package.main([argument]) == 2
    error = capsys.readouterr().err
    known = argument == "train"
    assert ("python -m vsae_jax.train ..." if known else f"{argument} is no") in error


def config_of(command: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """The config class that `python -m command` reads its flags into."""
    seen = []
    monkeypatch.setattr(
        cli, "main", lambda run, config_class: seen.append(config_class)
    )
    with warnings.catch_warnings():
        # runpy: the module was imported before, by another test.
        warnings.simplefilter("ignore", RuntimeWarning)
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    (config_class,) = seen
    return config_class
