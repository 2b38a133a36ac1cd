"""The package's own source: no pickle, no eval, no remote code, no shell."""

import ast
import hashlib
from pathlib import Path

import numpy as np
import pytest

import vsae_jax
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import open_verified

SOURCES = sorted(Path(vsae_jax.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MODULES |= {"subprocess", "runpy", "imp", "code"}
NAMES = {"eval", "exec", "compile", "__import__", "input"}
CALLS = {("os", "system"), ("os", "popen"), ("torch", "load")}
# What is left of yaml is its safe loaders.
CALLS |= {("yaml", f"{kind}load") for kind in ("", "unsafe_", "full_")}
CALLS |= {("yaml", kind) for kind in ("Loader", "UnsafeLoader", "FullLoader")}


def findings(source: str) -> list[str]:
    """What a source must not have, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        at = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            found += [f"{at}: import {name}" for name in names & MODULES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                found.append(f"{at}: from {node.module}")
        elif isinstance(node, ast.Call):
            found += _call(node, at)
        elif isinstance(node, ast.Dict):
            found += [
                f"{at}: trust_remote_code"
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if not (isinstance(value, ast.Constant) and value.value is False)
            ]
    return found


def _call(node: ast.Call, at: int) -> list[str]:
    given = {
        k.arg: k.value.value if isinstance(k.value, ast.Constant) else "?"
        for k in node.keywords
    }
    called = node.func
    if isinstance(called, ast.Name) and called.id in NAMES:
        return [f"{at}: {called.id}("]
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        place = called.value.id, called.attr
        if place in CALLS or place == ("np", "load") and given.get("allow_pickle", "?"):
            return [f"{at}: {'.'.join(place)}("]
    wrong = [n for n in ("trust_remote_code", "allow_pickle", "shell") if given.get(n)]
    return [f"{at}: {name}" for name in wrong]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_package(path):
    assert findings(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle.x as y",
        "from dill import loads",
        "eval('1')",
        "yaml.load(text, Loader=loader)",
        "yaml.UnsafeLoader(text)",
        "exec(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "x = {'trust_remote_code': True}",
        "os.system('ls')",
        "torch.load(path)",
        "g(shell=True)",
    ],
)
def test_what_would_be_found(source):
    assert len(findings(source)) == 1


def test_what_is_allowed():
    assert findings("np.load(path, allow_pickle=False)\nmodel.eval()") == []


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    """Even with a manifest that asks for it."""
    path = tmp_path / "activations-00000.npy"
    np.save(path, np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="is not an .npy file|is truncated"):
        open_verified(path, shape=(4,), dtype=np.int8, sha256=digest)
