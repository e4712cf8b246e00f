"""Simple arithmetic: addition and subtraction of one- and two-digit numbers, multiplication of one-digit numbers.

Answers to one-digit problems are given directly, others with a call of Python. The rule is simple, so that a model can learn
when to call the tool.
"""

import random

from chattrain.tasks.words import draw

OPERATIONS = {  # name -> (sign, questions in words, largest operand)
    "add": ("+", ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"), 99),
    "subtract": ("-", ("What is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}."), 99),
    "multiply": ("*", ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"), 9),
}
WITH_SIGN = ("What is {a} {sign} {b}?", "{a} {sign} {b} =", "Compute {a} {sign} {b}.", "How much is {a} {sign} {b}?")
ONE_DIGIT_SHARE = 0.5  # of the additions and subtractions; the others have operands with up to two digits
TOOL_PHRASES = ("I will let Python work it out.\n", "Let me use Python.\n", "I compute it with Python.\n")


def arithmetic(rng: random.Random, split: str) -> dict:
    """One problem and its answer. Both orders of the operands are in the same split, since 7 + 5 gives away 5 + 7."""

    def propose() -> tuple[str, tuple[str, int, int]]:
        name = rng.choice(tuple(OPERATIONS))
        largest = 9 if rng.random() < ONE_DIGIT_SHARE else OPERATIONS[name][2]
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        low, high = sorted((a, b))
        return f"arithmetic/{name}/{low}/{high}", (name, high, low) if name == "subtract" else (name, a, b)

    name, a, b = draw(propose, split)
    sign, in_words, _ = OPERATIONS[name]
    question = rng.choice(WITH_SIGN + in_words).format(a=a, b=b, sign=sign)
    answer = _answer(rng, a, sign, b)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def result(a: int, sign: str, b: int) -> int:
    """The value of one operation.

    >>> result(7, "+", 5), result(7, "-", 5), result(7, "*", 5)
    (12, 2, 35)
    """
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def _answer(rng: random.Random, a: int, sign: str, b: int) -> str | list[dict]:
    """A direct answer if both operands have one digit, else one with a Python call."""
    value = result(a, sign, b)
    if max(a, b) < 10:
        return f"{a} {sign} {b} = {value}"
    return [
        {"type": "text", "text": rng.choice(TOOL_PHRASES)},
        {"type": "python", "text": f"{a} {sign} {b}"},
        {"type": "python_output", "text": str(value)},
        {"type": "text", "text": f"{a} {sign} {b} = {value}"},
    ]
