"""The special tokens of chattrain's chat format, with nanochat's names."""

from __future__ import annotations

import tiktoken

from chattrain.errors import UserError

BOS = "<|bos|>"  # the first token of every document
USER_START, USER_END = "<|user_start|>", "<|user_end|>"
ASSISTANT_START, ASSISTANT_END = "<|assistant_start|>", "<|assistant_end|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"  # the assistant calls the Python tool
OUTPUT_START, OUTPUT_END = "<|output_start|>", "<|output_end|>"  # the tool answers
SPECIAL_TOKENS = (BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END)


def require_special_tokens(encoding: tiktoken.Encoding) -> None:
    """Raises UserError if the encoding lacks any of SPECIAL_TOKENS."""
    missing = [name for name in SPECIAL_TOKENS if name not in encoding._special_tokens]
    if missing:
        raise UserError(
            f"the tokenizer lacks the special tokens {', '.join(missing)}; chattrain needs all of {', '.join(SPECIAL_TOKENS)}"
        )
