"""Figures from the files of run folders: a module for each kind, one style for all.

A figure is a function of arms that yields `(file name without suffix, Figure)` pairs.
The modules need matplotlib; what draws imports them only when it draws.
"""

from vsae_jax.system.errors import missing_extra

try:
    import matplotlib  # noqa: F401
except ImportError:
    raise missing_extra("matplotlib", extra="analysis") from None
