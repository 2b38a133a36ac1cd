"""README.md and the site's pages run as they stand: their commands and Python blocks,
on a tiny model under the names of those that they load."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import ROOT, blocks, commands, every_command
from tiny_runs import CONTEXTS, LENGTH, TRAINING, call, copied

README = ROOT / "README.md"
# The second goes on where the first ends.
PYTHON = [ROOT / "docs" / f"{name}.md" for name in ("own_activations", "python")]
EIGHT = ROOT / "docs" / "eight_tasks.md"
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


@pytest.fixture(scope="module")
def followed(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    """A folder in which README's commands were run."""
    folder = tmp_path_factory.mktemp("newcomer")
    model = copied(tiny_model, folder / "vsae_jax" / "data" / "neox-stories")
    (model / "sampled_stories.jsonl").symlink_to(tiny_corpus)
    before = Path.cwd()
    os.chdir(folder)
    try:
        (block,) = [b for b in blocks(README) if "--out=activations/first" in b]
        for command, *words in commands(block):
            small = [f"--{name}={value}" for name, value in SMALL[command].items()]
            assert call(command, *words, *small) == 0
    finally:
        os.chdir(before)
    return folder


def test_the_commands_make_a_page(followed):
    assert (followed / "both.html").read_text().startswith("<!DOCTYPE html>")
    assert len(sorted((followed / "runs" / "first").glob("*/evals/core.json"))) == 2


def test_the_glossary_has_every_number_of_a_run(followed):
    run = followed / "runs" / "first" / "variant-topk"
    page = (ROOT / "docs" / "evaluation.md").read_text()
    core = json.loads((run / "evals" / "core.json").read_text())["metrics"]
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    said = set(re.findall(r"`([\w-]+)`", page))
    assert {*core, *line} - {"step"} - said == set()


@pytest.mark.parametrize("pages", [[README], PYTHON], ids=["README", "site"])
def test_python_blocks_run(pages, followed, monkeypatch, capsys):
    monkeypatch.chdir(followed)
    names = {}
    sources = [source for page in pages for source in blocks(page, "python")]
    for source in sources:
        for written, small in SMALLER.items():
            source = source.replace(written, small)
        exec(compile(source, "a block", "exec"), names)
    assert len(sources) >= 2
    if pages == [README]:
        assert names["latents"].shape == (1000, 32)
        assert names["x_hat"].shape == names["rows"].shape == (1000, 16)
        printed = capsys.readouterr().out
        assert "'Lily'" in printed or "'L'" in printed
        assert str(names["mine"]) in printed and names["mine"].d_sae == 32
    else:
        theirs = names["trained"].encode(names["rows"])
        assert names["without_3"].shape == (10, 100, 16)
        assert Path("training.svg").is_file() and "".join(names["top"].tokens)
        np.testing.assert_allclose(names["latents"], theirs, rtol=1e-4, atol=1e-4)
        assert names["loss"] > 0 and names["info"].penalties["kl"] > 0


def test_our_blocks_of_the_eight_tasks_run(followed, monkeypatch):
    monkeypatch.chdir(followed)
    rows = np.random.default_rng(0).normal(size=(500, 16)).astype("f4")
    names = {"rows": rows}
    tasks = re.split(r"^## ", EIGHT.read_text(), flags=re.M)[1:]
    ours = [re.search(r"^```(?:python)?\n(.*?)^```", t, re.M | re.S)[1] for t in tasks]
    for source in ours:
        for written, small in SMALLER.items():
            source = source.replace(written, small)
        if not source.startswith("python -m"):
            exec(compile(source, str(EIGHT), "exec"), names)
            continue
        for line in source.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            command = words[2].removeprefix("vsae_jax.")
            small = [f"--{name}={value}" for name, value in SMALL[command].items()]
            assert call(command, *words[3:], *small) == 0
    assert len(ours) >= 7 and Path("my-sae-of-task-8", "config.json").is_file()


def test_the_readme_is_short_and_has_the_lines_that_others_look_for():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert "pip install torch==2.13.0 -e '.[dev]' && python -m pytest" in lines
    assert "pip install -e . && python -m vsae_jax.demo --out=demo" in lines


# The site's pages with commands, in a newcomer's order.
HOUR = ["own_model", "grids", "evaluation", "look_inside", "formats", "devices"]
# No hub is at hand (tests/test_sae_hub.py has a stand-in for both).
OF_THE_HUB = ("--push_to_hub=me/my-sae", "gemma-scope-2b-pt-res-canonical")
TINY = {
    "extract": SMALL["extract"] | {"backend": "jax", "dataset": "stories.jsonl"},
    "train": {n: v for n, v in TRAINING.items() if n not in ("k", "d_sae")},
    "features": {"num_tokens": 200},
    "maximise": {"steps": 2, "restarts": 2},
} | {name: SMALL[name] for name in ("evaluate", "dashboard")}
# What a tiny model has too little of, and what names an unnamed run.
INSTEAD = {
    "--d_sae=4096": "--d_sae=64",
    "--d_sae=131072": "--d_sae=128",
    "--k=64,128": "--k=2,4",
    "--seed=0,1,2": "--seed=0,1",
    "--beta=0,0.1": "--beta=0.1",
    "--k=256": "--k=8",
}


def small(command: str, words: list[str]) -> list[str]:
    """A page's command at the size of a tiny model."""
    extra = [f"--{name}={value}" for name, value in TINY.get(command, {}).items()]
    if "--k=256" in words:
        extra += ["--d_sae=64", "--out=runs/vsae_topk_k-256_beta-0.1"]
    if "--k=64,128" in words or "--mesh=data:2,latents:4" in words:
        extra += ["--activations=activations/first"]
    return [INSTEAD.get(word, word) for word in words] + extra


# Of a tiny grid a figure may hold nothing.
@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.slow
def test_a_newcomers_hour(followed, tiny_model, tiny_corpus, monkeypatch):
    monkeypatch.chdir(followed)
    copied(tiny_model, followed / "EleutherAI" / "pythia-70m-deduped")
    (followed / "stories.jsonl").symlink_to(tiny_corpus)
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    rows = [
        {"text": text, "category": "ab"[i % 2], "rating": 1 + i // 2 % 2}
        for i, text in enumerate(texts)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (followed / "reviews.jsonl").write_text(lines)
    for page in HOUR:
        for command, *words in every_command(ROOT / "docs" / f"{page}.md"):
            if not any(part in word for part in OF_THE_HUB for word in words):
                assert followed_to_the_end(command, small(command, words)), words


def followed_to_the_end(command: str, words: list[str]) -> bool:
    """Whether a command ends well; one for eight devices in a process that has them."""
    if "--mesh=data:2,latents:4" not in words:
        return call(command, *words) == 0
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    line = [sys.executable, "-m", f"vsae_jax.{command}", *words]
    return subprocess.run(line, env=os.environ | flags).returncode == 0
