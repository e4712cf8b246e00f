"""The configuration as dataclasses, one file for each group of conf/. Imports no torch, so that errors appear at once."""

from chattrain.config.root import Config

__all__ = ["Config"]
