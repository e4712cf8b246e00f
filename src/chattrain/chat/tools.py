"""The tool that a model runs while it replies: the calculator of chattrain's own chat format.

A reply calls it with `<|python_start|>12/60<|python_end|>`, and what is forced next is `<|output_start|>0.2<|output_end|>`, as in
the training data (native.py).
"""

from __future__ import annotations

from collections.abc import Callable

from chattrain.chat.calculator import calculate
from chattrain.tokenizer import AnyTokenizer, Tokenizer
from chattrain.tokenizer.special_tokens import OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START

Tool = Callable[[list[int]], list[int]]  # the tokens of a reply so far -> those that it must go on with


def tool_of(tokenizer: AnyTokenizer) -> Tool | None:
    """The tool of a model with this tokenizer, for `generate`, `generate_batch` and the engine; None for a chat template of a
    Hugging Face tokenizer, which says how tools are called but not which there are."""
    return Calculator(tokenizer).after if isinstance(tokenizer, Tokenizer) else None


class Calculator:
    """Answers the calls in replies of one tokenizer. It keeps no state: one serves all replies."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._start, self._end = tokenizer.special(PYTHON_START), tokenizer.special(PYTHON_END)
        self._output = tokenizer.special(OUTPUT_START), tokenizer.special(OUTPUT_END)

    def after(self, reply: list[int]) -> list[int]:
        """The tokens that must follow a reply's tokens: the result, if they end with a call that has one, else none."""
        if not reply or reply[-1] != self._end:
            return []
        call: list[int] = []
        for token in reversed(reply[:-1]):
            if token == self._start:
                break
            if token == self._end:  # an end without a start
                return []
            call.append(token)
        else:
            return []
        result = calculate(self.tokenizer.decode(reversed(call)))
        return [] if result is None else [self._output[0], *self.tokenizer.encode(result), self._output[1]]
