"""The chain of checkpoints that a run's own checkpoints will carry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from chattrain.config import Config
from chattrain.config.changes import flatten, of_training
from chattrain.config.schema import to_yaml
from chattrain.storage.lineage import Ancestor, read_lineage
from chattrain.tracking.repository import code_commit, packages


def lineage_of_run(cfg: Config, run_dir: Path, start: Path | None, resumes: bool) -> list[Ancestor]:
    """The chain of a run that begins with the checkpoint or model folder `start` (None: random weights) or resumes from it. The
    last entry is the run itself, still without a step and hashes."""
    before = read_lineage(start) if start else []
    if resumes:
        *before, earlier = before
        changes = earlier.changes
    else:
        changes = setting_changes(start, to_yaml(cfg)) if start else {}
    itself = Ancestor(
        cfg.stage, f"{cfg.stage}/{run_dir.name}", chattrain=packages().get("chattrain"), commit=code_commit(), changes=changes
    )
    return [*before, itself]


def setting_changes(start: Path, config_yaml: str) -> dict[str, list[Any]]:
    """The settings of the training that differ from those of the checkpoint `start`: key -> [there, here]. {} where it has none.
    Of the data, `data` has the paths of the sources that were trained on.

    Keys that only one of the two has, such as those of another optimizer, count where the part they belong to is another.
    """
    file = start / "config.yaml"
    if not file.is_file():
        return {}
    all_there, all_here = flatten(yaml.safe_load(file.read_text())), flatten(yaml.safe_load(config_yaml))
    there, here = of_training(all_there), of_training(all_here)
    there["data"], here["data"] = _sources(all_there), _sources(all_here)
    changes = {key: [there[key], here[key]] for key in here if key in there and there[key] != here[key]}
    others = {key.partition(".")[0] for key in changes if key.endswith("._target_")}
    for key in (key for key in [*there, *here] if key.partition(".")[0] in others and (key in there) != (key in here)):
        changes[key] = [there.get(key), here.get(key)]
    return changes


def _sources(flat: dict[str, Any]) -> list[str]:
    """The paths of the training data of a configuration with dotted keys."""
    own, stage = flat.get("data.train_path"), re.escape(str(flat.get("stage")))
    if own is not None:
        return [str(path) for path in (own if isinstance(own, list) else [own])]
    return sorted(str(path) for key, path in flat.items() if re.fullmatch(rf"data\.stages\.{stage}\.train\.[^.]+\.path", key))
