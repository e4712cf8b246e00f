"""Overrides to a checked configuration, and Hydra's errors to messages with the near miss and the way out."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from chattrain.config import ALTERNATIVES, Config, from_hydra, register_schemas
from chattrain.errors import UserError


def conf_dir() -> Path:
    """The YAML tree: inside an installed package, or beside src/ in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def compose(overrides: list[str]) -> Config:
    """What `python -m chattrain <overrides>` would run. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return from_hydra(hydra_compose("config", overrides=settle_alternatives(overrides)))
    except UserError:
        raise
    except Exception as error:
        raise explain(error) from error


def settle_alternatives(overrides: list[str]) -> list[str]:
    """Where one of two keys that set the same thing is given, clear the other, whatever the YAML says.

    >>> settle_alternatives(["train.total_batch_size=8192", "stage=sft"])
    ['train.total_batch_size=8192', 'train.rows_per_step=null', 'stage=sft']
    """
    partner = ALTERNATIVES | {b: a for a, b in ALTERNATIVES.items()}
    given = {key_of(o) for o in overrides}
    settled = []
    for override in overrides:
        settled.append(override)
        other = partner.get(key_of(override))
        if other and other not in given and not override.endswith("=null"):
            settled.append(f"{other}=null")
    return settled


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def explain(error: BaseException) -> UserError:
    """Hydra's or OmegaConf's complaint as one message: what, which value, the way out."""
    text = str(error).strip()
    full_key = re.search(r"full_key: (\S+)", text)
    cause = error.__cause__
    if cause is not None and not full_key:
        full_key = re.search(r"full_key: (\S+)", str(cause))
    if match := re.search(r"Key '([^']+)' (?:is )?not in", text) or re.search(r"Key '([^']+)' not in", str(cause)):
        key = full_key.group(1) if full_key else match.group(1)
        return UserError(f"no key {key}{_near_miss(key, known_keys())}. `python -m chattrain --cfg job` shows all keys")
    if match := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        key = match.group(1)
        return UserError(f"no key or group {key}{_near_miss(key, [*known_keys(), *groups()])}. "
                         "`python -m chattrain --help` shows all groups")
    if match := re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s*(.*)", text, re.DOTALL):
        group, options = match.group(2), match.group(3).split()
        choice = match.group(1).removeprefix(f"{group}/")
        return UserError(f"{group}={choice} is not known{_near_miss(choice, options)}; choose from {', '.join(options)}")
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return UserError(f"{match.group(1)} must be given: {match.group(1)}=<value>")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type")))
    return UserError(f"{full_key.group(1)}: {message}" if full_key else message)


def _near_miss(key: str, known: list[str]) -> str:
    last = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or last[:1]
    return f"; did you mean {near[0]}?" if near else ""


def known_keys() -> list[str]:
    """Every key of every schema, in dotted form."""
    from omegaconf import DictConfig, OmegaConf

    from chattrain import config

    def walk(node: Any, prefix: str) -> list[str]:
        keys = []
        for key in node:
            keys.append(prefix + str(key))
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                keys += walk(child, f"{prefix}{key}.")
        return keys

    keys = walk(OmegaConf.structured(Config), "")
    variants = {"optimizer": [config.MuonAdamWConfig, config.AdamWConfig], "schedule": [config.DecayScheduleConfig],
                "data": [config.LocalDataConfig, config.NanochatDataConfig]}
    for group, schemas in variants.items():
        for schema in schemas:
            keys += walk(OmegaConf.structured(schema), f"{group}.")
    return sorted({key for key in keys if not key.split(".")[-1].startswith("_")})


def groups() -> list[str]:
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
