"""Four-choice questions that a model of four layers begins to answer within a minute of training, with the columns of cais/mmlu.

They give the demo a benchmark whose accuracy rises: real MMLU stays at chance for any model that a laptop can train. Each
question has exactly one right answer by construction, and its index is drawn independently of everything else.
"""

import random
import string
from collections.abc import Callable

from chattrain.tasks.words import draw

# Subject -> relative frequency. In the first line the right choice differs from the others by itself, like a number among words:
# a tiny model learns these within about 300,000 tokens. The second line needs a comparison of the choices with the question, the
# third knowledge of letters and sums. These take far longer, so that accuracy does not saturate.
SHARES = {
    "number": 20, "kind_of_word": 30, "longest_word": 12, "largest_number": 6,
    "same_word": 6, "spelled_word": 4, "starts_with": 5, "ends_with": 2,
    "first_letter": 6, "last_letter": 2, "small_sum": 4, "word_length": 2, "letter_count": 1,
}  # fmt: skip

KINDS = {
    "a colour": ["red", "blue", "green", "black", "white", "brown", "pink", "yellow", "grey"],
    "an animal": ["cat", "dog", "bird", "fish", "horse", "cow", "fox", "bear", "sheep", "duck", "goat", "lion", "wolf"],
    "a fruit": ["apple", "pear", "plum", "peach", "lemon", "cherry", "grape", "melon", "banana"],
    "a drink": ["tea", "coffee", "milk", "juice", "water", "cocoa"],
    "a day of the week": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
}

# Common words of texts about computing, one or two tokens each. None belongs to KINDS, none is a number.
_WORDS = """
area arrow base block body box button byte cache call case cell chain child circle class column copy corner cycle data
date disk edge email engine error event family field figure file flag flow font form frame goal graph grid group guard
hand head height help home hook host idea image index item job jump key kernel label leaf length letter level line
link list lock loop machine mail map mark memory menu message month name network node object option order output owner
page pair parent part path place point power process program query question queue quote range record region report
root round row rule sample scale screen script server shape shell side sign size source space speed square stack state
step stream string table task text thread time title tool tree type unit user value version view volume week weight
width window word work year zone
"""
WORDS = tuple(_WORDS.split())
SHORT_WORDS = tuple(word for word in WORDS if len(word) <= 4)
LONG_WORDS = tuple(word for word in WORDS if len(word) >= 6)

Question = tuple[str, str, list[str]]  # question, right choice, three wrong choices


def demo_choice(rng: random.Random, split: str) -> dict:
    """One question with 4 choices; `answer` (0 to 3) is the index of the right one."""

    def propose() -> tuple[str, tuple[str, Question]]:
        subject = rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
        question, right, wrong = MAKERS[subject](rng)
        choices = sorted([right, *wrong]) if subject in ANSWERED_BY_CHOICES else []
        return "/".join(["demo_choice", question, *choices]), (subject, (question, right, wrong))

    subject, (question, right, wrong) = draw(propose, split)
    answer = rng.randrange(4)
    choices = [*wrong[:answer], right, *wrong[answer:]]
    return {"question": question, "choices": choices, "answer": answer, "subject": subject}


def number(rng: random.Random) -> Question:
    return "Which of these is a number?", str(rng.randint(2, 99)), rng.sample(WORDS, 3)


def kind_of_word(rng: random.Random) -> Question:
    kind = rng.choice(tuple(KINDS))
    return f"Which of these is {kind}?", rng.choice(KINDS[kind]), rng.sample(WORDS, 3)


def longest_word(rng: random.Random) -> Question:
    return "Which word is the longest?", rng.choice(LONG_WORDS), rng.sample(SHORT_WORDS, 3)


def largest_number(rng: random.Random) -> Question:
    *wrong, right = sorted(rng.sample(range(1, 100), 4))
    rng.shuffle(wrong)
    return "Which number is the largest?", str(right), [str(n) for n in wrong]


def same_word(rng: random.Random) -> Question:
    right, *wrong = _words(rng)
    return f"Which choice is the word {right}?", right, wrong


def spelled_word(rng: random.Random) -> Question:
    right, *wrong = _words(rng)
    return f"Which word is spelled {','.join(right)}?", right, wrong


def starts_with(rng: random.Random) -> Question:
    right, *wrong = _words(rng)
    return f"Which word starts with the letter {right[0]}?", right, wrong


def ends_with(rng: random.Random) -> Question:
    right = rng.choice(WORDS)
    wrong = rng.sample([word for word in WORDS if word[-1] != right[-1]], 3)
    return f"Which word ends with the letter {right[-1]}?", right, wrong


def first_letter(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    return f"What is the first letter of the word {word}?", word[0], _letters(rng, word[0])


def last_letter(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    return f"What is the last letter of the word {word}?", word[-1], _letters(rng, word[-1])


def small_sum(rng: random.Random) -> Question:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return f"What is {a} + {b}?", str(a + b), _numbers(rng, a + b, range(2, 19))


def word_length(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    return f"How many letters has the word {word}?", str(len(word)), _numbers(rng, len(word), range(2, 10))


def letter_count(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    letter = rng.choice(word)
    count = word.count(letter)
    return f"How many {letter} are in the word {word}?", str(count), _numbers(rng, count, range(5))


def _words(rng: random.Random) -> list[str]:
    """Four words, no two with the same first letter."""
    words: list[str] = []
    while len(words) < 4:
        word = rng.choice(WORDS)
        if all(word[0] != other[0] for other in words):
            words.append(word)
    return words


def _letters(rng: random.Random, right: str) -> list[str]:
    return rng.sample([letter for letter in string.ascii_lowercase if letter != right], 3)


def _numbers(rng: random.Random, right: int, among: range) -> list[str]:
    return [str(number) for number in rng.sample([n for n in among if n != right], 3)]


MAKERS: dict[str, Callable[[random.Random], Question]] = {
    make.__name__: make
    for make in (number, kind_of_word, longest_word, largest_number, same_word, spelled_word, starts_with, ends_with,
                 first_letter, last_letter, small_sum, word_length, letter_count)
}  # fmt: skip

# Subjects whose questions differ by their choices, not by their text; the choices are then part of a question's identity.
ANSWERED_BY_CHOICES = {"number", "kind_of_word", "longest_word", "largest_number", "starts_with", "ends_with"}
