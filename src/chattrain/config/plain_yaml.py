"""Read config.yaml of a run folder, which may be a stranger's: plain values only, and nothing that grows when it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from chattrain.errors import UserError

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_plain(text: str) -> Any:
    """The plain values in a YAML text: no tags, and no aliases, of which a few lines expand to gigabytes where they are compared.

    Raises yaml.YAMLError, or ValueError, TypeError or RecursionError, for anything else.
    """
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=Loader)):
        raise yaml.YAMLError("it has an alias (*name), which a configuration does not need")
    return yaml.load(text, Loader=Loader)


def read_yaml(text: str, source: str | Path = "config.yaml") -> dict[str, Any]:
    """The settings in a YAML text. Texts such as `${oc.env:HOME}` are refused: they would be replaced where settings are used.

    Raises UserError, which names `source`, for anything else than plain values by name.
    """
    try:
        content = load_plain(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source} cannot be read: {' '.join(str(error).split())}; take the one of another checkpoint") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{source} holds no settings by name; take the one of another checkpoint")
    for key, value in leaves(content):
        if "${" in f"{key}{value}":
            raise UserError(
                f"{source}: {key} holds an interpolation, {value!r:.80}; a recorded configuration holds values, and none is read "
                "from elsewhere. Write the value in its place, or take the one of another checkpoint"
            )
    return content


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all values in nested dicts and lists.

    >>> list(leaves({"a": {"_target_": "x"}, "b": [1, {"c": 2}]}, "model"))
    [('model.a._target_', 'x'), ('model.b.0', 1), ('model.b.1.c', 2)]
    """
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, value in items:
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, tree


def section(content: dict[str, Any], name: str, source: str | Path = "config.yaml") -> dict[str, Any]:
    """A section of the settings, {} where there is none. Raises UserError where it is none."""
    found = content.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{source}: {name}={found!r:.80} is no section of settings; take the one of another checkpoint")
    return found
