"""Massive activations: planted ones are found, and said with their tokens."""

import numpy as np
import pytest
from tiny_runs import call

from vsae_jax.activations import massive
from vsae_jax.activations.shards import Activations


@pytest.fixture
def planted():
    """1,000 rows of norm 1 or so, of which 30 of token 7 and 10 of token 9 are 4 and 12
    times as long, by dimension 3."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1000, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    tokens, first = np.ones(1000, int), np.zeros(1000, bool)
    for token, length, numbers in ((7, 4, range(0, 90, 3)), (9, 12, range(500, 510))):
        rows[numbers] = 0
        rows[numbers, 3] = length
        tokens[numbers] = token
    first[::3] = True
    return rows, tokens, first


def test_planted_rows_are_found_with_their_tokens(planted):
    found = massive.look(*planted)
    assert found.n_rows == 1000
    assert found.dimension == 3
    rows = planted[0].astype(np.float64)
    assert found.variance_share == pytest.approx(rows.var(0)[3] / rows.var(0).sum())
    assert found.above == {3: 0.04, 5: 0.01, 10: 0.01}
    assert found.tokens == [(7, 0.75), (9, 0.25)]
    # Every row of token 7 is a context's first; of the ten of token 9 three are.
    assert found.first_share == pytest.approx(33 / 40)


def test_what_is_found_is_said_with_what_can_be_done(planted):
    said = massive.described(massive.look(*planted), {7: "a", 9: "b"}.__getitem__)
    assert "dimension 3 has" in said
    assert "4.00% above 3, 1.00% above 5, 1.00% above 10" in said
    assert "are of 'a' 75%, 'b' 25%; 82% are the first of their context" in said
    assert "--max_norm_multiple=10 leaves 1.00% of the rows out" in said
    found = massive.look(*planted)._replace(above={3: 0.02, 5: 0.01, 10: 0.0})
    said = massive.described(found, str)
    assert "--max_norm_multiple=5 leaves 1.00%" in said


def test_ordinary_rows_are_one_line_without_a_note():
    rows = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    found = massive.look(rows, np.zeros(500, int), np.zeros(500, bool))
    assert found.above == {3: 0.0, 5: 0.0, 10: 0.0}
    said = massive.described(found, str)
    assert "\n" not in said and "note" not in said


def test_equal_rows_have_no_variance_to_share():
    rows = np.ones((10, 4), np.float32)
    found = massive.look(rows, np.zeros(10, int), np.zeros(10, bool))
    assert found.variance_share == 0.0


def test_a_sample_is_of_whole_contexts_with_their_tokens(tiny_rows):
    opened = Activations.open(tiny_rows)
    rows, tokens, first = massive.sample(opened)
    # All of a small folder, each row once.
    assert len(rows) == len(tokens) == len(first) == opened.n_rows
    np.testing.assert_array_equal(rows, opened.rows(0, opened.n_rows))
    dropped = opened.manifest.dropped_positions
    expected = opened.tokens(0, opened.n_contexts)[:, dropped:].reshape(-1)
    np.testing.assert_array_equal(tokens, expected)
    assert first.sum() == opened.n_contexts


def test_extract_says_what_it_found(tiny_model, tiny_corpus, tmp_path, capsys):
    flags = {"model": tiny_model, "backend": "jax", "dataset": tiny_corpus}
    flags |= {"num_tokens": 320, "context_length": 16, "bos": "keep"}
    assert call("extract", out=tmp_path / "rows", **flags) == 0
    assert "of 320 rows looked at: dimension " in capsys.readouterr().out


def test_a_sample_of_a_large_folder_is_spread_and_bounded(tiny_rows, monkeypatch):
    monkeypatch.setattr(massive, "SAMPLE_ROWS", 15 * 32)
    opened = Activations.open(tiny_rows)
    rows, _, first = massive.sample(opened)
    assert len(rows) == 15 * 32
    assert first.sum() == 32
    np.testing.assert_array_equal(rows[-15:], opened.rows(1185, 1200))
