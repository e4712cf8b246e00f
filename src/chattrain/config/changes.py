"""Which keys decide the numbers of a run. Two runs that agree in these, in data and in start give the same numbers."""

from __future__ import annotations

from typing import Any

# Keys and groups of keys that change where a run goes, how fast it is or what it says of itself, and its numbers by rounding at
# most. Data and start are compared by their contents, so their keys are not compared.
FREE = (
    "command",
    "format",
    "runs",
    "run.root",
    "run.name",
    "run.dir",
    "run.resume",
    "run.allow_change",
    "init",
    "data",
    "tracking",
    "log",
    "checkpoint",
    "distributed",
    "sweep",
    "chat",
    "inspect",
    "plan",
    "verify",
    "export",
    "train.stop_after",
    "train.max_steps",  # the number of steps is compared
    "train.num_epochs",
    "train.max_tokens",
    "train.max_supervised_tokens",
    "train.device",
    "train.compile",
    "train.activation_checkpointing",
    "train.device_batch_size",
    "train.device_batch_tokens",
    "train.rows_per_step",  # part of the data's fingerprint, in rows
    "train.total_batch_size",
    "eval.batch_size",
    "eval.reply_batch_size",
    "eval.prompts",
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration by dotted keys; an empty group keeps its own.

    >>> flatten({"run": {"seed": 1}, "betas": [0.8, 0.95], "tags": {}})
    {'run.seed': 1, 'betas': [0.8, 0.95], 'tags': {}}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def deciding(flat: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide the numbers of a run.

    >>> deciding({"run.seed": 1, "run.name": "a", "data.schema": "text", "optimizer.lr": 0.1})
    {'run.seed': 1, 'optimizer.lr': 0.1}
    """
    return {key: value for key, value in flat.items() if not any(key == free or key.startswith(f"{free}.") for free in FREE)}


def of_training(flat: dict[str, Any]) -> dict[str, Any]:
    """The keys that say what a run is trained on and how: those that decide its numbers, data, number of steps and batch.

    >>> of_training({"run.seed": 1, "run.name": "a", "data.schema": "text", "data.workers": 2, "train.max_steps": 3})
    {'run.seed': 1, 'data.schema': 'text', 'train.max_steps': 3}
    """
    kept = deciding(flat)
    return {
        key: value
        for key, value in flat.items()
        if key in kept or (key.startswith(("data.", "train.")) and key not in ("data.cache_dir", "data.workers"))
    }
