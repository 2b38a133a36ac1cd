"""Real Orbax checkpoints: what is saved comes back bit for bit; damage is survived."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsae_jax.autoencoder import sae
from vsae_jax.config import SAEConfig
from vsae_jax.system.errors import UserError
from vsae_jax.training import step
from vsae_jax.training.checkpoint import Checkpoints

CONFIG = SAEConfig(d_model=4, d_sae=12, k=3)


def state_at(number: int) -> step.TrainState:
    rng = np.random.default_rng(number)
    variables = sae.init(
        jax.random.key(number), CONFIG, scale=2.5, mean=rng.normal(size=4)
    )
    state = step.init_state(variables, jax.random.key(number + 1), CONFIG)
    return state._replace(
        step=jnp.int32(number),
        rows_since_fired=jnp.arange(12, dtype=jnp.int32) * number,
        totals=state.totals._replace(
            sums=state.totals.sums | {"loss": jnp.float32(rng.normal())}
        ),
    )


def assert_same(a: step.TrainState, b: step.TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_state_and_position_come_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(5), data_position=123)
    with Checkpoints(tmp_path) as checkpoints:
        like = jax.eval_shape(lambda: state_at(0))
        state, position = checkpoints.restore(like)
    assert position == 123
    assert_same(state, state_at(5))


def test_the_last_two_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(state_at(number), data_position=number)
        assert checkpoints.steps() == [2, 3]


def test_no_checkpoint_is_none(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state_at(0)) is None


def damage(folder):
    data = [
        p for p in (folder / "state").rglob("*") if p.is_file() and p.parent.name == "d"
    ]
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(1), data_position=10)
        checkpoints.save(state_at(2), data_position=20)
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        state, position = checkpoints.restore(jax.eval_shape(lambda: state_at(0)))
    assert position == 10
    assert_same(state, state_at(1))
    assert "checkpoint of step 2 is damaged" in capsys.readouterr().out


def test_only_damaged_checkpoints_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(1), data_position=10)
    damage(tmp_path / "1")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint of this run can be read"):
            checkpoints.restore(jax.eval_shape(lambda: state_at(0)))


def test_a_checkpoint_of_another_shape_is_not_loaded(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(1), data_position=10)
    other = SAEConfig(d_model=4, d_sae=16, k=3)
    variables = sae.init(jax.random.key(0), other)
    like = jax.eval_shape(lambda: step.init_state(variables, jax.random.key(1), other))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError):
            checkpoints.restore(like)
