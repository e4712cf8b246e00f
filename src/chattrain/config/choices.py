"""The YAML files in conf/ and in a user's own folders: groups, their choices, and what each sets."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from chattrain.config.compose import conf_dir
from chattrain.config.root import Config


@dataclass(frozen=True)
class Choice:
    """A YAML file of a group."""

    group: str
    name: str
    meaning: str
    file: Path

    @property
    def sets(self) -> dict[str, Any]:
        """The keys that the file sets itself -> their values."""
        tree = yaml.safe_load(self.file.read_text()) or {}
        tree.pop("defaults", None)
        if not _header(self.file).startswith("# @package _global_"):
            tree = {self.group: tree}
        return {k: v for k, v in _flatten(tree).items() if not k.rpartition(".")[2].startswith("_") and not k.startswith("hydra")}


def all_groups(own: tuple[Path, ...] = ()) -> dict[str, list[Choice]]:
    """The groups in conf/ and in the user's own folders -> their choices."""
    found = {group: dict(choices) for group, choices in _choices(conf_dir()).items()}
    for folder in own:
        for group, choices in _choices.__wrapped__(folder).items():
            found.setdefault(group, {}).update(choices)
    order = [*(field.name for field in fields(Config)), *default_choices(), *sorted(found)]
    return {group: list(found[group].values()) for group in dict.fromkeys(order) if group in found}


@cache
def _choices(folder: Path) -> dict[str, dict[str, Choice]]:
    """The choices in a folder, by group and name, in the order of names, numbers by their size."""
    found: dict[str, dict[str, Choice]] = {}
    for file in sorted(folder.rglob("*.yaml"), key=_by_number):
        group = file.parent.relative_to(folder).as_posix()
        if group.partition("/")[0] not in (".", "hydra"):
            found.setdefault(group, {})[file.stem] = Choice(group, file.stem, _first_comment(file), file)
    return found


def _by_number(file: Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.as_posix())]


@cache
def default_choices() -> dict[str, str | None]:
    """The groups in the order in which they are composed -> the choice that is taken where none is given."""
    entries = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items() if " " not in group}


def overrides_of(choice: Choice) -> dict[str, str]:
    """The choices of other groups that a choice takes (`override /group: name`)."""
    entries = (yaml.safe_load(choice.file.read_text()) or {}).get("defaults") or []
    return {
        key.removeprefix("override /"): name
        for entry in entries
        if isinstance(entry, dict)
        for key, name in entry.items()
        if key.startswith("override /")
    }


def set_by(name: str, own: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The choices whose files set a key -> the value of each."""
    choices = [choice for group in all_groups(own).values() for choice in group]
    return {f"{choice.group}={choice.name}": choice.sets[name] for choice in choices if name in choice.sets}


def _header(file: Path) -> str:
    return file.read_text().partition("\n")[0]


def _first_comment(file: Path) -> str:
    """The first sentence of the comment at the head of a file; "" where code stands first."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    found = [line.lstrip("# ") for line in lines if not line.startswith("# @package")]
    more = takewhile(lambda line: line[:1].islower() and not line.startswith("python"), found[1:])  # the sentence goes on
    return " ".join([*found[:1], *more]).partition(". ")[0].strip()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
