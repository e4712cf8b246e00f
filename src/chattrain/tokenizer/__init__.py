"""Text to token ids and back: chattrain's tokenizer, nanochat's files, Hugging Face tokenizers."""

from chattrain.tokenizer.huggingface import HFTokenizer
from chattrain.tokenizer.native import Tokenizer
from chattrain.tokenizer.special_tokens import SPECIAL_TOKENS

AnyTokenizer = Tokenizer | HFTokenizer  # what `Tokenizer.load` returns: they have the same methods

__all__ = ["SPECIAL_TOKENS", "AnyTokenizer", "HFTokenizer", "Tokenizer"]
