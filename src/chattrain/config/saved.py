"""The settings that a checkpoint was trained with, read back from its config.yaml, with what the command line gives on top."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from chattrain.config import own
from chattrain.config.collator import CollatorConfig, JoiningCollatorConfig
from chattrain.config.compose import LOCAL_KEYS, LOCAL_TO_COMPOSE, conf_dir, key_of
from chattrain.config.data import DataConfig, LocalDataConfig, NanochatDataConfig
from chattrain.config.eval import CHOSEN
from chattrain.config.model import GPTConfig, HFModelConfig
from chattrain.config.optimizer import AdamWConfig, MuonAdamWConfig
from chattrain.config.plain_yaml import read_yaml, section
from chattrain.config.root import Config
from chattrain.config.schedule import DecayScheduleConfig, ShapedScheduleConfig
from chattrain.config.schema import with_credentials
from chattrain.config.targets import current_target
from chattrain.config.trusted import check_section
from chattrain.errors import UserError

SECTIONS = ("model", "data", "collator", "eval")  # what an evaluation depends on, besides the keys of train below
# What a training depends on, besides run.seed and the start, and what a repetition may have of its own.
TRAINING = ("train", "tokenizer", "loss", "optimizer", "schedule", *SECTIONS, "checkpoint", "log", "distributed")
REPEATED_WITH = (
    *(f"data.{name}" for name in ("train_path", "val_path", "test_path", "replay_path", "cache_dir", "workers")),
    "distributed.nproc",
    "train.device",
)
OF_THE_CALL = ("stage", "init.from", "run.name", "run.dir", "run.root", "tracking")
TRAIN_KEYS = ("seq_len", "device_batch_size", "device_batch_tokens", "dtype")


def with_saved(cfg: Config, file: Path, overrides: list[str], config_dirs: list[str]) -> Config:
    """`cfg`, but stage, model, data, collator, evaluation and rows as in the config.yaml `file`, except what `overrides` give.

    A group on the command line replaces the whole section, except `eval`: its choices set only some keys. A typed stage that is
    not the saved one brings its collator and its choice of evaluation; eval.also goes with the stage and the data. Keys that an
    earlier version did not have get their defaults. `config_dirs`: of this call, whose parts may be built. Raises UserError for a
    typed key that the saved part does not have, and for a part that is neither ours nor theirs.
    """
    saved, now = read_yaml(file.read_text(), file), yaml.safe_load(with_credentials(cfg))
    typed = {key_of(override): override.partition("=")[2] for override in overrides if override != LOCAL_TO_COMPOSE}
    stage = saved.get("stage", cfg.stage)
    other_stage = "stage" in typed and typed["stage"] != stage
    result = copy.copy(cfg)
    check_section("stage", stage, file, config_dirs)
    result.stage = cfg.stage if other_stage else stage
    for name in SECTIONS:
        replaced = name != "eval" and name in typed
        replaced |= name == "collator" and other_stage  # a stage sets its collator as a whole
        if "experiment" in typed or replaced or name not in saved:
            continue
        tree = copy.deepcopy(section(saved, name, file))
        check_section(name, tree, file, config_dirs, typed)
        kind = _kind(name, tree, cfg)
        if name == "eval":
            tree |= {key: now[name][key] for key in _chosen(typed, other_stage, list(now[name]))}
            if "data" in typed or other_stage:
                tree.pop("also", None)  # stages of the data that the run had
        keys = [key for key in typed if key.startswith(f"{name}.")]
        for key in keys:
            _copy_value(now, {name: tree}, key)
        for key in keys:
            _refuse_unknown(key, tree, kind)
        part = _build(kind, tree)
        if "_target_" in tree:
            part._target_ = current_target(tree["_target_"])
        setattr(result, name, part)
    rows = section(saved, "train")
    kept = {k: rows[k] for k in TRAIN_KEYS if rows.get(k) is not None and f"train.{k}" not in typed}
    if "train.device_batch_size" in typed:
        kept.pop("device_batch_tokens", None)  # it would win over what is typed
    if "experiment" not in typed and kept:
        check_section("train", kept, file, config_dirs)
        built = _build(type(cfg.train), kept)
        result.train = replace(cfg.train, **{name: getattr(built, name) for name in kept})
    return result


def repeated(cfg: Config, file: Path, overrides: list[str], config_dirs: list[str]) -> Config:
    """The configuration to repeat the run of the config.yaml `file` with: `cfg`, but all that a training depends on as there,
    except keys of REPEATED_WITH that `overrides` give.

    Raises UserError for any other typed key, which would make it another run, and for a part that is neither ours nor of
    `config_dirs`.
    """
    saved, now = read_yaml(file.read_text(), file), yaml.safe_load(with_credentials(cfg))
    given = [key_of(override) for override in overrides if override != LOCAL_TO_COMPOSE]
    typed = [key for key in given if not key.startswith("hydra.") and key != "command"]
    for key in typed:
        if key not in (*REPEATED_WITH, *OF_THE_CALL):
            raise UserError(f"{key} is given, but command=reproduce repeats a run with its own settings; leave it out")
    check_section("stage", saved["stage"], file, config_dirs)
    result = copy.copy(cfg)
    result.stage = saved["stage"]
    for name in TRAINING:
        if name in saved:
            tree = copy.deepcopy(section(saved, name, file))
            check_section(name, tree, file, config_dirs, typed)
            kind = _kind(name, tree, cfg)
            for key in (key for key in typed if key.startswith(f"{name}.")):
                _refuse_unknown(key, tree, kind)
                _copy_value(now, {name: tree}, key)
            part = _build(kind, tree)
            if "_target_" in tree:
                part._target_ = current_target(tree["_target_"])
            setattr(result, name, part)
    result.run = replace(cfg.run, seed=int(saved["run"]["seed"]), allow_change=[])
    return result


def _chosen(typed: dict[str, str], other_stage: bool, keys: list[str]) -> list[str]:
    """The keys of `eval` that the choices on the command line set: all `keys`, where the file of one is the user's own."""
    chosen: list[str] = list(CHOSEN) if other_stage or "eval" in typed else []
    if "eval" not in typed:
        return chosen
    for choice in typed["eval"].strip("[]").split(","):
        file = conf_dir() / "eval" / f"{choice.strip()}.yaml"
        if not file.is_file():
            return keys
        chosen += yaml.safe_load(file.read_text())
    return chosen


def _refuse_unknown(key: str, tree: dict, kind: type) -> None:
    """Raises UserError for a typed key that the saved section of this kind does not have."""
    section, name = key.split(".")[:2]
    if name not in kind.__dataclass_fields__:
        way_out = "add data=local, which replaces its data" if key in LOCAL_KEYS else "leave it out"
        raise UserError(f"no key {key}: the {section} of the run ({tree.get('_target_') or kind.__name__}) has none; {way_out}")


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
    if name == "optimizer":
        return AdamWConfig if tree.get("_target_") == "chattrain.optim.adamw.build" else MuonAdamWConfig
    if name == "schedule":
        return DecayScheduleConfig if "decay_ratio" in tree else ShapedScheduleConfig
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
