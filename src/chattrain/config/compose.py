"""Compose overrides to a checked configuration. Turn Hydra's errors into messages that name the closest key and the way out."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from chattrain.config.data import DataConfig, LocalDataConfig
from chattrain.config.own import SCHEMAS
from chattrain.config.quoting import as_argument, quoted
from chattrain.config.root import Config
from chattrain.config.schema import VARIANTS, from_hydra, register_schemas
from chattrain.config.train import ALTERNATIVES
from chattrain.config.words import Command
from chattrain.errors import UserError

LOCAL_KEYS = {f"data.{name}" for name in LocalDataConfig.__dataclass_fields__.keys() - DataConfig.__dataclass_fields__.keys()}
LOCAL_TO_COMPOSE = "data='local'"  # quoted, which tells it from a choice that was typed: that replaces the data of a run


def conf_dir() -> Path:
    """The folder of the YAML files: in the package if it is installed, beside src/ in a checkout."""
    inside = Path(__file__).parents[1] / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "conf"


def compose(overrides: list[str]) -> Config:
    """The configuration of `python -m chattrain <overrides>`. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schemas()
    around = GlobalHydra.instance().hydra  # of a sweep that calls this, or of the user's own program
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return from_hydra(hydra_compose("config", overrides=settle_alternatives(overrides)))
    except UserError:
        raise
    except Exception as error:
        raise explain(error) from error
    finally:
        GlobalHydra.instance().hydra = around


def config_dirs(overrides: list[str]) -> list[str]:
    """The user's own folders of choices that `hydra.searchpath` names, absolute.

    >>> config_dirs(["stage=sft", "hydra.searchpath=[file:///home/me/conf]"])
    ['/home/me/conf']
    """
    given = [override.partition("=")[2] for override in overrides if key_of(override) == "hydra.searchpath"]
    paths = yaml.safe_load(given[-1]) if given else []
    return [str(Path(path.removeprefix("file://")).resolve()) for path in paths if not path.startswith("pkg://")]


def settle_alternatives(overrides: list[str]) -> list[str]:
    """If one of two alternative keys is given, set the other to null, whatever the YAML says. Expand `~/` in values, and put into
    quotes what Hydra would not read without. Raises UserError for a value that may mean several things.

    An evaluation or a repetition that is given keys of data=local, but no data, composes with data=local: the run that it reads
    may have it.

    >>> settle_alternatives(["train.total_batch_size=8192", "stage=sft"])
    ['train.total_batch_size=8192', 'train.rows_per_step=null', 'stage=sft']
    """
    given = {key_of(o) for o in overrides}
    settled = []
    for override in overrides:
        settled.append(quoted(override.replace("=~/", f"={Path.home()}/")))  # a shell does not expand ~ after `key=`
        if not override.endswith("=null"):
            settled += [f"{other}=null" for other in _alternatives(key_of(override)) if other not in given]
    if {"command=evaluate", "command=reproduce"} & set(overrides) and not given & {"data", "experiment"} and given & LOCAL_KEYS:
        settled.append(LOCAL_TO_COMPOSE)
    return settled


def drop_other_alternatives(composed: DictConfig, overrides: list[str]) -> None:
    """The same for a composed configuration whose overrides a sweeper made, from values in a YAML file."""
    given = {key_of(o) for o in overrides}
    for key in given:
        for other in _alternatives(key):
            if other not in given and OmegaConf.select(composed, key) is not None:
                OmegaConf.update(composed, other, None)


def _alternatives(key: str) -> list[str]:
    """The other keys that set the same thing.

    >>> _alternatives("train.rows_per_step"), _alternatives("train.seq_len")
    (['train.total_batch_size'], [])
    """
    return [other for keys in ALTERNATIVES if key in keys for other in keys if other != key]


def key_of(override: str) -> str:
    """The key of an override: `a.b` of `+a.b=1`."""
    return override.partition("=")[0].lstrip("+~")


