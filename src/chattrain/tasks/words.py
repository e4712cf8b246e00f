"""The words of the spelling tasks, and the rule that splits questions into training, validation and test.

All generators use this one rule, because a question that was trained on measures nothing.
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

SPLITS = ("train", "val", "test")
HELD_OUT_PERCENT = 10  # of the identities, by their hash: validation and test take turns
MIN_DOCUMENTS = 5  # a word in fewer documents is often a misspelling or the name of a variable
PLAIN_WORD = re.compile(r"(?<![^\s(])[a-z]{3,10}(?=[,.;:?!)]*(?:\s|$))")  # between spaces or punctuation, so not part of code
MAX_DRAWS = 20_000  # if one question in 20 belongs to the split, the chance of not drawing one is 0.95 ** 20_000, which is 0

Value = TypeVar("Value")


def split_of(identity: str) -> str:
    """The split of a question, by the hash of its text, so that adding questions does not move others to another split.

    >>> split_of("spell_word/code"), split_of("spell_word/page")
    ('test', 'train')
    """
    digest = hashlib.sha256(identity.encode()).digest()
    percent = int.from_bytes(digest[:8]) % 100
    return "train" if percent >= HELD_OUT_PERCENT else "test" if percent % 2 else "val"


def draw(propose: Callable[[], tuple[str, Value]], split: str) -> Value:
    """Call `propose`, which returns (identity, value), until the identity belongs to `split`. Returns that value.

    Raises ValueError if MAX_DRAWS proposals have no such identity, which happens only with very few different questions.
    """
    identity = ""
    for _ in range(MAX_DRAWS):
        identity, value = propose()
        if split_of(identity) == split:
            return value
    raise ValueError(
        f"no question for the split {split!r} in {MAX_DRAWS} draws (the last was {identity!r}); "
        "its pool is too small to set a twentieth aside: give more words in words_file"
    )


@lru_cache(maxsize=1)
def common_words() -> tuple[str, ...]:
    """Lower-case words of 3 to 10 letters that occur in at least MIN_DOCUMENTS documents of the prose, sorted."""
    documents_with: Counter[str] = Counter()
    for text in documents():
        documents_with.update(set(PLAIN_WORD.findall(text)))
    common = (word for word, n in documents_with.items() if n >= MIN_DOCUMENTS)
    return tuple(sorted(word for word in common if re.search("[aeiouy]", word)))


@lru_cache(maxsize=8)
def words_of_file(path: str) -> tuple[str, ...]:
    """The different words of a file with one word a line, sorted.

    Lines with anything but the letters a to z (capitals, apostrophes, accents), which system word lists contain, are left out:
    the tasks ask about lower-case words. Raises ValueError if no word is left or the file cannot be read.
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
    """A random word of the split. Words are split by task, so a validation word of one may be a training word of another."""

    def propose() -> tuple[str, str]:
        word = rng.choice(words)
        return f"{task}/{word}", word

    return draw(propose, split)
