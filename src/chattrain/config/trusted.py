"""A run folder is data: what its config.yaml says is built is only ours, or named by the user's own folder of choices.

A `_target_`, and a source `python:<module>.<function>`, is imported and called. So one in a folder, which may come from
anywhere, is refused unless it is a part of chattrain that stands in conf/, or this call names it: on its command line, or in a
YAML file in a `--config-dir`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from chattrain.config.compose import conf_dir, groups
from chattrain.config.model import GPTConfig, HFModelConfig
from chattrain.config.plain_yaml import leaves
from chattrain.config.targets import current_target
from chattrain.errors import UserError

TARGET = "_target_"
PYTHON = "python:"  # in the path of a source


def check_section(section: str, tree: Any, file: Path, config_dirs: list[str], typed: Collection[str] = ()) -> None:
    """Check one section of the config.yaml `file` before anything is built of it. `config_dirs`: of this call. `typed`: what
    this call gives; values of these keys in the file are not used. A choice of a whole group, such as eval=bpb, is none of these
    keys, as it leaves others of the section as they are.

    Raises UserError for a `_target_` that is neither ours nor named there.
    """
    for key, value in leaves(tree, section):
        if not _is_code(key, value) or any(f"{key}.".startswith(f"{name}.") for name in typed if name != section):
            continue
        if key == f"{section}.{TARGET}" and isinstance(value, str) and current_target(value) in _ours(section):
            continue
        run = file.parents[2] if file.parent.parent.name == "checkpoints" else file.parent
        if value not in _named(config_dirs, run):
            again = f"type {key}={value} again, or " if str(value).startswith(PYTHON) and ".stages." not in key else ""
            raise UserError(
                f"{file}: {key}={value} is no part of chattrain, and a run folder is data, so it is not imported. If it is your "
                f"own, {again}add the folder whose YAML file names it: --config-dir <folder>"
            )


def _is_code(key: str, value: Any) -> bool:
    return key.rpartition(".")[2] == TARGET or (isinstance(value, str) and value.startswith(PYTHON))


def _ours(section: str) -> set[str]:
    """The targets of a group's choices in conf/, and of its dataclasses."""
    files = (conf_dir() / section).glob("*.yaml")
    found = {value for file in files for key, value in leaves(_read(file), "") if key.endswith(TARGET)}
    return found | ({GPTConfig._target_, HFModelConfig._target_} if section == "model" else set())


def _named(config_dirs: list[str], apart_from: Path) -> set[str]:
    """The targets in the YAML files of the groups in the user's own folders. A run that lies in one of these, as where such a
    folder is the current one, names nothing for itself: files in the folder `apart_from` do not count."""
    files = [file for folder in config_dirs for group in groups() for file in (Path(folder) / group).rglob("*.yaml")]
    own = [file for file in files if apart_from.resolve() not in file.resolve().parents]
    return {str(value) for file in own for key, value in leaves(_read(file), "") if _is_code(key, value)}


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # Hydra says so, where it is used
        return None
