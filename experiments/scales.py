"""The study's five sizes: what is trained, on how much, how often.

* `smoke`: minutes on two cores, from the bundled model and its stories; shows that all
  of it runs, and nothing about the question.
* `standin`: hours on two cores, with any small model and any stories.
* `real`: the paper's questions on a language model from disk, such as SmolLM2-135M,
  with your own text: many hours of two cores, which may be cut into pieces.
* `large`: the same at the paper's shapes and lengths, on a large GPU.
* `paper`: Pythia-70M, TinyStories, the paper's shapes; needs a network and a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from vsae_jax.config.fields import REQUIRED


@dataclass(frozen=True)
class Text:
    """What is read: "" is the bundled model, and its stories.

    max_norm_multiple: as in train, for every arm. tuning_documents: how many of the
    last documents are set aside for the search for learning rates; none of the bundled
    stories, which are all trained on.
    """

    model: str = ""
    backend: str = "jax"
    dataset: str = ""
    layers: tuple[int, ...] = (2,)
    num_tokens: int = 390_000
    max_norm_multiple: float | None = None
    tuning_documents: int = 0


@dataclass(frozen=True)
class Figures:
    """The paper's own comparison: presets by layer, variants, sizes, k.
    released_to_the_letter: preset `released` at its own d_sae, steps and batch.
    released_k: of that preset; `k`, unset. layers: those of the text, unset."""

    d_sae: tuple[int, ...]
    k: tuple[int, ...]
    seeds: int
    steps: int
    batch_size: int
    feature_tokens: int
    released_to_the_letter: bool = False
    released_k: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Controlled:
    """Arms that differ in one switch: same rows, initial weights and schedule.

    norms: root mean square norms of the scaled rows, in sqrt(d_model); 0 is norm 1.
    lrs: learning rates that every kind of arm is tried with.
    smaller: d_sae of TopK arms with fewer latents.
    kinds: those of the ablation; all, unset. crossed: switches of the full cross.
    norm: that of all but the map; the one that the map recommends, unset.
    tuning_steps: of the search for learning rates; `steps`, unset.
    rates: where `lrs` is one, the kinds that have another.
    main_seeds: of the main arms (ablation.MAIN); `seeds`, unset.
    """

    d_sae: int
    k: int
    other_k: tuple[int, ...]
    smaller: tuple[int, ...]
    seeds: int
    steps: int
    batch_size: int
    lrs: tuple[float, ...]
    norms: tuple[float, ...]
    map_betas: tuple[float, ...]
    map_lrs: tuple[float, ...]
    map_steps: int
    map_seeds: int
    cross_steps: int
    cross_seeds: int
    kinds: tuple[str, ...] = ()
    crossed: tuple[str, ...] = ("noise", "relu", "decoder", "auxk", "penalty")
    norm: float = 0.0
    tuning_steps: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    main_seeds: int = 0


@dataclass(frozen=True)
class Stability:
    """Whether latents come back with another seed, besides the ablation's arms.

    tokens: held-out ones that latents fire on. lengths: further training lengths of
    TopK and the vSAE. l1: of a ReLU SAE, in shares of the norm. noises: standard
    deviations beside 1. noise_at: other places of the noise. batch_topk: those variants
    too.
    """

    tokens: int
    lengths: tuple[int, ...] = ()
    l1: tuple[float, ...] = ()
    noises: tuple[float, ...] = ()
    noise_at: tuple[str, ...] = ()
    batch_topk: bool = False


@dataclass(frozen=True)
class Truth:
    """Synthetic rows from known features. kinds: of arms; those of the part, unset."""

    d_model: int
    n_features: int
    group: int
    active: int
    n_rows: int
    steps: int
    batch_size: int
    seeds: int
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Every variant on known features at one L0; `truth.kinds` are variants.

    norms: root mean square norms of the scaled rows, in sqrt(d_model).
    lrs: learning rates that each is tried with; a constant ratio apart.
    """

    truth: Truth
    norms: tuple[float, ...]
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Scale:
    """One size of the study. The numbers after the parts are of the evaluations.
    dtype: as in train, on a language model's rows. absorption_words: words that the
    language model is asked the first letters of; none where it does not know them.
    """

    text: Text
    figures: Figures
    controlled: Controlled
    stability: Stability
    truth: Truth
    family: Family
    eval_tokens: int
    train_size: int
    test_size: int
    samples: int
    dtype: Literal["auto", "bfloat16"] = "auto"
    absorption_words: int = 0


