"""What `features` can be asked."""

from dataclasses import dataclass

from vsae_jax.config.extract import DEVICE, LM_DTYPE, Backend, LMDtype
from vsae_jax.config.fields import REQUIRED, check_at_least, flag
from vsae_jax.config.opening import (
    ACTIVATIONS,
    BACKEND,
    LAYER,
    MODEL_DIFFERS,
    OpenOptions,
)
from vsae_jax.system.errors import UserError

# Firings of a latent in the uniform sample that its groups are made of.
SAMPLED_FIRINGS = 100


@dataclass(frozen=True)
class FeaturesConfig(OpenOptions):
    """Finds what every latent fires on and which tokens it makes likely, in one pass
    over held-out activations.

    python -m vsae_jax.features --run=runs/topk
    """

    run: str = flag(
        "run folder, a grid's folder, or a folder of any format that convert reads",
        "",
        default_help=REQUIRED,
    )
    model: str = flag("hub id or local folder; unset: the manifest's", "")
    revision: str = flag("hub revision; unset: the manifest's", "")
    model_differs: bool = flag(MODEL_DIFFERS, False)
    layer: int | None = flag(LAYER)
    backend: Backend = flag(BACKEND, "auto")
    lm_dtype: LMDtype = flag(LM_DTYPE, "auto")
    device: str = flag(DEVICE, "auto")
    activations: str = flag(ACTIVATIONS, "")
    num_tokens: int = flag("most held-out tokens to look at", 1_000_000)
    top: int = flag("contexts of the strongest activations kept per latent", 20)
    quantiles: int = flag("equal groups into which a latent's firings are divided", 10)
    window: int = flag("tokens shown on each side", 12)
    seed: int = flag("seed of the sample for groups and correlations", 0)
    loss_effect: bool = flag(
        "measure the language model's loss without the latent, in its 5 strongest "
        "contexts (minutes)",
        False,
    )
    model_name: str = flag(
        "what Neuronpedia calls the language model; unset: its hub id, or the name of "
        "its folder",
        "",
    )
    neuronpedia: bool = flag("also write SAEDashboard's JSON", False)

    def __post_init__(self):
        check_at_least(self, 1, "num_tokens", "top", "quantiles", "window")
        check_at_least(self, 0, "layer", "seed")
        if self.quantiles > SAMPLED_FIRINGS:
            raise UserError(
                f"--quantiles={self.quantiles} must not exceed {SAMPLED_FIRINGS}"
            )
        if not self.run:
            raise UserError("--run is not set; name a run folder or a grid's folder")
