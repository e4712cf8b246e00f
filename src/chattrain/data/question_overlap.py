"""Which questions of an evaluation are in the training data: an accuracy on these shows memory, not skill.

A question is trained on where a training conversation asks it in the same words, compared as in overlap.py. Besides, the usual
figure for parts of questions in any text: those that share 13 words in a row with a document (Brown et al. 2020, appendix C,
https://arxiv.org/abs/2005.14165), on a sample of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from chattrain.data.cache import TokenizedSource
from chattrain.data.overlap import BLOCK, words_of

VERSION = 1  # part of the cache's key; raised when the counts change
GRAM = 13  # words
QUESTIONS, DOCUMENTS = 1_000, 10_000  # of the sample, at most
EDGE_TOKENS = 1_024  # tokens of a longer document, or of a longer question, that are read
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(1, GRAM + 1)], np.uint64)


class QuestionOverlap(NamedTuple):
    """Questions, how many of them are trained on, questions of the sample, how many of these share GRAM words with a document."""

    questions: int
    exact: int
    sampled: int
    shared: int


def question_overlap(
    train: list[TokenizedSource], questions: list[list[int]], decode: Callable[[list[int]], str]
) -> QuestionOverlap:
    """Compare the token ids of each question's prompt with all training documents; the sample with some, evenly spaced."""
    asked: dict[int, list[int]] = {}
    words = [words_of(decode(ids[:EDGE_TOKENS])) for ids in questions]
    for i, text in enumerate(words):
        asked.setdefault(hash(text.tobytes()), []).append(i)
    found = {i for words in _prompts(train, [len(ids) for ids in questions], decode) for i in asked.get(words, ())}
    long = [i for i, text in enumerate(words) if len(text) >= GRAM]
    sample = [long[i] for i in np.linspace(0, len(long) - 1, min(QUESTIONS, len(long))).astype(int)]
    return QuestionOverlap(len(questions), len(found), len(sample), _count_shared(train, [words[i] for i in sample], decode))


def _prompts(train: list[TokenizedSource], sizes: list[int], decode: Callable[[list[int]], str]) -> Iterator[int]:
    """The hash of the words of each training conversation's first prompt, where it is about as long as one of the questions."""
    from rich.console import Console
    from rich.progress import track

    least, most = min(sizes, default=0) // 4, min(4 * max(sizes, default=0), EDGE_TOKENS)
    for source in train:
        fitting = np.flatnonzero((source.first_reply >= max(least, 2)) & (source.first_reply <= most)).tolist()
        shown = track(
            fitting,
            f"looking for questions in {source.name}",
            disable=not sys.stderr.isatty() or len(fitting) < BLOCK,
            transient=True,
            console=Console(stderr=True),
        )
        for number, i in enumerate(shown):
            if number % BLOCK == 0:
                source.release()
            begin = int(source.offsets[i])
            words = words_of(decode(source.tokens[begin : begin + int(source.first_reply[i])].tolist()))
            if len(words):
                yield hash(words.tobytes())


def _count_shared(train: list[TokenizedSource], texts: list[np.ndarray], decode: Callable[[list[int]], str]) -> int:
    """How many of the texts, each (words,), share GRAM words in a row with a document of the sample."""
    if not texts:
        return 0
    grams = [_grams(text) for text in texts]
    wanted, seen = np.unique(np.concatenate(grams)), set[int]()
    total = sum(map(len, train))
    for i in np.linspace(0, total - 1, min(DOCUMENTS, total)).astype(int).tolist():
        for source in train:
            if i < len(source):
                begin, end = int(source.offsets[i]), int(source.offsets[i + 1])
                text = words_of(decode(source.tokens[begin : min(end, begin + EDGE_TOKENS)].tolist()))
                if len(text) >= GRAM:
                    grams_of_text = _grams(text)
                    at = np.searchsorted(wanted, grams_of_text).clip(max=len(wanted) - 1)
                    seen.update(grams_of_text[wanted[at] == grams_of_text].tolist())
                break
            i -= len(source)
    return sum(not seen.isdisjoint(gram.tolist()) for gram in grams)


def _grams(words: np.ndarray) -> np.ndarray:
    """(grams,) uint64: a hash of each GRAM words in a row."""
    return np.lib.stride_tricks.sliding_window_view(words.view(np.uint64), GRAM) @ _POWERS
