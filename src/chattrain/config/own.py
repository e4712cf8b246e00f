"""Parts of a user's own: a `_target_` in another package, whose signature is the schema of its keys.

The arguments become keys with the types and defaults of the signature, except those that chattrain passes itself. So a user's
optimizer, schedule, collator or model is checked, swept, recorded and resumed like one of chattrain's, with no schema to write.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from chattrain.config.collator import CollatorConfig
from chattrain.config.model import ModelConfig
from chattrain.config.optimizer import OptimizerConfig
from chattrain.config.schedule import ScheduleConfig
from chattrain.errors import UserError


@dataclass(frozen=True)
class Group:
    """A group whose choices are built by `_target_`."""

    base: type  # dataclass of the keys that every choice has
    positional: int  # arguments that chattrain passes by position
    named: tuple[str, ...] = ()  # and by name
    usual: dict[str, Any] = field(default_factory=dict)  # keys that chattrain's choices share -> default, if the target has none


GROUPS = {
    "optimizer": Group(OptimizerConfig, positional=2, usual={"lr_scale": 1.0}),
    "schedule": Group(ScheduleConfig, positional=2, usual={"init_lr_frac": 1.0, "min_lr_factor": 0.0, "warmup_steps": 0}),
    "collator": Group(CollatorConfig, positional=3, named=("last_epoch",)),
    "model": Group(ModelConfig, positional=0, named=("vocab_size", "start", "seed")),
}
PRIMITIVES = (int, float, str, bool)
SCHEMAS: dict[str, type] = {}  # `<group>=<choice>` -> schema, of the choices that were read in this process


class OwnPart:
    """What the schemas of all own parts share, besides the dataclass of their group."""

    own_group: str
    own_keys: tuple[str, ...]  # of the choice's YAML file, which **kwargs takes
    own_arguments: frozenset[str]  # that the target takes

    def check(self) -> None:
        """Ranges are the target's own business."""

    def call(self) -> dict[str, Any]:
        """The part as Hydra instantiates it: keys that the target does not take, such as init_lr_frac, are left out."""
        kept = {name: value for name, value in vars(self).items() if name in self.own_arguments or name.startswith("_")}
        return {**copy.deepcopy(kept), "_convert_": "all"}

    def misfit(self, saved: dict[str, Any]) -> str | None:
        """A model of one's own fits a checkpoint whose shape has the same values under the names that both use."""
        other = [f"it has {k}={saved[k]}, the config asks for {v}" for k, v in vars(self).items() if saved.get(k, v) != v]
        return ", ".join(other) or None

    @property
    def isolates(self) -> bool:
        return bool(getattr(self, "isolate_documents", False))

    @property
    def outer_factor(self) -> float:
        """init_lr_frac, where the schedule does not take it: it multiplies any schedule."""
        return 1.0 if "init_lr_frac" in self.own_arguments else getattr(self, "init_lr_frac", 1.0)

    def __reduce__(self):
        return _rebuild, (self.own_group, vars(self)["_target_"], self.own_keys, vars(self))


def is_own(target: Any) -> bool:
    """
    >>> is_own("my.package.build"), is_own("chattrain.optim.adamw.build"), is_own("???")
    (True, False, False)
    """
    return isinstance(target, str) and "." in target and not target.startswith("chattrain.") and "${" not in target


