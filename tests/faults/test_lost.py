"""One of several processes is killed: the others end, and all of them go on."""

import random
import time
from pathlib import Path

import pytest
from test_mesh import assert_close, flags, free_address, started, two_processes
from tiny_runs import TRAINING

from vsae_jax import runs

_RUN = TRAINING | {"steps": 600, "checkpoint_every": 20, "log_every": 20}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_all_go_on(tiny_rows, tmp_path, killed):
    out = tmp_path / "run"
    given = {"activations": tiny_rows, **_RUN}
    together = {"coordinator": free_address(), "num_processes": 2}
    both = [
        started(*flags("train", out=out, **given, **together, process_id=i), devices=1)
        for i in range(2)
    ]
    while not saved(out):
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    time.sleep(random.Random(killed).uniform(0, 1))
    both[killed].kill()
    began = time.monotonic()
    _, errors = both[1 - killed].communicate(timeout=300)
    print(f"\nprocess {1 - killed} ended {time.monotonic() - began:.1f} s later")
    both[killed].communicate()
    assert both[1 - killed].returncode not in (0, None), errors
    assert not (out / runs.PARAMETERS).is_file(), "killed after its end"
    text = two_processes("train", out=out, **given)[0]
    assert "going on from step" in text
    two_processes("train", out=tmp_path / "whole", **given)
    assert_close(tmp_path / "whole", out)


def saved(out: Path) -> list[Path]:
    """Finished checkpoints."""
    folder = out / runs.CHECKPOINTS
    paths = folder.iterdir() if folder.is_dir() else []
    return [path for path in paths if path.name.isdigit()]
