"""Questions with lettered choices: the columns of MMLU (cais/mmlu) and of ARC (allenai/ai2_arc)."""

LETTERS = "ABCDEFGHIJ"


def question(row: dict) -> tuple[str, list[str], list[str], int]:
    """(question, choices, letters, index of the right one) of an MMLU or ARC row.

    MMLU names the right choice by its index, ARC by its label, which may be a digit. Raises KeyError or ValueError for
    other columns or an answer that is none of the choices.

    >>> question({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1})
    ('2 + 2?', ['3', '4'], ['A', 'B'], 1)
    >>> question({"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"})
    ('2 + 2?', ['3', '4'], ['1', '2'], 1)
    """
    if isinstance(row.get("train"), dict):  # auxiliary_train of MMLU wraps each row once more
        row = row["train"]
    if "answerKey" in row:
        choices, letters = list(row["choices"]["text"]), list(row["choices"]["label"])
        answer = letters.index(row["answerKey"])
    else:
        choices = list(row["choices"])
        letters, answer = list(LETTERS[: len(choices)]), int(row["answer"])
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= answer < len(choices) or len(letters) != len(choices):
        raise ValueError(f"{len(choices)} choices, {len(letters)} letters and answer {answer} do not fit")
    if not all(isinstance(text, str) for text in [row["question"], *choices]):
        raise ValueError("the question or a choice is empty or no text")
    return row["question"], choices, letters, answer


def conversation(row: dict) -> dict:
    """The question as the user's turn, the letter of the right choice as the assistant's.

    The letter stands after its choice, behind `=` and no space, so that it is the very token of the answer: small
    models bind better this way (nanochat's rendering).

    >>> print(conversation({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1})["messages"][0]["content"])
    Multiple Choice question: 2 + 2?
    - 3=A
    - 4=B
    <BLANKLINE>
    Respond only with the letter of the correct answer.
    """
    text, choices, letters, answer = question(row)
    prompt = _prompt(text, [f"{choice}={letter}" for letter, choice in zip(letters, choices, strict=True)])
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": letters[answer]}]}


def tokenizer_text(row: dict) -> str:
    """The prompt without letters, to train a tokenizer on: with them it would learn `=A` as one token, which is not the
    token of the answer."""
    text, choices, _, _ = question(row)
    return _prompt(text, choices)


def _prompt(text: str, lines: list[str]) -> str:
    listed = "".join(f"- {line}\n" for line in lines)
    return f"Multiple Choice question: {text}\n{listed}\nRespond only with the letter of the correct answer."
