"""A user's mistake: exit status 2, one line that names it, and nothing is lost.

Every case runs the real command in this process, so that a traceback fails the test;
`test_in_a_process_of_its_own` shows a few as a shell sees them.
"""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_models import make_tiny_neox, make_tokenizer, write_jsonl
from tiny_runs import LENGTH, TRAINING, call, copied, identity_arrays, write_run

from vsae_jax import runs

ROOT = Path(__file__).resolve().parents[1]


class Place(NamedTuple):
    """What there is to point a command at, and an empty folder of the test's own."""

    model: Path
    corpus: Path
    rows: Path
    run: Path
    grid: Path
    tmp: Path


@pytest.fixture
def place(tiny_model, tiny_corpus, tiny_rows, tiny_run, tiny_grid, tmp_path) -> Place:
    return Place(tiny_model, tiny_corpus, tiny_rows, tiny_run, tiny_grid, tmp_path)


def flags_of(command: str, place: Place) -> dict[str, object]:
    """Flags under which the command works; a case changes some."""
    if command == "extract":
        return {
            "model": place.model,
            "backend": "jax",
            "dataset": place.corpus,
            "num_tokens": 20 * LENGTH,
            "context_length": LENGTH,
            "out": place.tmp / "out",
        }
    if command == "train":
        out = {"activations": place.rows, "out": place.tmp / "out"}
        return out | {"variant": "topk", **TRAINING}
    if command == "evaluate":
        return {"run": place.run, "num_tokens": 2 * LENGTH}
    return {"out": place.tmp / "out"}


