"""Figures from the files of run folders: one module a kind, one style for all.

A figure is a function of arms that gives `(file name without suffix, Figure)` pairs.
They need matplotlib; what draws imports them only then.
"""

from vsae_jax.system.errors import missing_extra

try:
    import matplotlib  # noqa: F401
except ImportError:
    raise missing_extra("matplotlib", extra="analysis") from None
