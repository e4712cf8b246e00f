"""The words that the spelling tasks ask about, and the one rule that parts any questions into training and validation.

The rule stands in one place, because a validation question that was trained on measures nothing.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from chattrain.tasks.prose import documents

SPLITS = ("train", "val")
VAL_PERCENT = 10  # of the identities, by their hash
MIN_DOCUMENTS = 5  # a word in fewer documents is more often a misspelling or somebody's variable
PLAIN_WORD = re.compile(r"(?<![^\s(])[a-z]{3,10}(?=[,.;:?!)]*(?:\s|$))")  # stands alone, so it is no part of any code
MAX_DRAWS = 20_000  # a pool where 1 in 10 fits is never refused: 0.9 ** 20_000 is 0

Value = TypeVar("Value")


def split_of(identity: str) -> str:
    """Which split a question belongs to: by the hash of its text, so adding questions moves none of the others.

    >>> split_of("spell_word/code"), split_of("spell_word/page")
    ('val', 'train')
    """
    digest = hashlib.sha256(identity.encode()).digest()
    return "val" if int.from_bytes(digest[:8]) % 100 < VAL_PERCENT else "train"


def draw(propose: Callable[[], tuple[str, Value]], split: str) -> Value:
    """Calls `propose`, which gives (identity, value), until an identity belongs to `split`; returns its value.

    Raises ValueError where none does, which only a pool of very few questions brings about.
    """
    identity = ""
    for _ in range(MAX_DRAWS):
        identity, value = propose()
        if split_of(identity) == split:
            return value
    raise ValueError(
        f"no question for the split {split!r} in {MAX_DRAWS} draws (the last was {identity!r}); "
        "its pool is too small to set a tenth aside: give more words in words_file"
    )


@lru_cache(maxsize=1)
def common_words() -> tuple[str, ...]:
    """Lower-case words of 3 to 10 letters that many documents of the prose use, sorted."""
    documents_with: Counter[str] = Counter()
    for text in documents():
        documents_with.update(set(PLAIN_WORD.findall(text)))
    common = (word for word, n in documents_with.items() if n >= MIN_DOCUMENTS)
    return tuple(sorted(word for word in common if re.search("[aeiouy]", word)))


@lru_cache(maxsize=8)
def words_of_file(path: str) -> tuple[str, ...]:
    """The words of a file with one word a line, sorted, each once.

    Lines with anything but the letters a to z (capitals, apostrophes, accents) are left out: system word lists hold
    many, and the tasks ask about plain lower-case words. Raises ValueError where nothing is left to ask about.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"words_file={path} cannot be read ({error}); give a text file with one word a line") from None
    words = {line.strip() for line in lines if re.fullmatch("[a-z]+", line.strip())}
    if not words:
        raise ValueError(f"words_file={path} has no line that is one lower-case word; give one word (a to z) a line")
    return tuple(sorted(words))


def pick(rng: random.Random, words: tuple[str, ...], task: str, split: str) -> str:
    """One word of the split's share. Each task parts the words anew, so a word new to one may be known from another."""

    def propose() -> tuple[str, str]:
        word = rng.choice(words)
        return f"{task}/{word}", word

    return draw(propose, split)
