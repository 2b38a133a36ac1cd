"""The gradient of the objective on one batch: of all at once, or on a CPU in parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from vsae_jax.autoencoder.objective import Info, total_loss
from vsae_jax.autoencoder.penalties import row_variance
from vsae_jax.autoencoder.sparsifiers import Numbers, sparsifier_of
from vsae_jax.config import SAEConfig
from vsae_jax.system import mesh
from vsae_jax.training.layout import to_public

# On a CPU a part of a batch has this many bytes of latents, so that they stay in cache
# between the passes over them.
CPU_PART_BYTES = 2**25
# With fewer rows a product no longer keeps all cores busy.
_LEAST_ROWS = 128


def gradient(
    held: dict[str, Array],
    x_n: Float[Array, "batch d_model"],
    key: Key[Array, ""],
    numbers: Numbers,
    *,
    dead: Bool[Array, " d_sae"],
    any_dead: Bool[Array, ""],
    buffers: dict[str, Array],
    config: SAEConfig,
) -> tuple[dict[str, Array], Info]:
    """The gradient with respect to the held parameters, and the batch's `Info`. The key
    is consumed; `any_dead` is whether AuxK acts."""

    def of(rows: Array, first_row: Array | int) -> tuple[Any, Info]:
        def loss(held: dict[str, Array], dead: Array | None) -> tuple[Array, Info]:
            return total_loss(
                to_public(held),
                rows,
                key,
                numbers,
                dead,
                config=config,
                first_row=first_row,
                buffers=buffers,
            )

        part = jax.grad(loss, has_aux=True)
        if not config.auxk:
            return part(held, None)
        # Where no latent is dead, AuxK is not computed rather than multiplied by 0.
        return lax.cond(any_dead, lambda: part(held, dead), lambda: part(held, None))

    rows = rows_of_a_part(len(x_n), config.d_sae)
    by_batch = (
        sparsifier_of(config).WHOLE_BATCH
        or (config.auxk and config.auxk_units == "variance")
        or (config.penalty == "kl" and config.kl_units == "error")
    )
    few = rows < _LEAST_ROWS or rows == len(x_n)
    if jax.default_backend() != "cpu" or mesh.is_split() or by_batch or few:
        return of(x_n, 0)
    return _mean_of_parts(of, x_n, rows)


def rows_of_a_part(n: int, d_sae: int) -> int:
    """The largest divisor of a batch's n rows whose latents fit into a part."""
    most = CPU_PART_BYTES // (4 * d_sae)
    return max(
        rows for rows in range(1, n + 1) if n % rows == 0 and rows <= max(most, 1)
    )


def _mean_of_parts(
    of: Callable[[Array, Array | int], tuple[Any, Info]], x: Array, rows: int
) -> tuple[Any, Info]:
    """The mean of `of(part, first_row)` over the parts of `rows` rows."""
    parts = len(x) // rows

    def add(i: Array, total: Any) -> Any:
        start = i * rows
        part = of(lax.dynamic_slice_in_dim(x, start, rows), start)
        return jax.tree.map(
            lambda a, b: a | b if a.dtype == bool else a + b / parts, total, part
        )

    shapes = jax.eval_shape(lambda: of(x[:rows], 0))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    grads, info = lax.fori_loop(0, parts, add, zero)
    return grads, info._replace(variance=row_variance(x))
