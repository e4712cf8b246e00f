"""Mutated inputs, and what may come of one: it is handled, or refused with one message. Anything else fails the test."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chattrain.chat import Malformed
from chattrain.errors import RunFailed, UserError

HANG_S = 60  # an input that takes longer hangs
T = TypeVar("T")

TEXTS = [
    "",
    " ",
    "\0",
    "a\0b",
    "\ud83d",
    "\ufeff",
    "\u2028",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "~",
    "~nobody/x",
    "<|im_end|>",
    "<|assistant_end|>",
    "<think>",
    "</think>",
    "${oc.env:HOME}",
    "${a",
    "???",
    "!!python/object:os.system",
    "%s{}{0}",
    "null",
    "x" * 5000,
    "\x1b[2J",
    "1e999",
    "９",
    "²",
]
NUMBERS: list[Any] = [0, -1, 1, True, False, 2**31, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")]
VALUES: list[Any] = [
    None,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"a": []}},
    [1, "a"],
    {"role": "user", "content": "x"},
    [{"role": "user", "content": "x"}],
    *NUMBERS,
    *TEXTS,
]
SPLICES = [b"\0", b"\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\xff", b"\xef\xbb\xbf", b"-", b"9" * 400, b"[" * 3000]


def forms(short: int, full: int) -> pytest.MarkDecorator:
    """How many inputs a test tries: in the normal tests, and in `make faults`."""
    return pytest.mark.parametrize("count", [short, pytest.param(full, marks=pytest.mark.slow)])


def for_all(count: int, inputs: st.SearchStrategy[T], check: Callable[[T], None]) -> None:
    """Check `count` inputs, the same ones in every run."""

    @settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def each(value: T) -> None:
        with no_hang():
            check(value)

    each()


@contextmanager
def no_hang(seconds: int = HANG_S) -> Iterator[None]:
    def hangs(*_: Any) -> None:
        raise AssertionError(f"an input takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(act: Callable[[], Any]) -> str | None:
    """The message with which an input is refused; None: it is handled."""
    try:
        act()
    except (UserError, RunFailed, Malformed) as error:
        said = str(error)
        assert said.strip() and "Traceback" not in said, said
        return said
    return None


def mutated_bytes(original: bytes) -> st.SearchStrategy[bytes]:
    """The bytes, changed in one to four places: cut, doubled, flipped, or with others put in."""

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        content = original
        for _ in range(draw(st.integers(1, 4))):
            at, size = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
            how = draw(st.sampled_from(["cut", "end", "double", "flip", "splice", "random"]))
            if how == "cut":
                content = content[:at] + content[at + size :]
            elif how == "end":
                content = content[:at]
            elif how == "double":
                content = content[: at + size] + content[at:]
            elif how == "flip":
                content = content[:at] + bytes(b ^ 1 << size % 8 for b in content[at : at + 1]) + content[at + 1 :]
            elif how == "splice":
                content = content[:at] + draw(st.sampled_from(SPLICES)) + content[at:]
            else:
                content = content[:at] + draw(st.binary(max_size=8)) + content[at + size :]
        return content

    return changed()


def mutated_values(original: Any) -> st.SearchStrategy[Any]:
    """A tree of JSON, changed in one to three places: a member replaced, lost, doubled, or under another name."""
    values = st.sampled_from(VALUES) | st.text(max_size=20) | st.integers() | st.floats()

    @st.composite
    def changed(draw: st.DrawFn) -> Any:
        tree = copy.deepcopy(original)
        for _ in range(draw(st.integers(1, 3))):
            members = list(_members(tree))
            if not members:
                return draw(values)
            holder, key = draw(st.sampled_from(members))
            how = draw(st.sampled_from(["replace", "replace", "lose", "double", "rename", "deepen"]))
            if how == "replace":
                holder[key] = copy.deepcopy(draw(values))
            elif how == "lose":
                del holder[key]
            elif how == "double" and isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            elif how == "rename" and isinstance(holder, dict):
                holder[draw(st.sampled_from(TEXTS) | st.text(max_size=10))] = holder.pop(key)
            else:
                for _ in range(draw(st.sampled_from([1, 3, 300]))):
                    holder[key] = [holder[key]]
        return tree

    return changed()


def _members(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []):
        yield tree, key
        yield from _members(value)


def dumps(value: Any) -> str:
    return json.dumps(value)  # lone surrogates as escapes, NaN and Infinity as Python writes them
