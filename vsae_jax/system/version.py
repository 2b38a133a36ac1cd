"""The version, for an installed package and for a folder on Python's path."""

VERSION = "0.1.0"
