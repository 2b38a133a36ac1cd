"""Evaluations: each takes a `Subject` and returns what its JSON file holds."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vsae_jax.lm import LanguageModel
from vsae_jax.runs import Run


class Subject(NamedTuple):
    """What is evaluated: a run, its language model and held-out contexts.

    tokens: `[contexts, context_length]`. config: what goes beside every result.
    """

    run: Run
    lm: LanguageModel
    tokens: Int[np.ndarray, "contexts time"]
    batch_size: int
    config: dict[str, Any]
