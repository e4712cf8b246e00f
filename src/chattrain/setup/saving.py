"""Checkpoints while the run goes on: the loop waits for a copy of the tensors, and a thread of rank 0 writes them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from chattrain import loop
from chattrain.config import Config
from chattrain.config.run import CheckpointConfig
from chattrain.config.schema import to_yaml
from chattrain.errors import UserError
from chattrain.model.causal_lm import CausalLM
from chattrain.optim.named import NamedOptimizer
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy
from chattrain.setup.data import RunData
from chattrain.storage import checkpoint
from chattrain.storage.lineage import Ancestor, to_json
from chattrain.tracking.tracker import NullTracker, Tracker


class Saver:
    """Saves the states of a run, with the whole configuration in each checkpoint. All ranks make every call; rank 0 writes.

    A save that fails is raised by the next call of `save` or `finish`, on every rank.
    """

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        data: RunData,
        model: CausalLM,
        optimizer: NamedOptimizer,
        tracker: Tracker | NullTracker,
        ranks: Ranks,
        strategy: ParallelStrategy,
        lineage: list[Ancestor],
    ):
        self.config, self.config_yaml, self.stage = cfg.checkpoint, to_yaml(cfg), cfg.stage
        self.run_dir, self.data, self.model, self.optimizer = run_dir, data, model, optimizer
        self.tracker, self.ranks, self.strategy = tracker, ranks, strategy
        self.lineage = to_json(lineage)
        self.best = (
            Best(cfg.checkpoint, ranks.run_on_rank0(lambda: checkpoint.best(run_dir))) if cfg.checkpoint.keep_best else None
        )
        self._saved_at = time.monotonic()
        self._writing: Writing | None = None

    def is_due(self) -> bool:
        """Where checkpoint.every is not set: have checkpoint.minutes passed on rank 0 since the last save?"""
        minutes = self.config.minutes if self.config.every is None else None
        return self.ranks.is_main and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def is_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Is checkpoint.keep_best better than ever before, at this step? Such a state is saved and kept. Raises UserError where
        the metric is not measured."""
        return self.best is not None and self.best.improves(step, metrics)

    def save(self, state: loop.State) -> None:
        """Begin to save this state. Returns once its tensors are copied."""
        self.ranks.at(f"saving step {state.step}")
        self._finish_writing()
        weights, optimizer_state = self.strategy.full_weights(self.model), self.strategy.consolidate_state(self.optimizer.state())
        if self.ranks.is_main:
            write = self._writer(state, _copies(weights), _copies(optimizer_state))
            self._writing = Writing(state.step, write)
        self._saved_at = time.monotonic()

    def finish(self, together: bool = True) -> None:
        """Wait until the last save is on disk. `together` False: this rank alone, after an error, so that no other is raised."""
        if together:
            self._finish_writing()
        elif self._writing is not None:
            self._writing.wait()

    def _finish_writing(self) -> None:
        def wait() -> None:
            writing, self._writing = self._writing, None
            if writing is not None:
                self.tracker.checkpoint(writing.step, writing.result())

        self.ranks.run_on_rank0(wait)

    def _writer(self, state: loop.State, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> Callable[[], Path]:
        """A function that writes the checkpoint of this state and returns its folder."""
        saved = checkpoint.CheckpointState(
            step=state.step,
            tokens_seen=state.tokens_seen,
            supervised_tokens=state.supervised_tokens,
            loss_weight=state.loss_weight,
            skipped=state.skipped,
            stage=self.stage,
            model=self.model.shape,
            data_fingerprint=self.data.fingerprint,
            num_steps=self.data.num_steps,
            metrics=dict(self.tracker.last),
            mlflow_run_id=self.tracker.mlflow_run_id,
            lineage=self.lineage,
            best=self.best.at(state.step) if self.best else None,
        )
        keep, files, tokenizer = self.config.keep, self.model.files, self.data.tokenizer
        return lambda: checkpoint.save(self.run_dir, saved, weights, optimizer, tokenizer, self.config_yaml, keep, files)


class Writing:
    """A save that a thread makes. The thread is a daemon: a process that is stopped at once does not wait for it."""

    def __init__(self, step: int, write: Callable[[], Path]):
        self.step, self._write = step, write
        self._folder: Path | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="saving")
        self._thread.start()

    def result(self) -> Path:
        """Wait for the folder; raises what went wrong."""
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._folder is not None
        return self._folder

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._folder = self._write()
        except BaseException as error:
            self._error = error


class Best:
    """The best value of checkpoint.keep_best so far. `found`: what an earlier part of the run has kept, the same on all ranks, as
    these must agree on when to save."""

    def __init__(self, config: CheckpointConfig, found: tuple[Path, dict] | None):
        assert config.keep_best is not None
        self.metric, self.maximize = config.keep_best, config.maximizes
        self.value = float(found[1]["value"]) if found and found[1]["metric"] == self.metric else None
        self.step = -1  # of the value, in this process

    def improves(self, step: int, metrics: dict[str, float]) -> bool:
        if self.metric not in metrics:
            if not metrics or step:  # measured at some evaluations only, as questions may be
                return False
            raise UserError(f"checkpoint.keep_best={self.metric} is not measured; measured are {', '.join(metrics)}")
        value = metrics[self.metric]
        if not step or not math.isfinite(value):  # the model that the run begins with is not saved, so it is no best to keep
            return False
        if self.value is not None and (value <= self.value if self.maximize else value >= self.value):
            return False
        self.value, self.step = value, step
        return True

    def at(self, step: int) -> dict | None:
        """For the checkpoint of this step: the value, if it is the best."""
        if step != self.step:
            return None
        return {"metric": self.metric, "value": self.value, "maximize": self.maximize}


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own on the CPU; what is one tensor stays one."""
    copied: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in copied:
            copied[id(tensor)] = tensor.detach().to("cpu", copy=True).contiguous()
    return {name: copied[id(tensor)] for name, tensor in tensors.items()}
