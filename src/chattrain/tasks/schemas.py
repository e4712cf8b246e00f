"""The schemas of rows: which columns each needs and takes, and which one the columns of a data set tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from chattrain.chat.messages import EXPECTED, ROLES
from chattrain.tasks import alpaca, gsm8k, humaneval, messages, multiple_choice, prompt_completion, sharegpt, text


class RowSchema(NamedTuple):
    document: Callable[[dict], dict]  # from a record to a conversation `{"messages": [...]}` or a text `{"text": ...}`
    needs: tuple[tuple[str, ...], ...]  # columns that a row must have, each with the names that it may have instead
    takes: tuple[str, ...] = ()  # columns that are used where there are any

    @property
    def reads(self) -> set[str]:
        """All columns that a row may use. Others are not read from a table."""
        return {name for names in self.needs for name in names} | set(self.takes)

    def lacks(self, columns: Iterable[str]) -> list[str]:
        """The columns that a row with these columns would still need."""
        present = set(columns)
        if multiple_choice.WRAPPER in present & set(self.takes):
            return []
        return [names[0] for names in self.needs if not present & set(names)]

    def __str__(self) -> str:
        """
        >>> print(SCHEMAS["multiple_choice"])
        question, choices (or options), answer (or answerKey)
        """
        needed = [" ".join([names[0], *([f"(or {', '.join(names[1:])})"] if names[1:] else [])]) for names in self.needs]
        return ", ".join(needed)


SCHEMAS = {
    "messages": RowSchema(messages.conversation, (("messages",),), ("system", "tools")),
    "sharegpt": RowSchema(sharegpt.conversation, (("conversations", "conversation", "messages"),), ("system", "tools")),
    "alpaca": RowSchema(alpaca.conversation, (("instruction",), ("output",)), ("input", "system", "history", "tools")),
    "prompt_completion": RowSchema(prompt_completion.conversation, (("prompt",), ("completion",)), ("system", "tools")),
    "multiple_choice": RowSchema(
        multiple_choice.conversation,
        (("question",), ("choices", "options"), ("answer", "answerKey")),
        (multiple_choice.WRAPPER, "subject"),
    ),
    "gsm8k": RowSchema(gsm8k.conversation, (("question",), ("answer",))),
    "humaneval": RowSchema(humaneval.conversation, (("prompt",), ("canonical_solution",), ("test",), ("entry_point",))),
    "text": RowSchema(text.text, (("text",),)),
}


def told_by(row: Mapping[str, Any]) -> str | None:
    """The schema that the columns of a row tell. Where several fit, the one that uses more of them; None: none fits.

    A column without a value does not count, as in Parquet each row has all columns of its file.

    >>> told_by({"instruction": "Add.", "input": None, "output": "2", "text": "Add.\\n2"})
    'alpaca'
    >>> told_by({"messages": [{"from": "human", "value": "Hi"}]}), told_by({"id": 1, "body": "x"})
    ('sharegpt', None)
    """
    columns = {name for name, value in row.items() if value is not None}
    if not isinstance(row.get(multiple_choice.WRAPPER), dict):
        columns.discard(multiple_choice.WRAPPER)
    fitting = {
        name: len(schema.needs) + len(columns & set(schema.takes))
        for name, schema in SCHEMAS.items()
        if not schema.lacks(columns)
    }
    if "messages" in fitting and not columns & {"conversations", "conversation"}:  # sharegpt may have them in `messages` too
        del fitting["messages" if _names_speakers_as_sharegpt(row["messages"]) else "sharegpt"]
    if {"A", "B"} <= columns:  # a question whose choices are in columns of their own is none without them
        fitting.pop("gsm8k", None)
    return max(fitting, key=lambda name: fitting[name]) if fitting else None


def way_out(row: Mapping[str, Any], schema: str) -> str:
    """What to do with a data set whose rows have columns such as those of this row and do not fit the schema."""
    told = told_by(row)
    if told is None:
        return no_schema(row)
    if told == schema:
        return f"none of the rows that were tried fits: mend the rows, whose columns are those of schema {schema}"
    return f"its columns are those of data.schema={told}; data.schema=auto tells it for each path (one path, one schema)"


def _names_speakers_as_sharegpt(turns: Any) -> bool:
    """By `from`, or by a role such as `human` that only sharegpt knows.

    >>> _names_speakers_as_sharegpt([{"role": "system", "content": "x"}, {"role": "human", "content": "Hi"}])
    True
    """
    for turn in turns if isinstance(turns, list) else [turns]:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role is None and isinstance(turn, dict) and "from" in turn:
            return True
        if isinstance(role, str) and role not in (*EXPECTED, *ROLES) and role.lower() in sharegpt.ROLES:
            return True
    return False


def no_schema(columns: Iterable[str]) -> str:
    """Why rows with these columns fit no schema, and the way out.

    >>> print(no_schema(["id", "prompt", "response"]))
    its columns (id, prompt, response) fit no schema. They look most like prompt_completion, without completion. Rename or \
convert them to the columns of one: messages (messages), sharegpt (conversations (or conversation, messages)), \
alpaca (instruction, output), prompt_completion (prompt, completion), \
multiple_choice (question, choices (or options), answer (or answerKey)), gsm8k (question, answer), \
humaneval (prompt, canonical_solution, test, entry_point), text (text)
    """
    columns = list(columns)
    said = f"its columns ({', '.join(columns) or 'none'}) fit no schema."
    if {"chosen", "rejected"} <= set(columns):
        said += " They are pairs of a better and a worse reply: train on the better ones, as `messages`."
    else:
        near = max(SCHEMAS, key=lambda name: (len(SCHEMAS[name].reads & set(columns)), -len(SCHEMAS[name].lacks(columns))))
        if SCHEMAS[near].reads & set(columns):
            lacking = ", ".join(SCHEMAS[near].lacks(columns))
            said += f" They look most like {near}, {f'without {lacking}' if lacking else 'but hold no values'}."
    known = ", ".join(f"{name} ({schema})" for name, schema in SCHEMAS.items())
    return f"{said} Rename or convert them to the columns of one: {known}"
