"""Shards on disk: what is written is read, and what is damaged is found and named."""

import dataclasses
import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from vsae_jax.activations import manifest as manifests
from vsae_jax.activations.manifest import Manifest, Shard, read_manifest
from vsae_jax.activations.shards import Activations, ShardWriter, is_missing
from vsae_jax.system.errors import UserError

D_MODEL, LENGTH, SHARD, CONTEXTS = 3, 4, 2, 5
DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}
EMPTY = Manifest(
    model="m",
    revision="",
    revision_asked="",
    backend="jax",
    config_hash="c",
    tokenizer_hash="t",
    hook_name="blocks.0.hook_resid_post",
    layer=0,
    d_model=D_MODEL,
    vocab_size=100,
    dtype="float32",
    context_length=LENGTH,
    bos="drop",
    bos_id=0,
    special_ids=(0,),
    skip_positions=0,
    center_residual=False,
    dataset="d",
    split="train",
    text_column="text",
    num_tokens=CONTEXTS * LENGTH,
    shard_contexts=SHARD,
)
TOKENS = np.random.default_rng(1).integers(0, 99, (CONTEXTS, LENGTH), dtype=np.int32)


def make_rows(dtype: str = "float32") -> np.ndarray:
    """What the folder of `write` holds."""
    rows = np.random.default_rng(0).normal(2, 5, (CONTEXTS * (LENGTH - 1), D_MODEL))
    return rows.astype(DTYPES[dtype])


def write_shard(writer: ShardWriter, index: int, rows: np.ndarray) -> None:
    """One shard, in two pieces."""
    tokens = TOKENS[index * SHARD : (index + 1) * SHARD]
    per_context = writer.manifest.rows_per_context
    start = index * SHARD * per_context
    mine = rows[start : start + len(tokens) * per_context]
    writer.begin(index, tokens)
    writer.add(mine[:2])
    writer.add(mine[2:])
    writer.commit()


