"""NaN, infinite and giant rows in a shard: counted, and never silently trained on."""

import numpy as np
import pytest
from tiny_runs import TRAINING, call, copied

from faults.places import one_error, rewrite
from vsae_jax import runs
from vsae_jax.activations import bad_rows
from vsae_jax.activations.bad_rows import Check
from vsae_jax.activations.shards import Activations
from vsae_jax.activations.shuffle import ShuffledRows
from vsae_jax.config import TrainConfig
from vsae_jax.system.errors import UserError
from vsae_jax.training import plan
from vsae_jax.training.batches import Feed

# Row of the folder, and what one of its values becomes: two in shard 0, one in 1.
BAD = {7: np.nan, 300: -np.inf, 500: 3e8}


def spoil(rows) -> None:
    """Puts `BAD` into the shards of 480 rows."""
    for number, value in BAD.items():
        shard, at = divmod(number, 480)

        def change(array, at=at, value=value):
            array[at, 3] = value

        rewrite(rows / f"activations-{shard:05d}.npy", change)


@pytest.fixture
def spoilt(tiny_rows, tmp_path):
    rows = copied(tiny_rows, tmp_path / "rows")
    spoil(rows)
    return rows


def config(rows, out, **fields) -> TrainConfig:
    return TrainConfig(activations=str(rows), out=str(out), **TRAINING, **fields)


@pytest.mark.parametrize("feed", ["stream", "device"])
def test_stop_is_the_default_and_names_the_first(spoilt, tmp_path, capfd, feed):
    flags = {"activations": spoilt, "out": tmp_path / "run", "feed": feed, **TRAINING}
    assert call("train", **flags) == 2
    line = one_error(capfd.readouterr().err)
    assert "activations-00000.npy" in line and "3 of 960 rows are NaN" in line
    assert "context 0, position 8" in line and "--bad_rows=skip" in line
    assert not (tmp_path / "run" / runs.METRICS).exists()


@pytest.mark.parametrize("feed", ["stream", "device"])
def test_skip_counts_them_and_never_trains_on_them(spoilt, tmp_path, feed, capsys):
    planned = plan.plan(config(spoilt, tmp_path / "run", feed=feed, bad_rows="skip"))
    assert planned.left_out.rows.tolist() == list(BAD)
    plan.explain(planned)
    said = capsys.readouterr().out
    assert "3 of 1200 rows are NaN, infinite or giant and are left out" in said
    good = np.delete(Activations.open(spoilt).rows(0, 960), list(BAD), axis=0)
    with Feed(planned) as source:
        taken = source.stack(0, 60, n_max=60)
    taken = np.asarray(taken).reshape(1920, -1)
    assert np.isfinite(taken).all() and np.abs(taken).max() < 1e3
    known = {row.tobytes() for row in good}
    assert {row.tobytes() for row in taken} == known


@pytest.mark.slow
def test_skip_trains_to_the_same_bits_by_either_feed(spoilt, tmp_path):
    flags = {"activations": spoilt, "bad_rows": "skip", **TRAINING}
    both = []
    for feed in ("stream", "device"):
        assert call("train", out=tmp_path / feed, feed=feed, **flags) == 0
        both.append((tmp_path / feed / runs.PARAMETERS).read_bytes())
    assert both[0] == both[1]
    stored = runs.read_json(tmp_path / feed / runs.CONFIG)["data"]["left_out"]
    assert stored.startswith("3 rows, sha256 ")


def test_what_a_run_left_out_is_part_of_what_it_is(spoilt, tmp_path, capfd):
    flags = {"activations": spoilt, "out": tmp_path / "run", **TRAINING}
    assert call("train", bad_rows="skip", **flags) == 0
    capfd.readouterr()
    assert call("train", **flags) == 2
    assert "left_out: '3 rows" in one_error(capfd.readouterr().err)


@pytest.mark.slow
def test_without_bad_rows_skip_is_stop(tiny_rows, tiny_run, tmp_path, capsys):
    flags = {"activations": tiny_rows, "variant": "topk", **TRAINING}
    assert call("train", out=tmp_path / "run", bad_rows="skip", **flags) == 0
    assert "left out" not in capsys.readouterr().out
    both = [(f / runs.PARAMETERS).read_bytes() for f in (tmp_path / "run", tiny_run)]
    assert both[0] == both[1]


