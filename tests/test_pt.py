"""`.pt` files: equal to torch's on honest ones, and hostile ones are refused."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsae_jax.interop.pt import read_pt
from vsae_jax.interop.pt_write import write_pt
from vsae_jax.system.errors import UserError

STATE = {
    "encoder.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "k": np.array(2, np.int32),
    "count": np.arange(5, dtype=np.int64),
    "activation": "TopK",
    "activation_state_dict": {"k": 2, "postact_fn": "ReLU"},
}


def test_what_is_written_comes_back(tmp_path):
    write_pt(tmp_path / "a.pt", STATE)
    read = read_pt(tmp_path / "a.pt")
    assert list(read) == list(STATE)
    for name, value in STATE.items():
        if isinstance(value, np.ndarray):
            assert read[name].dtype == value.dtype
            np.testing.assert_array_equal(read[name], value)
        else:
            assert read[name] == value
    first = (tmp_path / "a.pt").read_bytes()
    write_pt(tmp_path / "a.pt", STATE)
    assert (tmp_path / "a.pt").read_bytes() == first


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    write_pt(tmp_path / "a.pt", STATE)
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    assert read["activation_state_dict"] == STATE["activation_state_dict"]
    for name in ("encoder.weight", "k", "count"):
        np.testing.assert_array_equal(read[name].numpy(), STATE[name])
        assert read[name].numpy().dtype == STATE[name].dtype


def test_what_torch_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(4, 3)
    state = layer.state_dict()  # an OrderedDict with _metadata
    state["transposed"] = torch.randn(5, 2).T
    state["part"] = torch.arange(10.0)[2:8:2]
    state["half"], state["bf16"] = torch.randn(3).half(), torch.randn(3).bfloat16()
    state["whole"], state["yes"] = torch.tensor(7), torch.tensor([True, False])
    state["empty"], state["parameter"] = torch.zeros(0, 3), layer.weight
    state["plain"] = {"lr": 0.1, "betas": (0.9, 0.999), "no": None, "list": [1, "two"]}
    torch.save(state, tmp_path / "a.pt")
    read = read_pt(tmp_path / "a.pt")
    assert read["plain"] == state["plain"]
    assert read["bf16"].dtype == ml_dtypes.bfloat16
    for name, tensor in state.items():
        if name != "plain":
            expected = tensor.detach().float().numpy()
            np.testing.assert_array_equal(np.float32(read[name]), expected)
            assert read[name].shape == tuple(tensor.shape)


# Hostile files. None may run, each is one line, and memory stays small.


def archive(pickled: bytes, **data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickled)
        for name, content in data.items():
            zipped.writestr(f"archive/data/{name.lstrip('_')}", content)
    return file.getvalue()


class Runs:
    """A pickle that runs a command when it is loaded by pickle."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Evaluates(Runs):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


