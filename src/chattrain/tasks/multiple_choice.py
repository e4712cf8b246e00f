"""Questions with lettered choices: the columns of MMLU (cais/mmlu) and of ARC (allenai/ai2_arc)."""

LETTERS = "ABCDEFGHIJ"


def question(record: dict) -> tuple[str, list[str], list[str], int]:
    """(question, choices, letters, index of the right one) of a record of MMLU or ARC.

    MMLU gives the right choice by its index, ARC by its label, which may be a digit. Raises KeyError or ValueError for
    other columns, or if the answer is not one of the choices.

    >>> question({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1})
    ('2 + 2?', ['3', '4'], ['A', 'B'], 1)
    >>> question({"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"})
    ('2 + 2?', ['3', '4'], ['1', '2'], 1)
    """
    if isinstance(record.get("train"), dict):  # auxiliary_train of MMLU nests each record once more
        record = record["train"]
    if "answerKey" in record:
        choices, letters = list(record["choices"]["text"]), list(record["choices"]["label"])
        answer = letters.index(record["answerKey"])
    else:
        choices = list(record["choices"])
        letters, answer = list(LETTERS[: len(choices)]), int(record["answer"])
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= answer < len(choices) or len(letters) != len(choices):
        raise ValueError(f"{len(choices)} choices, {len(letters)} letters and answer {answer} do not fit")
    if not all(isinstance(text, str) for text in [record["question"], *choices]):
        raise ValueError("the question or a choice is empty or no text")
    return record["question"], choices, letters, answer


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
