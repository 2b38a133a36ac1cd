"""What `tsne` can be asked."""

from dataclasses import dataclass
from typing import Literal

from vsae_jax.config.fields import REQUIRED, check_at_least, check_below, flag
from vsae_jax.config.opening import ACTIVATIONS, LAYER, OpenOptions
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class MapConfig(OpenOptions):
    """Maps the latents to two dimensions by t-SNE and measures how they lie; for a
    grid, one table over seeds.

    python -m vsae_jax.tsne --run=runs/grid
    """

    run: str = flag(
        "run folder, a grid's folder, or one that convert reads",
        "",
        default_help=REQUIRED,
    )
    points: Literal["activations", "decoder"] = flag(
        "what a latent is: its standardised activations, or its decoder row",
        "activations",
    )
    samples: int = flag("held-out rows that make --points=activations", 20_000)
    min_rate: float = flag("leave out latents that fire on no more than this", 0.01)
    clusters: int = flag("clusters of k-means, on the two dimensions", 10)
    seed: int = flag("seed of t-SNE and k-means", 42)
    layer: int | None = flag(LAYER)
    model: str = flag("hub id or local folder; unset: the run's", "")
    activations: str = flag(ACTIVATIONS, "")

    def __post_init__(self):
        check_at_least(self, 2, "samples", "clusters")
        check_at_least(self, 0, "min_rate", "seed", "layer")
        check_below(self, 1, "min_rate")
        if not self.run:
            raise UserError("--run is not set; name a run folder or a grid's folder")
