"""The tracker of a run: metrics.jsonl in its folder, and MLflow where tracking.mlflow asks for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from chattrain.config import Config
from chattrain.parallel.ranks import Ranks
from chattrain.storage.checkpoint import CheckpointState
from chattrain.tracking.mlflow_sink import MLflowSink, Param
from chattrain.tracking.tracker import NullTracker, Tracker


def build_tracker(
    cfg: Config, run_dir: Path, num_steps: int, saved: CheckpointState | None, ranks: Ranks
) -> Tracker | NullTracker:
    """The tracker on rank 0, a NullTracker on other ranks. `saved`: the state of the checkpoint that the run resumes from."""
    if not ranks.is_main:
        return NullTracker()
    sink = None
    if cfg.tracking.mlflow:
        uri = cfg.tracking.uri or f"sqlite:///{(Path(cfg.run.root) / 'mlflow.db').resolve()}"
        sink = MLflowSink(
            uri,
            cfg.tracking.experiment,
            f"{cfg.stage}/{run_dir.name}",
            flatten(asdict(cfg)),
            {"stage": cfg.stage, "run_dir": str(run_dir)},
            saved.mlflow_run_id if saved else None,
        )
    return Tracker(run_dir, num_steps, saved.step if saved else 0, sink)


def flatten(tree: dict, prefix: str = "") -> dict[str, Param]:
    """A nested configuration as dotted keys, enums as their names.

    >>> flatten({"run": {"seed": 1, "name": None}, "betas": [0.8, 0.95]})
    {'run.seed': 1, 'run.name': None, 'betas': '[0.8, 0.95]'}
    """
    flat: dict[str, Param] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float | bool | None):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = getattr(value, "name", str(value))
    return flat
