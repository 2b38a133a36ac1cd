"""Folders from strangers: each is refused in one line, in little memory, unexecuted."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from autoencoders import make, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file
from test_pt import archive
from tiny_runs import call

from vsae_jax import interop
from vsae_jax.interop.canonical import check_k
from vsae_jax.interop.pt import read_pt
from vsae_jax.interop.tensors import read_safetensors
from vsae_jax.system.errors import UserError

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


def safetensors(entries: dict, data: bytes, *, length: int | None = None) -> bytes:
    header = json.dumps(entries).encode()
    size = len(header) if length is None else length
    return struct.pack("<Q", size) + header + data


def entry(start: int, stop: int, *, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


EIGHT = b"\0" * 8
BIG = 2**40
TENSORS = {
    "header of a gigabyte": (
        safetensors({}, b"", length=2**30),
        "says that its header",
    ),
    "header of 2^63": (safetensors({}, b"", length=2**63), "says that its header"),
    "header past the end": (safetensors({}, b"", length=100), "says that its header"),
    "empty": (b"", "it has 0 bytes"),
    "overlapping": (
        safetensors({"a": entry(0, 8), "b": entry(4, 12)}, EIGHT * 2),
        "b starts at byte 4 of the data, where the tensor before it ends at 8",
    ),
    "same bytes twice": (
        safetensors({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT),
        "tensors overlap or leave a hole",
    ),
    "hole": (safetensors({"a": entry(8, 16)}, EIGHT * 2), "overlap or leave a hole"),
    "past the end": (safetensors({"a": entry(0, 8)}, b"\0" * 4), "is truncated"),
    "oversized": (
        safetensors({"a": entry(0, 4 * BIG, shape=(BIG,))}, EIGHT),
        "is truncated",
    ),
    "shape without bytes": (
        safetensors({"a": entry(0, 8, shape=(BIG,))}, EIGHT),
        "has 8 bytes; expected",
    ),
    "too many bytes": (safetensors({"a": entry(0, 8)}, EIGHT * 2), "8 bytes of no ten"),
    "negative offset": (safetensors({"a": entry(-8, 0)}, EIGHT), "are no sizes"),
    "fractional shape": (
        safetensors({"a": entry(0, 8, shape=(1.5,))}, EIGHT),
        "no siz",
    ),
    "shape of a thousand": (
        safetensors({"a": entry(0, 8, shape=(1,) * 1000)}, EIGHT),
        "are no sizes",
    ),
    "name of two lines": (
        safetensors({"a\nb\x1b[2J": entry(0, 8)}, EIGHT),
        r"a tensor is named 'a\nb\x1b[2J'",
    ),
    "unknown dtype": (safetensors({"a": entry(0, 8, dtype="C64")}, EIGHT), "has dtype"),
    "entry is no object": (safetensors({"a": 3}, EIGHT), "has dtype 'None'"),
    "header is a list": (struct.pack("<Q", 2) + b"[]", "holds list; expected an obj"),
    "header is no JSON": (struct.pack("<Q", 2) + b"{x", "is not valid JSON"),
    "twins": (
        struct.pack("<Q", 16) + b'{"a": 1, "a": 2}',
        "a name stands twice in one object",
    ),
    "deep header": (
        struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
        "is not valid JSON",
    ),
}
JSONS = {
    "deep": (b"[" * 100_000 + b"]" * 100_000, "is not valid JSON"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON"),
    "two megabytes": (b'{"a": "' + b"x" * 2**21 + b'"}', "has over 1048576 bytes"),
    "long number": (b'{"k": ' + b"9" * 100_000 + b"}", "is not valid JSON"),
    "NaN": (b'{"k": NaN}', "NaN is not a finite number"),
    "infinity": (b'{"k": -Infinity}', "-Infinity is not a finite number"),
    "not UTF-8": (b'{"k": "\xff\xfe\xfd"}', "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "a list": (b"[1, 2]", "holds list; expected an object"),
    "half": (b'{"k": ', "is not valid JSON"),
}


def one_line(call, *arguments, said: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            call(*arguments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert peak < 64 * 2**20


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(make(), "saelens", tmp_path / "saelens")


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_hostile_safetensors(folder, name):
    content, said = TENSORS[name]
    (folder / WEIGHTS).write_bytes(content)
    one_line(interop.read, folder, said=said)


@pytest.mark.parametrize("name", sorted(JSONS))
@pytest.mark.parametrize("file", [CONFIG, "vsae_jax_export.json"])
def test_hostile_json(folder, name, file):
    content, said = JSONS[name]
    (folder / file).write_bytes(content)
    one_line(interop.read, folder, said=said)


def test_a_configs_key_of_two_lines(folder):
    config = json.loads((folder / CONFIG).read_text()) | {"a\nb": 1}
    (folder / CONFIG).write_text(json.dumps(config))
    one_line(interop.read, folder, said=r"has unknown keys: 'a\nb'; expected arch")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_weights_that_are_not_finite(folder, name, value):
    arrays = load_file(folder / WEIGHTS)
    arrays[name].flat[-1] = value
    save_file(arrays, folder / WEIGHTS)
    one_line(interop.read, folder, said=f"{name} holds NaN or infinity")


def test_a_float64_beyond_float32_is_not_finite(folder):
    arrays = load_file(folder / WEIGHTS)
    arrays["b_dec"] = np.full(6, 1e300)
    save_file(arrays, folder / WEIGHTS)
    one_line(interop.read, folder, said="b_dec holds NaN or infinity")


def test_a_billion_laughs_are_not_printed(tmp_path):
    """A tuple of twice a tuple of twice a tuple of ..., sixty deep."""
    deep = b"".join(b"q%ch%c\x86" % (i, i) for i in range(1, 61))
    (tmp_path / "a.pt").write_bytes(archive(b"\x80\x02)" + deep + b"."))
    one_line(
        check_k_of, tmp_path / "a.pt", said="k is a tuple, expected a whole number"
    )


def check_k_of(path: Path) -> None:
    check_k(read_pt(path), d_sae=3, where=path)


def test_the_command_says_one_line_and_writes_nothing(folder, tmp_path, capfd):
    (folder / WEIGHTS).write_bytes(TENSORS["header of a gigabyte"][0])
    before = sorted(tmp_path.iterdir())
    assert call("convert", input=folder, to="openai", out=tmp_path / "out") == 2
    said = capfd.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert said.out == "" and sorted(tmp_path.iterdir()) == before


def test_bfloat16_and_float16_are_read_exactly(tmp_path):
    values = np.float32([[1.5, -2.25], [0.125, 3.0]])
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    data = bits.tobytes() + values.astype(np.float16).tobytes()
    entries = {"b": entry(0, 8, shape=(2, 2), dtype="BF16")}
    entries |= {
        "h": entry(8, 16, shape=(2, 2), dtype="F16"),
        "__metadata__": {"a": "b"},
    }
    (tmp_path / "x").write_bytes(safetensors(entries, data))
    for array in read_safetensors(tmp_path / "x").values():
        np.testing.assert_array_equal(np.float32(array), values)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_flipped_bytes_are_read_or_refused(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    content = bytearray(save({"a": np.float32([1, 2]), "b": np.ones((2, 2), np.int64)}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        arrays = read_safetensors(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert sum(a.nbytes for a in arrays.values()) <= len(content)
