"""Work, traffic, time and money of a step, as pure functions of a few numbers.

P weights in all, M of them in matrices that Muon moves, w ranks. Bytes are those that one rank sends, which are those that it
receives: a reduce-scatter or an all-gather of x bytes in a ring sends x (w - 1) / w
(https://docs.nvidia.com/deeplearning/nccl/, Thakur et al. 2005, https://doi.org/10.1177/1094342005051521). Latency is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from chattrain.optim.newton_schulz import cost
from chattrain.planning.hardware import Hardware

FP32, BF16 = 4, 2  # bytes
UPDATE_BYTES = 28  # a weight an update reads and writes, fp32: weight, gradient and two moments, then weight and moments
BACKWARD = 2 / 3  # of forward and backward
SCALES = tuple(2**n for n in range(11))  # ranks of the table


@dataclass(frozen=True)
class Workload:
    """What a run asks for, on however many ranks."""

    weights: int  # P
    matrices: tuple[tuple[int, int], ...]  # sides of those that Muon moves, M weights together; () for AdamW alone
    ns_steps: int  # Newton-Schulz iterations
    flops_a_token: float  # of the model: forward and backward once
    block_share: float  # of these FLOPs, what the blocks take
    recomputed: bool  # is the blocks' forward run twice?
    compute_bytes: int  # of a number in matrix products
    places: int  # tokens and padding of the whole run
    rows: int  # of the whole run
    rows_a_step: int
    device_batch_size: int  # rows a rank a forward pass, at most
    strategy: str  # ddp or fsdp
    sharing: dict[int, int]  # ranks -> how many of them step different weights; as many again do as they do


@dataclass(frozen=True)
class Step:
    """One step on a number of ranks; seconds, and bytes that a rank sends."""

    world_size: int
    rows: int  # of all ranks
    device_batch_size: int
    grad_accum_steps: int
    computes: float  # forward and backward
    updates: float
    talks: float  # all communication, hidden or not
    waits: float  # communication that nothing hides
    bytes_sent: float

    @property
    def seconds(self) -> float:
        return self.computes + self.updates + self.waits


def traffic(work: Workload, world_size: int, micro_batches: int) -> dict[str, float]:
    """Bytes that a rank sends a step, by what they are.

    ddp: gradients reduce-scattered over the ranks that share the update, and summed over those that do the same; weights
    gathered, all in fp32. fsdp: in each micro-batch weights gathered in the compute format, in forward and again in backward (but
    for embedding and head, which is left out here), and gradients reduce-scattered in fp32; Muon's matrices to their owner and
    back in the compute format.
    """
    sharers = work.sharing[world_size]
    share, copies = (sharers - 1) / sharers, world_size // sharers
    gradients = {"gradients": (share + 2 * (copies - 1) / copies / sharers) * FP32 * work.weights}
    if work.strategy == "ddp":
        return gradients | {"weights": share * FP32 * work.weights}
    in_matrices = sum(rows * columns for rows, columns in work.matrices)
    return {
        "gradients": micro_batches * gradients["gradients"],
        "weights": 2 * micro_batches * share * work.compute_bytes * work.weights,
        "matrices": 2 * share * (BF16 if work.compute_bytes == BF16 else FP32) * in_matrices / world_size,
    }


def hidden(work: Workload, seconds: dict[str, float], computes: float, micro_batches: int) -> float:
    """Seconds of communication that run beside computation.

    ddp's gradients leave while backward of the last micro-batch makes the next ones, up to as long as it takes; fsdp's in every
    backward, and it gathers a block while another is computed. ddp's gather of new weights and Muon's matrices hide behind
    nothing.
    """
    if work.strategy == "ddp":
        return min(seconds["gradients"], computes / micro_batches * BACKWARD)
    gradients = min(seconds["gradients"], computes * BACKWARD)
    return gradients + min(seconds["weights"], computes - gradients)


def update_seconds(work: Workload, hardware: Hardware, mfu: float, world_size: int) -> float:
    """The optimizer's part on the rank that has most to do: whole matrices for Muon, in bf16, a slice of all weights to move."""
    sizes = sorted((2 * cost(sides, work.ns_steps) for sides in work.matrices), reverse=True)  # FLOPs
    sharers = work.sharing[world_size]
    busiest = max(sum(sizes) / sharers, sizes[0]) if sizes else 0.0
    return busiest / (hardware.bf16 * mfu) + UPDATE_BYTES * work.weights / sharers / hardware.bandwidth


def step_on(work: Workload, hardware: Hardware, mfu: float, world_size: int) -> Step:
    """A step of the run on this many ranks. Where there are more ranks than rows, the step grows to a row a rank."""
    rows = math.ceil(work.rows_a_step / world_size) * world_size
    mine = rows // world_size
    micro_batches = next(n for n in range(1, mine + 1) if mine % n == 0 and mine // n <= work.device_batch_size)
    flops = work.flops_a_token * (1 + (1 - BACKWARD) * work.block_share * work.recomputed)
    peak = hardware.bf16 if work.compute_bytes == BF16 else hardware.fp32
    computes = mine * work.places / work.rows * flops / (peak * mfu)
    sent = traffic(work, world_size, micro_batches)
    seconds = {name: size / hardware.between(world_size) for name, size in sent.items()}
    talks = sum(seconds.values())
    return Step(
        world_size,
        rows,
        mine // micro_batches,
        micro_batches,
        computes,
        update_seconds(work, hardware, mfu, world_size),
        talks,
        talks - hidden(work, seconds, computes, micro_batches),
        sum(sent.values()),
    )


def steps_of(work: Workload, step: Step) -> int:
    """Steps until the run has seen its rows."""
    return math.ceil(work.rows / step.rows)


def hours_of(work: Workload, step: Step) -> float:
    """Of the run on the clock, evaluation and checkpoints left out."""
    return steps_of(work, step) * step.seconds / 3600


def scaling(work: Workload, hardware: Hardware, mfu: float) -> list[Step]:
    """The run on 1 to 1,024 devices, with the same rows a step as long as each device has one."""
    return [step_on(work, hardware, mfu, world_size) for world_size in SCALES]


def dominated_from(steps: list[Step]) -> int | None:
    """The fewest ranks at which communication takes longer than forward and backward; None where it never does."""
    return next((step.world_size for step in steps if step.talks > step.computes), None)
