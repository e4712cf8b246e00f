"""What may be configured, mirroring conf/: a file a group. Imports no torch, so that a mistake is answered at once."""

from chattrain.config.root import Config

__all__ = ["Config"]
