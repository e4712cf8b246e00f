"""Which validation documents are also trained on, exactly or nearly: a low validation loss then shows memory, not skill.

Texts are compared in lower case, without punctuation, word by word. Two are near copies if they share 70 % of the shingles (eight
words in a row) that either has: Jaccard's measure. MinHash finds the candidates without comparing each document with each: under
a random hash function two sets have the same smallest hash with a probability equal to their measure (Broder 1997,
https://doi.org/10.1109/SEQUEN.1997.666900).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from chattrain.data.cache import TokenizedSource

VERSION = 1  # part of the cache's key; raised when the counts change
WORDS = 8  # of a shingle
NEAR = 0.7  # Jaccard's measure of near copies, at least
BANDS, ROWS = 10, 3  # smallest hashes: two documents that share a whole band are compared, which 98 % of those at NEAR do
COMPARED = 256  # training documents at most that a validation document is compared with
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


class Sketch(NamedTuple):
    """What is compared of a document."""

    text: int  # hash of all its words
    shingles: np.ndarray  # (shingles,) uint64, sorted
    signature: np.ndarray  # (BANDS * ROWS,) uint64, the smallest hash of its shingles under each of so many hash functions
    bands: set[int]  # hash of each band of the signature

    def is_near(self, other: Sketch) -> bool:
        """The signatures, which agree in about as many places as the measure says, save most of the exact comparisons."""
        if (self.signature == other.signature).mean() < NEAR - 0.3:
            return False
        shared = len(np.intersect1d(self.shingles, other.shingles, assume_unique=True))
        return shared >= NEAR * (len(self.shingles) + len(other.shingles) - shared)


def overlap(train: list[TokenizedSource], val: list[TokenizedSource], decode: Callable[[list[int]], str]) -> Overlap:
    """Compare the validation documents with all training documents. Time is linear in both; memory holds the former."""
    from rich.console import Console
    from rich.progress import track

    texts: dict[int, list[int]] = {}  # hash of a whole text -> validation documents that have it and were not found yet
    bands: dict[int, list[int]] = {}  # the same for a band of the signature
    held = [sketch for source in val for sketch in _sketches(source, decode)]
    for i, sketch in enumerate(held):
        texts.setdefault(sketch.text, []).append(i)
        for key in sketch.bands:
            bands.setdefault(key, []).append(i)
    exact, near, compared = set(), set(), np.zeros(len(held), dtype=int)
    for source in track(
        train, "comparing validation and training", disable=not sys.stderr.isatty(), transient=True, console=Console(stderr=True)
    ):
        for sketch in _sketches(source, decode):
            exact.update(texts.pop(sketch.text, ()))
            for i in {i for key in sketch.bands for i in bands.get(key, ())}:
                compared[i] += 1
                if sketch.is_near(held[i]):
                    near.add(i)
            for key in sketch.bands & bands.keys():  # so that what many documents share costs no more than COMPARED
                bands[key] = [i for i in bands[key] if i not in near and compared[i] < COMPARED]
    return Overlap(sum(map(len, val)), len(exact), len(near - exact))


def words_of(text: str) -> np.ndarray:
    """(words,) int64: a hash of each word, without case, punctuation and special tokens. It holds for this process only.

    >>> np.array_equal(words_of("<|bos|>Well, WELL!"), words_of("well well"))
    True
    """
    text = _SPECIAL.sub(" ", text.lower())
    words = (text.translate(_IN_ASCII) if text.isascii() else _BETWEEN_WORDS.sub(" ", text)).split()
    return np.fromiter(map(hash, words), np.int64, len(words))


def _sketches(source: TokenizedSource, decode: Callable[[list[int]], str]) -> Iterator[Sketch]:
    """Of each document that has a word."""
    documents = (words for words in _documents(source, decode) if len(words))
    while block := list(islice(documents, BLOCK)):
        shingles = [_shingles(words) for words in block]
        for words, some, signature in zip(block, shingles, _signatures(shingles), strict=True):
            bands = {hash((n, band.tobytes())) for n, band in enumerate(signature.reshape(BANDS, ROWS))}
            yield Sketch(hash(words.tobytes()), some, signature, bands)


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


def _signatures(shingles: list[np.ndarray]) -> np.ndarray:
    """(documents, BANDS * ROWS) uint64, from the shingles of each document."""
    starts = np.cumsum([0, *map(len, shingles)])[:-1]
    whole, smallest = np.concatenate(shingles), []
    for multiplier in np.random.default_rng(0).integers(1 << 63, size=BANDS * ROWS, dtype=np.uint64) | np.uint64(1):
        mixed = whole * multiplier
        smallest.append(np.minimum.reduceat(mixed ^ (mixed >> np.uint64(29)), starts))
    return np.array(smallest).T


def _shingles(words: np.ndarray) -> np.ndarray:
    """(shingles,) uint64, sorted: a hash of each WORDS words in a row, or of all words where there are fewer."""
    size = min(WORDS, len(words))
    hashes = words.view(np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(hashes, size)
    return np.unique(rows @ _POWERS[:size])
