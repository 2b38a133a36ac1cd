"""What `convert` can be asked."""

from dataclasses import dataclass
from typing import Literal

from vsae_jax.config.fields import REQUIRED, check_at_least, flag
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class ConvertConfig:
    """Converts a trained autoencoder between a run folder and the files of SAELens,
    dictionary_learning, sparsify and OpenAI.

    python -m vsae_jax.convert --input=runs/topk --to=saelens --out=my-sae
    """

    input: str = flag(
        "run folder, folder of another library (recognised by its files), hub id, or "
        "SAELens' name, release/id",
        "",
        default_help=REQUIRED,
    )
    to: Literal["saelens", "dictionary_learning", "sparsify", "openai", "vsae_jax"] = (
        flag("format to write", "saelens")
    )
    out: str = flag(
        "new folder to write, with a model card, ready to upload",
        "",
        default_help=REQUIRED,
    )
    revision: str = flag("hub revision of --input: branch, tag or commit", "")
    activations: str = flag(
        "folder that extract wrote, for the self-check; unset: the run's, or generated",
        "",
    )
    model_name: str = flag(
        "the language model's hub id, for the files and the card; unset: as --input "
        "says; for a local folder, its name",
        "",
    )
    rows: int = flag("rows of the self-check", 1024)
    lossy: bool = flag(
        "write it even if the format drops its negative latents; the cost is printed "
        "and stated in the card",
        False,
    )
    push_to_hub: str = flag("hub id to upload --out to, such as me/my-sae", "")
    private: bool = flag("make the hub repository a private one", False)

    def __post_init__(self):
        check_at_least(self, 2, "rows")
        if not self.input or not self.out:
            raise UserError(
                "--input and --out must be set: a trained autoencoder and a new folder"
            )
