"""THE LOOP: optimizer steps, for any data and model. setup/build.py chooses and builds the components; nothing here does.

Log lines, evaluations, checkpoints and errors count steps from 1: `step 4` is the fourth step, or the state after it. Arguments
called `step` that say which data or learning rate to take count from 0: the number of steps completed before.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chattrain.data.batch import Batch
from chattrain.data.loader import Loader
from chattrain.errors import RunFailed
from chattrain.optim.named import NamedOptimizer
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy

log = logging.getLogger("chattrain")


@dataclass
class State:
    """How far a run is. Tokens are counted over all ranks, without padding."""

    step: int = 0  # completed optimizer steps
    tokens_seen: int = 0
    supervised_tokens: int = 0  # targets of weight 1
    loss_weight: float = 0.0  # sum of the weights of all targets
    skipped: int = 0  # steps whose loss or gradient was not finite, which changed nothing
    interrupted: bool = False
    tokens_per_second: float | None = None  # over all ranks, from this process's second step on
    current_step: int = 0  # the step that runs, or ran last, counted from 1: the one that an error names


@dataclass(frozen=True)
class Cadence:
    """Every how many steps to log, evaluate and save, besides after the last step that is made; None: only then."""

    log: int
    evaluate: int | None
    save: int | None
    last_step: int  # to be made now: the run's last, or an earlier one from which it resumes later

    def due(self, every: int | None, step: int) -> bool:
        return step == self.last_step or (every is not None and step % every == 0)


@dataclass
class TrainerComponents:
    """What the loop runs on; built by setup/build.py."""

    model: nn.Module
    loss_of: Callable[[Batch], Tensor]  # summed loss of a batch's targets in nats; compiled, under autocast
    optimizer: NamedOptimizer
    lr_factor: Callable[[int], float]  # steps completed -> factor on every learning rate
    loader: Loader
    evaluate: Callable[[int], dict[str, float]]  # steps completed -> metrics by name
    save: Callable[[State], None]  # begins to save; the copy is made when it returns
    finish_saving: Callable[..., None]  # waits until it is on disk; see setup/saving.py
    save_asked: Callable[[], bool]  # has this process been asked to save now?
    is_best: Callable[[int, dict[str, float]], bool]  # steps completed, metrics measured -> is it to be kept as the best?
    track: Callable[[int, dict[str, float]], None]
    show: Callable[[int], None]  # updates the progress bar
    stop_asked: Callable[[], bool]  # has this process been asked to stop?
    ranks: Ranks
    strategy: ParallelStrategy  # how the work of a step is distributed over ranks
    max_grad_norm: float | None  # None: gradients are not clipped
    checks_each_step: bool  # read loss and gradient norm after each step; else when `fit` logs, evaluates or saves
    max_skipped: int | None  # steps that may be skipped because they are not finite; None: the first one fails the run
    watch: Callable[[int, float], None]  # steps completed, loss of the last: looks for spikes
    flops_per_token: int  # forward and backward
    peak_flops: float | None  # FLOP/s of one device; None: unknown
    meters: Callable[[], dict[str, float]]  # resources that this process has used since the last call, such as memory


@dataclass
class StepResult:
    """loss and grad_norm stay on the device: reading them would make this process wait for it."""

    step: int  # steps completed before it
    loss: Tensor  # () this rank's summed loss in nats, divided by the loss weight of all ranks and micro-batches
    grad_norm: Tensor  # () of the gradients summed over all ranks
    group_norms: Tensor | None  # (groups,) the same of each of the optimizer's groups; None at steps that are not logged
    tokens: int  # of all ranks, without padding
    num_supervised: int  # targets of weight 1, of all ranks
    loss_weight: float  # sum of the weights of the targets, of all ranks
    stop: bool  # was a rank asked to stop?
    save: bool  # was a rank asked to save?


def fit(trainer: TrainerComponents, state: State, cadence: Cadence) -> State:
    """Train from state.step to cadence.last_step, or until a rank is asked to stop; saves in both cases. Returns the state."""
    if state.step == 0:
        trainer.is_best(0, measure(trainer, 0))
    speed = Speed(trainer, state)
    unchecked: list[StepResult] = []
    while state.step < cadence.last_step and not state.interrupted:
        state.current_step = state.step + 1
        batches = trainer.loader.step(state.step)
        factor = trainer.lr_factor(state.step)
        trainer.optimizer.set_lr_factor(factor)
        result = train_step(trainer, batches, state.step, logged=cadence.due(cadence.log, state.step + 1))
        unchecked.append(result)

        state.step += 1
        state.tokens_seen += result.tokens
        state.supervised_tokens += result.num_supervised
        state.loss_weight += result.loss_weight
        state.interrupted = result.stop
        speed.tick()
        trainer.show(state.step)
        log, evaluate, save = (cadence.due(every, state.step) for every in (cadence.log, cadence.evaluate, cadence.save))
        save = save or result.save
        if log or evaluate or save or state.interrupted or trainer.checks_each_step:
            loss, grad_norm = sync_and_check_finite(trainer, unchecked, state)
            unchecked.clear()
            if log:
                norms = {"train/grad_norm": grad_norm, **trainer.optimizer.by_group("train/grad_norm", result.group_norms)}
                log_step(trainer, state, speed, {"train/loss": loss, **norms, "lr_factor": factor})
        state.tokens_per_second = speed.overall()
        if evaluate:
            with speed.paused():
                save = trainer.is_best(state.step, measure(trainer, state.step)) or save
        if save or state.interrupted:
            with speed.paused():
                trainer.save(state)
    trainer.finish_saving()
    return state


def log_step(trainer: TrainerComponents, state: State, speed: Speed, metrics: dict[str, float]) -> None:
    """Track the metrics of the last step, with learning rates, speed, resources and tokens."""
    metrics |= {**trainer.optimizer.learning_rates(), **speed.since_last(), **trainer.meters()}
    metrics |= {"train/tokens_seen": state.tokens_seen, "train/supervised_tokens": state.supervised_tokens}
    metrics |= {"train/loss_weight": state.loss_weight, **({"train/skipped": state.skipped} if state.skipped else {})}
    trainer.track(state.step, metrics)
    gc.collect(1)  # between steps, so that it interrupts none: see runner.collect_garbage_between_steps


def measure(trainer: TrainerComponents, step: int) -> dict[str, float]:
    """Evaluate, and track the metrics if there are any. Returns them."""
    metrics = trainer.evaluate(step)
    if metrics:
        trainer.track(step, metrics)
    return metrics


def train_step(trainer: TrainerComponents, batches: list[Batch], step: int, logged: bool = False) -> StepResult:
    """One optimizer step on this rank's micro-batches. `step`: steps completed before. parallel/strategy.py has the timeline.

    `logged`: take the gradient norm of each group too, which reads the gradients once more.
    The loss of a step is the weighted sum over its targets divided by the sum of their weights, over all micro-batches and ranks:
    a mean of means would give a token in a batch with few of them more weight. Where the loss or the gradient norm is not finite,
    neither the weights nor the optimizer's state change; `sync_and_check_finite` reports it. Raises RunFailed if no target
    carries loss.
    """
    ranks = trainer.ranks
    ranks.at(f"step {step + 1}")
    counts = ([b.loss_weight, b.num_supervised, b.num_tokens] for b in batches)
    asked = float(trainer.stop_asked()), float(trainer.save_asked())
    weight, supervised, tokens, stop, save = ranks.sum([*map(sum, zip(*counts, strict=True)), *asked])
    if not weight:
        raise RunFailed(f"step {step + 1} has no token that carries loss in its rows: {trainer.loader.describe(step)}")
    losses = []
    for number, batch in enumerate(batches, start=1):
        trainer.strategy.set_requires_gradient_sync(last=number == len(batches))
        loss = trainer.loss_of(batch) / weight
        loss.backward(1 + 0 * loss.detach())  # 1, or NaN where the loss is not finite: then no rank's gradient norm is finite
        losses.append(loss.detach())
    norm = trainer.strategy.reduce_gradients(trainer.optimizer)
    group_norms = trainer.strategy.group_norms(trainer.optimizer, norm) if logged else None
    loss = sum(losses[1:], losses[0])
    result = StepResult(step, loss, norm, group_norms, int(tokens), int(supervised), weight, stop > 0, save > 0)
    if trainer.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(trainer.optimizer.parameters(), trainer.max_grad_norm, norm)
    found_inf = (~torch.isfinite(norm)).float()  # read only where that does not wait for the device
    trainer.optimizer.void_if(None if trainer.checks_each_step and not found_inf else found_inf)
    trainer.strategy.step(trainer.optimizer)
    return result


def sync_and_check_finite(trainer: TrainerComponents, results: list[StepResult], state: State) -> tuple[float, float]:
    """Wait for the device; returns the loss, summed over ranks, and the gradient norm of the last of these steps.

    Raises RunFailed for the first step whose loss or gradient norm is not finite, or with max_skipped for the first that is one
    too many, so that nothing is tracked, evaluated or saved after it. Such steps have changed nothing.
    """
    losses = trainer.ranks.sum(torch.stack([result.loss for result in results]).tolist())
    norms = torch.stack([result.grad_norm for result in results]).tolist()
    for result, loss, norm in zip(results, losses, norms, strict=True):
        if math.isfinite(loss) and math.isfinite(norm):
            trainer.watch(result.step + 1, loss)
            continue
        state.skipped += 1
        what = f"step {result.step + 1}: non-finite loss ({loss:.4g}) or gradient norm ({norm:.4g})"
        rows = f"Rows: {trainer.loader.describe(result.step)}"
        if trainer.max_skipped is None or state.skipped > trainer.max_skipped:
            limit = "" if trainer.max_skipped is None else f", the {state.skipped}th step of this kind (train.max_skipped)"
            raise RunFailed(
                f"{what}{limit}. Stopped; no checkpoint written. Lower optimizer.lr_scale or set train.max_grad_norm. {rows}"
            )
        log.warning("%s, skipped: it changed nothing (%d so far). %s", what, state.skipped, rows)
    return losses[-1], norms[-1]


class Speed:
    """Tokens per second and model FLOPs utilisation over all ranks, and the fraction of time that this process waits for data.

    Time in `paused` does not count. The first step of a process compiles and warms up, so `overall` counts from the second.
    """

    def __init__(self, trainer: TrainerComponents, state: State):
        self.trainer, self.state = trainer, state
        self.last = (time.perf_counter(), state.tokens_seen)
        self.waited_s = trainer.loader.waited_s
        self.first: tuple[float, int] | None = None

    def tick(self) -> None:
        """A step is completed."""
        if self.first is None:
            self.first = (time.perf_counter(), self.state.tokens_seen)

    def since_last(self) -> dict[str, float]:
        """Metrics since the last call."""
        rate, waited_s = self._rate(self.last), self.trainer.loader.waited_s - self.waited_s
        data_wait = waited_s / max(time.perf_counter() - self.last[0], 1e-9)
        self.last, self.waited_s = (time.perf_counter(), self.state.tokens_seen), self.trainer.loader.waited_s
        peak, ranks = self.trainer.peak_flops, self.trainer.ranks.world_size
        utilisation = {} if peak is None else {"train/mfu": rate * self.trainer.flops_per_token / (peak * ranks)}
        return {"train/tokens_per_second": rate, "train/data_wait": data_wait, **utilisation}

    def overall(self) -> float | None:
        """Tokens per second from the second step on; None before."""
        return self._rate(self.first) if self.first and self.state.tokens_seen > self.first[1] else None

    def _rate(self, since: tuple[float, int]) -> float:
        return (self.state.tokens_seen - since[1]) / max(time.perf_counter() - since[0], 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time in this context."""
        begun = time.perf_counter()
        yield
        spent = time.perf_counter() - begun
        self.last = (self.last[0] + spent, self.last[1])
        if self.first is not None:
            self.first = (self.first[0] + spent, self.first[1])
