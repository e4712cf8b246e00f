"""The calculator that replies may call: arithmetic, and how often a text occurs in another. Nothing is ever executed.

Numbers are exact fractions, so `0.1+0.2` is 0.3, and `48/2` is 24 as in the answers of GSM8K. Every number has at most BITS bits
above and below its line and an expression at most CHARACTERS characters, so no expression takes longer than a few milliseconds.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from fractions import Fraction

CHARACTERS = 300  # of an expression
DEPTH = 50  # operations within each other
BITS = 512  # of the numerator and of the denominator of every number
DIGITS = 12  # significant digits of a result that is no whole number
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
EXACT = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _Refused(ValueError):
    """An expression that is no arithmetic, or too large."""


def calculate(expression: str) -> str | None:
    """The value of an expression as text; None if there is none, or the expression is not of the kind below or too large.

    Numbers with + - * / // % ** and brackets, and `'text'.count('part')`, as the training data has them (tasks/gsm8k.py,
    tasks/spelling.py). A comma may stand between thousands.

    >>> [calculate(text) for text in ("48/2", ".5*0.3", "2/3", "1,200*3", "'strawberry'.count('r')")]
    ['24', '0.15', '0.666666666667', '3600', '3']
    >>> [calculate(text) for text in ("1/0", "9**9**9", "__import__('os')", "2 +")]
    [None, None, None, None]
    """
    if len(expression) > CHARACTERS:
        return None
    if "'" not in expression and '"' not in expression:
        expression = THOUSANDS.sub("", expression)
    try:
        with warnings.catch_warnings():  # of Python's parser, on what a model may write
            warnings.simplefilter("ignore")
            body = ast.parse(expression.strip(), mode="eval").body
        return _as_text(Fraction(_count(body)) if isinstance(body, ast.Call) else _value(body, DEPTH))
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, depth: int) -> Fraction:
    """The number that an expression stands for. Raises _Refused or ArithmeticError."""
    if depth == 0:
        raise _Refused
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        number = Fraction(str(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        number = _value(node.operand, depth - 1)
        number = -number if isinstance(node.op, ast.USub) else number
    elif isinstance(node, ast.BinOp):
        left, right = _value(node.left, depth - 1), _value(node.right, depth - 1)
        number = _power(left, right) if isinstance(node.op, ast.Pow) else _operation(node.op)(left, right)
    else:
        raise _Refused
    return _bounded(Fraction(number))


def _operation(sign: ast.operator):
    if type(sign) not in EXACT:
        raise _Refused
    return EXACT[type(sign)]


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent, exact for whole exponents; a root is rounded as floating-point numbers are."""
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base not in (0, 1, -1) and (bits - 1) * abs(exponent.numerator) > BITS:
            raise _Refused  # before it is computed
        if base in (1, -1):
            return base if exponent.numerator % 2 else Fraction(1)
        return base ** min(max(exponent.numerator, -BITS), BITS)  # of 0, any exponent of the same sign is the same
    root = float(base) ** float(exponent)
    if isinstance(root, complex):
        raise _Refused
    return Fraction(repr(root))


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > BITS:
        raise _Refused
    return number


def _count(node: ast.Call) -> int:
    """`'text'.count('part')`. Raises _Refused for any other call."""
    function = node.func
    if not isinstance(function, ast.Attribute) or function.attr != "count" or len(node.args) != 1 or node.keywords:
        raise _Refused
    texts = [part.value for part in (function.value, node.args[0]) if isinstance(part, ast.Constant)]
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise _Refused
    text, part = map(str, texts)
    return text.count(part)


def _as_text(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.{DIGITS}g}"
