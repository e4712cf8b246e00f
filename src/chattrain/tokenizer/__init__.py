"""Text to token ids and back: chattrain's tokenizer, nanochat's files, Hugging Face tokenizers."""

from chattrain.tokenizer.native import Tokenizer
from chattrain.tokenizer.special_tokens import SPECIAL_TOKENS

__all__ = ["SPECIAL_TOKENS", "Tokenizer"]
