"""Alpaca's instructions: columns `instruction`, `input` and `output` (https://github.com/tatsu-lab/stanford_alpaca)."""

from __future__ import annotations

from chattrain.chat import Malformed
from chattrain.tasks import columns


def conversation(record: dict) -> dict:
    """The instruction, a blank line and the input as the user's turn, the output as the reply.

    A column `system` comes first, then the pairs of a column `history`, as in LLaMA-Factory. The text around them with which
    Alpaca was trained is left out: the chat format says who speaks.

    >>> conversation({"instruction": "Translate.", "input": "gut", "output": "good"})["messages"]
    [{'role': 'user', 'content': 'Translate.\\n\\ngut'}, {'role': 'assistant', 'content': 'good'}]
    >>> [m["content"] for m in conversation({"instruction": "More", "output": "c", "history": [["a", "b"]]})["messages"]]
    ['a', 'b', 'More', 'c']
    """
    asked, more = columns.text_of(record, "instruction"), record.get("input")
    if more and not isinstance(more, str):
        raise Malformed(f"`input` is {columns.kind_of(more)}, not a text")
    if more and more.strip():
        asked += f"\n\n{more}"
    turns = [*_history(record.get("history")), (asked, columns.text_of(record, "output"))]
    pairs = [[{"role": "user", "content": user}, {"role": "assistant", "content": reply}] for user, reply in turns]
    return columns.conversation([message for pair in pairs for message in pair], record)


def _history(history: object) -> list[tuple[str, str]]:
    if not history:
        return []
    if not isinstance(history, list):
        raise Malformed(f"`history` is {columns.kind_of(history)}, not a list of [question, answer]")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Malformed(f"`history` {i} is no pair [question, answer]")
    return [(user, reply) for user, reply in history]
