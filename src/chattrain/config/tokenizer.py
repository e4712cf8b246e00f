"""The keys `tokenizer.*`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TokenizerConfig:
    path: str | None = None  # folder of a saved tokenizer; null: the checkpoint's, or trained on the data
    vocab_size: int = 2048  # tokens when one is trained, special tokens included
    train_chars: int = 4_000_000  # characters of the training data it is trained on, at most
