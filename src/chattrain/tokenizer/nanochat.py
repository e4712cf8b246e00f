"""Read nanochat's tokenizer files, `tokenizer.pkl` and (if it exists) `token_bytes.pt`, without running code from them.

A restricted unpickler accepts tiktoken's Encoding and plain values. It refuses any other class and names it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import tiktoken

from chattrain.errors import UserError
from chattrain.tokenizer.special_tokens import require_special_tokens


def read_encoding(folder: Path) -> tiktoken.Encoding:
    """The encoding in a folder with `tokenizer.pkl`.

    Raises UserError if the pickle is damaged or refers to classes that a tokenizer does not need, or if `token_bytes.pt` belongs
    to another tokenizer.
    """
    file = folder / "tokenizer.pkl"
    encoding = _encoding(file, _unpickle(file))
    try:
        require_special_tokens(encoding)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if (folder / "token_bytes.pt").is_file():
        _check_token_bytes(folder / "token_bytes.pt", encoding)
    return encoding


class _Recorded:
    """Replaces tiktoken's Encoding while unpickling: stores the state and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Latin1:
    """Replaces `_codecs.encode`, which pickles of protocol 2 use for bytes. Encodes latin1 only; has no attributes to set."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise ValueError("_codecs.encode of anything but bytes written as latin1")
        return text.encode("latin-1")


class _Unpickler(pickle.Unpickler):
    """Accepts an Encoding (as _Recorded) and plain values. Raises UserError that names any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("tiktoken.core", "Encoding"), ("tiktoken", "Encoding")):
            return _Recorded
        if (module, name) == ("_codecs", "encode"):
            return _Latin1()
        raise UserError(f"asks for {module}.{name}, which a tokenizer does not need: refused")

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("asks for an object outside the file, which a tokenizer does not need: refused")


def _unpickle(file: Path) -> Any:
    """The pickled state of the Encoding. Raises UserError if the file cannot be read or contains anything else."""
    try:
        raw = file.read_bytes()
        _scan(raw)
        loaded = _Unpickler(io.BytesIO(raw)).load()
    except UserError as error:
        raise UserError(f"{file} {error}") from error
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; name the tokenizer's folder with tokenizer.path=<folder>"
        ) from error
    except Exception as error:  # a damaged pickle can raise almost any error
        raise UserError(f"{file} is no pickle of a tokenizer: {error!r}; take the one that nanochat saved") from error
    if type(loaded) is not _Recorded:
        raise UserError(f"{file} holds no tokenizer but a {type(loaded).__name__}")
    return loaded.state


def _scan(raw: bytes) -> None:
    """Raises for opcodes that the unpickler runs without calling find_class: extension codes, which come from a cache, and memo
    indices beyond the size of the file, for which it would allocate memory."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name.startswith("EXT"):
            raise UserError("asks for an extension code, which a tokenizer does not need: refused")
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(raw):
            raise ValueError(f"an object is stored at memo index {argument}")


def _encoding(file: Path, state: Any) -> tiktoken.Encoding:
    """A new Encoding from the pickled state. Raises UserError if a value is missing, of another type, or contradictory."""
    if isinstance(state, str):
        raise UserError(f"{file} names tiktoken's encoding {state!r} instead of holding one; save the encoding itself")
    if not isinstance(state, dict) or not {"pat_str", "mergeable_ranks", "special_tokens"} <= state.keys():
        raise UserError(f"{file} holds no pattern, ranks and special tokens")
    pattern, ranks, special = state["pat_str"], state["mergeable_ranks"], state["special_tokens"]
    if not isinstance(pattern, str) or not _is_table(ranks, bytes) or not _is_table(special, str):
        raise UserError(f"{file}: pattern, ranks or special tokens are of another type than a tokenizer's")
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) != len(ids) or min(ids, default=0) < 0:
        raise UserError(f"{file}: two tokens have one id, or an id is below 0")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{file}: {len(missing)} of the 256 single bytes have no token")
    try:
        return tiktoken.Encoding(name="chattrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except Exception as error:  # mostly about the regular expression
        raise UserError(f"{file}: tiktoken refuses it: {error}") from error


def _is_table(table: Any, key: type) -> bool:
    return isinstance(table, dict) and all(type(k) is key and type(v) is int for k, v in table.items())


def _check_token_bytes(file: Path, encoding: tiktoken.Encoding) -> None:
    """Raises UserError if `token_bytes.pt` does not fit the encoding.

    nanochat counts the bytes of the decoded token: 3 for each U+FFFD that replaces part of a character, and 0 if the text is that
    of a special token.
    """
    from chattrain.storage.tensors import is_plain_tensor, read_torch_file

    saved, size = read_torch_file(file), encoding.n_vocab
    if not is_plain_tensor(saved) or str(saved.dtype) not in ("torch.int32", "torch.int64") or saved.shape != (size,):
        raise UserError(f"{file} holds no {size} whole numbers, one a token: it belongs to another tokenizer")
    counts = [0] * size
    for token in encoding._mergeable_ranks.values():
        text = encoding.decode([token])
        counts[token] = 0 if text in encoding._special_tokens else len(text.encode())
    if saved.tolist() != counts:
        raise UserError(f"{file} counts other bytes than the tokens beside it have: it belongs to another tokenizer")
