"""Values that Hydra's grammar does not read as they are typed: umlauts, `=`, `#`, brackets, quotes in the name of a file.

Where only one meaning is possible, the value is put into the quotes that Hydra wants. Else the message has the argument to type.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from chattrain.errors import UserError

_KEY = re.compile(r"[+~]{0,2}[\w./@:$-]+", re.ASCII)
_READ_AS_TYPED = re.compile(r"[\w./:+@%*$?|\\-]*", re.ASCII)  # characters that Hydra reads as themselves
_MEANINGS = re.compile(r"[\[\]{}()'\",]")  # characters that it may read as something else


def quoted(override: str) -> str:
    """The override as Hydra reads it. Raises UserError, with the argument to type, where the value may mean several things.

    A value that names a file or folder is that name, whatever is in it.

    >>> quoted("train.seq_len=64"), quoted("data.train_path=ü/a=b.jsonl"), quoted("data.train_path=[ä.jsonl,b.jsonl]")
    ('train.seq_len=64', 'data.train_path="ü/a=b.jsonl"', 'data.train_path=["ä.jsonl",b.jsonl]')
    >>> quoted("data.train_path=c[1].jsonl")
    Traceback (most recent call last):
    chattrain.errors.UserError: data.train_path=c[1].jsonl has characters that mean something to Hydra; as a text it is typed \
'data.train_path="c[1].jsonl"'
    """
    key, equals, value = override.partition("=")
    if equals and not key.strip("+~ "):
        raise UserError(f"{override!r} has no key: <key>={value}")
    if not equals or override.startswith("-") or _READ_AS_TYPED.fullmatch(value) or not _KEY.fullmatch(key):
        return override
    if _exists(value):
        return f"{key}={in_quotes(value)}"
    if _is_read(override):
        return override
    begin, end = ("[", "]") if value.startswith("[") and value.endswith("]") else ("", "")
    items = value[len(begin) : len(value) - len(end)].split(",")
    whole = begin + ",".join(item if _is_read(f"key={item}") else in_quotes(item) for item in items) + end
    if _is_read(f"{key}={whole}") and (_exists(*items) or not any(_MEANINGS.search(item) for item in items)):
        return f"{key}={whole}"
    typed = shlex.quote(f"{key}={whole}") if begin and _is_read(f"{key}={whole}") else as_argument(key, value)
    raise UserError(f"{override} has characters that mean something to Hydra; as a text it is typed {typed}")


def as_argument(key: str, value: str) -> str:
    """What to type in a shell, for a value that is a text whatever is in it.

    >>> print(as_argument("run.name", "it's"))
    'run.name="it'"'"'s"'
    """
    return shlex.quote(f"{key}={in_quotes(value)}")


def in_quotes(value: str) -> str:
    """The value in the double quotes of Hydra's grammar.

    >>> print(in_quotes('a"b'), in_quotes("c\\\\"))
    "a\\"b" "c\\\\"
    """
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], value.replace("${", "\\${"))
    return f'"{escaped}"'


def _exists(*names: str) -> bool:
    try:
        return all(name and Path(name).exists() for name in names)
    except (OSError, ValueError):
        return False


def _is_read(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
