"""Extraction: the right rows, the same bits after a kill, one line for a mistake."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_stories, make_tiny_neox, write_jsonl

from vsae_jax import extract
from vsae_jax.activations import extraction
from vsae_jax.activations.manifest import read_manifest
from vsae_jax.activations.shards import Activations, ShardWriter
from vsae_jax.config import ExtractConfig, cli, resolve_extract
from vsae_jax.lm import load_language_model, load_tokenizer
from vsae_jax.system import files, progress, signals
from vsae_jax.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_neox(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    return write_jsonl(folder / "stories.jsonl", make_stories(200))


def small(model: Path, corpus: Path, out: Path) -> dict:
    """The flags of a small run, 20 contexts in shards of 8."""
    return {
        "model": model,
        "backend": "jax",
        "layer": 1,
        "dataset": corpus,
        "num_tokens": 20 * LENGTH,
        "context_length": LENGTH,
        "dtype": "float32",
        "batch_size": 3,
        "shard_contexts": 8,
        "out": out,
    }


@pytest.fixture
def arguments(model, corpus, tmp_path) -> dict:
    """Those flags, to change."""
    return small(model, corpus, tmp_path / "out")


def flags(arguments: dict) -> list[str]:
    return ["extract", *(f"--{name}={value}" for name, value in arguments.items())]


def run(arguments: dict) -> int:
    return cli.run(extract.command, ExtractConfig, flags(arguments))


def extracted(arguments: dict) -> Activations:
    assert run(arguments) == 0
    return Activations.open(arguments["out"])


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def residual(arguments: dict, tokens: np.ndarray) -> np.ndarray:
    """What the model gives for the tokens, all at once: [contexts, time, d_model]."""
    lm = load_language_model(str(arguments["model"]), backend="jax")
    return np.asarray(lm.residual(tokens, arguments["layer"]))


@pytest.mark.parametrize(
    "bos, skip, dropped",
    [("keep", 0, 0), ("drop", 0, 1), ("drop", 2, 3), ("keep", 2, 2), ("none", 1, 1)],
)
def test_rows_are_the_models_residual_at_the_kept_positions(
    arguments, bos, skip, dropped
):
    activations = extracted(arguments | {"bos": bos, "skip_positions": skip})
    tokens = activations.tokens(0, 20)
    expected = residual(arguments, tokens)[:, dropped:]
    rows = activations.rows(0, activations.n_rows).reshape(expected.shape)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)
    assert (tokens[:, 0] == 0).all() == (bos != "none")
    m = activations.manifest
    assert (m.bos, m.dropped_positions, m.n_contexts) == (bos, dropped, 20)


def test_a_kept_bos_gives_every_context_the_same_row_which_drop_leaves_out(arguments):
    kept = extracted(arguments | {"bos": "keep"})
    rows = kept.rows(0, kept.n_rows).reshape(20, LENGTH, -1)
    assert np.ptp(rows[:, 0], axis=0).max() < 1e-5 < np.ptp(rows[:, 1], axis=0).max()
    folder = arguments["out"].with_name("dropped")
    dropped = extracted(arguments | {"bos": "drop", "out": folder})
    np.testing.assert_array_equal(dropped.tokens(0, 20), kept.tokens(0, 20))
    np.testing.assert_array_equal(
        dropped.rows(0, dropped.n_rows), rows[:, 1:].reshape(dropped.n_rows, -1)
    )


def test_center_residual_takes_each_rows_mean_away_and_nothing_else(arguments):
    plain = extracted(arguments)
    folder = arguments["out"].with_name("centred")
    centred = extracted(arguments | {"center_residual": True, "out": folder})
    rows = plain.rows(0, plain.n_rows)
    expected = rows - rows.mean(1, keepdims=True)
    assert np.abs(rows.mean(1)).max() > 0.1
    np.testing.assert_allclose(
        centred.rows(0, plain.n_rows), expected, rtol=1e-5, atol=1e-5
    )
    assert centred.manifest.center_residual and not plain.manifest.center_residual


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_shorter_dtype_holds_the_float32_rows_rounded(arguments, dtype):
    exact = extracted(arguments)
    folder = arguments["out"].with_name(dtype)
    short = extracted(arguments | {"dtype": dtype, "out": folder})
    rows = short.rows(0, short.n_rows)
    np.testing.assert_array_equal(rows, exact.rows(0, 300).astype(rows.dtype))


def test_both_backends_give_the_same_rows(arguments):
    pytest.importorskip("torch")
    ours = extracted(arguments)
    folder = arguments["out"].with_name("torch")
    theirs = extracted(arguments | {"backend": "transformers", "out": folder})
    n = ours.n_rows
    np.testing.assert_allclose(theirs.rows(0, n), ours.rows(0, n), atol=1e-4)
    np.testing.assert_array_equal(theirs.tokens(0, 20), ours.tokens(0, 20))


def test_the_manifest_says_how_the_rows_were_made(arguments, model, corpus):
    m = extracted(arguments).manifest
    lm = load_language_model(str(model), backend="jax")
    assert (m.model, m.dataset) == (str(model), str(corpus))
    assert (m.config_hash, m.tokenizer_hash) == (lm.config_hash, lm.tokenizer_hash)
    assert (m.hook_name, m.layer) == ("blocks.1.hook_resid_post", 1)
    assert (m.d_model, m.vocab_size) == (lm.d_model, lm.vocab_size)
    assert [shard.contexts for shard in m.shards] == [8, 8, 4] and m.complete


def test_paths_in_the_manifest_are_absolute_and_the_output_is_not_in_it(
    arguments, model, corpus, monkeypatch
):
    monkeypatch.chdir(model.parent)
    relative = {"model": model.name, "dataset": os.path.relpath(corpus)}
    m = extracted(arguments | relative).manifest
    assert (m.model, m.dataset) == (str(model), str(corpus))
    assert str(arguments["out"]).encode() not in m.to_bytes()


def test_the_default_place_follows_model_and_layer(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments | {"out": ""}) == 0
    name = arguments["model"].name
    assert (tmp_path / f"activations/{name}/blocks.1.hook_resid_post").is_dir()


def test_it_first_prints_what_it_will_write_and_needs(arguments, capsys):
    run(arguments)
    printed = capsys.readouterr()
    assert "up to 20 contexts, 300 rows of float32, 0.02 MB" in printed.out
    assert (
        "blocks.1.hook_resid_post, d_model 16" in printed.out and "free" in printed.out
    )
    assert "320 of 320 tokens" in printed.err and "tokens/s" in printed.err


def test_the_whole_corpus_is_taken_where_more_is_asked_for(arguments, capsys):
    more = extracted(arguments | {"num_tokens": 2e6, "shard_contexts": 500})
    said = f"note: the corpus ends after {more.n_contexts * LENGTH:,} tokens"
    assert said in capsys.readouterr().out
    tokenizer = load_tokenizer(str(arguments["model"]))
    ids = tokenizer(make_stories(200), add_special_tokens=False)["input_ids"]
    n = sum(map(len, ids))
    assert n // LENGTH <= more.n_contexts <= (n + 200) // (LENGTH - 1)
    assert len(more.manifest.shards) > 1


def test_a_finished_folder_is_recognised_without_loading_the_model(
    arguments, monkeypatch, capsys
):
    before = extracted(arguments).manifest
    monkeypatch.delattr(extract, "load_language_model")
    assert run(arguments) == 0
    assert "is finished already: 20 contexts" in capsys.readouterr().out
    assert Activations.open(arguments["out"]).manifest == before


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layer": 0}, "layer: 1 -> 0"),
        ({"num_tokens": 21 * LENGTH}, "num_tokens: 320 -> 336"),
        ({"dtype": "float16"}, "dtype: 'float32' -> 'float16'"),
        ({"bos": "keep"}, "bos: 'drop' -> 'keep'"),
        ({"backend": "auto"}, "backend: 'jax' -> 'auto'"),
        ({"context_length": 8}, "context_length: 16 -> 8"),
        ({"lm_dtype": "bfloat16"}, "lm_dtype: 'float32' -> 'bfloat16'"),
        ({"center_residual": True}, "center_residual: False -> True"),
    ],
)
def test_a_folder_of_other_settings_is_refused_with_the_difference(
    arguments, capsys, change, said
):
    extracted(arguments)
    before = read_folder(arguments["out"])
    assert run(arguments | change) == 2
    assert f"made with other settings ({said})" in capsys.readouterr().err
    assert read_folder(arguments["out"]) == before


@pytest.mark.parametrize("lm_dtype", ["float32", "bfloat16"])
def test_what_products_are_made_of_is_recorded(arguments, lm_dtype):
    there = extracted(arguments | {"lm_dtype": lm_dtype})
    assert there.manifest.lm_dtype == lm_dtype
    text = (arguments["out"] / "manifest.json").read_text()
    assert json.loads(text)["lm_dtype"] == lm_dtype


def test_a_folder_of_before_there_was_a_dtype_is_of_float32(arguments, capsys):
    extracted(arguments)
    path = arguments["out"] / "manifest.json"
    before = dataclasses.replace(read_manifest(arguments["out"]), lm_dtype="")
    assert b"lm_dtype" not in before.to_bytes()
    path.write_bytes(before.to_bytes())
    assert run(arguments | {"lm_dtype": "float32"}) == 0
    assert "is finished already" in capsys.readouterr().out
    assert run(arguments | {"lm_dtype": "bfloat16"}) == 2


def stop_after_one_shard(monkeypatch) -> None:
    """The first shard is written; the next piece of work fails as a bug would."""
    commit = ShardWriter.commit

    def commit_then_fail(writer):
        commit(writer)
        raise RuntimeError("stopped here")

    monkeypatch.setattr(ShardWriter, "commit", commit_then_fail)


def test_it_goes_on_without_running_the_model_on_what_is_there(
    arguments, monkeypatch, capsys
):
    whole = read_folder(extracted(arguments).folder)
    arguments["out"] = arguments["out"].with_name("parts")
    with monkeypatch.context() as patched:
        stop_after_one_shard(patched)
        with pytest.raises(RuntimeError, match="stopped here"):
            run(arguments)
    assert len(read_manifest(arguments["out"]).shards) == 1
    seen = []
    with monkeypatch.context() as patched:
        to_rows = extract.extraction.to_rows

        def count(residual, **options):
            seen.append(len(residual))
            return to_rows(residual, **options)

        patched.setattr(extract.extraction, "to_rows", count)
        assert run(arguments) == 0
    assert seen == [3] * 5  # 8 contexts and 4 contexts, in batches of 3
    assert "resumes: 1 shards of 8 contexts are there" in capsys.readouterr().out
    assert read_folder(arguments["out"]) == whole


@pytest.mark.parametrize(
    "name", ["activations-00001.npy", "tokens-00000.npy", "activations-00002.npy"]
)
def test_a_deleted_shard_is_written_again_bit_for_bit(arguments, name):
    before = read_folder(extracted(arguments).folder)
    (arguments["out"] / name).unlink()
    assert run(arguments) == 0
    assert read_folder(arguments["out"]) == before


def test_a_changed_text_is_noticed_on_going_on(arguments, tmp_path, capsys):
    arguments["dataset"] = write_jsonl(tmp_path / "a.jsonl", make_stories(200))
    extracted(arguments)
    (arguments["out"] / "activations-00001.npy").unlink()
    write_jsonl(tmp_path / "a.jsonl", make_stories(200, seed=1))
    assert run(arguments) == 2
    assert "the text is not the one that shard 0" in capsys.readouterr().err


def test_a_changed_model_is_noticed_on_going_on(arguments, tmp_path, capsys):
    arguments["model"] = make_tiny_neox(tmp_path / "lm")
    extracted(arguments)
    (arguments["out"] / "activations-00001.npy").unlink()
    make_tiny_neox(tmp_path / "lm", d_model=32)
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert "config_hash: " in error and "d_model: 16 -> 32" in error


def start(arguments: dict) -> subprocess.Popen:
    """The command as a user runs it, in a process of its own."""
    command = [sys.executable, "-m", "vsae_jax.extract", *flags(arguments)[1:]]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_a_shard(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "manifest.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no shard within two minutes"
        time.sleep(0.002)


LONG = {"num_tokens": 200 * LENGTH, "shard_contexts": 2, "batch_size": 1}
LONG |= {"dtype": "bfloat16"}


@pytest.fixture(scope="module")
def long_undisturbed(model, corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("long") / "undisturbed"
    assert run(small(model, corpus, out) | LONG) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_it_has_the_bits_of_an_undisturbed_run(
    arguments, long_undisturbed, number
):
    arguments |= LONG | {"out": arguments["out"].with_name("killed")}
    with start(arguments) as process:
        wait_for_a_shard(arguments["out"], process)
        process.send_signal(number)
        error = process.stderr.read()
    assert not read_manifest(arguments["out"]).complete, "it came too late"
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "run the same command to go on" in error.splitlines()[-1]
        assert not list(arguments["out"].glob("*.tmp"))
    else:
        assert process.returncode == -signal.SIGKILL
    assert run(arguments) == 0
    assert read_folder(arguments["out"]) == read_folder(long_undisturbed)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    arguments, monkeypatch, capsys
):
    usage = shutil.disk_usage("/")._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert "needs 0.02 MB and its disk has 0.02 MB free; lower --num_tokens" in error
    assert not arguments["out"].exists()


def test_a_small_corpus_needs_no_disk_for_what_it_cannot_fill(
    arguments, monkeypatch, capsys
):
    usage = shutil.disk_usage("/")._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert run(arguments | {"num_tokens": 10**9}) == 0


def test_a_disk_that_fills_up_leaves_the_shards_that_are_there(
    arguments, monkeypatch, capsys
):
    whole = read_folder(extracted(arguments).folder)
    arguments["out"] = arguments["out"].with_name("full")
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 5:  # tokens, rows, folder, manifest, folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        assert run(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and "tokens-00001" in error
    assert "1 shards are safe" in error and "same command to go on" in error
    expected = {name: whole[name] for name in whole if "00000" in name}
    found = read_folder(arguments["out"])
    assert found.pop("manifest.json") and found == expected
    assert run(arguments) == 0 and read_folder(arguments["out"]) == whole


def test_two_extractions_into_one_folder_are_refused(arguments, capsys):
    arguments["out"].mkdir()
    descriptor = os.open(arguments["out"] / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert run(arguments) == 2
    finally:
        os.close(descriptor)
    assert "is being written by another process" in capsys.readouterr().err
    assert run(arguments) == 0


def scale_embedding(folder: Path, value: float) -> None:
    """Multiplies the embedding of the full stop, which every context has."""
    weights = load_file(folder / "model.safetensors")
    token = load_tokenizer(str(folder)).convert_tokens_to_ids(".")
    weights["gpt_neox.embed_in.weight"][token] *= value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "dtype, value, hint", [("float32", np.nan, False), ("float16", 1e6, True)]
)
def test_rows_that_are_not_finite_name_their_context(
    arguments, tmp_path, capsys, dtype, value, hint
):
    arguments |= {"model": make_tiny_neox(tmp_path / "lm"), "dtype": dtype, "layer": 0}
    scale_embedding(arguments["model"], value)
    assert run(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "blocks.0.hook_resid_post is not finite in context 0 at position" in error
    assert ("--dtype=bfloat16" in error) == hint
    assert not arguments["out"].exists()


def write_wrong_tokenizer(folder: Path) -> Path:
    """A model whose tokenizer knows more ids than the model."""
    make_tiny_neox(folder, vocab_size=260)
    other = make_tiny_neox(folder.with_name("other"), vocab_size=320)
    shutil.copy(other / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layer": 2}, "layer=2 must be from 0 to 1"),
        ({"layer": -1}, "--layer=-1 must be at least 0"),
        ({"num_tokens": 15}, "--num_tokens=15 is less than one context"),
        ({"num_tokens": 0}, "--num_tokens=0 must be at least 1"),
        ({"context_length": 1}, "--context_length=1 leaves no row"),
        ({"context_length": 512}, "must not exceed the 256 positions"),
        ({"context_length": 1, "bos": "keep"}, "--context_length=1 leaves no room"),
        ({"skip_positions": 15}, "leaves no row after dropping 16"),
        ({"batch_size": 0}, "--batch_size=0 must be at least 1"),
        ({"dtype": "int8"}, "'int8' is not bfloat16|float16|float32"),
        ({"bos": "yes"}, "'yes' is not keep|drop|none"),
        ({"layr": 1}, "layr"),
        ({"dataset": "gone.jsonl"}, "there is no such file"),
        ({"dataset": "/etc/hosts"}, "is not a .jsonl, .txt or .parquet file"),
        ({"text_column": "story"}, "no --text_column=story; there is: text"),
        ({"model": "/gone"}, "--model=/gone"),
        ({"revision": "step1"}, "--revision=step1 needs a hub id"),
        ({"out": "/proc/nowhere/x"}, "/proc/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments, capsys, monkeypatch, change, said
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments |= change
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error
    assert not Path(arguments["out"]).exists()


@pytest.mark.parametrize(
    "texts, said",
    [
        ([], "holds no text"),
        (["Tom ran."], "the corpus is too short: "),
    ],
)
def test_too_little_text_is_one_line_and_writes_nothing(
    arguments, tmp_path, capsys, texts, said
):
    arguments["dataset"] = write_jsonl(tmp_path / "few.jsonl", texts)
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not arguments["out"].exists()


def test_bad_text_in_the_middle_keeps_the_shards_before_it(arguments, tmp_path, capsys):
    lines = [json.dumps({"text": story}) for story in make_stories(600)]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, "{oops"]))
    arguments |= {"dataset": tmp_path / "bad.jsonl", "num_tokens": 10**6}
    arguments |= {"shard_contexts": 300, "batch_size": 50}
    assert run(arguments) == 2
    assert "line 601 is not JSON" in capsys.readouterr().err
    assert len(read_manifest(arguments["out"]).shards) > 1
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    assert run(arguments) == 0


def test_shards_that_wait_for_the_disk_are_written_before_a_bad_line_is_said(
    arguments, tmp_path
):
    """The first write waits until the text has broken off: all whole shards wait."""
    broken = threading.Event()

    class Slow(ShardWriter):
        def begin(self, index, tokens):
            assert broken.wait(60)
            time.sleep(0.1)  # the error is on its way
            super().begin(index, tokens)

    config = ExtractConfig(
        **{n: str(v) if isinstance(v, Path) else v for n, v in arguments.items()}
    )
    model = load_language_model(config.model, backend="jax")
    folder = tmp_path / "slow"
    folder.mkdir()
    manifest = extract.new_manifest(resolve_extract(config), model)
    writer = Slow(folder, manifest)
    rows = np.zeros((8 * manifest.rows_per_context, model.d_model), np.float32)
    tokens = np.zeros((8, LENGTH), np.int32)

    def pieces():
        for index in range(2):
            yield extraction.Piece(index, tokens, 0, [(writer, jnp.asarray(rows))], 8)
        broken.set()
        raise UserError("line 3 is not JSON")

    bar = progress.bar(16 * LENGTH, unit="tokens")
    with pytest.raises(UserError, match="line 3"):
        extraction.write([writer], pieces(), signals.Caught(), bar=bar)
    found = read_manifest(folder)
    assert found is not None and len(found.shards) == 2 and not found.complete


def test_a_tokenizer_of_another_model_is_refused(arguments, tmp_path, capsys):
    arguments["model"] = write_wrong_tokenizer(tmp_path / "lm")
    assert run(arguments) == 2
    assert "the model's vocabulary is 260" in capsys.readouterr().err
    assert not arguments["out"].exists()


def test_out_that_is_a_file_is_refused(arguments, capsys):
    arguments["out"].write_text("mine")
    assert run(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert arguments["out"].read_text() == "mine"


def test_a_damaged_manifest_is_refused(arguments, capsys):
    extracted(arguments)
    (arguments["out"] / "manifest.json").write_text("{}")
    assert run(arguments) == 2
    assert "is not a manifest that this version reads" in capsys.readouterr().err


def test_a_positional_argument_is_refused(capsys):
    assert cli.run(extract.command, ExtractConfig, ["extract", "layer=1"]) == 2
    assert "unexpected argument 'layer=1'" in capsys.readouterr().err