def refused(capfd, command: str, *arguments: str, **flags: object) -> str:
    """The one line that the command says on stderr, with status 2."""
    capfd.readouterr()
    assert call(command, *arguments, **flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# Command, the flags that are wrong, and what the line must name.
FLAGS = [
    ("train", {"bta": 1}, ["--bta", "did you mean --beta?"]),
    ("train", {"k": "many"}, ["--k=many", "INTEGER"]),
    ("train", {"k": 2.5}, ["--k=2.5", "INTEGER"]),
    ("train", {"k": 64}, ["--k=64 must not exceed --d_sae=32"]),
    ("train", {"k": "4,64"}, ["--k=64 must not exceed --d_sae=32"]),
    ("train", {"k": 0}, ["--k=0", "at least 1"]),
    ("train", {"beta": -1}, ["--beta=-1.0", "at least 0"]),
    ("train", {"beta": "nan"}, ["--beta=nan", "finite"]),
    ("train", {"lr": 0}, ["--lr=0.0", "above 0"]),
    ("train", {"steps": 0}, ["--steps=0", "at least 1"]),
    ("train", {"held_out": 0}, ["--held_out=0.0", "between 0 and 1"]),
    ("train", {"held_out": 0.999}, ["--held_out=0.999", "80 contexts"]),
    ("train", {"variant": "vase"}, ["--variant=vase", "vsae_topk"]),
    ("train", {"preset": "papr"}, ["--preset=papr", "released"]),
    ("train", {"preset": "released"}, ["--preset=released", "--center_residual=true"]),
    ("train", {"seed": -1}, ["--seed=-1", "at least 0"]),
    ("train", {"data_seed": "0,1"}, ["--data_seed=0,1", "takes one INTEGER"]),
    ("train", {"k_aux": 40}, ["--k_aux=40", "d_sae=32"]),
    ("train", {"mesh": "data:3"}, ["--mesh=data:3", "3 devices and there are 1"]),
    ("train", {"mesh": "rows:1"}, ["--mesh=rows:1", "data and latents"]),
    ("train", {"process_id": 1}, ["--process_id=1 needs --coordinator=HOST:PORT"]),
    ("extract", {"num_processes": 2}, ["--num_processes=2 needs --coordinator"]),
    ("train", {"activations": "nowhere"}, ["nowhere", "vsae_jax.extract"]),
    ("extract", {"layer": 2}, ["layer=2", "2 blocks"]),
    ("extract", {"dataset": "corpus.csv"}, ["--dataset=corpus.csv"]),
    ("extract", {"context_length": 0}, ["--context_length=0"]),
    ("extract", {"bos": "maybe"}, ["--bos=maybe", "keep|drop|none"]),
    ("extract", {"text_column": "story"}, ["--text_column=story", "there is: text"]),
    ("evaluate", {"run": ""}, ["--run is not set"]),
    ("evaluate", {"run": "nowhere"}, ["--run=nowhere", "not a folder"]),
    ("evaluate", {"evals": "corr"}, ["--evals=corr", "there is core"]),
    ("evaluate", {"evals": ""}, ["--evals= is not known"]),
    ("evaluate", {"batch_size": 0}, ["--batch_size=0", "at least 1"]),
    ("evaluate", {"num_tokens": -5}, ["--num_tokens=-5", "at least 1"]),
    ("evaluate", {"activations": "nowhere"}, ["nowhere"]),
    ("evaluate", {"text": "nowhere.jsonl"}, ["--text=nowhere.jsonl"]),
    ("evaluate", {"text": "a/hub-id"}, ["--text=a/hub-id", ".parquet file"]),
    ("evaluate", {"backend": "tf"}, ["--backend=tf", "transformers|jax|auto"]),
    ("demo", {"steps": 0}, ["--steps"]),
    ("demo", {"num_tokens": 5}, ["--num_tokens=5", "one context"]),
    ("demo", {"num_stories": 5}, ["--num_stories"]),
]


@pytest.mark.parametrize("command, wrong, named", FLAGS)
def test_a_wrong_flag(command, wrong, named, place, capfd, monkeypatch):
    monkeypatch.chdir(place.tmp)
    line = refused(capfd, command, **flags_of(command, place) | wrong)
    assert [text for text in named if text not in line] == []
    assert not (place.tmp / "out").exists()


@pytest.mark.parametrize("command", ["extract", "train", "evaluate", "demo"])
def test_a_positional_argument(command, place, capfd):
    line = refused(capfd, command, "k=12", **flags_of(command, place))
    assert "'k=12'" in line and "flags start with --" in line
    assert not (place.tmp / "out").exists()


@pytest.mark.parametrize("command", ["extract", "train", "demo"])
def test_out_below_a_file(command, place, capfd):
    (place.tmp / "file").write_text("kept")
    out = place.tmp / "file" / "out"
    line = refused(capfd, command, **flags_of(command, place) | {"out": out})
    assert str(place.tmp / "file") in line
    assert (place.tmp / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
@pytest.mark.parametrize("command", ["extract", "train", "evaluate"])
def test_a_read_only_folder(command, place, capfd):
    folder = copied(place.run, place.tmp / "run")
    shutil.rmtree(folder / runs.EVALS, ignore_errors=True)
    folder.chmod(0o555)
    where = {"run": folder} if command == "evaluate" else {"out": folder / "out"}
    try:
        line = refused(capfd, command, **flags_of(command, place) | where)
    finally:
        folder.chmod(0o755)
    assert str(folder) in line and "Permission denied" in line


def test_an_out_that_holds_something_else(place, capfd):
    out = place.tmp / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("kept")
    line = refused(capfd, "train", **flags_of("train", place))
    assert f"--out={out} is not empty" in line
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


# How the corpus is spoilt, and what the line must name.
CORPORA = [
    ("c.jsonl", '{"text": "one"}\n{"text": \n', ["c.jsonl, line 2", "not JSON"]),
    ("c.jsonl", "", ["c.jsonl", "holds no text"]),
    ("c.jsonl", '{"text": "Tom ran."}\n', ["--context_length=16", "too short"]),
    ("c.txt", "Tom ran.\n", ["--context_length=16", "too short"]),
    ("c.parquet", "PAR1", ["c.parquet", "not a parquet file"]),
]


@pytest.mark.parametrize("command", ["extract", "evaluate"])
@pytest.mark.parametrize("name, content, named", CORPORA)
def test_a_bad_corpus(command, name, content, named, place, capfd):
    path = place.tmp / name
    path.write_text(content)
    flag = {"text" if command == "evaluate" else "dataset": path}
    line = refused(capfd, command, **flags_of(command, place) | flag)
    assert [text for text in named if text not in line] == []


def test_a_tokenizer_larger_than_the_model(place, capfd):
    model = copied(place.model, place.tmp / "model")
    make_tokenizer(340).save_pretrained(model)
    for command in ("extract", "evaluate"):
        text = {"text": place.corpus} if command == "evaluate" else {}
        flags = flags_of(command, place) | {"model": model} | text
        line = refused(capfd, command, **flags)
        assert str(model) in line and "339" in line and "320" in line


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


# What is done to a file of the activations, and what the line must say.
DAMAGE = [
    ("activations-00000.npy", flip, "is corrupt"),
    ("activations-00000.npy", cut, "is truncated"),
    ("activations-00001.npy", Path.unlink, "is missing"),
    ("manifest.json", cut, "is not a manifest"),
    ("manifest.json", Path.unlink, "no activations in"),
]


@pytest.mark.parametrize("name, damage, said", DAMAGE)
def test_damaged_activations_stop_training(name, damage, said, place, capfd):
    rows = copied(place.rows, place.tmp / "rows")
    damage(rows / name)
    flags = flags_of("train", place) | {"activations": rows}
    line = refused(capfd, "train", **flags)
    assert said in line and str(rows) in line
    # Once it is mended, the same command works.
    if name.startswith("activations-00001"):
        shutil.copy(place.rows / name, rows / name)
        assert call("train", **flags) == 0


@pytest.mark.parametrize("damage, said", [(flip, "is corrupt"), (cut, "is truncated")])
def test_damaged_tokens_stop_evaluation(damage, said, place, capfd):
    rows = copied(place.rows, place.tmp / "rows")
    damage(rows / "tokens-00002.npy")
    line = refused(
        capfd, "evaluate", **flags_of("evaluate", place) | {"activations": rows}
    )
    assert said in line and "tokens-00002.npy" in line


def test_activations_that_are_no_longer_there(place, capfd):
    run, rows = place.tmp / "run", copied(place.rows, place.tmp / "rows")
    write_run(run, rows, identity_arrays(), variant="relu")
    shutil.rmtree(rows)
    line = refused(capfd, "evaluate", run=run)
    assert str(rows) in line and "--activations" in line and "--text" in line
    copied(place.rows, rows)
    flip(rows / "manifest.json")
    assert "manifest" in refused(capfd, "evaluate", run=run)


def test_activations_that_were_made_again_otherwise(place, extracted, capfd):
    run, rows = place.tmp / "run", copied(place.rows, place.tmp / "rows")
    write_run(run, rows, identity_arrays(), variant="relu")
    shutil.rmtree(rows)
    shutil.copytree(extracted(num_tokens=30 * LENGTH), rows)
    line = refused(capfd, "evaluate", run=run)
    assert "is not what" in line and "--activations" in line


def test_activations_without_bos_for_a_run_with(place, extracted, capfd):
    rows = extracted(bos="none", num_tokens=20 * LENGTH)
    flags = flags_of("evaluate", place) | {"activations": rows}
    line = refused(capfd, "evaluate", **flags)
    assert f"--activations={rows} has bos=none" in line and "bos=drop" in line


def test_a_model_of_another_width(place, capfd):
    model = make_tiny_neox(place.tmp / "wide", d_model=32)
    flags = flags_of("evaluate", place) | {"model": model}
    line = refused(capfd, "evaluate", **flags)
    assert f"--model={model} has d_model=32" in line and "trained on 16" in line


def test_a_model_with_another_tokenizer(place, capfd):
    model = copied(place.model, place.tmp / "model")
    make_tokenizer(300).save_pretrained(model)
    flags = flags_of("evaluate", place) | {"model": model}
    line = refused(capfd, "evaluate", **flags)
    assert "another tokenizer" in line and f"--model={model}" in line


def test_a_model_with_too_few_blocks(place, extracted, capfd):
    rows = extracted(layer=1, num_tokens=20 * LENGTH)
    run = write_run(place.tmp / "run", rows, identity_arrays(), variant="relu")
    model = make_tiny_neox(place.tmp / "model", n_layers=1)
    line = refused(capfd, "evaluate", run=run, model=model)
    assert "layer=1 must be from 0 to 0" in line


def test_a_revision_of_a_local_model(place, capfd):
    flags = flags_of("evaluate", place) | {"revision": "main"}
    line = refused(capfd, "evaluate", **flags)
    assert "--revision=main needs a hub id" in line


# What is done to a file of a run, and what evaluate and train must say.
RUN_DAMAGE = [
    ("config.json", cut, "is not valid JSON", "is not valid JSON"),
    ("config.json", Path.unlink, "is not a run folder", "not a run folder"),
    ("sae.safetensors", cut, "cannot be read", None),
    ("sae.safetensors", Path.unlink, "is not finished", None),
]


@pytest.mark.parametrize("name, damage, said, said_in_training", RUN_DAMAGE)
def test_a_damaged_run(name, damage, said, said_in_training, place, capfd):
    run = copied(place.run, place.tmp / "out")
    damage(run / name)
    line = refused(capfd, "evaluate", **flags_of("evaluate", place) | {"run": run})
    assert said in line and str(run) in line
    if said_in_training:
        line = refused(capfd, "train", **flags_of("train", place))
        assert said_in_training in line and str(run) in line
        assert (run / "sae.safetensors").read_bytes() == (
            place.run / "sae.safetensors"
        ).read_bytes()


def test_parameters_of_another_run(place, capfd):
    run = copied(place.run, place.tmp / "run")
    wide = {"w_enc": [[0.0] * 64] * 16, "w_dec": [[0.0] * 16] * 64}
    rows = place.rows
    other = write_run(place.tmp / "wide", rows, wide, d_sae=64, variant="relu")
    shutil.copy(other / "sae.safetensors", run)
    line = refused(capfd, "evaluate", run=run)
    assert "does not match its config" in line and "w_dec: (32, 16) -> (64, 16)" in line


def test_a_grid_with_an_arm_that_is_not_finished(place, capfd):
    grid = copied(place.grid, place.tmp / "grid")
    for path in grid.rglob("core.json"):
        path.unlink()
    arm = runs.run_folders(grid)[2]
    (arm / "sae.safetensors").unlink()
    line = refused(capfd, "evaluate", run=grid)
    assert f"{arm} is not finished" in line
    # It is said before the arms ahead of it are evaluated.
    assert list(grid.rglob("core.json")) == []


def test_a_grid_json_that_is_damaged(place, capfd):
    grid = copied(place.grid, place.tmp / "grid")
    cut(grid / "grid.json")
    assert "grid.json is not valid JSON" in refused(capfd, "evaluate", run=grid)


def test_a_run_folder_of_another_config(place, capfd):
    run = copied(place.run, place.tmp / "out")
    line = refused(capfd, "train", **flags_of("train", place) | {"k": 5, "lr": 1e-3})
    assert str(run) in line and "k: 4 -> 5" in line and "another --out" in line


def test_checkpoints_of_another_config(place, capfd):
    run = copied(place.run, place.tmp / "out")
    (run / "sae.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    wide = place.tmp / "wide"
    flags = flags_of("train", place)
    assert call("train", **flags | {"out": wide, "d_sae": 48}) == 0
    shutil.copytree(wide / "checkpoints", run / "checkpoints")
    line = refused(capfd, "train", **flags)
    assert "no checkpoint of this run can be read" in line


def test_a_full_disk_leaves_the_old_result(place, capfd):
    run = copied(place.run, place.tmp / "run")
    assert call("evaluate", run=run) == 0
    before = (run / "evals/core.json").read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        capfd.readouterr()
        status = call("evaluate", run=run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    line = capfd.readouterr().err.splitlines()[-1]
    assert status == 2 and "File too large" in line and str(run / "evals") in line
    assert (run / "evals/core.json").read_bytes() == before


def test_in_a_process_of_its_own(place):
    empty = write_jsonl(place.tmp / "empty.jsonl", [])
    model = f"--model={place.model} --backend=jax"
    cases = {
        "train k=12": "'k=12'",
        "train --k=512 --d_sae=256": "--k=512 must not exceed --d_sae=256",
        "evaluate": "--run is not set",
        f"extract {model} --dataset={empty}": "empty.jsonl holds no text",
        "demo --step=5": "did you mean --steps?",
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *f"vsae_jax.{case}".split()],
            cwd=place.tmp,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for case in cases
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2] * len(cases)
    for err, named in zip(said, cases.values(), strict=True):
        (line,) = err.splitlines()
        assert line.startswith("error: ") and named in line
    assert [path.name for path in place.tmp.iterdir()] == ["empty.jsonl"]
