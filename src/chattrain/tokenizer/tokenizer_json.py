"""Hugging Face's `tokenizer.json`, as far as it says what a tiktoken encoding says: byte-level BPE with a split pattern."""

from __future__ import annotations

from typing import Any

import tiktoken

from chattrain.errors import UserError
from chattrain.tokenizer.special_tokens import require_special_tokens


def write(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """The content of a `tokenizer.json` that gives the ids of the encoding for every text, and its special tokens.

    Other than there, a special token's name in a text becomes that token. The pattern stands as it is: Oniguruma, which
    reads it there, and Rust's engine, which reads it here, know the same letters, numbers and spaces (a test asks for
    every code point). Raises UserError where an ordinary token is spelled like a special one.
    """
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    vocab = {_spell(token): rank for token, rank in _by_rank(ranks)}
    twice = sorted(vocab.keys() & special.keys())
    if twice:
        raise UserError(
            f"tokenizer.json cannot hold an ordinary token spelled like the special token {twice[0]}; train the "
            "tokenizer on texts without the names of special tokens"
        )
    if sorted([*ranks.values(), *special.values()]) != list(range(len(vocab) + len(special))):
        vocab |= special  # where ids are unused, added tokens that the vocabulary lacks would be counted anew
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name, i) for name, i in _by_rank(special)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False},
                _byte_level(),
            ],
        },
        "post_processor": None,
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": _merges(ranks),
        },
    }


def read(content: dict[str, Any]) -> tiktoken.Encoding | None:
    """The inverse of `write`: an equal encoding. None where no tiktoken encoding gives the file's ids.

    So is, too, a file without chattrain's special tokens. A file that transformers loaded and saved again is read.
    """
    try:
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        ranks = {_bytes(text): i for text, i in content["model"]["vocab"].items() if text not in special}
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        if not _is_sound(ranks, special):
            return None
        encoding = tiktoken.Encoding(name="chattrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        require_special_tokens(encoding)
        return encoding if _what_decides(write(encoding)) == _what_decides(content) else None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, UserError):
        return None


def _is_sound(ranks: dict[bytes, int], special: dict[str, int]) -> bool:
    """Every byte has a token and every token an id of its own: what tiktoken takes for granted."""
    ids = [*ranks.values(), *special.values()]
    bytes_known = all(bytes([b]) in ranks for b in range(256))
    return bytes_known and len(set(ids)) == len(ids) and all(type(i) is int and 0 <= i < 2**32 - 1 for i in ids)


def _what_decides(content: dict[str, Any]) -> dict[str, Any]:
    """The content without what decides neither ids nor text: the places that tokens are said to have, the order of one
    token's merges, and the cut and the filling, which transformers sets with each call."""
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    after = content.get("post_processor") or {"type": "ByteLevel"}
    adds_nothing = after["type"] == "ByteLevel" or (after["type"] == "TemplateProcessing" and after["special_tokens"] == {})
    model = content["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return {
        "added_tokens": sorted(content["added_tokens"], key=lambda token: token["id"]),
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": [content["pre_tokenizer"]["type"], split, {**byte_level, "trim_offsets": True}],
        "post_processor": None if adds_nothing else after,
        "decoder": content["decoder"]["type"],
        "model": {**model, "merges": sorted(merges), "ranks of merges": [model["vocab"][a + b] for a, b in merges]},
    }


def _by_rank(ids: dict[Any, int]) -> list[tuple[Any, int]]:
    return sorted(ids.items(), key=lambda item: item[1])


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _added(name: str, i: int) -> dict[str, Any]:
    return {
        "id": i,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Every split of a token into two tokens, lowest rank first: what tiktoken merges, in its order.

    tiktoken merges equal ranks from left to right, whatever their halves; a list puts the halves in an order too, and any
    will do: both engines build a token always from the same two halves, those that its own bytes alone end up in.

    >>> _merges({b"a": 0, b"b": 1, b"aba": 4, b"ab": 2, b"ba": 3})
    [['a', 'b'], ['b', 'a'], ['a', 'ba'], ['ab', 'a']]
    """
    splits = ((token[:i], token[i:]) for token, _ in _by_rank(ranks) for i in range(1, len(token)))
    return [[_spell(left), _spell(right)] for left, right in splits if left in ranks and right in ranks]


def _letter_of_byte() -> dict[int, str]:
    """GPT-2's letter for each byte: the byte's own where it prints, else the next from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printing))
    return {b: chr(b) for b in printing} | {b: chr(0x100 + i) for i, b in enumerate(others)}


LETTER_OF_BYTE = _letter_of_byte()
BYTE_OF_LETTER = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}


def _spell(token: bytes) -> str:
    """The token in letters.

    >>> _spell(b" a\\n\\xc3")
    'ĠaĊÃ'
    """
    return token.decode("latin-1").translate(LETTER_OF_BYTE)


def _bytes(spelled: str) -> bytes:
    return bytes(BYTE_OF_LETTER[letter] for letter in spelled)
