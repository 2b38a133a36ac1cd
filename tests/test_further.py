"""Training on text beyond what is extracted: the rows that extract would have written,
in an order that goes on where a run stopped."""

import json
import shutil

import numpy as np
import pytest
from tiny_models import make_stories, write_jsonl
from tiny_runs import CONTEXTS, LENGTH, TRAINING, call

from vsae_jax import runs
from vsae_jax.activations.further import FurtherRows
from vsae_jax.activations.shards import Activations
from vsae_jax.activations.shuffle import ShuffledRows
from vsae_jax.interop.tensors import read_safetensors
from vsae_jax.system.errors import UserError

EACH = LENGTH - 1


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return write_jsonl(folder / "stories.jsonl", make_stories(200))


@pytest.fixture(scope="module")
def some(extracted, text):
    """The beginning of the text."""
    return Activations.open(extracted(dataset=text))


@pytest.fixture(scope="module")
def more(extracted, text):
    """More of it: the rows of 40 contexts that `some` lacks."""
    tokens = (CONTEXTS + 40) * LENGTH
    return Activations.open(extracted(dataset=text, num_tokens=tokens))


def test_the_rows_are_those_that_extract_writes(some, more):
    further = FurtherRows(some, giant=1e4)
    expected = more.view(CONTEXTS * EACH, (CONTEXTS + 40) * EACH)
    for first, last in ((0, 3), (3, 40), (7, 9)):
        found = further.read(first * EACH, last * EACH)
        np.testing.assert_allclose(
            found, expected[first * EACH : last * EACH], rtol=1e-5, atol=1e-6
        )


def test_where_the_text_ends_it_is_read_again(some, extracted, text):
    whole = Activations.open(extracted(dataset=text, num_tokens=10**6))
    there = whole.n_contexts - CONTEXTS
    further = FurtherRows(some, giant=1e4)
    again = further.read(there * EACH, (there + 2) * EACH)
    np.testing.assert_array_equal(again, FurtherRows(some, giant=1e4).read(0, 2 * EACH))
    with pytest.raises(UserError, match="has no text after the"):
        FurtherRows(whole, giant=1e4).read(0, EACH)


def test_forward_each_epoch_is_of_the_next_rows():
    reads = []

    def read(start, stop):
        reads.append((start, stop))
        return np.arange(start, stop)[:, None]

    rows = ShuffledRows(read, n_rows=30, row_bytes=8, seed=0, forward=True)
    taken = rows.take(0, 90)[:, 0].reshape(3, 30)
    for epoch, found in enumerate(taken):
        np.testing.assert_array_equal(np.sort(found), 30 * epoch + np.arange(30))
        assert not np.array_equal(found, np.sort(found))
    assert reads == [(0, 30), (30, 60), (60, 90)]
    resumed = ShuffledRows(read, n_rows=30, row_bytes=8, seed=0, forward=True)
    np.testing.assert_array_equal(resumed.take(45, 20)[:, 0], taken.reshape(-1)[45:65])


def test_train_stream_goes_on_where_it_stopped(some, tmp_path):
    flags = {"activations": some.folder, "variant": "topk", "stream": True}
    flags |= {"buffer_rows": 100, "checkpoint_every": 10, "log_every": 10} | TRAINING
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call("train", **flags, out=whole) == 0
    # As a kill after the first checkpoint leaves it.
    shutil.copytree(whole, stopped)
    (stopped / runs.PARAMETERS).unlink()
    shutil.rmtree(stopped / runs.CHECKPOINTS / "20")
    assert call("train", **flags, out=stopped) == 0
    again = read_safetensors(stopped / runs.PARAMETERS)
    for name, array in read_safetensors(whole / runs.PARAMETERS).items():
        np.testing.assert_array_equal(array, again[name])
    config = json.loads((whole / runs.CONFIG).read_text())
    assert config["train"]["stream"] is True


def test_refusals(some, tmp_path, capsys):
    flags = {"activations": some.folder, "out": tmp_path / "run", "stream": True}
    assert call("train", **flags, **TRAINING, bad_rows="skip") == 2
    assert "--stream makes rows as they are needed" in capsys.readouterr().err
