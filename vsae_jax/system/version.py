"""The version, of an installed package and of a folder on Python's path alike."""

VERSION = "0.1.0"
