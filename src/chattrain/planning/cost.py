"""Work, traffic, time and money of a step, as pure functions of a few numbers.

P weights, M of them in matrices that Muon updates, w ranks. Bytes are those that one rank sends, which equal those that it
receives: in a ring, a reduce-scatter or an all-gather of x bytes sends x (w - 1) / w
(https://docs.nvidia.com/deeplearning/nccl/, Thakur et al. 2005, https://doi.org/10.1177/1094342005051521). Latency is ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from chattrain.optim.newton_schulz import cost
from chattrain.planning.hardware import Hardware

FP32, BF16 = 4, 2  # bytes
# Bytes a weight of an update in one kernel: it reads weight, gradient and two moments, and writes weight and moments, all fp32.
UPDATE_BYTES = 28
# The same of optim/adamw_bf16.py, whose operations each read and write their numbers.
BF16_UPDATE_BYTES = 196
# Utilization in Newton-Schulz as a share of that in forward and backward: 34 ms for an optimizer step of d20 on an H100 at 46 %.
MUON_UTILIZATION = 0.76
BACKWARD = 2 / 3  # share of backward in the time of forward and backward
SCALES = tuple(2**n for n in range(11))  # world sizes of the table


@dataclass(frozen=True)
class Workload:
    """What a run has to compute, on any number of ranks."""

    weights: int  # P
    matrices: tuple[tuple[int, int], ...]  # shapes of those that Muon updates, M weights in all; () for AdamW
    ns_steps: int  # Newton-Schulz iterations
    update_bytes: int  # bytes a weight that the update reads and writes
    flops_a_token: float  # FLOPs of forward and backward
    block_share: float  # share of the blocks in these FLOPs
    recomputed: bool  # does the forward of the blocks run twice?
    compute_bytes: int  # bytes a number in matrix products
    num_tokens: int  # tokens of the whole run, padding included
    rows: int  # rows of the whole run
    rows_a_step: int
    device_batch_size: int  # rows a rank a forward pass, at most; of padded rows on average
    strategy: str  # ddp or fsdp
    sharing: dict[int, int]  # world size -> ranks that the update is sharded over; groups of so many do the same
    padded: bool = False  # padded rows need not divide evenly over the passes of a step


@dataclass(frozen=True)
class Step:
    """One step on world_size ranks. Times are in seconds."""

    world_size: int
    rows: int  # of all ranks together
    device_batch_size: int
    grad_accum_steps: int
    compute_s: float  # forward and backward
    update_s: float  # the optimizer
    communication_s: float  # all of it, overlapped with compute or not
    exposed_s: float  # communication that does not overlap with compute
    bytes_sent: float  # by a rank

    @property
    def seconds(self) -> float:
        return self.compute_s + self.update_s + self.exposed_s


def traffic(work: Workload, world_size: int, micro_batches: int) -> dict[str, float]:
    """Bytes that a rank sends in a step, by content.

    ddp, all in fp32: gradients are reduce-scattered within a group of ranks that shards the update and all-reduced over such
    groups; weights are all-gathered. fsdp, in each micro-batch: weights are all-gathered in the compute dtype, in forward and
    again in backward (embedding and head only once, which is ignored here); gradients are reduce-scattered in fp32. In each step
    Muon's matrices go to their owner and back, in the compute dtype.
    """
    shards = work.sharing[world_size]
    sent, groups = (shards - 1) / shards, world_size // shards  # sent: of the bytes of a reduce-scatter or an all-gather
    gradients = {"gradients": (sent + 2 * (groups - 1) / groups / shards) * FP32 * work.weights}
    if work.strategy == "ddp":
        return gradients | {"weights": sent * FP32 * work.weights}
    in_matrices = sum(rows * columns for rows, columns in work.matrices)
    return {
        "gradients": micro_batches * gradients["gradients"],
        "weights": 2 * micro_batches * sent * work.compute_bytes * work.weights,
        "matrices": 2 * sent * work.compute_bytes * in_matrices / world_size,
    }


def overlapped(work: Workload, seconds: dict[str, float], compute_s: float, micro_batches: int) -> float:
    """Seconds of communication that overlap with compute. `seconds`: of each entry of `traffic`.

    ddp's gradients overlap with the backward of the last micro-batch, fsdp's with every backward. fsdp also gathers one block
    while it computes another. ddp's gather of new weights and the traffic of Muon's matrices do not overlap with anything.
    """
    if work.strategy == "ddp":
        return min(seconds["gradients"], compute_s / micro_batches * BACKWARD)
    gradients = min(seconds["gradients"], compute_s * BACKWARD)
    return gradients + min(seconds["weights"], compute_s - gradients)


def update_seconds(work: Workload, hardware: Hardware, mfu: float, world_size: int) -> float:
    """Seconds of the optimizer on the busiest rank: Newton-Schulz on its whole matrices, in bf16, and an update of its shard."""
    matrix_flops = sorted((2 * cost(shape, work.ns_steps) for shape in work.matrices), reverse=True)
    shards = work.sharing[world_size]
    busiest = max(sum(matrix_flops) / shards, matrix_flops[0]) if matrix_flops else 0.0
    return busiest / (hardware.bf16 * mfu * MUON_UTILIZATION) + work.update_bytes * work.weights / shards / hardware.bandwidth


def step_on(work: Workload, hardware: Hardware, mfu: float, world_size: int) -> Step:
    """A step of the run on this many ranks. With more ranks than rows, the step grows to one row a rank."""
    rows_a_rank = math.ceil(work.rows_a_step / world_size)
    fewest = math.ceil(rows_a_rank / work.device_batch_size)
    micro_batches = next(n for n in range(fewest, rows_a_rank + 1) if work.padded or rows_a_rank % n == 0)
    flops = work.flops_a_token * (1 + (1 - BACKWARD) * work.block_share * work.recomputed)
    peak = hardware.bf16 if work.compute_bytes == BF16 else hardware.fp32
    compute_s = rows_a_rank * work.num_tokens / work.rows * flops / (peak * mfu)
    sent = traffic(work, world_size, micro_batches)
    seconds = {name: size / hardware.between(world_size) for name, size in sent.items()}
    communication_s = sum(seconds.values())
    return Step(
        world_size=world_size,
        rows=rows_a_rank * world_size,
        device_batch_size=math.ceil(rows_a_rank / micro_batches),
        grad_accum_steps=micro_batches,
        compute_s=compute_s,
        update_s=update_seconds(work, hardware, mfu, world_size),
        communication_s=communication_s,
        exposed_s=communication_s - overlapped(work, seconds, compute_s, micro_batches),
        bytes_sent=sum(sent.values()),
    )


def steps_of(work: Workload, step: Step) -> int:
    """Steps of this size until the run has trained on its rows."""
    return math.ceil(work.rows / step.rows)


def hours_of(work: Workload, step: Step) -> float:
    """Wall-clock hours of the run, without evaluation and checkpoints."""
    return steps_of(work, step) * step.seconds / 3600


def scaling(work: Workload, hardware: Hardware, mfu: float) -> list[Step]:
    """The run on 1 to 1,024 devices, with the same number of rows a step unless there are more devices than rows."""
    return [step_on(work, hardware, mfu, world_size) for world_size in SCALES]


def dominated_from(steps: list[Step]) -> int | None:
    """The smallest world size at which communication takes longer than forward and backward; None if it never does."""
    return next((step.world_size for step in steps if step.communication_s > step.compute_s), None)
