"""The calculator: arithmetic, exactly, of anything that a model may write, without executing any of it."""

from __future__ import annotations

import operator
import sys
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.chat import render
from chattrain.chat.calculator import CHARACTERS, calculate
from chattrain.chat.tools import Calculator, tool_of
from chattrain.tokenizer.special_tokens import OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START
from tests.conftest import SHARED_DATA

SIGNS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}


@st.composite
def expressions(draw, depth: int = 3) -> tuple[str, Fraction | None]:
    """An expression and its value; None where it divides by zero."""
    if depth == 0 or draw(st.booleans()):
        text = draw(st.sampled_from(["0", "7", "12", "365", ".5", "0.25", "3.0", "1000"]))
        return text, Fraction(text)
    (a, left), (b, right) = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    sign = draw(st.sampled_from(sorted(SIGNS)))
    text = f"({a}) {sign} ({b})" if draw(st.booleans()) else f"({a}){sign}({b})"
    if left is None or right is None or (right == 0 and sign in ("/", "//", "%")):
        return text, None
    return text, Fraction(SIGNS[sign](left, right))


@given(expressions())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_values_are_those_of_exact_arithmetic(case):
    text, value = case
    found = calculate(text)
    if value is None or len(text) > CHARACTERS:
        assert found is None
    elif value.denominator == 1:
        assert found == str(value.numerator)
    else:
        assert found is not None and float(found) == pytest.approx(float(value), rel=1e-11)


@given(st.text(st.sampled_from("0123456789.+-*/%()[]{}'\"abcount,_= \n\\:;lmdx"), max_size=60) | st.text(max_size=60))
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_any_text_is_answered_with_a_short_text_or_nothing(text):
    found = calculate(text)
    assert found is None or len(found) < 200


@pytest.mark.parametrize(
    "text, value",
    [
        ("2+2*3", "8"),
        ("-(3-5)", "2"),
        ("2**10", "1024"),
        ("2**-2", "0.25"),
        ("9**.5", "3"),
        ("0.1+0.2", "0.3"),
        ("1,234,567+1", "1234568"),
        ("7//2", "3"),
        ("-7 % 3", "2"),
        ("  1 +\t1 ", "2"),
        ("1e3/8", "125"),
        ("'Mississippi'.count('ss')", "2"),
        ("\"a,b\".count(',')", "1"),
        ("(-1)**1001", "-1"),
        ("0**999999999", "0"),
    ],
)
def test_values(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one plus one",
        "1/0",
        "0**-1",
        "(-8)**.5",
        "2**513",
        "9**9**9**9",
        "(9**99)**9",
        "1e999",
        "9" * (CHARACTERS + 1),
        "(" * 150 + "1" + ")" * 149,
        "-" * 290 + "1",
        "True + 1",
        "1 if 1 else 2",
        "[1][0]",
        "1j*1j",
        "x := 1",
        "'a' * 9",
        "'a'.upper()",
        "'a'.count('a', 1)",
        "'a'.count('a') + 1",
        "'a'.count.__class__",
        "().__class__.__base__.__subclasses__()",
        "__import__('os').getpid()",
        "print(1)",
        "1_0; 2",
        "lambda: 1",
        "f'{1}'.count('1')",
        "\x00",
        "\ud800",
    ],
)
def test_what_is_no_arithmetic_or_too_large_has_no_value(text):
    assert calculate(text) is None


def test_nothing_is_executed_or_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    calculate("__import__('antigravity')")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "text", ["9**99*9**99+" * 20 + "1", "2**512//3" + "%7**180" * 30, "1" + "/3" * 140, "7**-170+" * 30 + "1"]
)
def test_the_largest_expressions_are_answered(text):
    assert calculate(text) is None or len(str(calculate(text))) < 200  # computed as they stand, some would take years


def test_the_calls_of_gsm8k_have_the_values_that_their_answers_give():
    if not (SHARED_DATA / "gsm8k").is_dir():
        pytest.skip("needs the shared data")
    import pyarrow.parquet as pq

    from chattrain.tasks.gsm8k import conversation

    same = calls = 0
    for row in pq.read_table(SHARED_DATA / "gsm8k" / "main" / "test.parquet").to_pylist():
        parts = conversation(row)["messages"][1]["content"]
        for call, output in pairwise(parts):
            if call["type"] == "python":
                calls += 1
                value = calculate(call["text"])
                assert value is not None and float(value) == pytest.approx(float(Fraction(output["text"])), abs=1e-9)
                same += value == output["text"]
    assert calls > 3000 and same > 0.95 * calls  # others have zeros behind, as sums of money have


# --- in a reply ------------------------------------------------------------------------------------------------------


def reply(tokenizer, text: str, *parts: str) -> list[int]:
    """Token ids of a text with special tokens between <| and |>."""
    ids = tokenizer.encode(text)
    for part in parts:
        ids += [tokenizer.special(part)] if part.startswith("<|") else tokenizer.encode(part)
    return ids


def test_a_call_is_answered_as_the_training_data_answers_it(tokenizer):
    content = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "12/60"},
        {"type": "python_output", "text": "0.2"},
        {"type": "text", "text": "."},
    ]
    talk = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]}
    ids = render(talk, tokenizer).ids
    end = ids.index(tokenizer.special(PYTHON_END)) + 1
    answer = tool_of(tokenizer)(ids[:end])
    assert answer == ids[end : end + len(answer)] and answer[-1] == tokenizer.special(OUTPUT_END)


def test_only_a_whole_call_with_a_value_is_answered(tokenizer):
    after = Calculator(tokenizer).after
    assert after([]) == after(reply(tokenizer, "12/60")) == []
    assert after(reply(tokenizer, "", PYTHON_START, "12/60")) == []
    assert after(reply(tokenizer, "12/60", PYTHON_END)) == []
    assert after(reply(tokenizer, "", PYTHON_START, "open('x')", PYTHON_END)) == []
    assert after(reply(tokenizer, "", PYTHON_START, "1+1", PYTHON_END, PYTHON_END)) == []
    assert after(reply(tokenizer, "", PYTHON_START, PYTHON_END)) == []
    two = reply(tokenizer, "a", PYTHON_START, "3", PYTHON_START, "1+1", PYTHON_END)
    assert after(two) == reply(tokenizer, "", OUTPUT_START, "2", OUTPUT_END)
