"""Questions with lettered choices: the columns of MMLU (cais/mmlu), of ARC (allenai/ai2_arc), and `options` of MMLU-Pro."""

from typing import Any

LETTERS = "ABCDEFGHIJ"
WRAPPER = "train"  # auxiliary_train of MMLU nests each record once more, in a column of this name


def question(record: dict) -> tuple[str, list[str], list[str], int]:
    """(question, choices, letters, index of the right one) of a record of MMLU or ARC.

    MMLU gives the right choice by its index from 0, variants of it by its letter; ARC by its label, which may be a digit. Raises
    KeyError or ValueError for other columns, or if the answer is not one of the choices.

    >>> question({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1})
    ('2 + 2?', ['3', '4'], ['A', 'B'], 1)
    >>> question({"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"})
    ('2 + 2?', ['3', '4'], ['1', '2'], 1)
    """
    if isinstance(record.get(WRAPPER), dict):
        record = record[WRAPPER]
    given = record["answer"] if record.get("answerKey") is None else record["answerKey"]
    offered = record["options" if record.get("choices") is None and "options" in record else "choices"]
    if isinstance(offered, dict):
        if not {"text", "label"} & offered.keys():
            raise ValueError(f"the choices are an object of {', '.join(offered)}, not a list, nor one of text and label")
        choices, letters = list(offered["text"]), list(offered["label"])
        if not isinstance(given, str) or given.strip().upper() not in letters:
            raise ValueError(f"answer {given!r} is none of {', '.join(map(str, letters))}")
        answer = letters.index(given.strip().upper())
    else:
        choices = list(offered)
        letters = list(LETTERS[: len(choices)])
        answer = _index(given, choices, letters)
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= answer < len(choices) or len(letters) != len(choices):
        raise ValueError(f"{len(choices)} choices, {len(letters)} letters and answer {answer} do not fit")
    if not all(isinstance(text, str) for text in [record["question"], *choices]):
        raise ValueError("the question or a choice is empty or no text")
    return record["question"], choices, letters, answer


def _index(answer: Any, choices: list[str], letters: list[str]) -> int:
    """The index of the right choice, which a number gives from 0, and a text as letter, as number or as the choice itself.

    >>> choices, letters = ["3", "4", "5"], ["A", "B", "C"]
    >>> _index(2, choices, letters), _index(" b", choices, letters), _index("0", choices, letters)
    (2, 1, 0)
    >>> _index("2", ["1", "2", "3"], letters)
    Traceback (most recent call last):
    ValueError: answer '2' may mean choice 2, counted from 0, or the one that reads so; give its letter or a number
    """
    if isinstance(answer, int | float) and not isinstance(answer, bool) and float(answer).is_integer():
        return int(answer)
    if not isinstance(answer, str):
        raise ValueError(f"answer {answer!r} is no letter and no number")
    text = answer.strip()
    meant = {i for i, letter in enumerate(letters) if letter == text.upper()}
    meant |= {i for i, choice in enumerate(choices) if isinstance(choice, str) and choice.strip() == text}
    if text.isdecimal() and int(text) < len(choices):
        meant.add(int(text))
    if len(meant) > 1:
        raise ValueError(
            f"answer {answer!r} may mean choice {text}, counted from 0, or the one that reads so; give its letter or a number"
            if text.isdecimal()
            else f"answer {answer!r} is the letter of one choice and the text of another; give the right one's number, from 0"
        )
    if not meant:
        raise ValueError(f"answer {answer!r} is none of {', '.join(letters)}, nor a number from 0 to {len(choices) - 1}")
    return meant.pop()


def conversation(record: dict) -> dict:
    """A user turn with the question, and an assistant turn with the letter of the right choice.

    As in nanochat, each letter follows its choice after `=`, without a space, so that it is the same token as in the answer.
    Small models learn this form more easily.

    >>> print(conversation({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1})["messages"][0]["content"])
    Multiple Choice question: 2 + 2?
    - 3=A
    - 4=B
    <BLANKLINE>
    Respond only with the letter of the correct answer.
    """
    text, choices, letters, answer = question(record)
    prompt = _prompt(text, [f"{choice}={letter}" for letter, choice in zip(letters, choices, strict=True)])
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": letters[answer]}]}


def tokenizer_text(record: dict) -> str:
    """The prompt without letters, to train a tokenizer on. With letters, it would learn `=A` as one token, which is not the token
    of the answer."""
    text, choices, _, _ = question(record)
    return _prompt(text, choices)


def _prompt(text: str, lines: list[str]) -> str:
    listed = "".join(f"- {line}\n" for line in lines)
    return f"Multiple Choice question: {text}\n{listed}\nRespond only with the letter of the correct answer."
