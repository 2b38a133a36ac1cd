"""Any bytes for a manifest, a config, metrics or flags: read or refused in one line.

Hundreds of inputs in the normal run, thousands with `-m slow`. Each is a good file with
random changes, or random altogether; nothing but UserError may come out, and nothing
may be written.
"""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import COMMANDS

from vsae_jax import runs
from vsae_jax.activations.manifest import MANIFEST, read_manifest
from vsae_jax.config import cli
from vsae_jax.system.errors import UserError

MANY = [
    pytest.param(150, id="hundreds"),
    pytest.param(3000, id="thousands", marks=pytest.mark.slow),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../..", "/etc/passwd", "\x1b[2J\n", "9" * 5000, "NaN", ""]),
    st.sampled_from([10**400, 2**63, -(2**63), 1e308, "x" * 10**5]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner)
    ),
    max_leaves=5,
)


def fuzz(count: int, strategy, check) -> None:
    """`check` on so many draws, the same every time."""
    options = settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    options(given(strategy)(check))()


def changed(value, data: st.DataObject):
    """A JSON value with one to three changes somewhere within."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            inner = at[key]
            if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
                at = inner
                continue
            what = data.draw(st.sampled_from(["change", "drop", "add"]))
            if what == "drop":
                at.pop(key)
            elif what == "change":
                at[key] = data.draw(VALUES)
            elif isinstance(at, dict):
                at[data.draw(st.text(max_size=5))] = data.draw(VALUES)
            else:
                at.append(data.draw(VALUES))
            break
    return value


def scrambled(good: bytes, data: st.DataObject) -> bytes:
    """The file with changed values, flipped bytes, cut, or other bytes altogether."""
    how = data.draw(st.sampled_from(["values", "values", "bytes", "cut", "random"]))
    if how == "values":
        return json.dumps(changed(json.loads(good), data)).encode()
    if how == "cut":
        return good[: data.draw(st.integers(0, len(good)))]
    if how == "random":
        return data.draw(st.binary(max_size=300))
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    return bytes(content)


def refused_or(call, *arguments):
    """The call's result, or None where it is refused as it should be."""
    try:
        return call(*arguments)
    except UserError as error:
        text = cli.one_line(error)
        assert len(text) <= 400 and "\n" not in text
        return None


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("count", MANY)
def test_manifests(tiny_rows, tmp_path, count):
    good, path = (tiny_rows / MANIFEST).read_bytes(), tmp_path / MANIFEST

    def check(data):
        path.write_bytes(scrambled(good, data))
        m = refused_or(read_manifest, tmp_path)
        assert m is None or m.to_bytes() and m.n_rows >= 0
        assert listing(tmp_path) == {str(path)}

    fuzz(count, st.data(), check)


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("name", [runs.CONFIG, runs.GRID])
def test_configs(tiny_run, tiny_grid, tmp_path, count, name):
    """Of a run and of a grid; what a grid names is always within it."""
    good = ((tiny_grid if name == runs.GRID else tiny_run) / name).read_bytes()
    (tmp_path / name).write_bytes(good)
    parameters = (tiny_run / runs.PARAMETERS).read_bytes()
    (tmp_path / runs.PARAMETERS).write_bytes(parameters)
    before = listing(tmp_path)

    def check(data):
        (tmp_path / name).write_bytes(scrambled(good, data))
        if name == runs.CONFIG:
            run = refused_or(runs.open_run, tmp_path)
            assert run is None or run.sae.d_model == 16
        else:
            for folder in refused_or(runs.run_folders, tmp_path) or []:
                assert folder.parent == tmp_path and folder.name not in ("", "..")
        assert listing(tmp_path) == before

    fuzz(count, st.data(), check)


@pytest.mark.parametrize("count", MANY)
def test_metrics(tiny_run, tmp_path, count):
    good = (tiny_run / runs.METRICS).read_bytes()
    path = tmp_path / runs.METRICS

    def check(data):
        content = scrambled(good.splitlines()[0], data) + b"\n" + good[:-1]
        path.write_bytes(content + data.draw(st.sampled_from([b"", b"\n"])))
        lines = runs.read_metrics(path)
        assert all(type(line["step"]) is int for line in lines)
        runs.keep_metrics_up_to(path, 10)
        assert runs.read_metrics(path) == [x for x in lines if x["step"] <= 10]
        assert listing(tmp_path) == {str(path)}

    fuzz(count, st.data(), check)


FLAG_TEXT = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", ",", "1,1", "1,2", "0", "-1", "1e999", "nan", "inf", "true", "auto"]
        + ["9" * 5000, "0x10", "1_0", "٣", "\x00", "--", "=", "unit", "a,b", "1e3"]
    ),
)


@pytest.mark.parametrize("count", MANY)
def test_flags(tmp_path, monkeypatch, count):
    """Parsing alone: nothing is run."""
    monkeypatch.chdir(tmp_path)
    names = {
        name: [f"--{field}" for field in config.__dataclass_fields__]
        for name, (_, config) in COMMANDS.items()
    }

    def check(data):
        command = data.draw(st.sampled_from(sorted(COMMANDS)))
        one = st.sampled_from(names[command])
        flag = st.one_of(one, one, one, st.text(max_size=8).map("--".__add__))
        arguments = [
            data.draw(flag) + data.draw(st.sampled_from(["=", "", " "])) + text
            for text in data.draw(st.lists(FLAG_TEXT, max_size=4))
        ]
        config = COMMANDS[command][1]
        arms = refused_or(cli.parse, config, [command, *arguments])
        assert arms is None or all(isinstance(arm, config) for arm in arms)
        assert listing(tmp_path) == set()

    fuzz(count, st.data(), check)