def tensor(
    shape=b"K\x02\x85", stride=b"K\x01\x85", numel=b"K\x02", offset=b"K\x00"
) -> bytes:
    """{"b_dec": a tensor of two floats}, with anything else in place of its parts."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    storage += b"X\x03\x00\x00\x00cpu" + numel + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride
    return b"\x80\x02}X\x05\x00\x00\x00b_dec" + made + hooks + b"tRs."


FLOATS = np.float32([1, 2]).tobytes()


def renamed(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("archive/data.pkl", tensor())
        zipped.writestr(name, FLOATS)
    return file.getvalue()


def compressed() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("archive/data.pkl", tensor())
        zipped.writestr("archive/data/0", b"\0" * 2**27)
    return file.getvalue()


def overlapping() -> bytes:
    """Sixty-four entries of 1 MiB that all start at the same bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("archive/data.pkl", tensor())
        zipped.writestr("archive/data/0", b"\0" * 2**20)
        first = zipped.infolist()[-1]
        for i in range(1, 64):
            twin = zipfile.ZipInfo(f"archive/data/{i}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, name, getattr(first, name))
            zipped.filelist.append(twin)
            zipped.NameToInfo[twin.filename] = twin
        zipped._didModify = True
    return file.getvalue()


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Files and what has to be said of each."""
    nested = b"ccollections\nOrderedDict\n" * 20_000 + b")" + b"R" * 20_000 + b"."
    good = archive(tensor(), _0=FLOATS)
    posix = pickle.dumps(Runs(marker), 2)
    return {
        "os.system": (archive(posix), "wants 'posix.system'"),
        "os.system, protocol 4": (archive(pickle.dumps(Runs(marker))), "opcode FRAME"),
        "eval": (archive(pickle.dumps(Evaluates(marker), 2)), "wants '__builtin__.ev"),
        "in a dict": (archive(pickle.dumps({"k": Runs(marker)}, 2)), "'posix.system'"),
        "a string opcode": (archive(b"(S'touch x'\nios\nsystem\n."), "opcode STRING"),
        "inst of a global": (archive(b"(ios\nsystem\n."), "opcode INST"),
        "obj": (archive(b"(ctorch\nFloatStorage\no."), "opcode OBJ"),
        "newobj": (archive(b"ctorch\nFloatStorage\n)\x81."), "opcode NEWOBJ"),
        "stack global": (archive(b"\x8c\x02os\x8c\x06system\x93."), "STACK_GLOBAL"),
        "extension": (archive(b"\x82\x01."), "opcode EXT1"),
        "persistent text": (archive(b"P0\n."), "opcode PERSID"),
        "calls a call": (archive(b"ccollections\nOrderedDict\n)R)R."), "calls what is"),
        "calls a storage": (archive(b"ctorch\nFloatStorage\n)R."), "calls what is no"),
        "nested reduce": (archive(nested), "calls what is no tensor"),
        "set state": (archive(b"]}b."), "builds what is no OrderedDict"),
        "huge string": (archive(b"X\xff\xff\xff\x7fabc."), "ends within a string"),
        "huge pickle": (archive(b"N" * (2**20 + 1) + b"."), "at most 1048576 are read"),
        "empty pickle": (archive(b""), "it does not end"),
        "pops nothing": (archive(b"t."), "no valid pickle"),
        "unhashable": (archive(b"}]Ns."), "a list as a dict's key"),
        "shape too large": (
            archive(tensor(shape=b"J\xff\xff\xff\x7f\x85"), _0=FLOATS),
            r"shape \[2147483647\] in a storage of 2",
        ),
        "stride 0": (
            archive(tensor(shape=b"J\xff\xff\xff\x7f\x85", stride=b"K\x00\x85")),
            "in a storage of 2",
        ),
        "negative stride": (
            archive(tensor(stride=b"J\xff\xff\xff\xff\x85"), _0=FLOATS),
            "sizes are no sizes",
        ),
        "negative offset": (
            archive(tensor(offset=b"J\xff\xff\xff\xff"), _0=FLOATS),
            "sizes are no sizes",
        ),
        "offset past the end": (
            archive(tensor(offset=b"K\x01"), _0=FLOATS),
            "in a storage of 2",
        ),
        "storage too large": (
            archive(tensor(numel=b"J\xff\xff\xff\x7f"), _0=FLOATS),
            "larger than the file|has 8 bytes",
        ),
        "storage missing": (archive(tensor()), "lacks archive/data/0"),
        "../": (renamed("archive/../../evil"), "an entry named 'archive/../../evil'"),
        "name of two lines": (renamed("archive/a\nb"), r"named 'archive/a.*b'"),
        "absolute": (renamed("/etc/passwd"), "an entry named '/etc/passwd'"),
        "zip bomb": (compressed(), "is compressed or encrypted"),
        "overlapping entries": (overlapping(), "overlap"),
        "truncated": (good[: len(good) // 2], "not a .pt file"),
        "one byte short": (good[:-1], "not a .pt file"),
        "empty": (b"", "not a .pt file"),
        "legacy": (pickle.dumps(0x1950A86A20F9469CFC6C), "torch 1.6 or later"),
        "no pickle": (renamed("x").replace(b"data.pkl", b"data.pxx"), "without one"),
    }


NAMES = sorted(hostile(Path()))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_files_are_refused(tmp_path, name):
    marker = tmp_path / "executed"
    content, said = hostile(marker)[name]
    path = tmp_path / "ae.pt"
    path.write_bytes(content)
    before = set(tmp_path.iterdir())
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=said) as error:
            read_pt(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert set(tmp_path.iterdir()) == before
    assert peak < 32 * 2**20


def test_the_same_files_do_run_under_pickle(tmp_path):
    """The attack is real: pickle itself would run it."""
    marker = tmp_path / "executed"
    with zipfile.ZipFile(io.BytesIO(hostile(marker)["os.system"][0])) as zipped:
        pickle.loads(zipped.read("archive/data.pkl"))
    assert marker.exists()


def test_an_honest_file_of_the_same_parts_is_read(tmp_path):
    (tmp_path / "a.pt").write_bytes(archive(tensor(), _0=FLOATS))
    np.testing.assert_array_equal(read_pt(tmp_path / "a.pt")["b_dec"], [1, 2])


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_flipped_bytes_are_read_or_refused(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    content = bytearray(archive(tensor(), _0=FLOATS))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        read_pt(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_every_opcode_but_the_admitted_is_refused_by_name(tmp_path):
    import pickletools

    path, refused = tmp_path / "a.pt", set()
    for opcode in pickletools.opcodes:
        content = opcode.code.encode("latin1") + struct.pack("<Q", 1) + b"0\n0\n."
        path.write_bytes(archive(b"\x80\x02}" + content))
        try:
            read_pt(path)
        except UserError as error:
            if f"opcode {opcode.name}" in str(error):
                refused.add(opcode.name)
    for name in "INST OBJ NEWOBJ NEWOBJ_EX STACK_GLOBAL EXT1 EXT2 EXT4 POP DUP".split():
        assert name in refused
    assert not refused & {"GLOBAL", "REDUCE", "BINPERSID", "BUILD", "EMPTY_DICT"}
