"""Values that Hydra's grammar does not read as they are typed: umlauts, `=`, `#`, brackets, quotes in the name of a file.

Where only one meaning is possible, the value is put into the quotes that Hydra wants. Else the message has the argument to type.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chattrain.errors import UserError

_KEY = re.compile(r"[+~]{0,2}[\w./@:$-]+", re.ASCII)
_READ_AS_TYPED = re.compile(r"[\w./:+@%*$?|\\-]*", re.ASCII)  # characters that Hydra reads as themselves
_A_WORD = re.compile(r"(?!(true|false|null|inf|nan)$)[a-zA-Z_][\w./-]*", re.ASCII | re.IGNORECASE)
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


def as_overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What to type for these settings: a section of keys may be a mapping of its own. Raises UserError for a value that no
    command line can hold.

    >>> as_overrides({"stage": "sft", "data.train_path": "my talk.jsonl", "train": {"max_steps": 20, "compile": False}})
    ['stage=sft', 'data.train_path="my talk.jsonl"', 'train.max_steps=20', 'train.compile=false']
    """
    overrides: list[str] = []
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and not prefix and "." not in key:
            overrides += as_overrides(value, f"{key}.")
        else:
            overrides.append(f"{key}={_as_value(key, value)}")
    return overrides


def _as_value(key: str, value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value) if _A_WORD.fullmatch(str(value)) else in_quotes(str(value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(float(value) if isinstance(value, float) else value)  # NumPy's repr is no number
    if isinstance(value, list | tuple):
        return "[" + ",".join(_as_value(key, item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_as_value(key, name)}:{_as_value(key, item)}" for name, item in value.items()) + "}"
    raise UserError(f"{key} is a {type(value).__name__}; a setting is a text, a number, true or false, None, a list or a dict")


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
