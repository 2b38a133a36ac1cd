"""Evaluations: each takes a `Subject` and returns what its JSON file holds."""

from vsae_jax.runs.opening import Subject

__all__ = ["Subject"]
