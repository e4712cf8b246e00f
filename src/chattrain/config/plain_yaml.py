"""Read config.yaml of a run folder, which may be a stranger's: plain values only, and nothing that grows when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from chattrain.errors import UserError


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """No tags, and no aliases: a few lines of them expand to gigabytes where they are written or compared."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which a configuration does not need")
        return super().compose_node(parent, index)


def read_yaml(text: str, source: str | Path = "config.yaml") -> dict[str, Any]:
    """The settings in a YAML text. Texts such as `${oc.env:HOME}` are refused: they would be replaced where the settings are used.

    Raises UserError, which names `source`, for anything else than plain values by name.
    """
    try:
        content = yaml.load(text, Loader=PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source} cannot be read: {' '.join(str(error).split())}; take the one of another checkpoint") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{source} holds no settings by name; take the one of another checkpoint")
    if "${" in text:
        raise UserError(f"{source} holds ${{...}}, but a run writes its settings resolved; take the one of another checkpoint")
    return content


def section(content: dict[str, Any], name: str, source: str | Path = "config.yaml") -> dict[str, Any]:
    """A section of the settings, {} where there is none. Raises UserError where it is none."""
    found = content.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{source}: {name}={found!r:.80} is no section of settings; take the one of another checkpoint")
    return found