_SMALLEST_TRUTH = Truth(
    d_model=32,
    n_features=64,
    group=8,
    active=4,
    n_rows=20_000,
    steps=200,
    batch_size=64,
    seeds=2,
    kinds=("topk", "vsae"),
)
_SMALL_TRUTH = Truth(
    d_model=64,
    n_features=256,
    group=8,
    active=8,
    n_rows=500_000,
    steps=2000,
    batch_size=256,
    seeds=5,
)
# Two decades.
_FIVE_RATES = (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2)
# Some minutes of a large GPU; reads no language model.
_FAMILY_OF_A_GPU = Family(
    truth=Truth(
        d_model=128,
        n_features=512,
        group=8,
        active=16,
        n_rows=1_000_000,
        steps=3000,
        batch_size=1024,
        seeds=5,
    ),
    norms=(1.0, 3.0, 10.0),
    lrs=_FIVE_RATES,
)

SMOKE = Scale(
    text=Text(num_tokens=60_000),
    figures=Figures(
        d_sae=(256,), k=(16,), seeds=2, steps=120, batch_size=128, feature_tokens=3_000
    ),
    controlled=Controlled(
        d_sae=128,
        k=8,
        other_k=(),
        smaller=(64,),
        seeds=2,
        steps=80,
        batch_size=64,
        lrs=(3e-3,),
        norms=(0.0, 10.0),
        map_betas=(0.1,),
        map_lrs=(3e-3,),
        map_steps=60,
        map_seeds=2,
        cross_steps=20,
        cross_seeds=2,
        kinds=(
            "topk",
            "topk_noise",
            "topk_kl",
            "vsae",
            "vsae_no_noise",
            "vsae_no_penalty",
        ),
        crossed=("noise",),
    ),
    stability=Stability(tokens=3_000),
    truth=_SMALLEST_TRUTH,
    family=Family(
        truth=replace(_SMALLEST_TRUTH, steps=150, kinds=("topk", "relu", "vsae_topk")),
        norms=(10.0,),
        lrs=(1e-3, 1e-2),
    ),
    eval_tokens=3_000,
    train_size=160,
    test_size=40,
    samples=1_000,
)
STANDIN = Scale(
    text=Text(num_tokens=2_200_000, tuning_documents=600),
    figures=Figures(
        d_sae=(2048,),
        k=(32, 64),
        seeds=3,
        steps=2000,
        batch_size=1024,
        feature_tokens=100_000,
    ),
    controlled=Controlled(
        d_sae=512,
        k=32,
        other_k=(16, 64),
        smaller=(64, 128, 256),
        seeds=5,
        steps=1200,
        batch_size=256,
        lrs=(6e-4, 2e-3, 6e-3, 2e-2, 6e-2),
        norms=(0.0, 0.3, 1.0, 3.0, 10.0),
        map_betas=(0.0, 0.01, 0.1, 1.0),
        map_lrs=(1e-3, 4e-3),
        map_steps=600,
        map_seeds=3,
        cross_steps=300,
        cross_seeds=3,
    ),
    stability=Stability(
        tokens=40_000,
        lengths=(400, 3_600),
        l1=(0.03, 0.06, 0.1),
        noises=(0.3,),
        noise_at=("input", "kept"),
    ),
    truth=_SMALL_TRUTH,
    family=replace(_FAMILY_OF_A_GPU, truth=_SMALL_TRUTH),
    eval_tokens=25_000,
    train_size=1000,
    test_size=400,
    samples=10_000,
)
LARGE = Scale(
    text=Text(
        model=REQUIRED,
        dataset=REQUIRED,
        layers=(14, 7),
        num_tokens=2_200_000,
        max_norm_multiple=5.0,
        tuning_documents=600,
    ),
    figures=Figures(
        d_sae=(2304,),
        k=(64, 128, 256, 512),
        seeds=3,
        steps=20_000,
        batch_size=1024,
        feature_tokens=100_000,
        released_to_the_letter=True,
        layers=(14,),
    ),
    controlled=Controlled(
        d_sae=2304,
        k=64,
        other_k=(16, 32, 128),
        smaller=(288, 576, 1152),
        seeds=5,
        steps=6_000,
        batch_size=1024,
        lrs=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        norms=(0.0, 0.3, 1.0, 4.0, 12.0),
        map_betas=(0.0, 0.1, 1.0),
        map_lrs=(1e-3, 4e-3),
        map_steps=2_000,
        map_seeds=2,
        cross_steps=2_000,
        cross_seeds=3,
        norm=100.0,
        tuning_steps=3_000,
    ),
    stability=Stability(
        tokens=100_000,
        lengths=(2_000, 20_000),
        l1=(0.01, 0.03, 0.1),
        noises=(0.3, 3.0),
        noise_at=("input", "kept"),
        batch_topk=True,
    ),
    truth=Truth(
        d_model=128,
        n_features=512,
        group=8,
        active=8,
        n_rows=1_000_000,
        steps=5000,
        batch_size=512,
        seeds=5,
    ),
    family=_FAMILY_OF_A_GPU,
    eval_tokens=25_000,
    train_size=4000,
    test_size=1000,
    samples=10_000,
    absorption_words=10_000,
)
# About ten hours of two cores. The learning rates are those that the search of `large`
# found on the same model and block (experiments/results/large).
REAL = replace(
    LARGE,
    text=replace(LARGE.text, num_tokens=1_000_000),
    figures=replace(
        LARGE.figures,
        k=(64, 256),
        released_k=(64,),
        steps=2_000,
        feature_tokens=50_000,
    ),
    controlled=replace(
        LARGE.controlled,
        other_k=(16,),
        smaller=(1152,),
        seeds=3,
        main_seeds=5,
        steps=1_000,
        lrs=(1e-3,),
        rates={"topk_d-1152": 3e-3},
        norms=(1.0, 4.0),
        map_lrs=(1e-3,),
        map_betas=(0.1,),
        map_seeds=3,
        map_steps=400,
        cross_steps=300,
        kinds=(
            "topk",
            "topk_noise",
            "topk_kl",
            "topk_l1",
            "vsae",
            "vsae_no_noise",
            "vsae_no_penalty",
            "vsae_relu",
            "vsae_kl_selected",
            "vsae_beta-0.01",
            "vsae_beta-0.5",
        ),
        crossed=("noise", "relu", "penalty"),
    ),
    stability=Stability(
        tokens=40_000,
        lengths=(300, 3_000),
        l1=(0.03, 0.06),
        noises=(0.3,),
        noise_at=("input", "kept"),
    ),
    truth=STANDIN.truth,
    family=STANDIN.family,
    eval_tokens=16_384,
    train_size=1000,
    test_size=400,
    dtype="bfloat16",
    absorption_words=6_000,
)
PAPER = Scale(
    text=Text(
        model="EleutherAI/pythia-70m-deduped",
        dataset="roneneldan/TinyStories",
        layers=(0, 3),
        num_tokens=22_000_000,
    ),
    figures=Figures(
        d_sae=(2048, 8192),
        k=(64, 128, 256, 512),
        seeds=5,
        steps=20_000,
        batch_size=1024,
        feature_tokens=1_000_000,
    ),
    controlled=Controlled(
        d_sae=2048,
        k=64,
        other_k=(128, 256),
        smaller=(256, 512, 1024),
        seeds=5,
        steps=20_000,
        batch_size=1024,
        lrs=(2e-4, 6e-4, 1.8e-3),
        norms=(0.0, 0.3, 1.0, 3.0, 10.0),
        map_betas=(0.0, 0.01, 0.1, 1.0),
        map_lrs=(5e-4, 2e-3),
        map_steps=10_000,
        map_seeds=3,
        cross_steps=5_000,
        cross_seeds=3,
    ),
    stability=Stability(tokens=100_000),
    truth=Truth(
        d_model=256,
        n_features=2048,
        group=8,
        active=16,
        n_rows=2_000_000,
        steps=20_000,
        batch_size=1024,
        seeds=5,
    ),
    family=_FAMILY_OF_A_GPU,
    eval_tokens=400_000,
    train_size=4000,
    test_size=1000,
    samples=20_000,
)
ScaleName = Literal["smoke", "standin", "real", "large", "paper"]
SCALES: dict[ScaleName, Scale] = {
    "smoke": SMOKE,
    "standin": STANDIN,
    "real": REAL,
    "large": LARGE,
    "paper": PAPER,
}
