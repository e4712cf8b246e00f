"""Tokenised documents made by hand, for tests of what is built on them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from chattrain.chat import Kind
from chattrain.data.cache import TokenizedSource
from chattrain.data.loss_weights import last_turn


def tokenized(name: str, tokens, kinds, offsets, turns=None, record_indices=None) -> TokenizedSource:
    """A source of documents tokens[offsets[i] : offsets[i + 1]], with their kinds and turns (None: one turn each)."""
    kinds, offsets = np.asarray(kinds, np.uint8), np.asarray(offsets)
    turns = np.zeros(len(kinds), np.uint16) if turns is None else np.asarray(turns, np.uint16)
    spans = [slice(a, b) for a, b in pairwise(offsets)]
    replies = kinds == Kind.ASSISTANT
    of_last = [replies[s] & (turns[s] == last_turn(kinds[s], turns[s])) for s in spans]
    return TokenizedSource(
        name=name,
        tokens=np.asarray(tokens, np.uint16),
        kinds=kinds,
        turns=turns,
        offsets=offsets,
        num_assistant=np.array([replies[s].sum() for s in spans], np.int64),
        num_last_assistant=np.array([last.sum() for last in of_last], np.int64),
        num_off=np.array([(kinds[s] & Kind.OFF > 0).sum() for s in spans], np.int64),
        first_reply=np.array([int(np.argmax(replies[s])) if replies[s].any() else len(kinds[s]) for s in spans], np.int64),
        record_indices=np.arange(len(spans)) if record_indices is None else np.asarray(record_indices),
        skipped=0,
        content_hash=name,
    )
