"""Four-choice questions that a model of four layers can learn in a minute, in the column schema of cais/mmlu.

They let the demo show a benchmark that moves: real MMLU stays at chance for any model that a laptop trains. Each skill
below has one right answer by construction, and the place of the answer is drawn apart from everything else.
"""

import random
import string
from collections.abc import Callable

from chattrain.tasks.words import draw

SKILLS = {  # subject -> its share of the questions; the first two are found in the question itself, the others known
    "same_word": 30,
    "spelled_word": 20,
    "starts_with": 20,
    "first_letter": 10,
    "small_sum": 6,
    "ends_with": 5,
    "last_letter": 3,
    "word_length": 3,
    "letter_count": 3,
}

# Short words of computing prose, known to a small tokenizer, so that a word is a token or two.
WORDS = tuple(
    """area arrow base block body box button byte cache call case cell chain child circle class color column copy corner
    cycle data date day digit disk edge email engine error event family field figure file flag flow font form frame goal
    graph grid group hand head height help home hook host idea image index item job jump key kernel kind label leaf
    length letter level line link list lock loop machine mail map mark memory menu message month mouse name network node
    number object option order output owner page pair parent part path place point power process program query question
    queue quote range record region report root round row rule sample scale screen script server shape shell side sign
    size source space speed square stack state step stream string table task text thread time title tool tree turtle
    type unit user value version view volume week weight width window word work year zero zone""".split()
)

Question = tuple[str, str, list[str]]  # question, right choice, three wrong choices


def demo_choice(rng: random.Random, split: str) -> dict:
    """One question with 4 choices, of which `answer` (0 to 3) is the only right one."""

    def propose() -> tuple[str, tuple[str, Question]]:
        subject = rng.choices(tuple(SKILLS), tuple(SKILLS.values()))[0]
        question, right, wrong = MAKERS[subject](rng)
        answer_in_words = subject in ("starts_with", "ends_with")
        identity = "/".join([question, *sorted([right, *wrong])]) if answer_in_words else question
        return f"demo_choice/{identity}", (subject, (question, right, wrong))

    subject, (question, right, wrong) = draw(propose, split)
    rng.shuffle(wrong)
    answer = rng.randrange(4)
    return {"question": question, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer, "subject": subject}


def same_word(rng: random.Random) -> Question:
    right, *wrong = _words(rng, first_letters_differ=True)
    return f"Which choice is the word {right}?", right, wrong


def spelled_word(rng: random.Random) -> Question:
    right, *wrong = _words(rng, first_letters_differ=True)
    return f"Which word is spelled {','.join(right)}?", right, wrong


def starts_with(rng: random.Random) -> Question:
    right, *wrong = _words(rng, first_letters_differ=True)
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
    return f"What is {a} + {b}?", str(a + b), _numbers(rng, a + b, 2, 18)


def word_length(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    return f"How many letters has the word {word}?", str(len(word)), _numbers(rng, len(word), 2, 10)


def letter_count(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    letter = rng.choice(word)
    return f"How many {letter} are in the word {word}?", str(word.count(letter)), _numbers(rng, word.count(letter), 0, 4)


def _words(rng: random.Random, first_letters_differ: bool) -> list[str]:
    """Four words, no two with the same first letter."""
    words: list[str] = []
    while len(words) < 4:
        word = rng.choice(WORDS)
        if all(word[0] != other[0] for other in words):
            words.append(word)
    return words


def _letters(rng: random.Random, right: str) -> list[str]:
    return rng.sample([letter for letter in string.ascii_lowercase if letter != right], 3)


def _numbers(rng: random.Random, right: int, low: int, high: int) -> list[str]:
    return [str(number) for number in rng.sample([n for n in range(low, high + 1) if n != right], 3)]


MAKERS: dict[str, Callable[[random.Random], Question]] = {
    make.__name__: make
    for make in (same_word, spelled_word, starts_with, ends_with, first_letter, last_letter, small_sum, word_length, letter_count)
}
