"""Evaluations: each takes `Subject`s and returns what their JSON files hold."""

from vsae_jax.runs.opening import Subject

__all__ = ["Subject"]