def write(folder: Path, *, dtype: str = "float32", n_shards: int = 3) -> Path:
    """A folder of three shards, the last of them shorter."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, dataclasses.replace(EMPTY, dtype=dtype))
    for index in range(n_shards):
        write_shard(writer, index, make_rows(dtype))
    if n_shards == 3:
        writer.finish()
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_range_of_rows_is_read_as_it_was_written(tmp_path, dtype):
    rows, activations = make_rows(dtype), Activations.open(write(tmp_path, dtype=dtype))
    assert activations.n_rows == len(rows) and activations.n_contexts == CONTEXTS
    for start in range(len(rows) + 1):
        for stop in range(start, len(rows) + 1):
            read = activations.rows(start, stop)
            assert read.dtype == DTYPES[dtype]
            np.testing.assert_array_equal(read, rows[start:stop])


@pytest.mark.parametrize("start, stop, shares", [(1, 5, True), (4, 8, False)])
def test_a_view_is_read_only_and_copies_only_across_shards(
    tmp_path, start, stop, shares
):
    activations = Activations.open(write(tmp_path, dtype="bfloat16"))
    rows = activations.view(start, stop)
    np.testing.assert_array_equal(rows, make_rows("bfloat16")[start:stop])
    assert not rows.flags.writeable
    shards = [activations.activations_shard(i) for i in range(2)]
    assert any(np.shares_memory(rows, shard) for shard in shards) == shares


def test_every_range_of_tokens_is_read_as_it_was_written(tmp_path):
    activations = Activations.open(write(tmp_path))
    for start in range(CONTEXTS + 1):
        for stop in range(start, CONTEXTS + 1):
            read = activations.tokens(start, stop)
            assert read.dtype == np.int32 and read.shape == (stop - start, LENGTH)
            np.testing.assert_array_equal(read, TOKENS[start:stop])


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 16), (16, 16)])
def test_a_range_outside_the_rows_is_refused(tmp_path, start, stop):
    with pytest.raises(IndexError, match="not within"):
        Activations.open(write(tmp_path)).rows(start, stop)


def test_bfloat16_is_on_disk_as_plain_uint16_that_numpy_alone_reads(tmp_path):
    write(tmp_path, dtype="bfloat16")
    raw = np.load(tmp_path / "activations-00000.npy", allow_pickle=False)
    assert raw.dtype == np.uint16 and raw.shape == (6, D_MODEL)
    widened = (raw.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(widened, make_rows("bfloat16")[:6].astype("f4"))


def test_rows_are_a_copy_and_shards_a_read_only_memory_map(tmp_path):
    activations = Activations.open(write(tmp_path))
    activations.rows(0, 4)[:] = 0
    np.testing.assert_array_equal(activations.rows(0, 4), make_rows()[:4])
    shard = activations.activations_shard(0)
    assert isinstance(shard, np.memmap) and not shard.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_rows_as_stored(tmp_path, dtype):
    m = Activations.open(write(tmp_path, dtype=dtype)).manifest
    exact = make_rows(dtype).astype(np.float64)
    np.testing.assert_allclose(m.mean, exact.mean(0), rtol=1e-12)
    expected = np.square(exact).sum(1).mean()
    np.testing.assert_allclose(m.mean_squared_norm, expected, rtol=1e-12)


def test_many_threads_read_the_right_rows(tmp_path):
    rows, activations = make_rows(), Activations.open(write(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        reads = list(threads.map(lambda i: activations.rows(i, i + 5), [0, 3, 9] * 20))
    for start, read in zip([0, 3, 9] * 20, reads, strict=True):
        np.testing.assert_array_equal(read, rows[start : start + 5])


def test_a_writer_that_goes_on_makes_the_same_bytes(tmp_path):
    whole, parts = write(tmp_path / "whole"), tmp_path / "parts"
    write(parts, n_shards=2)
    for stale in ("activations-00002.npy", "tokens-00007.npy", "manifest.json"):
        (parts / f"{stale}.tmp").write_bytes(b"half a file")
    writer = ShardWriter(parts, read_manifest(parts))
    write_shard(writer, 2, make_rows())
    writer.finish()
    assert read_folder(parts) == read_folder(whole)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_writer_leaves_files_that_are_not_its_own(tmp_path):
    (tmp_path / "thesis.tmp").write_text("mine")
    ShardWriter(tmp_path, EMPTY)
    assert (tmp_path / "thesis.tmp").read_text() == "mine"


def test_an_open_shard_is_not_in_the_folder_and_abandoning_leaves_nothing(tmp_path):
    before = read_folder(write(tmp_path, n_shards=1))
    writer = ShardWriter(tmp_path, read_manifest(tmp_path))
    writer.begin(1, TOKENS[2:4])
    writer.add(make_rows()[:3])
    assert is_missing(tmp_path, 1)
    assert read_manifest(tmp_path) == Manifest.from_bytes(before["manifest.json"])
    writer.abandon()
    assert read_folder(tmp_path) == before


def test_a_shard_with_too_few_rows_is_never_published(tmp_path):
    writer = ShardWriter(tmp_path, EMPTY)
    writer.begin(0, TOKENS[:2])
    writer.add(make_rows()[:5])
    with pytest.raises(ValueError, match="12 bytes are missing"):
        writer.commit()
    writer.abandon()
    assert is_missing(tmp_path, 0) and read_manifest(tmp_path) is None


def test_a_full_disk_is_named_and_costs_only_the_open_shard(tmp_path, monkeypatch):
    before = read_folder(write(tmp_path, n_shards=2))
    writer = ShardWriter(tmp_path, read_manifest(tmp_path))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*tokens-00002.npy.tmp"):
        write_shard(writer, 2, make_rows())
    writer.abandon()
    assert read_folder(tmp_path) == before


def test_a_shard_that_is_there_must_be_of_the_same_tokens(tmp_path):
    writer = ShardWriter(tmp_path, read_manifest(write(tmp_path, n_shards=2)))
    assert writer.has(0, TOKENS[:2]) and not writer.has(2, TOKENS[4:])
    with pytest.raises(UserError, match="not the one that shard 1"):
        writer.has(1, TOKENS[2:4] + 1)
    (tmp_path / "tokens-00000.npy").unlink()
    assert not writer.has(0, TOKENS[:2])


def test_a_deleted_shard_is_written_again_only_if_it_comes_out_the_same(tmp_path):
    before = read_folder(write(tmp_path))
    (tmp_path / "activations-00001.npy").unlink()
    writer = ShardWriter(tmp_path, read_manifest(tmp_path))
    with pytest.raises(UserError, match="shard 1 differs"):
        write_shard(writer, 1, make_rows() + 1)
    writer.abandon()
    assert is_missing(tmp_path, 1)
    write_shard(writer, 1, make_rows())
    assert read_folder(tmp_path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named_by_context_and_position(tmp_path, value):
    writer = ShardWriter(tmp_path, EMPTY)
    writer.begin(0, TOKENS[:2])
    rows = make_rows()
    rows[4, 2] = value
    writer.add(rows[:2])
    with pytest.raises(UserError, match="not finite in context 1 at position 2$"):
        writer.add(rows[2:6])
    writer.abandon()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    other = path.with_name(path.name.replace("00001", "00000"))
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("name", ["activations-00001.npy", "tokens-00001.npy"])
@pytest.mark.parametrize(
    "damage, said",
    [
        (flip, "corrupt"),
        (swap, "corrupt"),
        (lengthen, "corrupt"),
        (truncate, "truncated"),
        (empty, "truncated"),
        (Path.unlink, "missing"),
    ],
)
def test_a_damaged_file_is_named_at_its_first_use(tmp_path, name, damage, said):
    damage(write(tmp_path) / name)
    activations = Activations.open(tmp_path)
    with pytest.raises(UserError, match=rf"{name} is {said}.*run extract again"):
        activations.rows(6, 7)
        activations.tokens(2, 3)
    np.testing.assert_array_equal(activations.rows(12, 15), make_rows()[12:])


@pytest.mark.parametrize(
    "other, said",
    [
        (np.zeros((6, D_MODEL + 1), np.float32), r"float32\[6, 4\]"),
        (np.zeros((6, D_MODEL), np.float64), r"float64\[6, 3\]"),
        (None, "is not an .npy file"),
    ],
)
def test_a_shard_of_another_shape_is_refused_even_with_its_checksum(
    tmp_path, other, said
):
    path = write(tmp_path) / "activations-00000.npy"
    path.write_bytes(b"x" * 1000) if other is None else np.save(path, other)
    m = read_manifest(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    shard = dataclasses.replace(m.shards[0], activations_sha256=digest)
    m = dataclasses.replace(m, shards=(shard, *m.shards[1:]))
    with pytest.raises(UserError, match=said):
        Activations(tmp_path, m).rows(0, 1)


def test_a_folder_without_activations_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"python -m vsae_jax.extract --out=.*nowhere"):
        Activations.open(tmp_path / "nowhere")


def test_an_unfinished_folder_says_how_to_go_on(tmp_path):
    with pytest.raises(UserError, match="not finished.*run extract again"):
        Activations.open(write(tmp_path, n_shards=2))


def test_manifest_bytes_and_hash_depend_on_the_settings_alone(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "elsewhere")
    data = (one / "manifest.json").read_bytes()
    assert data == (two / "manifest.json").read_bytes()
    m = read_manifest(one)
    assert m == Manifest.from_bytes(m.to_bytes()) and m.to_bytes() == data
    without = data.replace(f',\n"sha256": "{m.hash}"'.encode(), b"")
    assert without != data and m.hash == hashlib.sha256(without).hexdigest()
    other = dataclasses.replace(m, layer=1, hook_name="blocks.1.hook_resid_post")
    assert other.hash != m.hash


def test_manifest_json_holds_what_readers_need(tmp_path):
    values = json.loads((write(tmp_path) / "manifest.json").read_text())
    assert values["dropped_positions"] == 1 and values["rows_per_context"] == 3
    assert values["n_contexts"] == 5 and values["n_rows"] == 15
    assert [shard["rows"] for shard in values["shards"]] == [6, 6, 3]
    assert len(values["mean"]) == D_MODEL and values["complete"] is True


def change(**values):
    return lambda m: {**m, **values}


def first_shard(**values):
    return lambda m: {**m, "shards": [{**m["shards"][0], **values}, *m["shards"][1:]]}


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda m: [m], "not a JSON object"),
        (lambda m: {k: v for k, v in m.items() if k != "layer"}, "layer"),
        (change(colour="red"), "colour"),
        (change(format_version=2), "format_version is 2"),
        (change(layer="0"), "layer is '0'"),
        (change(layer=True), "layer is 'True'"),
        (change(layer=-1), "negative"),
        (change(d_model=0), "below 1"),
        (change(dtype="int8"), "dtype is 'int8'"),
        (change(bos="maybe"), "bos is 'maybe'"),
        (change(complete=1), "complete is '1'"),
        (change(mean=[1.0]), "mean has 1 entries"),
        (change(mean=[1.0, 2.0, float("nan")]), "NaN is not a finite number"),
        (change(mean=["a", 2.0, 3.0]), "mean is 'a'"),
        (change(mean_squared_norm=10**400), "too large"),
        (change(n_rows=16), "n_rows is 16"),
        (change(rows_per_context=4), "rows_per_context is 4"),
        (change(skip_positions=3), "rows_per_context is below 1"),
        (change(shards={}), "shards is '{}'"),
        (first_shard(contexts=1), "shard 0 cannot have contexts=1"),
        (first_shard(rows=7), "shard 0 cannot have contexts=2 rows=7"),
        (first_shard(tokens_sha256=None), "tokens_sha256 is 'None'"),
        (first_shard(file="/etc/passwd"), "file"),
        (change(mean_squared_norm=3.5), "it was edited"),
        (change(dataset="other"), "it was edited"),
        (first_shard(tokens_sha256="0" * 64), "it was edited"),
    ],
)
def test_an_impossible_manifest_is_refused_in_one_line(tmp_path, damage, said):
    path = write(tmp_path) / "manifest.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=said) as refused:
        Activations.open(tmp_path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff\xfe"])
def test_a_manifest_that_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="manifest.json is not a manifest"):
        Activations.open(tmp_path)


def test_a_huge_manifest_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "MAX_MANIFEST_BYTES", 500)
    with pytest.raises(UserError, match="larger than 500 bytes"):
        Activations.open(write(tmp_path))


def test_only_the_last_shard_may_be_short():
    shard = Shard(2, 6, "a", "b")
    short = Shard(1, 3, "a", "b")
    mean = (0.0,) * D_MODEL
    dataclasses.replace(EMPTY, mean=mean, shards=(shard, short))
    with pytest.raises(ValueError, match="shard 0"):
        dataclasses.replace(EMPTY, mean=mean, shards=(short, shard))
