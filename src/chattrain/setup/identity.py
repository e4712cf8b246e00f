"""What decides the numbers of a run, in identity.json: settings, data, start. A finished run is only passed off as the answer to
a command that asks for the same."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from chattrain.config import Config
from chattrain.config.changes import deciding, flatten
from chattrain.config.plain_yaml import read_yaml
from chattrain.config.schema import to_yaml
from chattrain.config.targets import recorded_target
from chattrain.errors import UserError
from chattrain.setup.data import RunData
from chattrain.setup.start import Start, find_start
from chattrain.storage import checkpoint
from chattrain.storage.files import replace_text

FILE = "identity.json"


@dataclass
class Identity:
    """None: not known, because an earlier version made the run; it is then not compared."""

    settings: dict[str, Any]  # the keys that decide the numbers, by dotted name
    data_settings: dict[str, Any]  # data.*: they name what differs where the contents do
    num_steps: int  # optimizer steps
    training: str  # hash of the training data, its order and the rows of a step
    validation: str | None
    questions: str | None
    start: str | None  # where the weights come from, in words
    weights: str | None  # hash of the weights at the start and of their tokenizer
    compiled: bool | None = None  # not compared: it changes numbers by rounding only. A resumed run keeps it
    changes: list[str] = field(default_factory=list)  # settings that changed when the run resumed: its numbers are of a mixture

    def write(self, run_dir: Path) -> None:
        replace_text(run_dir / FILE, json.dumps(asdict(self), indent=1) + "\n")


def contents(data: RunData) -> dict[str, str | None]:
    """Hashes of the training and of the validation data; None where there is none."""
    return {"training": data.fingerprint, "validation": _hash(_validation(data))}


def identify(cfg: Config, data: RunData, start: Start | None, compiled: bool) -> Identity:
    """The identity that a run of this configuration has. `start`: of a run that begins anew; None: what it would start from."""
    flat = flatten(yaml.safe_load(to_yaml(cfg)))
    if start is None:
        with suppress(UserError):  # what it started from may be gone: it can still resume
            start = find_start(cfg)
    return Identity(
        settings=_settings(flat),
        data_settings={key: value for key, value in flat.items() if key.startswith("data.")},
        num_steps=data.num_steps,
        training=data.fingerprint,
        validation=contents(data)["validation"],
        questions=_hash([[q.ids, q.letter_ids, q.answer] for questions in data.question_sets.values() for q in questions]),
        start=start.description if start else None,
        weights=weights_hash(start.checkpoint) if start else None,
        compiled=compiled,
    )


def read_identity(run_dir: Path, saved: Path) -> Identity:
    """The identity of an existing run; what it does not hold, as an earlier version made it, is what its checkpoint `saved`
    tells."""
    file, flat = run_dir / FILE, flatten(read_yaml((saved / "config.yaml").read_text()))
    setting = flat.get("train.compile")
    compiled = setting if isinstance(setting, bool) else None  # before auto, the setting was the decision
    if file.is_file():
        known = {each.name for each in fields(Identity)}
        try:
            held = {key: value for key, value in json.loads(file.read_text()).items() if key in known}
            return Identity(**{"compiled": compiled, **held})
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file} cannot be read: {error}; remove it, or use another run.name") from error
    state, data_settings = checkpoint.load_state(saved), {key: value for key, value in flat.items() if key.startswith("data.")}
    return Identity(_settings(flat), data_settings, state.num_steps, state.data_fingerprint, None, None, None, None, compiled)


def read_changes(run_dir: Path) -> list[str]:
    """The settings that changed when the run resumed; [] where it has no readable identity."""
    try:
        return json.loads((run_dir / FILE).read_text()).get("changes", [])
    except (OSError, ValueError):
        return []


def resumed(before: Identity, now: Identity) -> Identity:
    """The identity of a run that goes on under other settings: what it began with, and what changed. Number of steps, data and
    compilation are those that it now has."""
    changed = differences(replace(before, changes=[]), replace(now, num_steps=before.num_steps))
    contents = {part: getattr(now, part) for part in ("training", "validation", "questions")}
    return replace(before, **contents, num_steps=now.num_steps, compiled=now.compiled, changes=before.changes + changed)


def differences(before: Identity, now: Identity) -> list[str]:
    """What differs, in words, such as `optimizer.lr_scale 1.0 -> 30.0`; [] where the numbers are the same.

    Settings that only one of the two has belong to another version of chattrain and are not compared.
    """
    found = _changed(before.settings, now.settings)
    if before.num_steps != now.num_steps:
        found.append(f"optimizer steps {before.num_steps} -> {now.num_steps}")
    contents = [
        part
        for part in ("training", "validation", "questions")
        if getattr(before, part) is not None and getattr(before, part) != getattr(now, part)
    ]
    if contents:
        found += _changed(before.data_settings, now.data_settings) or [f"the contents of the data: {', '.join(contents)}"]
    if before.weights and now.weights and before.weights != now.weights:
        found.append(f"the start, {before.start} -> {now.start}")
    if before.changes:
        found.append(f"settings that changed while it ran ({', '.join(before.changes)})")
    return found


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = [key for key in now if key in before and before[key] != now[key]]
    return [f"{key} {before[key]} -> {now[key]}" for key in keys]


def _settings(flat: dict[str, Any]) -> dict[str, Any]:
    """The deciding settings; `_target_` under the name that checkpoints have."""
    return {
        key: recorded_target(value) if key.endswith("_target_") and isinstance(value, str) else value
        for key, value in deciding(flat).items()
    }


def _validation(data: RunData) -> list[Any] | None:
    if data.validation is None:
        return None
    caches = [cache.content_hash for cache in data.validation.mixture.caches]
    also = [[stage, [c.content_hash for c in v.mixture.caches], rows] for stage, (v, rows) in data.also.items()]
    return [caches, data.validation_rows, *([also] if also else [])]


def weights_hash(folder: Path | None) -> str | None:
    """Hash of the weights and the tokenizer of a checkpoint, by its manifest; of another program's folder by its files' sizes
    and times."""
    if folder is None:
        return "random"
    manifest = folder / "manifest.json"
    if manifest.is_file():
        files = json.loads(manifest.read_text())
        return _hash([name, digest] for name, digest in sorted(files.items()) if name == "model.safetensors" or "token" in name)
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return _hash([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)


def _hash(content: Any) -> str | None:
    if content is None:
        return None
    content = content if isinstance(content, list) else list(content)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
