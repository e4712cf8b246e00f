"""The tokenizer of any Hugging Face model, with the interface of `Tokenizer` (extra `hf`)."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from chattrain.errors import UserError
from chattrain.storage.files import read_json
from chattrain.tokenizer.unicode import well_formed

# The files that AutoTokenizer reads. It takes the class from config.json if tokenizer_config.json does not name it.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "config.json",
    "generation_config.json",
)


CONTROL = re.compile(r"<[^\w\s/].*>")  # <|im_start|> and the like, but no tag such as <think>
NO_LIMIT = 1 << 60  # tokens of a text; rows are cut after it is tokenised
MOST_TOKENS = 1 << 24  # a table of all tokens is kept; the largest vocabularies have a million
FINGERPRINT_VERSION = 1  # raised when the ids of a text change; the mask belongs to the version of chat/template.py


class HFTokenizer:
    """A fast Hugging Face tokenizer with the interface of `Tokenizer`. Conversations are rendered with its chat template.

    Raises UserError if the extra is not installed, the files cannot be read, or the tokenizer is not a fast one (the loss mask
    needs the character offsets of each token, which only fast tokenizers give).
    """

    def __init__(self, folder: Path):
        self.source = Path(folder)
        self.backend = _load(self.source)
        self._plain = _without_postprocessing(self.backend)
        self.chat_template = self.backend.chat_template
        special = {str(t) for t in self.backend.added_tokens_decoder.values() if t.special}
        self.special_texts = sorted((special | set(self.backend.all_special_tokens)) - {""})
        self.bos_text, self.eos_text = self.backend.bos_token, self.backend.eos_token
        ids = {*self.backend.get_vocab().values(), *self.backend.added_tokens_decoder}
        self.vocab_size: int = max([len(self.backend), *(i + 1 for i in ids)])
        if self.vocab_size > MOST_TOKENS:
            raise UserError(f"the tokenizer in {folder} has the id {self.vocab_size - 1:,}; {MOST_TOKENS:,} ids are the most")

    @property
    def pad_id(self) -> int:
        """The token that rows are padded with. Padding carries no loss."""
        backend = self.backend
        ids = (backend.pad_token_id, backend.eos_token_id, *sorted(self.eos_ids), 0)
        return next(i for i in ids if i is not None)

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a text: the tokenizer's own, and those of generation_config.json."""
        return {self.backend.eos_token_id, *_eos_of_generation(self.source)} - {None}

    @property
    def eos_texts(self) -> list[str]:
        """The texts of `eos_ids`, those that are special tokens."""
        texts = [self.backend.convert_ids_to_tokens(i) for i in sorted(self.eos_ids)]
        return [text for text in texts if text in self.special_texts]

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds texts that are encoded as a token that controls a conversation: special tokens, and those that the chat template
        writes although the tokenizer does not call them special, such as DeepSeek's `<｜User｜>`."""
        added = [str(token) for token in self.backend.added_tokens_decoder.values()]
        controls = {token for token in added if CONTROL.fullmatch(token) and token in str(self.chat_template or "")}
        texts = sorted(controls | set(self.special_texts), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def special(self, name: str) -> int:
        """Id of a special token. Raises KeyError for any other text."""
        if name not in self.special_texts:
            raise KeyError(name)
        return self.backend.convert_tokens_to_ids(name)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. No tokens are added, and the text of a special token is encoded as ordinary text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = list(map(well_formed, texts))
        return self.backend(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []

    def encode_rendered(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(ids, character offsets (begin, end) of each token) of rendered texts, in which special tokens are encoded as such.

        The texts must be well-formed (`well_formed`).
        """
        return [(e.ids, e.offsets) for e in self._plain.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: bytes of text that each token stands for, for bits per byte; 0 for special tokens and unused ids."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        special = {self.backend.convert_tokens_to_ids(text) for text in self.special_texts}
        added = {i: str(token) for i, token in self.backend.added_tokens_decoder.items()}
        characters_are_bytes = "ByteLevel" in json.dumps(json.loads(self._backend_text())["decoder"])
        for token, i in self.backend.get_vocab().items():
            if i in special:
                continue
            if i in added:
                sizes[i] = len(added[i].encode())
            elif characters_are_bytes:
                sizes[i] = len(token)
            else:
                sizes[i] = 1 if _is_byte(token) else len(token.replace("\u2581", " ").encode())
        return sizes

    def fingerprint(self) -> str:
        """Hash of everything that ids and loss masks depend on; part of the token cache's key."""
        inputs = [
            FINGERPRINT_VERSION,
            self._backend_text(),
            self.backend.chat_template,
            self.special_texts,
            self.bos_text,
            self.eos_text,
        ]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Copy the files that the tokenizer was loaded from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)

    def _backend_text(self) -> str:
        return self.backend.backend_tokenizer.to_str()


def _load(folder: Path):
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            f"the tokenizer in {folder} is a Hugging Face model's, which needs transformers: pip install 'chattrain[hf]'"
        ) from None
    try:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend.model_max_length = NO_LIMIT
        backend("text")
    except Exception as error:  # transformers raises many types of error for files that it does not understand
        raise UserError(f"the tokenizer in {folder} cannot be read by transformers: {error}") from error
    if not backend.is_fast:
        raise UserError(
            f"the tokenizer in {folder} has no fast form (tokenizer.json), which gives each token's offsets in the "
            "text; save one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return backend


def _without_postprocessing(backend):
    """A copy of the fast tokenizer without truncation, padding and post-processor. A post-processor may exclude a token's leading
    space from its offsets; `encode_rendered` needs the offsets of all characters."""
    from tokenizers import Tokenizer

    content = json.loads(backend.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(content | {"post_processor": None, "truncation": None, "padding": None}))


def _eos_of_generation(folder: Path) -> set[int]:
    """eos_token_id of generation_config.json: no, one or several ids. Raises UserError if it is anything else."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return set()
    ids = read_json(file).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int and 0 <= i < MOST_TOKENS for i in ids):
        raise UserError(f"{file}: eos_token_id={ids} must be an id or a list of ids")
    return set(ids)


def _is_byte(token: str) -> bool:
    """Whether the token stands for one byte, in SentencePiece's notation.

    >>> _is_byte("<0x0A>"), _is_byte("<0xbad>")
    (True, False)
    """
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
