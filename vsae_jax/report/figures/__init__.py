"""Figures from the files of run folders: one module a kind, one style for all.

A figure is a function of arms that gives `(file name without suffix, Figure)` pairs.
They need matplotlib, which `vsae_jax.plots` imports only when it draws.
"""
