"""Convert between tiktoken encodings and Hugging Face's `tokenizer.json`: byte-level BPE with a split pattern."""

from __future__ import annotations

from typing import Any

import tiktoken

from chattrain.errors import UserError
from chattrain.tokenizer.special_tokens import require_special_tokens


def write(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """The content of a `tokenizer.json` that gives the same ids as the encoding for every text, and the same special tokens.

    One difference: Hugging Face encodes the name of a special token in a text as that token. The split pattern is copied
    unchanged. Hugging Face runs it with Oniguruma and tiktoken with Rust's engine; both agree on what is a letter, number or
    space (a test compares all code points). Raises UserError if an ordinary token is spelled like a special one.
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
        vocab |= special  # with gaps in the ids, added tokens that are not in the vocabulary would be renumbered
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
    """The inverse of `write`: an equal encoding. Also reads such a file after transformers has loaded and saved it.

    None if no tiktoken encoding gives the same ids as the file, or if it lacks chattrain's special tokens.
    """
    try:
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        ranks = {_bytes(text): i for text, i in content["model"]["vocab"].items() if text not in special}
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        if not is_valid(ranks, special):
            return None
        encoding = tiktoken.Encoding(name="chattrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        require_special_tokens(encoding)
        return encoding if _canonical(write(encoding)) == _canonical(content) else None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, UserError):
        return None


def is_valid(ranks: dict[bytes, int], special: dict[str, int]) -> bool:
    """Whether every byte has a token and every token has a unique id. tiktoken does not check this."""
    ids = [*ranks.values(), *special.values()]
    bytes_known = all(bytes([b]) in ranks for b in range(256))
    return bytes_known and len(set(ids)) == len(ids) and all(type(i) is int and 0 <= i < 2**32 - 1 for i in ids)


def _canonical(content: dict[str, Any]) -> dict[str, Any]:
    """The content without everything that affects neither ids nor text: offsets of tokens, the order of the merges that give the
    same token, and truncation and padding, which transformers sets with each call."""
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
    """Every split of a token into two tokens, in the order of the token's rank: the merges that tiktoken performs.

    For equal ranks tiktoken merges from left to right, whatever the two halves are, while this list also orders the splits of one
    token. That order does not matter: both engines always build a token from the same halves, those that its own bytes merge to.

    >>> _merges({b"a": 0, b"b": 1, b"aba": 4, b"ab": 2, b"ba": 3})
    [['a', 'b'], ['b', 'a'], ['a', 'ba'], ['ab', 'a']]
    """
    splits = ((token[:i], token[i:]) for token, _ in _by_rank(ranks) for i in range(1, len(token)))
    return [[_spell(left), _spell(right)] for left, right in splits if left in ranks and right in ranks]


def _letter_of_byte() -> dict[int, str]:
    """GPT-2's `bytes_to_unicode`: a printable byte is its own character, the others are numbered from U+0100."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printing))
    return {b: chr(b) for b in printing} | {b: chr(0x100 + i) for i, b in enumerate(others)}


LETTER_OF_BYTE = _letter_of_byte()
BYTE_OF_LETTER = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}


def _spell(token: bytes) -> str:
    """The token in GPT-2's letters.

    >>> _spell(b" a\\n\\xc3")
    'ĠaĊÃ'
    """
    return token.decode("latin-1").translate(LETTER_OF_BYTE)


def _bytes(spelled: str) -> bytes:
    return bytes(BYTE_OF_LETTER[letter] for letter in spelled)
