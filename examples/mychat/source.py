"""A data source: a function from a split to records, here questions with one right answer, made from two lists."""

from collections.abc import Iterator
from itertools import product

THINGS = ["door", "lamp", "fan", "heater", "radio", "window", "printer", "fridge"]
STATES = {"on": "off", "off": "on", "open": "closed", "closed": "open"}


def switches(split: str) -> Iterator[dict]:
    for i, (thing, state) in enumerate(product(THINGS, STATES)):
        if (i % 8 == 7) == (split != "train"):  # every eighth is for validation
            question = f"The {thing} is {state}. I switch it. What is it now?"
            answer = f"The {thing} is {STATES[state]}."
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
