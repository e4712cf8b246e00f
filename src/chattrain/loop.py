"""THE LOOP: one optimizer step after another, whatever the data. setup/build.py builds the parts; nothing here chooses any."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
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


@dataclass
class State:
    """How far a run is. step counts optimizer steps only; tokens are counted over all ranks, padding left out."""

    step: int = 0
    tokens_seen: int = 0
    supervised_tokens: int = 0
    interrupted: bool = False
    tokens_per_second: float | None = None  # of this process, from its second step on


@dataclass(frozen=True)
class Cadence:
    """After how many steps something is done; None: only at the end."""

    log: int
    evaluate: int | None
    save: int | None
    num_steps: int

    def due(self, every: int | None, step: int) -> bool:
        return step == self.num_steps or (every is not None and step % every == 0)


@dataclass
class TrainerComponents:
    """What the loop runs on; setup/build.py makes them."""

    model: nn.Module
    loss_of: Callable[[Batch], Tensor]  # summed nats of a batch's targets; compiled, autocast
    optimizer: NamedOptimizer
    lr_factor: Callable[[int], float]  # step -> factor on every learning rate
    loader: Loader
    evaluate: Callable[[int], dict[str, float]]  # step -> what is measured there
    save: Callable[[State], None]
    track: Callable[[int, dict[str, float]], None]
    show: Callable[[int], None]  # moves the progress display
    stop_asked: Callable[[], bool]  # has this process been asked to stop?
    ranks: Ranks
    strategy: ParallelStrategy  # how the work of a step is spread over ranks
    max_grad_norm: float | None
    checks_each_step: bool  # read loss and gradient norm before the weights change; else `fit` does, when it logs
    flops_per_token: int
    peak_flops: float | None  # of one device; None: unknown
    meters: Callable[[], dict[str, float]]  # what this process has used since it was last asked


@dataclass
class StepResult:
    """What a step leaves. loss and grad_norm stay on the device, as reading them would make this process wait for it."""

    step: int
    loss: Tensor  # this rank's part of it, in nats a supervised token over all ranks and micro-batches
    grad_norm: Tensor  # of all ranks
    tokens: int
    num_supervised: int
    stop: bool


def fit(trainer: TrainerComponents, state: State, cadence: Cadence) -> State:
    """Train from state.step until cadence.num_steps, or until a rank is asked to stop; the state is saved either way."""
    if state.step == 0:
        measure(trainer, 0)
    speed = Speed(trainer, state)
    unread: list[StepResult] = []
    while state.step < cadence.num_steps and not state.interrupted:
        batches = trainer.loader.step(state.step)
        factor = trainer.lr_factor(state.step)
        trainer.optimizer.set_lr_factor(factor)
        result = train_step(trainer, batches, state.step)
        unread.append(result)

        state.step += 1
        state.tokens_seen += result.tokens
        state.supervised_tokens += result.num_supervised
        state.interrupted = result.stop
        speed.tick()
        trainer.show(state.step)
        log, evaluate, save = (cadence.due(every, state.step) for every in (cadence.log, cadence.evaluate, cadence.save))
        if log or evaluate or save or state.interrupted:
            loss, grad_norm = sync_and_check_finite(trainer, unread)
            unread.clear()
        if log:
            trainer.track(
                state.step,
                {
                    "train/loss": loss,
                    "train/grad_norm": grad_norm,
                    "lr_factor": factor,
                    **trainer.optimizer.learning_rates(),
                    **speed.since_last(),
                    **trainer.meters(),
                    "train/tokens_seen": state.tokens_seen,
                    "train/supervised_tokens": state.supervised_tokens,
                },
            )
            gc.collect(1)  # here, and not in the midst of a step: see runner.collect_garbage_between_steps
        state.tokens_per_second = speed.overall()
        if evaluate:
            with speed.paused():
                measure(trainer, state.step)
        if save or state.interrupted:
            with speed.paused():
                trainer.save(state)
    return state


def measure(trainer: TrainerComponents, step: int) -> None:
    """Evaluate, and track what there is: a run may measure nothing."""
    metrics = trainer.evaluate(step)
    if metrics:
        trainer.track(step, metrics)


def train_step(trainer: TrainerComponents, batches: list[Batch], step: int) -> StepResult:
    """One optimizer step on this rank's micro-batches.

    Its loss is the sum over all supervised tokens divided by their number, over micro-batches and ranks alike: a mean
    of means would weigh tokens by the company they are in. Raises RunFailed before the weights change if the step has
    no supervised token, or (on a CPU, elsewhere `fit` finds it) loss or gradient are not finite.
    """
    ranks = trainer.ranks
    ranks.at(f"step {step}")
    supervised, tokens, stop = ranks.sum(
        [sum(b.num_supervised for b in batches), sum(b.num_tokens for b in batches), float(trainer.stop_asked())]
    )
    if not supervised:
        raise RunFailed(f"step {step} has no supervised token in its rows: {trainer.loader.describe(step)}")
    total: Tensor | float = 0.0
    for number, batch in enumerate(batches, start=1):
        trainer.strategy.set_requires_gradient_sync(last=number == len(batches))
        loss = trainer.loss_of(batch) / supervised
        loss.backward()
        total = total + loss.detach()
    norm = trainer.strategy.reduce_gradients(trainer.optimizer)
    result = StepResult(step, total, norm, int(tokens), int(supervised), stop > 0)
    if trainer.checks_each_step:
        sync_and_check_finite(trainer, [result])
    if trainer.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(trainer.optimizer.parameters(), trainer.max_grad_norm, norm)
    trainer.strategy.step(trainer.optimizer)
    return result


def sync_and_check_finite(trainer: TrainerComponents, results: list[StepResult]) -> tuple[float, float]:
    """Loss over all ranks and gradient norm of the last of these steps; waits for the device.

    Raises RunFailed with the first step whose loss or gradient is not finite: nothing is tracked, evaluated or saved after it.
    """
    losses = trainer.ranks.sum(torch.stack([result.loss for result in results]).tolist())
    norms = torch.stack([result.grad_norm for result in results]).tolist()
    for result, loss, norm in zip(results, losses, norms, strict=True):
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise RunFailed(
                f"step {result.step}: loss {loss:.4g}, gradient norm {norm:.4g}: not finite, stopped before such "
                f"weights are saved. Lower optimizer.lr_scale or set train.max_grad_norm. Rows: "
                f"{trainer.loader.describe(result.step)}"
            )
    return losses[-1], norms[-1]


class Speed:
    """Tokens a second and model FLOPs utilisation over all ranks, and the share of this process's time that it waited for
    data; time in `paused` is left out.

    The first step of a process compiles and warms up, so `overall` counts from the second.
    """

    def __init__(self, trainer: TrainerComponents, state: State):
        self.trainer, self.state = trainer, state
        self.last = (time.perf_counter(), state.tokens_seen)
        self.waited_s = trainer.loader.waited_s
        self.first: tuple[float, int] | None = None

    def tick(self) -> None:
        """A step is over."""
        if self.first is None:
            self.first = (time.perf_counter(), self.state.tokens_seen)

    def since_last(self) -> dict[str, float]:
        rate, waited_s = self._rate(self.last), self.trainer.loader.waited_s - self.waited_s
        wait = waited_s / max(time.perf_counter() - self.last[0], 1e-9)
        self.last, self.waited_s = (time.perf_counter(), self.state.tokens_seen), self.trainer.loader.waited_s
        peak, ranks = self.trainer.peak_flops, self.trainer.ranks.world_size
        utilisation = {} if peak is None else {"train/mfu": rate * self.trainer.flops_per_token / (peak * ranks)}
        return {"train/tokens_per_second": rate, "train/data_wait": wait, **utilisation}

    def overall(self) -> float | None:
        """From the second step on; None before."""
        return self._rate(self.first) if self.first and self.state.tokens_seen > self.first[1] else None

    def _rate(self, since: tuple[float, int]) -> float:
        return (self.state.tokens_seen - since[1]) / max(time.perf_counter() - since[0], 1e-9)

    @contextmanager
    def paused(self):
        begun = time.perf_counter()
        yield
        spent = time.perf_counter() - begun
        self.last = (self.last[0] + spent, self.last[1])
        if self.first is not None:
            self.first = (self.first[0] + spent, self.first[1])
