"""The hashed noise is standard normal, and each key's is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vsae_jax.autoencoder import noise

SHAPE = (512, 1024)


@pytest.fixture(scope="module")
def eps() -> np.ndarray:
    return np.asarray(noise.normal(jax.random.key(3), SHAPE), np.float64)


def test_it_is_standard_normal(eps):
    n = eps.size
    # Five standard errors of the first four moments of n normals.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(eps**power) - moment) < 5 * np.sqrt(variance / n), power
    assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-3
    # Tails: P(|eps| > 4) is 6.3e-5.
    expected = 2 * stats.norm.sf(4) * n
    assert abs(np.sum(np.abs(eps) > 4) - expected) < 5 * np.sqrt(expected)
    assert np.abs(eps).max() < 5.4


def test_no_word_gives_an_infinite_eps():
    """All 2^23 of them: one that did would end a run within some steps."""
    words = jnp.arange(2**23, dtype=jnp.uint32) << 9
    every = np.asarray(jax.jit(noise.normal_of)(words))
    assert np.isfinite(every).all()
    np.testing.assert_allclose(every.max(), -every.min())
    assert every.max() < 5.4


@pytest.mark.parametrize("of", ["value", "square"])
def test_places_are_not_correlated(eps, of):
    x = eps if of == "value" else eps**2 - 1
    x = x / x.std()
    for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 2), (8, 0), (0, 64), (256, 512)):
        moved = np.roll(x, (rows, columns), axis=(0, 1))
        assert abs(np.mean(x * moved)) < 5 / np.sqrt(x.size), (rows, columns)
    # The spread of all pairs of rows, and of columns, is that of independent ones.
    for matrix in (x, x.T):
        r = np.corrcoef(matrix)[np.triu_indices(len(matrix), 1)]
        assert np.var(r) == pytest.approx(1 / matrix.shape[1], rel=0.05)


def test_every_bit_is_fair():
    bits = np.asarray(noise.mix(jnp.arange(2**18, dtype=jnp.uint32)))
    ones = [np.mean(bits >> i & 1) for i in range(32)]
    np.testing.assert_allclose(ones, 0.5, atol=5 * 0.5 / np.sqrt(2**18))


def test_keys_and_steps_have_their_own():
    key = jax.random.key(0)
    keys = [key, jax.random.key(1), *(jax.random.fold_in(key, t) for t in range(6))]
    drawn = np.stack([np.ravel(noise.normal(k, (256, 256))) for k in keys])
    r = np.corrcoef(drawn)[np.triu_indices(len(keys), 1)]
    assert np.abs(r).max() < 5 / 256


def test_the_same_key_and_a_part_of_a_batch():
    key = jax.random.key(7)
    whole = noise.normal(key, (64, 33))
    np.testing.assert_array_equal(whole, noise.normal(key, (64, 33)))
    part = noise.normal(key, (16, 33), first_row=jnp.int32(24))
    np.testing.assert_array_equal(part, whole[24:40])


def test_golden():
    """The stream is part of a run's record: a change would change every resumed run."""
    first = np.asarray(noise.normal(jax.random.key(0), (2, 2)))
    np.testing.assert_allclose(first, GOLDEN, rtol=1e-6)


GOLDEN = [[-0.11234152, -0.25657803], [0.84511238, -0.61819416]]
