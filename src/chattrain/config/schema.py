"""Register the dataclasses as Hydra's schema, turn a composed configuration into checked dataclasses, and write it as YAML."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, Node, OmegaConf, open_dict

from chattrain.config import own
from chattrain.config.collator import JoiningCollatorConfig
from chattrain.config.data import DataConfig, LocalDataConfig, NanochatDataConfig
from chattrain.config.model import GPTConfig, HFModelConfig
from chattrain.config.optimizer import AdamWConfig, MuonAdamWConfig
from chattrain.config.root import Config
from chattrain.config.schedule import DecayScheduleConfig, ShapedScheduleConfig
from chattrain.config.targets import current_target
from chattrain.errors import UserError
from chattrain.redact import redact_tree

# Choices whose keys differ from those of other choices of the group.
VARIANTS = {
    **{f"model={size}": GPTConfig for size in ("tiny", "d6", "d12", "d20", "d32")},
    "collator=packed": JoiningCollatorConfig,
    "collator=best_fit": JoiningCollatorConfig,
    "model=hf": HFModelConfig,
    "optimizer=muon_adamw": MuonAdamWConfig,
    "optimizer=adamw": AdamWConfig,
    "schedule=constant_then_linear": DecayScheduleConfig,
    "schedule=wsd": DecayScheduleConfig,
    "schedule=linear": ShapedScheduleConfig,
    "schedule=cosine": ShapedScheduleConfig,
    "data=local": LocalDataConfig,
    "data=nanochat": NanochatDataConfig,
}


def register_schemas() -> None:
    """Register the dataclasses under the names that conf/ refers to: Config as `schema`, variants as schema/<group>/<name>."""
    from hydra.core.config_store import ConfigStore

    from chattrain.config import source

    source.install()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, name, node in [
        ("collator", "joining", JoiningCollatorConfig),
        ("model", "gpt", GPTConfig),
        ("model", "hf", HFModelConfig),
        ("optimizer", "muon_adamw", MuonAdamWConfig),
        ("optimizer", "adamw", AdamWConfig),
        ("schedule", "plain", ShapedScheduleConfig),
        ("schedule", "decay", DecayScheduleConfig),
        ("data", "mixtures", DataConfig),
        ("data", "local", LocalDataConfig),
        ("data", "nanochat", NanochatDataConfig),
    ]:
        store.store(group=f"schema/{group}", name=name, node=node)


def from_hydra(composed: Any) -> Config:
    """The composed DictConfig as checked dataclasses, with interpolations resolved.

    Raises UserError for an unknown key, a mandatory value that is not given, and everything that `Config.check` refuses.
    """
    composed = _with_own_schemas(composed)
    for key in _unknown_keys(composed):
        raise UserError(f"no key {key}: `+{key}=...` adds what nothing reads; leave it out")
    missing = sorted(OmegaConf.missing_keys(composed), key=lambda key: (key.count("."), key))
    if missing:
        raise UserError(f"{missing[0]} must be given: {missing[0]}=<value>")
    cfg = OmegaConf.to_object(composed)
    assert isinstance(cfg, Config)
    for part in (cfg.model, cfg.collator, cfg.optimizer, cfg.schedule):
        part._target_ = current_target(part._target_)
    _check_paths(cfg)
    cfg.check()
    cfg.run.root = str(Path(cfg.run.root).expanduser())
    return cfg


def _check_paths(cfg: Config) -> None:
    """Raises UserError for a path that cannot be followed: a link to itself, `~` of nobody."""
    paths = {
        "run.root": cfg.run.root,
        "run.dir": cfg.run.dir,
        "init.from": cfg.init.source,
        "tokenizer.path": cfg.tokenizer.path,
        "data.cache_dir": cfg.data.cache_dir,
        "export.dir": cfg.export.dir,
    }
    for key, path in paths.items():
        try:
            Path(path or "").expanduser().resolve()
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{key}={path!r:.200} cannot be followed: {error}") from error


def _with_own_schemas(composed: DictConfig) -> DictConfig:
    """The configuration in which each part of the user's own has the schema of its target, whatever its YAML file extends."""
    for group in own.GROUPS:
        node = composed._get_node(group)
        if not isinstance(node, DictConfig) or node._is_missing() or issubclass(OmegaConf.get_type(node) or dict, own.OwnPart):
            continue
        target = node._get_node("_target_")
        if own.is_own(target._value() if isinstance(target, Node) else None):
            values = {str(key): OmegaConf.select(node, str(key)) for key in node if not OmegaConf.is_missing(node, key)}
            composed = copy.deepcopy(composed)
            with open_dict(composed):
                composed[group] = own.as_own(group, values)
    return composed


def _unknown_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys that `+key=value` added although the dataclass has no such field. Hydra does not refuse them."""
    declared = OmegaConf.get_type(node)
    fields = getattr(declared, "__dataclass_fields__", None)
    for key in node:
        if fields is not None and key not in fields:
            yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _unknown_keys(child, f"{prefix}{key}.")


def to_yaml(cfg: Config) -> str:
    """The content of config.yaml: all keys, resolved, without passwords and tokens."""
    text = with_credentials(cfg)
    tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    hidden = redact_tree(tree)
    return text if hidden == tree else yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True, width=1000)


def with_credentials(cfg: Config) -> str:
    """The same as the process needs it. It goes into no file."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True)
