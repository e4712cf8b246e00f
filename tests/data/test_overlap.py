"""Validation documents that are trained on are counted: exact copies but for case and punctuation, and near ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.cache import load_or_tokenize
from chattrain.data.overlap import Overlap, overlap

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(seed: int, words: int, count: int) -> str:
    """The same text with the words at `count` places in a row replaced."""
    parts = text(seed, words).split()
    return " ".join([*parts[:10], *["other"] * count, *parts[10 + count :]])


@pytest.fixture
def counted(tmp_path, tokenizer):
    def tokenised(name: str, texts: list[str]):
        (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return load_or_tokenize(name, SourceConfig(str(Path(tmp_path / name)), Schema.text), tokenizer, tmp_path / "cache")

    def count(train: list[str], val: list[str]) -> Overlap:
        return overlap([tokenised("train.jsonl", train)], [tokenised("val.jsonl", val)], tokenizer.decode)

    return count


def test_texts_that_share_nothing_are_no_copies(counted):
    assert counted([text(i) for i in range(3000)], [text(i) for i in range(3000, 3100)]) == (100, 0, 0)


def test_case_punctuation_and_blanks_make_no_other_text(counted):
    train = [text(i) for i in range(2100)] + ["Grüße, Köln"]
    copies = [text(5).upper(), text(6).replace(" ", ",  "), f"  {text(2099)}!", "GRÜSSE KÖLN".replace("SS", "ß") + "..."]
    assert counted(train, [*copies, text(9999)]) == (5, 4, 0)


def test_what_tells_sums_apart_is_no_punctuation(counted):
    assert counted(["2 + 2 = 4", "what?"], ["2 * 2 = 4", "2 + 2 = 4.", "What", "!?"]) == (4, 2, 0)


def test_near_copies_are_those_that_share_most_of_their_runs_of_words(counted):
    train = [text(i) for i in range(2100)]
    near = [changed(i, 60, 1) for i in range(100, 110)] + [f"Well now {text(i)}" for i in range(200, 210)]
    far = [" ".join(text(i).split()[:30] + text(i + 5000).split()[:30]) for i in range(300, 310)]
    documents, exact, close = counted(train, near + far)
    assert (documents, exact) == (30, 0) and close == len(near)


def test_of_long_documents_both_ends_are_compared(counted):
    beginning, end = text(1, 500), text(2, 500)
    train = [f"{beginning} {text(3, 500)} {end}", *(text(i) for i in range(10, 20))]
    assert counted(train, [train[0].upper(), f"{beginning} {text(4, 500)} {text(5, 500)}", f"{text(6, 500)} {end}"]) == (3, 1, 0)


def test_copies_are_counted_once_each_over_several_training_sources(tmp_path, tokenizer):
    sources = []
    for n in range(2):
        (tmp_path / f"{n}.jsonl").write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(20)))
        sources.append(load_or_tokenize(str(n), SourceConfig(str(tmp_path / f"{n}.jsonl"), Schema.text), tokenizer, tmp_path))
    assert overlap(sources, sources[:1], tokenizer.decode) == (20, 20, 0)
    assert overlap(sources, sources, tokenizer.decode) == (40, 40, 0)
