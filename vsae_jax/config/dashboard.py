"""What `dashboard` can be asked."""

import re
from dataclasses import dataclass

from vsae_jax.config.extract import DEVICE, LM_DTYPE, Backend, LMDtype
from vsae_jax.config.fields import REQUIRED, check_at_least, flag
from vsae_jax.config.opening import ACTIVATIONS, BACKEND, LAYER, MODEL_DIFFERS
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class DashboardConfig:
    """Writes one self-contained HTML page of a run's latents; with --compare of two
    runs, their latents matched. Makes `features/` first where it is not there.

    python -m vsae_jax.dashboard --run=runs/topk --compare=runs/vsae --out=both.html
    """

    run: str = flag(
        "run folder, or a folder of any format that convert reads",
        "",
        default_help=REQUIRED,
    )
    compare: str = flag("another such folder, to show beside it", "")
    out: str = flag("the page; unset: dashboard.html in the run folder", "")
    features: str = flag(
        "latents to show in full: how many, spread evenly over the firing rates, or a "
        "comma list of latents (7, for a single one); --compare adds their matches",
        "512",
    )
    model: str = flag("hub id or local folder; unset: the manifest's", "")
    model_differs: bool = flag(MODEL_DIFFERS, False)
    layer: int | None = flag(LAYER)
    backend: Backend = flag(BACKEND, "auto")
    lm_dtype: LMDtype = flag(LM_DTYPE, "auto")
    device: str = flag(DEVICE, "auto")
    activations: str = flag(ACTIVATIONS, "")
    num_tokens: int | None = flag(
        "most held-out tokens to look at; unset: as many as for features/, or 1,000,000"
    )

    def __post_init__(self):
        check_at_least(self, 1, "num_tokens")
        check_at_least(self, 0, "layer")
        if not self.run:
            raise UserError("--run is not set; name a run folder")
        wanted_latents(self.features)


def wanted_latents(asked: str) -> int | list[int]:
    """`--features` as a number or a list of latents."""
    parts = [part.strip() for part in asked.split(",")]
    numbers = [part for part in parts if part]
    if not numbers or not all(re.fullmatch(r"\d{1,9}", part) for part in numbers):
        raise UserError(
            f"--features={asked} must be a number of latents, or a comma list of them"
        )
    return int(numbers[0]) if len(parts) == 1 else [int(part) for part in numbers]
