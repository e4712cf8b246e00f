"""chattrain's tokenizer: a tiktoken encoding with nanochat's special tokens, saved as text files."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from chattrain.errors import UserError
from chattrain.storage.files import read_json
from chattrain.tokenizer import tokenizer_json
from chattrain.tokenizer.huggingface import HFTokenizer
from chattrain.tokenizer.special_tokens import ASSISTANT_END, SPECIAL_TOKENS, require_special_tokens
from chattrain.tokenizer.unicode import well_formed

# GPT-4's split pattern with numbers in groups of at most two digits, as nanochat has it.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

RANKS_FILE, ENCODING_FILE = "ranks.tiktoken", "encoding.json"
FORMAT_VERSION = 1
PART_CHARS = 100_000  # a text that is too long for tiktoken is encoded in parts of this size


class Tokenizer:
    """A tiktoken encoding with the special tokens of a chat.

    `encode` treats all text as ordinary: the text of a special token is never encoded as that token. The ids of special tokens
    come from `special` only.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        require_special_tokens(encoding)
        self.encoding = encoding
        self.vocab_size: int = encoding.n_vocab
        self._special = {name: encoding._special_tokens[name] for name in SPECIAL_TOKENS}

    @property
    def pad_id(self) -> int:
        """The token that rows are padded with. Padding carries no loss."""
        return self._special[ASSISTANT_END]

    def special(self, name: str) -> int:
        """Id of a special token, such as `<|bos|>`. Raises KeyError for any other text."""
        return self._special[name]

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text."""
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:
            if not _is_panic(error) or len(text) <= PART_CHARS:
                raise
            parts = (text[i : i + PART_CHARS] for i in range(0, len(text), PART_CHARS))
            return [token for part in parts for token in self.encode(part)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts, on this thread: the token cache runs in several processes instead.

        tiktoken's own batch function hands every text to a pool of threads. For the short texts of conversations, that takes
        several times as long as the encoding itself.
        """
        try:
            return list(map(self.encoding.encode_ordinary, texts))
        except BaseException as error:
            if not _is_panic(error):
                raise
            return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Special tokens appear by their names, bytes that are not valid UTF-8 as U+FFFD."""
        return self.encoding.decode(list(ids))

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: bytes of text that each token stands for, for bits per byte; 0 for special tokens and unused ids.

        These are the token's own bytes. Decoding a token that is part of a character would give the three bytes of U+FFFD.
        """
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.encoding._mergeable_ranks.items():
            sizes[rank] = len(token)
        return sizes

    def fingerprint(self) -> str:
        """Hash of everything that ids depend on; part of the token cache's key."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self._ranks_text() + self._encoding_text().encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `ranks.tiktoken` (tiktoken's own text format) and `encoding.json` (pattern and special tokens)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RANKS_FILE).write_bytes(self._ranks_text())
        (folder / ENCODING_FILE).write_text(self._encoding_text())

    def _ranks_text(self) -> bytes:
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)

    def _encoding_text(self) -> str:
        spec = {
            "format_version": FORMAT_VERSION,
            "pattern": self.encoding._pat_str,
            "ranks_sha256": hashlib.sha256(self._ranks_text()).hexdigest(),
            "special_tokens": self.encoding._special_tokens,
        }
        return json.dumps(spec, indent=1) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer | HFTokenizer:
        """The tokenizer in a folder, or in its subfolder `tokenizer/`: saved by `save`, by nanochat, or of a Hugging Face model.

        A Hugging Face tokenizer that is not equal to a tiktoken encoding is returned as an `HFTokenizer`, with the same methods.
        Raises UserError if there is no tokenizer or one of its files is damaged.
        """
        folder = Path(folder)
        if (folder / "tokenizer").is_dir():
            folder = folder / "tokenizer"
        if (folder / ENCODING_FILE).is_file():
            return cls(_read_encoding(folder))
        if (folder / "tokenizer.pkl").is_file():
            from chattrain.tokenizer import nanochat

            return cls(nanochat.read_encoding(folder))
        file = folder / "tokenizer.json"
        if file.is_file() or (folder / "tokenizer_config.json").is_file():
            encoding = tokenizer_json.read(read_json(file)) if file.is_file() else None
            if encoding is not None:
                return cls(encoding)
            return HFTokenizer(folder)
        raise UserError(
            f"no tokenizer in {folder}: neither {ENCODING_FILE} and {RANKS_FILE}, nor nanochat's "
            "tokenizer.pkl, nor a Hugging Face tokenizer.json; give the tokenizer folder of a run's "
            "checkpoint"
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-pair encoding on the texts with rustbpe. `vocab_size` includes the special tokens.

        The result has fewer tokens if the texts contain too few different pairs. Raises UserError if vocab_size is less than
        256 + the number of special tokens.
        """
        import rustbpe

        ordinary = vocab_size - len(SPECIAL_TOKENS)
        if ordinary < 256:
            raise UserError(
                f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens need {256 + len(SPECIAL_TOKENS)}"
            )
        trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
        trainer.train_from_iterator(map(well_formed, texts), ordinary, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        return cls(_encoding(ranks, SPLIT_PATTERN, special))


def _is_panic(error: BaseException) -> bool:
    """Whether tiktoken's Rust code has panicked, as its regular expressions do for a million equal characters, which overflow the
    stack. The panic is a BaseException, not an Exception."""
    return type(error).__name__ == "PanicException"


def _read_encoding(folder: Path) -> tiktoken.Encoding:
    """The encoding that `save` wrote. Raises UserError if a file is missing or damaged."""
    try:
        spec = read_json(folder / ENCODING_FILE)
        raw = (folder / RANKS_FILE).read_bytes()
        if hashlib.sha256(raw).hexdigest() != spec["ranks_sha256"]:
            raise ValueError(f"{RANKS_FILE} has another checksum than {ENCODING_FILE} says")
        lines = raw.splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        pattern, special = spec["pattern"], spec["special_tokens"]
        if not isinstance(pattern, str) or not isinstance(special, dict) or not tokenizer_json.is_valid(ranks, special):
            raise ValueError("its pattern, ranks or special tokens are not those of a tokenizer")
        return _encoding(ranks, pattern, special)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _encoding(ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name="chattrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