def test_the_scale_is_that_of_the_rows_that_are_left(spoilt, tiny_rows, tmp_path):
    found = bad_rows.left_out(Activations.open(spoilt), bad_rows="skip", giant=1e4)
    whole = Activations.open(tiny_rows).rows(0, 1200).astype(np.float64)
    kept = np.delete(whole, list(BAD), axis=0)
    np.testing.assert_allclose(found.mean, kept.mean(0), rtol=1e-9)
    expected = np.square(kept).sum(1).mean()
    np.testing.assert_allclose(found.mean_squared_norm, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_bad_value_is_found_and_no_good_one(extracted, dtype):
    opened = Activations.open(extracted(dtype=dtype, num_tokens=320))
    check = Check(opened, giant=100.0)
    rows = np.array(opened.rows(0, 300))
    assert not check.bad(rows).any()
    median = np.median(np.linalg.norm(rows.astype(np.float64), axis=1))
    limit = 100 * median
    values = [np.nan, np.inf, -np.inf, 1.05 * limit, -1.05 * limit]
    for value in values:
        changed = rows.copy()
        changed[17, 5] = value
        assert np.flatnonzero(check.bad(changed)).tolist() == [17], value
    for value in (0.95 * limit, -0.95 * limit, 0.0, -0.0):
        changed = rows.copy()
        changed[17, 5] = value
        assert not check.bad(changed).any(), value


# Row of the folder, and what its norm is multiplied with.
MASSIVE = {5: 12.0, 490: 30.0, 1100: 11.0, 1101: 8.0}


@pytest.fixture
def massive_rows(tiny_rows, tmp_path):
    rows = copied(tiny_rows, tmp_path / "rows")
    opened = Activations.open(tiny_rows)
    whole = opened.rows(0, opened.n_rows).astype(np.float64)
    norms = np.linalg.norm(whole, axis=1)
    for number, times in MASSIVE.items():
        factor = times * np.median(norms) / norms[number]
        shard, at = divmod(number, 480)

        def change(array, at=at, factor=factor):
            array[at] *= factor

        rewrite(rows / f"activations-{shard:05d}.npy", change)
    return rows


def test_massive_rows_are_left_out_counted_and_recorded(massive_rows, tmp_path, capsys):
    flags = {"activations": massive_rows, **TRAINING}
    out = tmp_path / "run"
    assert call("train", out=out, max_norm_multiple=10, **flags) == 0
    said = capsys.readouterr().out
    assert (
        "3 of 1200 rows have a norm above 10 times the median and are left out; the "
        "first is row 5" in said
    )
    stored = runs.read_json(out / runs.CONFIG)
    assert stored["data"]["left_out"].startswith("3 rows, sha256 ")
    planned = plan.plan(config(massive_rows, out, max_norm_multiple=10.0))
    assert planned.left_out.rows.tolist() == [5, 490, 1100]
    with Feed(planned) as source:
        taken = np.asarray(source.stack(0, 60, n_max=60)).reshape(1920, -1)
    norms = np.linalg.norm(taken, axis=1)
    assert norms.max() < 10 * np.median(norms)
    # As one mechanism: what is left out sets neither the scale nor the mean.
    opened = Activations.open(massive_rows)
    kept = np.delete(opened.rows(0, 1200).astype(np.float64), [5, 490, 1100], axis=0)
    squares = np.square(kept).sum(1).mean()
    assert planned.left_out.mean_squared_norm == pytest.approx(squares)
    # Unset, all rows are trained on, and the run is another.
    assert plan.plan(config(massive_rows, out)).left_out is None
    assert call("train", out=out, **flags) == 2


def test_bad_and_massive_rows_are_left_out_together_or_stop(
    massive_rows, tmp_path, capsys
):
    spoil(massive_rows)
    flags = {"activations": massive_rows, "max_norm_multiple": 10, **TRAINING}
    assert call("train", out=tmp_path / "stop", **flags) == 2
    assert "--bad_rows=skip" in capsys.readouterr().err
    assert call("train", out=tmp_path / "skip", bad_rows="skip", **flags) == 0
    assert (
        "6 of 1200 rows are NaN, infinite or giant or have a norm above 10 times the "
        "median and are left out" in capsys.readouterr().out
    )


def test_rows_in_many_pieces(tiny_rows, monkeypatch):
    check = Check(Activations.open(tiny_rows), giant=1e4)
    rows = np.ones((1000, 16), np.float32)
    rows[[0, 499, 999], [0, 7, 15]] = -np.inf
    monkeypatch.setattr(bad_rows, "AT_ONCE_BYTES", 7 * 64)
    assert np.flatnonzero(check.bad(rows)).tolist() == [0, 499, 999]


def test_a_row_left_out_is_replaced_within_its_group_and_the_others_stay():
    numbers = np.arange(50, dtype=np.int64)[:, None]
    streams = [
        ShuffledRows(
            lambda a, b: numbers[a:b], n_rows=50, row_bytes=8, seed=1, left_out=bad
        ).take(0, 100)[:, 0]
        for bad in ([], [3, 4, 49])
    ]
    same = ~np.isin(streams[0], [3, 4, 49])
    np.testing.assert_array_equal(streams[0][same], streams[1][same])
    assert same.sum() == 94 and not np.isin(streams[1], [3, 4, 49]).any()


def test_nothing_but_bad_rows_is_refused():
    numbers = np.arange(5, dtype=np.int64)[:, None]
    rows = ShuffledRows(
        lambda a, b: numbers[a:b], n_rows=5, row_bytes=8, seed=1, left_out=range(5)
    )
    with pytest.raises(UserError, match="a whole group of rows is bad"):
        rows.take(0, 1)
