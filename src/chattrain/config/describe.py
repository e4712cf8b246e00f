"""What the schema says to people: every key with its meaning, type, default and allowed words; every group with its choices.

One reader for the help and the docs. It reads the dataclasses, the comments at their fields, and the first comment of each YAML
file in conf/.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import types
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache, reduce
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING

from chattrain.config.choices import Choice, all_groups, default_choices, overrides_of
from chattrain.config.comments import field_comments
from chattrain.config.compose import compose, conf_dir
from chattrain.config.own import GROUPS as OWN_GROUPS
from chattrain.config.own import is_own, schema_of
from chattrain.config.root import Config
from chattrain.config.schema import VARIANTS
from chattrain.config.train import ALTERNATIVES
from chattrain.config.words import Command

TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "any value"}


@dataclass(frozen=True)
class Key:
    """One key. `owners`: the choices that have it, such as optimizer=adamw; () where every composition has it."""

    name: str
    meaning: str
    type: str
    default: Any  # MISSING: it must be given
    words: tuple[str, ...] = ()  # that it takes, where these are few
    owners: tuple[str, ...] = ()

    @property
    def of(self) -> str:
        """
        >>> Key("model.n_layer", "blocks", "whole number", MISSING, owners=("model=tiny", "model=d6")).of
        'model=tiny, d6'
        """
        return ", ".join(name if i == 0 else name.partition("=")[2] for i, name in enumerate(self.owners))

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]


# --- keys ------------------------------------------------------------------------------------------------------------


@cache
def all_keys() -> tuple[Key, ...]:
    """All keys, in the order of the dataclasses. A key that several choices declare differently has an entry for each."""
    found: dict[tuple, Key] = {}
    for name, meaning, kind, default, owner in _walk(Config, ""):
        section = name.partition(".")[0]
        variants = {choice: schema for choice, schema in VARIANTS.items() if choice.startswith(f"{section}=")}
        if "." not in name and variants:
            base = {entry[0] for entry in _walk(kind, f"{name}.")}
            for choice, schema in ({"": kind} | variants).items():
                for entry in _walk(schema, f"{name}."):
                    _add(found, *entry[:4], owner=() if entry[0] in base else (choice,))
        elif not is_dataclass(kind):
            _add(found, name, meaning, kind, default, owner)
    return tuple(replace(key, owners=() if _is_every_choice(key) else key.owners) for key in found.values())


def _is_every_choice(key: Key) -> bool:
    return {f"{key.section}={choice.name}" for choice in all_groups().get(key.section, [])} <= set(key.owners)


def _add(found: dict[tuple, Key], name: str, meaning: str, kind: Any, default: Any, owner: tuple[str, ...]) -> None:
    """Add a key, or one more owner to a key that is there with the same meaning and default."""
    same = (name, meaning, repr(default))
    owners = (*found[same].owners, *owner) if same in found else owner
    found[same] = Key(name, meaning, type_name(kind), default, _words(kind), tuple(dict.fromkeys(owners)))


def _walk(schema: type, prefix: str, seen: set[type] | None = None) -> list[tuple[str, str, Any, Any, tuple[str, ...]]]:
    """(name, meaning, type, default, owners) of each field, and of the fields of dataclasses within, of each dataclass once."""
    hints, found, seen = get_type_hints(schema), [], set() if seen is None else seen
    comments = field_comments(schema)
    for field in fields(schema):
        if field.name.startswith("_"):
            continue
        kind, name = hints[field.name], f"{prefix}{field.name}"
        found.append((name, comments.get(field.name, ""), kind, _default(field), ()))
        inner = get_args(kind)[1] if get_origin(kind) is dict else kind
        if (
            is_dataclass(inner)
            and inner not in seen
            and not (prefix == "" and any(choice.startswith(f"{name}=") for choice in VARIANTS))
        ):
            item = f".<{'stage' if name.endswith('stages') else 'source'}>" if inner is not kind else ""
            seen.add(inner)  # type: ignore
            found += _walk(inner, f"{name}{item}.", seen)  # type: ignore
    return found


def _default(field: Field) -> Any:
    if field.default is not NO_DEFAULT:
        return field.default
    return MISSING if field.default_factory is NO_DEFAULT else field.default_factory()


def type_name(kind: Any) -> str:
    """
    >>> type_name(int | None), type_name(list[str]), type_name(bool | str)
    ('whole number, or null', 'list of texts', 'true or false, or text')
    """
    if get_origin(kind) in (Union, types.UnionType):
        parts = [part for part in get_args(kind) if part is not type(None)]
        return ", or ".join([type_name(part) for part in parts] + ["null"] * (len(parts) < len(get_args(kind))))
    if get_origin(kind) is list:
        return f"list of {type_name(get_args(kind)[0])}s"
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return (
            "a group of names, each with the keys below"
            if is_dataclass(inner)
            else f"a group of names, each with {type_name(inner) if inner is Any else 'a ' + type_name(inner)}"
        )
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return "one of these words"
    return TYPES.get(kind, "a group of keys" if is_dataclass(kind) else str(kind))


def _words(kind: Any) -> tuple[str, ...]:
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(word for part in parts if inspect.isclass(part) and issubclass(part, Enum) for word in part.__members__)


def as_yaml(value: Any) -> str:
    """A value as it is typed; of a key that must be given, that it must.

    >>> as_yaml(None), as_yaml(524_288), as_yaml([0.8, 0.95]), as_yaml(MISSING), as_yaml(1e-10)
    ('null', '524_288', '[0.8, 0.95]', 'none: it must be given', '1e-10')
    """
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return "none: it must be given" if value == MISSING else value
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        return f"[{', '.join(as_yaml(item) for item in value)}]"
    if isinstance(value, dict) and value:
        return f"{{{', '.join(value)}}}, see the YAML file of the choice"
    return "{}" if value == {} else str(value)


def find_keys(name: str) -> list[Key]:
    """The entries of a key as it is typed: data.stages.mid.train.talk.limit is data.stages.<stage>.train.<source>.limit."""
    exact = [key for key in all_keys() if key.name == name]
    return (
        exact
        or [key for key in all_keys() if re.fullmatch(re.sub(r"<\w+>", r"[^.]+", re.escape(key.name)), name)]
        or [key for key in all_keys() if key.type.startswith("a group of names") and name.startswith(f"{key.name}.")]
    )


def related(key: Key) -> list[str]:
    """Other keys that its meaning names, or whose meaning names it, or that set the same thing."""
    alternatives = [other for group in ALTERNATIVES if key.name in group for other in group]
    named = [other.name for other in all_keys() if _names(key, other) or _names(other, key)]
    return [name for name in dict.fromkeys([*alternatives, *named]) if name != key.name and "<" not in name]


def _names(one: Key, other: Key) -> bool:
    """Does the meaning of the first key name the other, in full or, in the same section, by its last part?"""
    last = other.name.rpartition(".")[2]
    short = one.section == other.section and "_" in last and re.search(rf"(?<![\w.]){last}\b", one.meaning)
    return bool(short or re.search(rf"(?<![\w.]){re.escape(other.name)}\b(?!\.\w)", one.meaning)) and "." in other.name


# --- groups and commands ---------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """The parts of the configuration -> what each is: the fields of Config that hold keys."""
    comments = field_comments(Config)
    return {name: comments.get(name, "") for name in dict.fromkeys(key.section for key in all_keys() if "." in key.name)}


def group_meaning(group: str) -> str:
    """What a group chooses: the comment at its key, else the one at its entry in conf/config.yaml."""
    if found := field_comments(Config).get(group):
        return found
    entry = re.search(rf"^  - {re.escape(group)}: \S+ # (.+)$", (conf_dir() / "config.yaml").read_text(), re.MULTILINE)
    return entry[1] if entry else ""


def choice_keys(choice: Choice) -> list[Key]:
    """The keys of a group that a choice has, with its own values as defaults; of a user's own part those of its signature."""
    given = choice.sets
    target = (yaml.safe_load(choice.file.read_text()) or {}).get("_target_")
    if choice.group in OWN_GROUPS and is_own(target):
        schema = schema_of(choice.group, str(target), tuple(k.rpartition(".")[2] for k in given))
        found = [
            Key(name, meaning or f"an argument of {target}", type_name(kind), default, _words(kind))
            for name, meaning, kind, default, _ in _walk(schema, f"{choice.group}.")
        ]
    else:
        typed = f"{choice.group}={choice.name}"
        found = [key for key in all_keys() if key.name.startswith(f"{choice.group}.") and (not key.owners or typed in key.owners)]
    return [replace(key, default=given.get(key.name, key.default)) for key in found]


