"""English prose from Python itself: the docstrings of its standard library and the language reference of `help()`.

Every machine that can run chattrain has it, without a network. It is enough for a tokenizer and a toy base model. The sources
are parsed, never imported, so none of their code runs.
"""

import ast
import hashlib
import re
import sysconfig
import tokenize
import warnings
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path

MIN_CHARACTERS = 150  # shorter texts are not used as documents
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
REFERENCE = Path("pydoc_data", "topics.py")  # one long dict: topic -> its chapter of the language reference
UNDERLINE = re.compile(r"^(\S.*)\n[=*^~\-]{3,}\n", re.MULTILINE)  # a heading and its underline


@lru_cache(maxsize=1)
def documents() -> tuple[str, ...]:
    """All different documents, sorted by the hash of their text.

    So the order does not depend on the layout of the folders, and any prefix is a random sample. Other releases of Python have
    other texts, so a cache must have the release or the texts in its key. Raises ValueError if the standard library has no
    readable sources.
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
    r"""The docstrings of the module, its classes and its functions, without their common indentation.

    >>> list(docstrings("'Adds.'\ndef add(a, b):\n    '''Return the sum.\n\n    Of two numbers.\n    '''\n"))
    ['Adds.', 'Return the sum.\n\nOf two numbers.']
    """
    for node in _statements(source):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield cleandoc(text)


def sections(source: str) -> Iterator[str]:
    r"""The strings of a source, split before each underlined heading, without the underlines.

    Chapters of the reference repeat each other's sections with other underlines. Split like this, repeated sections are equal
    and a set removes them. Otherwise the same section could be in training and in validation.

    >>> list(sections("{'a': 'One\\n***\\n\\nFirst.\\n\\nTwo\\n===\\n\\nSecond.'}"))
    ['a', 'One\n\nFirst.', 'Two\n\nSecond.']
    """
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            starts = [0, *(match.start() for match in UNDERLINE.finditer(node.value) if match.start())]
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                yield UNDERLINE.sub(r"\1\n", node.value[start:end]).strip()


def _statements(source: str) -> Iterator[ast.AST]:
    """The module of a source, and its statements at any depth. Expressions, nine in ten of all nodes, hold none."""
    found: deque[ast.AST] = deque([_parse(source)])
    while found:
        node = found.popleft()
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            found.extend(getattr(node, block, ()))
        yield node


def _parse(source: str) -> ast.Module:
    """The parsed source; an empty module if it does not parse, as some files of a standard library do not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns of invalid escapes in old sources
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _sources(root: Path) -> list[Path]:
    """All .py files of the standard library under `root`, except its tests and installed packages."""
    return sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))


def _read(path: Path) -> str:
    """The text of a source file in the encoding that it declares; empty if it cannot be read."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
