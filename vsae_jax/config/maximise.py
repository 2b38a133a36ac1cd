"""What `maximise` can be asked."""

from dataclasses import dataclass

from vsae_jax.config.extract import Backend, LMDtype
from vsae_jax.config.fields import REQUIRED, check_above_zero, check_at_least, flag
from vsae_jax.config.opening import ACTIVATIONS, LAYER, MODEL_DIFFERS, OpenOptions
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class MaximiseConfig(OpenOptions):
    """Finds tokens that fire chosen latents, by gradient ascent through the language
    model, and shows them beside the best real text.

    python -m vsae_jax.maximise --run=runs/topk --latents=3,17
    """

    run: str = flag(
        "run folder, or a folder of any format that convert reads",
        "",
        default_help=REQUIRED,
    )
    latents: str = flag(
        "comma list of latents, such as 3,17", "", default_help=REQUIRED
    )
    length: int = flag("tokens of the synthetic sequence, BOS not counted", 12)
    steps: int = flag("steps of gradient ascent", 200)
    restarts: int = flag("random starts; the best result is reported", 16)
    lr: float = flag("learning rate of Adam, on the soft tokens' logits", 0.3)
    hot: float = flag("temperature of the softmax at the first step", 2.0)
    cold: float = flag("temperature at the last step; it falls geometrically", 0.05)
    seed: int = flag("seed of the random starts", 0)
    model: str = flag("hub id or local folder; unset: the run's", "")
    revision: str = flag("hub revision; unset: the run's", "")
    model_differs: bool = flag(MODEL_DIFFERS, False)
    layer: int | None = flag(LAYER)
    backend: Backend = flag("jax, which auto means: only it has gradients", "auto")
    lm_dtype: LMDtype = flag(
        "dtype of the language model's products; auto: float32, for exact gradients",
        "auto",
    )
    activations: str = flag(ACTIVATIONS, "")
    text: str = flag(
        "look for real text in this .jsonl, .txt or .parquet instead of held-out "
        "contexts",
        "",
    )
    text_column: str = flag("column of --text that holds the text", "text")
    num_tokens: int = flag("most tokens to look for real text in", 409_600)
    batch_size: int = flag("contexts in a forward pass", 16)

    def __post_init__(self):
        check_at_least(self, 1, "length", "steps", "restarts")
        check_at_least(self, 1, "num_tokens", "batch_size")
        check_at_least(self, 0, "seed", "layer")
        check_above_zero(self, "lr", "hot", "cold")
        if not self.run:
            raise UserError("--run is not set; name a run folder")
        if self.backend == "transformers":
            raise UserError(
                "--backend=transformers has no gradients through the autoencoder; use "
                "--backend=jax, which runs the families that the guide names"
            )
        if not self.latents:
            raise UserError("--latents is not set; name some, such as --latents=3,17")