def commands() -> dict[str, str]:
    """What `command=` takes -> the text at the head of its module, without its name."""
    found = {}
    for name in Command.__members__:
        file = Path(__file__).parents[1] / "commands" / f"{'import_' if name == 'import' else name}.py"  # import is a keyword
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        found[name] = re.sub(r"^command=\w+(, the default)?: ", "", text)
    return found


@cache
def _stage(name: str) -> Config:
    """The configuration of a stage where nothing else is typed."""
    return compose([f"stage={name}"])


@cache
def _set_by_stages() -> frozenset[str]:
    """The keys that the files of the stages set, or those of choices that some of them take: all others have one default."""
    stages = all_groups()["stage"]
    taken = {(group, name) for stage in stages for group, name in overrides_of(stage).items()}
    taken |= {(group, default_choices()[group]) for group, _ in taken}
    chosen = [choice for choices in all_groups().values() for choice in choices if (choice.group, choice.name) in taken]
    return frozenset(name for choice in [*stages, *chosen] for name in choice.sets)


def defaults(key: Key) -> dict[str, str]:
    """The values of a key where nothing else is typed, by stage; of a key that only some choices of a group have, by these."""
    if key.name in all_groups():
        return {"": str(default_choices()[key.name])}
    if "<" in key.name:  # an entry that a file names: it has the default of its kind
        return {"": as_yaml(key.default)}
    if key.owners:
        chosen = [choice for choice in all_groups()[key.section] if f"{choice.group}={choice.name}" in key.owners]
        return {choice.name: as_yaml(choice.sets.get(key.name, key.default)) for choice in chosen}
    stages = [choice.name for choice in all_groups()["stage"]]
    composed = stages if key.name in _set_by_stages() else stages[:1]
    values = [reduce(lambda part, last: getattr(part, last, key.default), key.name.split("."), _stage(name)) for name in composed]
    return dict(zip(composed, map(as_yaml, values), strict=True))


def suggestion(word: str, known: list[str]) -> str:
    """`; did you mean ...?` with what is most similar, in full or by its last part; "" if nothing is."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    near = near or [k for k in known if k.rpartition(".")[2] == word.rpartition(".")[2]][:3]
    by_last = {k.rpartition(".")[2]: k for k in known}
    near = near or [by_last[last] for last in difflib.get_close_matches(word, list(by_last), n=3, cutoff=0.75)]
    return f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
