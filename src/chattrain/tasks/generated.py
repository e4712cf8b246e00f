"""Data that is generated and needs no network, so that the first run works on any laptop.

Record i depends only on the name, the split and i, which seed its random generator. The splits share no question.
Prose, and the words taken from it, come from the running Python, so the key of a cache of records must include
GENERATOR_VERSION and either the release of Python or the records themselves.
"""

import random
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from chattrain.tasks.arithmetic import arithmetic
from chattrain.tasks.demo_choice import demo_choice
from chattrain.tasks.prose import documents
from chattrain.tasks.small_talk import small_talk
from chattrain.tasks.spelling import count_letters, spell_word
from chattrain.tasks.words import SPLITS, common_words, split_of, words_of_file

GENERATOR_VERSION = 2  # part of the cache key; raise it when any generator changes

NAMES = {  # name -> schema of its records
    "prose": "text",
    "spell_word": "messages",
    "count_letters": "messages",
    "arithmetic": "messages",
    "small_talk": "messages",
    "demo_choice": "multiple_choice",
}
DEFAULT_SIZES = {"train": 4_000, "val": 400, "test": 400}  # records, if no size is given; prose returns all that it has

_WITH_WORDS = {"spell_word": spell_word, "count_letters": count_letters}
_WITHOUT_WORDS = {"arithmetic": arithmetic, "small_talk": small_talk, "demo_choice": demo_choice}


def records(name: str, split: str, size: int | None = None, words_file: str | None = None) -> list[dict]:
    """The first `size` records of a generated data set, in the schema of NAMES.

    `words_file` (one word a line) replaces the words that spell_word and count_letters ask about. Raises ValueError for
    an unknown name or split, a size that is negative or larger than the prose, and a words_file that would have no effect.

    >>> records("arithmetic", "train", size=1)
    [{'messages': [{'role': 'user', 'content': 'Multiply 3 by 5.'}, {'role': 'assistant', 'content': '3 * 5 = 15'}]}]
    """
    _check(name, split, size, words_file)
    if name == "prose":
        return _prose(split, size)
    make = _maker(name, words_file)
    size = DEFAULT_SIZES[split] if size is None else size
    return [make(random.Random(f"{name}/{split}/{i}"), split) for i in range(size)]


def _prose(split: str, size: int | None) -> list[dict]:
    texts = [{"text": text} for text in documents() if split_of(f"prose/{text}") == split]
    if size is not None and size > len(texts):
        raise ValueError(f"prose has {len(texts)} documents for {split}, not {size}; leave the size out for all of them")
    return texts[:size]


def _maker(name: str, words_file: str | None) -> Callable[[random.Random, str], dict]:
    """The function that generates one record from (random generator, split)."""
    if name in _WITHOUT_WORDS:
        return _WITHOUT_WORDS[name]
    return partial(_WITH_WORDS[name], words=words_of_file(words_file) if words_file else common_words())


def _check(name: str, split: str, size: int | None, words_file: str | None) -> None:
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no generated data is called {name!r}; {hint}known are {', '.join(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"{name} has no split {split!r}; known are {', '.join(SPLITS)}")
    if size is not None and size < 0:
        raise ValueError(f"{name}: size={size} rows cannot be made; give 0 or more, or leave it out")
    if words_file is not None and name not in _WITH_WORDS:
        raise ValueError(f"{name} takes no words_file ({words_file}); only {' and '.join(_WITH_WORDS)} do")
