"""f = z where z is among its row's k largest (Gao et al. 2024; paper 2.1, 2.2)."""

from vsae_jax.autoencoder.arrays import ArraySpec, Latents
from vsae_jax.autoencoder.sparsifiers.sparse import Arrays, Numbers, Sparse
from vsae_jax.autoencoder.sparsity import keep_top_k
from vsae_jax.config import SAEConfig

ARRAYS: dict[str, ArraySpec] = {}
BUFFERS: dict[str, ArraySpec] = {}
THRESHOLD = None
WHOLE_BATCH = False


def apply(z: Latents, arrays: Arrays, numbers: Numbers, *, config: SAEConfig) -> Sparse:
    """Exactly numbers["k"] latents of each row; k may be traced, up to config.k."""
    c = config
    f, selected = keep_top_k(
        z, numbers["k"], k_max=c.k, selection=c.selection, method=c.top_k
    )
    return Sparse(f, selected)


def encode(z: Latents, arrays: Arrays, *, config: SAEConfig) -> Latents:
    """Exactly config.k latents of each row."""
    return apply(z, arrays, {"k": config.k}, config=config).f
