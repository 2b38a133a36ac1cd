"""Evaluations: each takes `Subject`s and returns what their JSON files hold."""

from vsae_jax.runs.opening import Subject

__all__ = ["NAMES", "Subject"]

# All evaluations, in the order of the tables.
NAMES = (
    "core",
    "sparse_probing",
    "scr",
    "tpp",
    "absorption",
    "stability",
    "predictability",
)
