"""Spelling words and counting their letters, which a model has to memorise, because it sees tokens and not letters.

After nanochat's SimpleSpelling and SpellingBee. Spelling a word turns one token into one for each letter, which are easy to
count. The answer then checks the count with Python, as an example of using the tool.
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

ABSENT_LETTER = 0.1  # fraction of the questions about any letter of the alphabet, so that some answers are 0


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
    """A question of how often a letter occurs in a word. The answer counts by hand, checks with Python, ends with `#### 3`."""
    word = pick(rng, words, "count_letters", split)
    letter = rng.choice(string.ascii_lowercase if rng.random() < ABSENT_LETTER else word)
    question = rng.choice(COUNT_QUESTIONS).format(letter=letter, word=word)
    solution = _solution(word, letter)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]}


def running_count(word: str, letter: str) -> str:
    """The letters of the word, with the running count after each occurrence of the letter.

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
