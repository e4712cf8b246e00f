"""Where a checkpoint comes from: the chain of the checkpoints that it was trained from, in its state.json, oldest first.

The last entry is the checkpoint itself. Its hashes stand in manifest.json, which is written last, so they are filled in when the
chain is read.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Ancestor:
    """One checkpoint of the chain. None: not known."""

    stage: str | None
    run: str  # <stage>/<name>; of a model that another program made, its path
    checkpoint: str | None = None  # its folder, absolute, when a run started from it
    step: int | None = None  # optimizer steps
    weights: str | None = None  # SHA-256 of model.safetensors
    config: str | None = None  # SHA-256 of config.yaml
    data: str | None = None  # fingerprint of the training data, its order and the rows of a step
    chattrain: str | None = None  # version
    commit: str | None = None  # of the code, `+` behind it where files differed
    imported_from: str | None = None  # nanochat, huggingface
    changes: dict[str, list[Any]] = field(default_factory=dict)  # setting -> [of the ancestor before, of this one]


def read_lineage(folder: Path) -> list[Ancestor]:
    """The chain of a checkpoint, oldest first, itself last; of a folder that another program made, that folder alone.

    What a checkpoint of an earlier version does not carry is taken from the runs it started from, as far as they exist.
    """
    if not (folder / "state.json").is_file():
        return [Ancestor(None, str(folder), str(folder), imported_from="huggingface")]
    state, manifest = _read(folder / "state.json"), _read(folder / "manifest.json")
    carried = state.get("lineage")
    chain = [ancestor(entry) for entry in carried if isinstance(entry, dict)] if isinstance(carried, list) else []
    if not chain:
        chain = [*_ancestors_of_old(folder), Ancestor(state.get("stage"), run_label(folder))]
    itself = replace(
        chain[-1],
        checkpoint=str(folder),
        step=state.get("step"),
        weights=manifest.get(WEIGHTS),
        config=manifest.get("config.yaml"),
        data=state.get("data_fingerprint") or None,
    )
    return [*chain[:-1], itself]


def ancestor(entry: dict[str, Any]) -> Ancestor:
    """The entry of a state.json, which another version may have written. What is of another kind is left out."""
    texts = [each.name for each in fields(Ancestor) if each.name not in ("step", "changes")]
    known: dict[str, Any] = {key: str(entry[key]) for key in texts if entry.get(key) is not None}
    step, changes = entry.get("step"), entry.get("changes")
    pairs = changes.items() if isinstance(changes, dict) else []
    return Ancestor(
        **{"stage": None, "run": "", **known},
        step=step if isinstance(step, int) else None,
        changes={key: pair for key, pair in pairs if isinstance(pair, list) and len(pair) == 2},
    )


def to_json(chain: list[Ancestor]) -> list[dict[str, Any]]:
    return [{key: value for key, value in asdict(each).items() if value not in (None, {})} for each in chain]


def run_label(folder: Path) -> str:
    """`<stage>/<name>` of the run of a checkpoint; the name of a folder that lies in no run."""
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    return f"{run.parent.name}/{run.name}" if run != folder else folder.name


def whereabouts(each: Ancestor) -> str:
    """Whether a checkpoint of a chain is still there: `there`, `changed` (another model lies there), `gone`; `there, hash not
    known` where nothing can be compared."""
    folder = Path(each.checkpoint) if each.checkpoint else None
    if folder is None or not folder.is_dir():
        return "gone"
    if each.weights is None:
        return "there, hash not known"
    return "there" if _read(folder / "manifest.json").get(WEIGHTS) == each.weights else "changed"


def _ancestors_of_old(folder: Path) -> list[Ancestor]:
    """The chain of what the run of a checkpoint without a lineage says it started from."""
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    said = str(_read(run / "identity.json").get("start") or _read(run / "summary.json").get("init") or "")
    start = Path(re.sub(r" \(resumed\)$", "", said))
    if said.startswith("/") and start.is_dir() and run not in start.parents:
        return read_lineage(start)
    return [Ancestor(None, said, said)] if said.startswith("/") and run not in start.parents else []


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
