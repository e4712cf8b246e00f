"""Collators: row indices to batches. `_target_` in conf/collator/*.yaml and in users' own parts refers to these names."""

from chattrain.data.collators.base import EMPTY, Collator, Counts, SourceCounts
from chattrain.data.collators.conversations import BestFit, Conversations, Padded
from chattrain.data.collators.packed import Packed

__all__ = ["EMPTY", "BestFit", "Collator", "Conversations", "Counts", "Packed", "Padded", "SourceCounts"]
