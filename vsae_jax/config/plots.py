"""What `plots` can be asked."""

from dataclasses import dataclass

from vsae_jax.config.fields import REQUIRED, flag
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class PlotsConfig:
    """Draws figures from the files in a run folder or in those of a grid.

    python -m vsae_jax.plots --run=runs/grid
    """

    run: str = flag("run folder, or a grid's folder", "", default_help=REQUIRED)
    figures: str = flag(
        "comma list of figures; unset: all that there are files for", ""
    )
    out: str = flag("folder for the figures; unset: figures/ in --run", "")

    def __post_init__(self):
        if not self.run:
            raise UserError("--run is not set; name a run folder or a grid's folder")
