"""What the tests of faults share: commands in processes of their own, and a small disk.

`FAULTS_KILLS` is how many kills the two tests of kills make.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(name: str, **flags: object) -> subprocess.Popen:
    """`python -m vsae_jax.<name> --flag=value ...`, on its way."""
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", f"vsae_jax.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_until(process: subprocess.Popen, said: str) -> Iterator[str]:
    """What the process prints, up to the line that contains `said`, or to its end."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if said in line:
            return


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_error(text: str) -> str:
    """The only line of stderr that is no progress."""
    (line,) = [line for line in text.splitlines() if line[:6] == "error:"]
    assert "Traceback" not in text
    return line


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MB of the test's own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode
    except FileNotFoundError:
        mounted = 1
    if mounted:
        pytest.skip("a small file system may not be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, *, leave: int) -> Path:
    """A file that takes all room but `leave` bytes."""
    path = folder / "ballast"
    free = os.statvfs(folder)
    path.write_bytes(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))
    return path


def rewrite(path: Path, change) -> None:
    """Changes the rows of a shard as `change` does, in place, and the manifest's
    checksum with it: what another program would have written."""
    import dataclasses
    import hashlib

    from vsae_jax.activations.manifest import MANIFEST, read_manifest

    rows = np.load(path, allow_pickle=False)
    change(rows)
    np.save(path, rows, allow_pickle=False)
    manifest = read_manifest(path.parent)
    index = int(path.stem.rsplit("-", 1)[1])
    shards = list(manifest.shards)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    shards[index] = dataclasses.replace(shards[index], activations_sha256=digest)
    manifest = dataclasses.replace(manifest, shards=tuple(shards))
    (path.parent / MANIFEST).write_bytes(manifest.to_bytes())
