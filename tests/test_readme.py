"""README.md and docs/guide.md run as they stand: their commands and Python blocks, on
a tiny model under the name of the bundled one."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import CONTEXTS, LENGTH, TRAINING, call, copied

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
# The sizes of the session's other folders, whose programs are compiled by then; of a
# flag given twice the last counts.
SMALL = {
    "extract": {
        "layer": 0,
        "num_tokens": CONTEXTS * LENGTH,
        "context_length": LENGTH,
        "dtype": "float32",
        "shard_contexts": 32,
    },
    "train": TRAINING,
    "evaluate": {"num_tokens": 200},
    "dashboard": {"num_tokens": 200},
}
SMALLER = {
    "d_sae=512, k=16, steps=1000": ", ".join(f"{n}={v}" for n, v in TRAINING.items()),
    "layer=2": "layer=0",
}


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path, *, naming: str) -> list[list[str]]:
    """The command lines, as words, of the only block that names a path."""
    (block,) = [b for b in blocks(page, "") if naming in b]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def followed(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    """A folder in which README's commands were run."""
    folder = tmp_path_factory.mktemp("newcomer")
    model = copied(tiny_model, folder / "vsae_jax" / "data" / "neox-stories")
    (model / "sampled_stories.jsonl").symlink_to(tiny_corpus)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for words in commands(README, naming="--out=activations/first"):
            assert words[:2] == ["python", "-m"]
            command = words[2].removeprefix("vsae_jax.")
            small = [f"--{name}={value}" for name, value in SMALL[command].items()]
            assert call(command, *words[3:], *small) == 0
    finally:
        os.chdir(before)
    return folder


def test_the_commands_make_a_page(followed):
    assert (followed / "both.html").read_text().startswith("<!DOCTYPE html>")
    assert len(sorted((followed / "runs" / "first").glob("*/evals/core.json"))) == 2


@pytest.mark.parametrize("page", [README, GUIDE], ids=lambda page: page.name)
def test_python_blocks_run(page, followed, monkeypatch, capsys):
    monkeypatch.chdir(followed)
    names = {}
    sources = blocks(page, "python")
    for source in sources:
        for written, small in SMALLER.items():
            source = source.replace(written, small)
        exec(compile(source, str(page), "exec"), names)
    assert len(sources) >= 2
    if page == README:
        assert names["latents"].shape == (1000, 32)
        assert names["x_hat"].shape == names["rows"].shape == (1000, 16)
        printed = capsys.readouterr().out
        assert printed.count(" latent ") == len(names["ids"]) > 4
    else:
        theirs = names["trained"].encode(names["rows"])
        np.testing.assert_allclose(names["latents"], theirs, rtol=1e-4, atol=1e-4)
        assert names["loss"] > 0 and names["info"].penalties["kl"] > 0


def test_the_readme_is_short_and_has_the_lines_that_others_look_for():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert "pip install torch==2.13.0 -e '.[dev]' && python -m pytest" in lines
    assert "pip install -e . && python -m vsae_jax.demo --out=demo" in lines