def explain(error: BaseException) -> UserError:
    """An error of Hydra or OmegaConf as one message: the problem, the value, the way out."""
    text = "\n".join(str(e).strip() for e in (error, error.__cause__) if e is not None)
    if unread := getattr(error, "override", None):  # hydra.errors.OverrideParseException
        return _unread(unread)
    if several := _find(r"Ambiguous value for argument '(.+)'\n", text):
        key, _, value = several.partition("=")
        return UserError(
            f"{several} holds several values: --multirun (-m) runs each, {key}=[{value}] is a list, and as one text it is "
            f"typed {as_argument(key, value)}"
        )
    key = _find(r"full_key: (\S+)", text)
    if unknown := _find(r"Key '([^']+)' (?:is )?not in", text):
        unknown = key or unknown
        if owner := _owner(unknown):
            return UserError(f"no key {unknown} in this composition: it is a key of {owner}")
        return UserError(
            f"no key {unknown}{_near_miss(unknown, [*known_keys(), *groups()])}; `python -m chattrain --cfg job` shows all keys"
        )
    if group := _find(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        return UserError(f"no group {group}{_near_miss(group, groups())}; the groups are {', '.join(groups())}")
    if missing := _find(r"Could not find '([^']+)'", text):
        group, _, choice = missing.rpartition("/")
        options = (_find(r"Available options in '[^']+':\n((?:\t.*\n?)+)", text) or "").split()
        return UserError(f"{group}={choice} is not known{_near_miss(choice, options)}; choose from {', '.join(options)}")
    if missing := _find(r"Missing mandatory value: (\S+)", text):
        return UserError(f"{missing} must be given: {missing}=<value>")
    if key and _find(r"(is not a ListConfig)", text):
        value = _find(rf"Error merging override \+*{re.escape(key)}=(.*)", text) or "<value>"
        return UserError(f"{key}={value} must be a list: {key}=[{value}]")
    if chosen := re.search(
        r"In '(?P<file>.+?)'.*?str is not a subclass of (?P<group>\w+?)Config\. value: (?P<value>\S+)", text, re.DOTALL
    ):
        group, value = chosen["group"].lower(), chosen["value"]
        return UserError(
            f"{chosen['file']}.yaml: `{group}: {value}` chooses of a group, which a YAML file does in its list of defaults: "
            f"`defaults: [override /{group}: {value}]`"
        )
    if _find(r"(dict is not a subclass of SourceConfig)", text):
        return UserError(
            f"a data source ({key}) cannot be added on the command line: write the mixture as a YAML file, "
            "my_conf/data/mine.yaml, and use --config-dir my_conf data=mine; or give data=local lists of paths"
        )
    reasons = [
        line.strip()
        for line in text.splitlines()
        if line.strip() and not re.match(r"\s*(full_key|object_type|reference_type|Error merging override)", line)
    ]
    return UserError(f"{key}: {' '.join(reasons)}" if key else " ".join(reasons))


def _unread(override: str) -> UserError:
    """The message for what Hydra cannot read as `<key>=<value>`."""
    key, equals, value = override.partition("=")
    known = [*known_keys(), *groups()]
    near = "" if key_of(key).strip() in known else _near_miss(key_of(key).strip(), known)
    if not equals and override in Command.__members__:
        return UserError(f"{override!r} is a command: command={override}")
    if not equals:
        return UserError(f"{override!r} has no value: {key}=<value>{near}")
    if re.fullmatch(r"[+~]{0,2}[\w./@:$-]+", key, re.ASCII):
        return UserError(f"{override} cannot be read; if the value is a text, it is typed {as_argument(key, value)}")
    return UserError(f"{override!r}: no key is called {key!r}{near}")


def _find(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None


def _owner(key: str) -> str | None:
    """The choices of a group that have this key, such as `optimizer=adamw` for optimizer.lr; None: no choice has it."""
    group, _, name = key.partition(".")
    owners = [
        choice
        for choice, schema in (SCHEMAS | VARIANTS).items()
        if choice.startswith(f"{group}=") and name in schema.__dataclass_fields__
    ]
    return " or ".join(owners) or None


def _near_miss(key: str, known: list[str]) -> str:
    """`, did you mean ...?` with the most similar key, else with a key whose last part is the same; empty if there is none."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    near = near or [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return f", did you mean {near[0]}?" if near else ""


def known_keys() -> list[str]:
    """The keys of all schemas, with dots."""

    def walk(node: Any, prefix: str) -> list[str]:
        keys = []
        for key in node:
            keys.append(prefix + str(key))
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                keys += walk(child, f"{prefix}{key}.")
        return keys

    keys = walk(OmegaConf.structured(Config), "")
    for choice, schema in (SCHEMAS | VARIANTS).items():
        keys += walk(OmegaConf.structured(schema), choice.partition("=")[0] + ".")
    return sorted({key for key in keys if not key.split(".")[-1].startswith("_")})


def groups() -> list[str]:
    """The names of all groups in conf/."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
