"""What `evaluate` can be asked."""

from dataclasses import dataclass

from vsae_jax.config.extract import DEVICE, LM_DTYPE, Backend, LMDtype
from vsae_jax.config.fields import REQUIRED, check_at_least, check_below, flag
from vsae_jax.config.opening import (
    ACTIVATIONS,
    BACKEND,
    LAYER,
    MODEL_DIFFERS,
    OpenOptions,
)
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class EvalConfig(OpenOptions):
    """Evaluates trained runs, or autoencoders in the files of another library, with the
    language model in the loop on held-out text.

    python -m vsae_jax.evaluate --run=runs/grid --evals=core,absorption
    """

    run: str = flag(
        "run folder, a grid's folder, or a folder of any format that convert reads",
        "",
        default_help=REQUIRED,
    )
    evals: str = flag(
        "comma list of core, sparse_probing, scr, tpp, absorption, stability and "
        "predictability",
        "core",
    )
    model: str = flag("hub id or local folder; unset: the manifest's", "")
    revision: str = flag("hub revision; unset: the manifest's", "")
    model_differs: bool = flag(MODEL_DIFFERS, False)
    layer: int | None = flag(LAYER)
    backend: Backend = flag(BACKEND, "auto")
    lm_dtype: LMDtype = flag(LM_DTYPE, "auto")
    device: str = flag(DEVICE, "auto")
    activations: str = flag(ACTIVATIONS, "")
    text: str = flag(
        "evaluate on this .jsonl, .txt or .parquet instead of held-out contexts", ""
    )
    text_column: str = flag("column of --text and --labelled with the text", "text")
    labelled: str = flag(
        "comma list of labelled .jsonl files, or of SAEBench's sets: ag_news, "
        "amazon_reviews, bias_in_bios, europarl, github-code",
        "",
    )
    label_column: str = flag(
        "column of --labelled with the label; a comma list has one per set", "label"
    )
    attribute_column: str = flag(
        "column of --labelled with an attribute of two values, for scr; a comma list "
        "has one per set",
        "",
    )
    train_size: int = flag("most texts to train a probe on", 4000)
    test_size: int = flag("most texts to test a probe on", 1000)
    seed: int = flag("seed of samples and probes", 42)
    probe_seeds: int = flag(
        "seeds of probes and of their samples, from --seed on; scores on labelled "
        "texts are means over them, the texts those of --seed",
        1,
    )
    absorption_words: int | None = flag(
        "most words that absorption asks about, drawn by --seed; unset: the vocabulary",
        None,
    )
    saebench_compatible: bool = flag("SAEBench 0.6's numbers, bugs included", False)
    quirks: str = flag("comma list of some of those bugs, to include only them", "")
    saebench_json: bool = flag("also write files in SAEBench's own schema", False)
    only_missing: bool = flag(
        "leave out arms that have a result of each of --evals, of as many "
        "--probe_seeds, whatever other flags it was made with; with stability, which "
        "compares arms, all or none",
        False,
    )
    num_tokens: int = flag("most tokens to evaluate on", 409_600)
    batch_size: int = flag("contexts in a forward pass", 16)

    def __post_init__(self):
        check_at_least(self, 1, "num_tokens", "batch_size", "probe_seeds")
        check_at_least(self, 0, "layer", "seed")
        check_at_least(self, 8, "train_size", "test_size")
        check_at_least(self, 100, "absorption_words")
        check_below(self, 2**32, "seed")
        if not self.run:
            raise UserError("--run is not set; name a run folder or a grid's folder")
