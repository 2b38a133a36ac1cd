"""How a training state is held: the decoder transposed, arrays split over devices.

    rows of a batch                                         over `data`
    arrays with an axis d_sae, their moments, silence       over `latents`
    the others, keys, sums                                  whole on every device

Training holds the decoder as `w_dec_t [d_model, d_sae]`, so that every matrix product
of a step is of rows by rows (autoencoder/matmul.py). Its columns are brought to norm 1
at the start of the next step, so what is held is not normalised yet. For an array that
stays above 0 (`ArraySpec.log`) training holds the logarithm, as `log_NAME`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

from vsae_jax.autoencoder import sae
from vsae_jax.config import SAEConfig

DECODER = "w_dec_t"
_LOGS = {n: f"log_{n}" for n, spec in sae.every_array().items() if spec.log}
# The axis of an array that is d_sae, counted from the last.
_LATENT_AXES = {"rows_since_fired": -1, DECODER: -1} | {
    _LOGS.get(name, name): spec.axes.index("d_sae") - len(spec.axes)
    for name, spec in sae.every_array().items()
    if "d_sae" in spec.axes
}


def to_training(params: sae.Params) -> dict[str, Array]:
    """The parameters as training holds them."""
    held = dict(params)
    held[DECODER] = jnp.array(held.pop("w_dec").T)
    for name in _LOGS.keys() & held.keys():
        held[_LOGS[name]] = jnp.log(held.pop(name))
    return held


def to_public(held: dict[str, Array]) -> dict[str, Array]:
    """The parameters as everything else takes them."""
    params = dict(held)
    params["w_dec"] = params.pop(DECODER).T
    for name, log in _LOGS.items():
        if log in params:
            params[name] = jnp.exp(params.pop(log))
    return params


def normed(held: dict[str, Array], config: SAEConfig) -> dict[str, Array]:
    """The held parameters with the decoder's columns at norm 1, unless the config
    leaves their norms free."""
    if config.decoder_norm == "free":
        return held
    w = held[DECODER]
    norm = jnp.linalg.norm(w, axis=0, keepdims=True)
    return {**held, DECODER: w / jnp.maximum(norm, 1e-8)}


def shardings(tree: Any, mesh: Mesh | None) -> Any:
    """The sharding of each array of a training state (or of numbers). With several
    arms, the leading axis over them is not split."""

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        if mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        name = getattr(path[-1], "key", getattr(path[-1], "name", None))
        if name not in _LATENT_AXES:
            return NamedSharding(mesh, PartitionSpec())
        axes: list[str | None] = [None] * leaf.ndim
        axes[_LATENT_AXES[name]] = "latents"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, tree)


def shaped(tree: Any, mesh: Mesh | None) -> Any:
    """The shape, dtype and sharding of each array of a state."""
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        tree,
        shardings(tree, mesh),
    )


def make(build: Callable[..., Any], *arguments: Any, mesh: Mesh | None) -> Any:
    """The state `build(*arguments)`; on a mesh each array is made where it belongs,
    never whole on one device."""
    if mesh is None:
        return build(*arguments)
    places = shardings(jax.eval_shape(build, *arguments), mesh)
    return jax.jit(build, out_shardings=places)(*arguments)