def schema_of(group: str, target: str, keys: tuple[str, ...] = ()) -> type:
    """The dataclass of a target's keys. `keys`: those of its YAML file, for a target that takes **kwargs.

    Raises UserError where the target cannot be imported or takes nothing that chattrain passes.
    """
    part, function = GROUPS[group], import_target(f"{group}._target_={target}", target)
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: part.positional]
    passed = {*positional, *part.named}
    hints = _hints(function)
    fields = []
    for p in parameters:
        if p.name not in passed and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            default = part.usual.get(p.name, p.default) if p.default is p.empty else p.default
            hint = type(part.usual[p.name]) if p.name in part.usual else Any
            fields += _field(p.name, hints.get(p.name, hint), default)
    taken = frozenset(p.name for p in parameters)
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        names = {name for name, *_ in fields} | passed
        more = {**part.usual, **dict.fromkeys((k for k in keys if not k.startswith("_")), MISSING)}
        fields += [(name, Any, default) for name, default in more.items() if name not in names]
        taken |= frozenset(more) | frozenset(part.base.__dataclass_fields__)
    clash = [name for name, *_ in fields if hasattr(OwnPart, name) or isinstance(getattr(part.base, name, None), property)]
    if clash:
        raise UserError(f"{group}: {target} has an argument {clash[0]}, a name that chattrain uses itself; rename it")
    fields.append(("_target_", str, target))
    made = make_dataclass(f"Own{group.capitalize()}", fields, bases=(OwnPart, part.base), namespace={"__module__": __name__})
    made.own_group, made.own_keys, made.own_arguments = group, keys, taken
    return made


def as_own(group: str, values: dict[str, Any]) -> Any:
    """An own part with these values. Raises UserError for a key that its target does not take."""
    made = schema_of(group, values["_target_"], tuple(values))
    for key in values:
        if key not in made.__dataclass_fields__:
            raise UserError(f"{group}.{key}: {values['_target_']} takes no {key}; leave it out of the choice's YAML file")
    return made(**values)


def _rebuild(group: str, target: str, keys: tuple[str, ...], values: dict[str, Any]) -> Any:
    made = schema_of(group, target, keys)()
    vars(made).update(values)
    return made


def import_target(label: str, target: str) -> Callable:
    """The function or class of a dotted path. Only the user's module is imported. Raises UserError, which begins with `label`."""
    module, _, name = target.rpartition(".")
    try:
        try:
            found = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:  # a class inside a class, or a static method
            outer, _, owner = module.rpartition(".")
            if not outer or (not module.startswith(f"{error.name}.") and error.name != module):
                raise
            found = getattr(getattr(importlib.import_module(outer), owner), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{label} cannot be imported: {error}. Install its package, or put its folder on PYTHONPATH") from error
    if not callable(found):
        raise UserError(f"{label} is {found!r}, nothing that can be called; name a function or a class")
    return found


def _hints(function: Callable) -> dict[str, Any]:
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # names that exist only for a type checker; the keys are then of any type
        return {}


def _field(name: str, hint: Any, default: Any) -> list[tuple]:
    """The dataclass field of an argument; none for a default that no YAML can hold, which the target keeps."""
    if default is inspect.Parameter.empty:
        return [(name, _type(hint), MISSING)]
    if isinstance(default, tuple):
        default = list(default)
    if isinstance(default, list | dict):
        return [(name, _type(hint), field(default_factory=lambda: copy.deepcopy(default)))]
    if default is None or isinstance(default, (*PRIMITIVES, Enum)):
        kind = _type(hint)
        return [(name, kind if default is not None or kind is Any else kind | None, default)]
    return []


def _type(hint: Any) -> Any:
    """The type of a key: a primitive, an Enum, a list of primitives, one of these or None; Any for whatever else.

    >>> _type(float), _type(int | None), _type(list[float]), _type(tuple[float, float]), _type(Callable)
    (<class 'float'>, int | None, list[float], list[float], typing.Any)
    """
    if hint in PRIMITIVES or (inspect.isclass(hint) and issubclass(hint, Enum)):
        return hint
    if get_origin(hint) in (Union, types.UnionType):
        others = [_type(part) for part in get_args(hint) if part is not type(None)]
        return others[0] | None if len(others) == 1 and others[0] is not Any and len(get_args(hint)) == 2 else Any
    if get_origin(hint) in (list, tuple):
        items = {item for item in get_args(hint) if item is not ...}
        return list[items.pop()] if len(items) == 1 and items <= set(PRIMITIVES) else Any
    return Any
