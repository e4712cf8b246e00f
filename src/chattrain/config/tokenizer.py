"""The keys `tokenizer.*`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TokenizerConfig:
    path: str | None = None  # folder of a saved tokenizer; null: the checkpoint's, or a new one trained on the data
    vocab_size: int = 2048  # of a new tokenizer, special tokens included
    train_chars: int = 4_000_000  # characters of training data at most that a new tokenizer is trained on
