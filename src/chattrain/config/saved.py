"""The settings that a checkpoint was trained with, read back from its config.yaml, with what the command line gives on top."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from chattrain.config import own
from chattrain.config.collator import CollatorConfig, JoiningCollatorConfig
from chattrain.config.compose import LOCAL_KEYS, LOCAL_TO_COMPOSE, conf_dir, key_of
from chattrain.config.data import DataConfig, LocalDataConfig, NanochatDataConfig
from chattrain.config.model import GPTConfig, HFModelConfig
from chattrain.config.plain_yaml import read_yaml, section
from chattrain.config.root import Config
from chattrain.config.schema import to_yaml
from chattrain.config.targets import current_target
from chattrain.errors import UserError

SECTIONS = ("model", "data", "collator", "eval")  # what an evaluation depends on, besides the keys of train below
TRAIN_KEYS = ("seq_len", "device_batch_size", "device_batch_tokens", "dtype")


def with_saved(cfg: Config, config_yaml: str, overrides: list[str]) -> Config:
    """`cfg`, but stage, model, data, collator, evaluation and rows as in `config_yaml`, except what `overrides` give.

    A group on the command line replaces the whole section, except `eval`: its choices set only some keys. A typed stage that is
    not the saved one brings its collator and its choice of evaluation; eval.also goes with the stage and the data. Keys that an
    earlier version did not have get their defaults. Raises UserError for a typed key that the saved part does not have.
    """
    saved, now = read_yaml(config_yaml), yaml.safe_load(to_yaml(cfg))
    typed = {key_of(override): override.partition("=")[2] for override in overrides if override != LOCAL_TO_COMPOSE}
    stage = saved.get("stage", cfg.stage)
    other_stage = "stage" in typed and typed["stage"] != stage
    result = copy.copy(cfg)
    result.stage = cfg.stage if other_stage else stage
    for name in SECTIONS:
        replaced = name != "eval" and name in typed
        replaced |= name == "collator" and other_stage  # a stage sets its collator as a whole
        if "experiment" in typed or replaced or name not in saved:
            continue
        tree = copy.deepcopy(section(saved, name))
        kind = _kind(name, tree, cfg)
        if name == "eval":
            tree |= {key: now[name][key] for key in _chosen(typed, other_stage, list(now[name]))}
            if "data" in typed or other_stage:
                tree.pop("also", None)  # stages of the data that the run had
        keys = [key for key in typed if key.startswith(f"{name}.")]
        for key in keys:
            _copy_value(now, {name: tree}, key)
        for key in keys:
            if key.split(".")[1] not in kind.__dataclass_fields__:
                way_out = "add data=local, which replaces its data" if key in LOCAL_KEYS else "leave it out"
                raise UserError(
                    f"no key {key}: the {name} of the run ({tree.get('_target_') or kind.__name__}) has none; {way_out}"
                )
        part = _build(kind, tree)
        if "_target_" in tree:
            part._target_ = current_target(tree["_target_"])
        setattr(result, name, part)
    rows = section(saved, "train")
    kept = {k: rows[k] for k in TRAIN_KEYS if rows.get(k) is not None and f"train.{k}" not in typed}
    if "train.device_batch_size" in typed:
        kept.pop("device_batch_tokens", None)  # it would win over what is typed
    if "experiment" not in typed and kept:
        built = _build(type(cfg.train), kept)
        result.train = replace(cfg.train, **{name: getattr(built, name) for name in kept})
    return result


def _chosen(typed: dict[str, str], other_stage: bool, keys: list[str]) -> list[str]:
    """The keys of `eval` that the choice on the command line sets: all `keys`, where its file is the user's own."""
    chosen = ["validation", "multiple_choice", "max_problems"] if other_stage else []
    if "eval" not in typed:
        return chosen
    file = conf_dir() / "eval" / f"{typed['eval']}.yaml"
    return [*chosen, *yaml.safe_load(file.read_text())] if file.is_file() else keys


def _copy_value(source: dict, target: dict, key: str) -> None:
    """Copy the value at a dotted key, or its absence (`~key`)."""
    *path, last = key.split(".")
    for name in path:
        source, target = source.get(name, {}), target.setdefault(name, {})
    if last in source:
        target[last] = source[last]
    else:
        target.pop(last, None)


def _kind(name: str, tree: dict, cfg: Config) -> type:
    """The dataclass of a saved section."""
    if name in own.GROUPS and own.is_own(tree.get("_target_")):
        return own.schema_of(name, tree["_target_"], tuple(tree))
    if name == "data":
        return LocalDataConfig if "train_path" in tree else NanochatDataConfig if "identity_path" in tree else DataConfig
    if name == "model":
        return HFModelConfig if tree.get("_target_") == "chattrain.model.hf.build" else GPTConfig
    if name == "collator":
        return JoiningCollatorConfig if "isolate_documents" in tree else CollatorConfig
    return type(getattr(cfg, name))


def _build(kind: type, tree: dict) -> Any:
    """The dataclass with the values of the tree; keys that it does not have, such as those of another version, are left out."""
    schema = OmegaConf.structured(kind)
    return OmegaConf.to_object(OmegaConf.merge(schema, _known(tree, schema)))


def _known(tree: dict, schema: DictConfig) -> dict:
    fields = getattr(OmegaConf.get_type(schema), "__dataclass_fields__", {})
    known = {}
    for key in (key for key in tree if key in fields):
        child = schema._get_node(key)
        nested = isinstance(child, DictConfig) and isinstance(tree[key], dict) and OmegaConf.get_type(child) is not dict
        known[key] = _known(tree[key], child) if nested and isinstance(child, DictConfig) else tree[key]
    return known
