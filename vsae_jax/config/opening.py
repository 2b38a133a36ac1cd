"""What opening a trained autoencoder, its language model and its tokens needs."""

from vsae_jax.config.extract import Backend, LMDtype

# The help of flags that are the same in every command that has them.
LAYER = "block whose output is autoencoded, from 0; unset: the folder's"
BACKEND = "auto: jax where it runs the family, else transformers"
MODEL_DIFFERS = "go on with a language model of other weights than the run's"
ACTIVATIONS = "folder that extract wrote; unset: the run's"


class OpenOptions:
    """The settings that opening a run reads. A command's config has flags for some of
    them; what it has no flag for is as here. No dataclass, so that each command lists
    its flags in its own order."""

    run: str
    model: str = ""
    revision: str = ""
    model_differs: bool = False
    layer: int | None = None
    backend: Backend = "auto"
    lm_dtype: LMDtype = "auto"
    device: str = "auto"
    activations: str = ""
    text: str = ""
    text_column: str = "text"
    num_tokens: int = 409_600
    batch_size: int = 16
