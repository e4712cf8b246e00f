"""The prose that every Python carries: its docstrings and the language reference behind `help()`.

It is English written with care, it is on every machine that can run chattrain, and it needs no network: enough for a
tokenizer and a toy base model. The sources are parsed, never imported, so nothing in them runs.
"""

import ast
import hashlib
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path

MIN_CHARACTERS = 150  # a shorter text says too little to be a document
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
REFERENCE = Path("pydoc_data", "topics.py")  # one long dict: topic -> its chapter of the language reference
UNDERLINE = re.compile(r"^(\S.*)\n[=*^~\-]{3,}\n", re.MULTILINE)  # a heading and its rule


@lru_cache(maxsize=1)
def documents() -> tuple[str, ...]:
    """All documents, each once, in an order that looks random and is the same on every call.

    The order follows from each text alone (its hash), so the folder layout does not show in it and any prefix is a fair
    sample. Another release of Python carries other texts: whoever caches these rows keys the cache with the texts.
    Raises ValueError where the standard library has no readable sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {text for path in _sources(root) for text in docstrings(_read(path))}
    texts.update(sections(_read(root / REFERENCE)))
    long_enough = [text for text in texts if len(text) >= MIN_CHARACTERS]
    if not long_enough:
        raise ValueError(
            f"prose: no Python source with docstrings under {root}; install Python with its sources, or train on your "
            "own text with data=local data.schema=text"
        )
    return tuple(sorted(long_enough, key=lambda text: hashlib.sha256(text.encode()).digest()))


def docstrings(source: str) -> Iterator[str]:
    r"""The docstrings of the module, its classes and its functions, with their common indent taken off.

    >>> list(docstrings("'Adds.'\ndef add(a, b):\n    '''Return the sum.\n\n    Of two numbers.\n    '''\n"))
    ['Adds.', 'Return the sum.\n\nOf two numbers.']
    """
    for node in _nodes(source):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield cleandoc(text)


def sections(source: str) -> Iterator[str]:
    r"""The strings of a source, cut before each underlined heading, the rules left out.

    Chapters of the reference repeat each other's sections under another rule: cut like this, the repeats are equal,
    and a set drops them. Otherwise one section could stand in training and in validation.

    >>> list(sections("{'a': 'One\\n***\\n\\nFirst.\\n\\nTwo\\n===\\n\\nSecond.'}"))
    ['a', 'One\n\nFirst.', 'Two\n\nSecond.']
    """
    for node in _nodes(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            starts = [0, *(match.start() for match in UNDERLINE.finditer(node.value) if match.start())]
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                yield UNDERLINE.sub(r"\1\n", node.value[start:end]).strip()


def _nodes(source: str) -> Iterator[ast.AST]:
    """Every node of a parsed source; none where it does not parse: a standard library keeps some broken files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold escapes that today's parser warns of
            return ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return iter(())


def _sources(root: Path) -> list[Path]:
    """Every .py file of the standard library under `root`, without its tests and without installed packages."""
    return sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))


def _read(path: Path) -> str:
    """The text of one source in the encoding that it declares; empty where it cannot be read."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
