"""Which validation documents are also trained on, exactly or nearly: a low validation loss then shows memory, not skill.

Texts are compared in lower case, without punctuation, word by word. Two are near copies if they share 70 % of the shingles (eight
words in a row) that either has: Jaccard's measure. MinHash finds the candidates without comparing each document with each: under
a random hash function two sets have the same smallest hash with a probability equal to their measure (Broder 1997,
https://doi.org/10.1109/SEQUEN.1997.666900).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from chattrain.data.cache import TokenizedSource

VERSION = 1  # part of the cache's key; raised when the counts change
WORDS = 8  # of a shingle
NEAR = 0.7  # Jaccard's measure of near copies, at least
BANDS = 8  # pairs of smallest hashes; one that two documents share makes a candidate, which 99.5 % of those at NEAR do
CANDIDATES = 8  # training documents at most that a validation document is compared with
EDGE = 64  # words at either end of a longer document that are compared, which bounds the time for a document
EDGE_CHARS, EDGE_TOKENS = 800, 512  # that hold these words
BLOCK = 2048  # documents that are hashed at a time
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(WORDS)], np.uint64)
_SPECIAL = re.compile(r"<[|｜][^|｜]*[|｜]>")  # tokens of the chat format
_BETWEEN_WORDS = re.compile(r"(?:[^\w+*/=<>^%]|_)+")  # what tells 2 + 2 from 2 * 2 is no punctuation
_IN_ASCII = {i: " " for i in range(128) if _BETWEEN_WORDS.match(chr(i))}


class Overlap(NamedTuple):
    """Validation documents, and how many of them are copies of training documents."""

    documents: int
    exact: int
    near: int  # besides the exact ones


def overlap(train: list[TokenizedSource], val: list[TokenizedSource], decode: Callable[[list[int]], str]) -> Overlap:
    """Compare the validation documents with all training documents. Time is linear in both; memory holds the former."""
    from rich.console import Console
    from rich.progress import track

    held = [document for source in val for document in _documents(source, decode)]
    by_key: dict[int, list[int]] = {}  # hash of a whole text, or of a band -> indices in `held`
    for i, (_, keys) in enumerate(_with_keys(held)):
        for key in keys:
            by_key.setdefault(key, []).append(i)
    exact, near, compared = set(), set(), np.zeros(len(held), dtype=int)
    for source in track(
        train, "comparing validation and training", disable=not sys.stderr.isatty(), transient=True, console=Console(stderr=True)
    ):
        for document, keys in _with_keys(_documents(source, decode)):
            found = {i for key in keys for i in by_key.get(key, ())}
            exact.update(i for i in found if np.array_equal(document, held[i]))
            for i in found - near - exact:
                if compared[i] < CANDIDATES:
                    compared[i] += 1
                    if _jaccard(document, held[i]) >= NEAR:
                        near.add(i)
    return Overlap(len(held), len(exact), len(near - exact))


def words_of(text: str) -> np.ndarray:
    """(words,) int64: a hash of each word, without case, punctuation and special tokens. It holds for this process only.

    >>> np.array_equal(words_of("<|bos|>Well, WELL!"), words_of("well well"))
    True
    """
    text = _SPECIAL.sub(" ", text.lower())
    words = (text.translate(_IN_ASCII) if text.isascii() else _BETWEEN_WORDS.sub(" ", text)).split()
    return np.fromiter(map(hash, words), np.int64, len(words))


def _documents(source: TokenizedSource, decode: Callable[[list[int]], str]) -> Iterator[np.ndarray]:
    for i in range(len(source)):
        if i % BLOCK == 0:
            source.release()
        tokens = source.tokens[source.offsets[i] : source.offsets[i + 1]].tolist()
        if len(tokens) > 2 * EDGE_TOKENS:
            tokens = tokens[:EDGE_TOKENS] + tokens[-EDGE_TOKENS:]
        text = decode(tokens)
        words = words_of(text if len(text) <= 2 * EDGE_CHARS else f"{text[:EDGE_CHARS]} {text[-EDGE_CHARS:]}")
        yield words if len(words) <= 2 * EDGE else np.concatenate([words[:EDGE], words[-EDGE:]])


def _with_keys(documents: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Each document with the hash of its text and those of its bands. One without a word has none."""
    documents = iter(documents)
    while block := list(islice(documents, BLOCK)):
        bands = iter(_bands([document for document in block if len(document)]).tolist())
        for document in block:
            yield document, [hash(document.tobytes()), *next(bands)] if len(document) else []


def _bands(documents: list[np.ndarray]) -> np.ndarray:
    """(documents, BANDS) uint64: each a hash of two smallest hashes of the document's shingles, different for each band."""
    if not documents:
        return np.empty((0, BANDS), np.uint64)
    shingles = [_shingles(document) for document in documents]
    starts = np.cumsum([0, *map(len, shingles)])[:-1]
    whole, rng = np.concatenate(shingles), np.random.default_rng(0)
    smallest = []
    for multiplier in rng.integers(1 << 63, size=2 * BANDS, dtype=np.uint64) | np.uint64(1):
        mixed = whole * multiplier
        smallest.append(np.minimum.reduceat(mixed ^ (mixed >> np.uint64(29)), starts))
    first, second = np.array(smallest).reshape(2, BANDS, -1)
    return (first * np.uint64(0x9E3779B97F4A7C15) + second + np.arange(BANDS, dtype=np.uint64)[:, None]).T


def _shingles(words: np.ndarray) -> np.ndarray:
    """(max(1, words - WORDS + 1),) uint64: a hash of each WORDS words in a row, or of all words where there are fewer."""
    size = min(WORDS, len(words))
    hashes = words.view(np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(hashes, size)
    return rows @ _POWERS[:size]


def _jaccard(one: np.ndarray, two: np.ndarray) -> float:
    shared = len(np.intersect1d(_shingles(one), _shingles(two)))
    return shared / (len(np.unique(_shingles(one))) + len(np.unique(_shingles(two))) - shared)
