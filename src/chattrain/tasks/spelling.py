"""Spelling and counting letters: what a model that sees tokens instead of letters has to learn by heart.

After the idea of nanochat's SimpleSpelling and SpellingBee: spelling a word out turns one token into many, after
which counting is easy; and the count is then checked with Python, which shows the model how its tool is used.
"""

import random
import string

from chattrain.tasks.words import pick

SPELL_REQUESTS = (
    "Spell the word: {word}",
    "Spell {word}",
    "How do you spell {word}?",
    "Please spell the word {word}.",
    "What are the letters of {word}?",
    "Write {word} letter by letter.",
)

COUNT_QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many {letter}'s are there in the word {word}?",
    "Count the letter {letter} in {word}.",
    "How often does {letter} occur in {word}?",
    "In the word {word}, how many {letter} do you see?",
    "Tell me how many times {word} has the letter {letter}.",
    "how many {letter} in {word}",
    "What is the number of {letter} in {word}?",
)

ABSENT_LETTER = 0.1  # share of the questions whose letter is any of the alphabet, so that 0 is an answer too


def spell_word(rng: random.Random, split: str, words: tuple[str, ...]) -> dict:
    """One request to spell a word, answered as `apple:a,p,p,l,e`."""
    word = pick(rng, words, "spell_word", split)
    request = rng.choice(SPELL_REQUESTS).format(word=word)
    return {
        "messages": [
            {"role": "user", "content": request},
            {"role": "assistant", "content": f"{word}:{','.join(word)}"},
        ]
    }


def count_letters(rng: random.Random, split: str, words: tuple[str, ...]) -> dict:
    """One question how often a letter is in a word: a running count by hand, a check in Python, `#### 3` at the end."""
    word = pick(rng, words, "count_letters", split)
    letter = rng.choice(string.ascii_lowercase if rng.random() < ABSENT_LETTER else word)
    question = rng.choice(COUNT_QUESTIONS).format(letter=letter, word=word)
    solution = _solution(word, letter)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]}


def running_count(word: str, letter: str) -> str:
    """Each letter of the word, and the count so far after each hit.

    >>> running_count("strawberry", "r")
    's,t,r(1),a,w,b,e,r(2),r(3),y'
    """
    marked, count = [], 0
    for each in word:
        count += each == letter
        marked.append(f"{each}({count})" if each == letter else each)
    return ",".join(marked)


def _solution(word: str, letter: str) -> list[dict]:
    count = word.count(letter)
    by_hand = f"I spell {word} and count each {letter}:\n{running_count(word, letter)}\nThat makes {count}."
    return [
        {"type": "text", "text": f"{by_hand} Let me check with Python.\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"Python counts {count} too.\n\n#### {count}"},
    ]
