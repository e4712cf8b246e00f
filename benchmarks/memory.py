"""Memory of a training step on a CPU: what command=plan predicts, and what the allocator saw in a real run.

    python -m benchmarks.memory distributed.strategy=fsdp --models d6 d12 --ranks 2

Separate processes build the model and train a few steps of two micro-batches of random tokens. For one process, torch's profiler
reports each allocation and each release, and their running sum is the bytes alive. The profiler does not see the allocations of
gloo's threads, so for several ranks we ask malloc for the bytes in use, every half millisecond: about 10 MiB more, for everything
that is no tensor. Both figures come from the allocator of the real operations, workspaces of kernels included, and are
independent of the prediction. Resident memory would include libraries, code and stacks, and miss pages of tensors that were never
touched.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu
from chattrain import loop
from chattrain.config import Config
from chattrain.config.compose import compose
from chattrain.device import GIB
from chattrain.parallel import launch
from chattrain.parallel.ranks import Ranks, join
from chattrain.planning.memory import MicroBatchSpec, step_memory

STEPS = 4  # the first creates the optimizer's state; several after it, because the timing of ranks varies
KINDS = ["none", "selective", "block"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["d6", "d12"], help="choices of conf/model (default d6 d12)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default 1)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # used in the separate process
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration")
    asked = parser.parse_intermixed_args(arguments)
    if asked.measure:
        print(json.dumps(run(settings(asked.models[0], asked.ranks, *asked.overrides), asked.ranks)))
        return
    for model in asked.models:
        for kind in KINDS:
            overrides = [*asked.overrides, f"train.activation_checkpointing={kind}"]
            predicted, found = predict(model, asked.ranks, *overrides), measure(model, asked.ranks, *overrides)
            print(
                f"{model} {kind:9s} predicted {predicted / GIB:.3f} GiB, measured {found / GIB:.3f} GiB: "
                f"{predicted / found - 1:+.1%}",
                flush=True,
            )


def settings(model: str, ranks: int, *overrides: str) -> Config:
    """Short rows, two micro-batches a rank and step, in fp32 and without compilation, unless the overrides say otherwise."""
    return compose(
        [
            f"model={model}",
            "stage=base",
            "eval=none",
            "tracking=none",
            "train.device=cpu",
            "train.dtype=fp32",
            "train.compile=false",
            "train.seq_len=512",
            "train.device_batch_size=2",
            f"train.total_batch_size={2048 * ranks}",
            *overrides,
        ]
    )


def predict(model: str, ranks: int, *overrides: str) -> int:
    """Peak bytes of the first rank, as command=plan predicts them."""
    cfg = settings(model, ranks, *overrides)
    repeats = cfg.train.rows_a_step(ranks) > cfg.train.device_batch_size * ranks
    shape = MicroBatchSpec(cfg.train.device_batch_size, cfg.train.seq_len, partial=False, isolated=False, repeats=repeats)
    return step_memory(cfg, cfg.tokenizer.vocab_size, None, shape, ranks).peak


def measure(model: str, ranks: int, *overrides: str) -> int:
    """Peak bytes of the first rank in a real run, in separate processes."""
    # One arena, because mallinfo2 reports the first one only.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *overrides, "--measure", "--ranks", str(ranks), "--models", model],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(cfg: Config, ranks: int) -> int:
    """Peak bytes of the first rank, from before the model is built until after the last step."""
    return seen_by_profiler(lambda: steps(cfg, Ranks())) if ranks == 1 else launch.start(ranks, None, _as_rank, cfg)


def _as_rank(cfg: Config) -> int:
    ranks = join(cfg.distributed.timeout_s, cuda=False)
    try:
        return seen_by_malloc(lambda: steps(cfg, ranks))
    finally:
        ranks.close()


def steps(cfg: Config, ranks: Ranks) -> None:
    components = gpu.build_components(cfg, lambda step, values: None, ranks)
    for step in range(STEPS):
        loop.train_step(components, components.loader.step(step), step)


class MallocInfo(ctypes.Structure):
    """The result of glibc's mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def seen_by_malloc(work: Callable[[], None]) -> int:
    """Peak bytes in use during work, minus those before it, as malloc counts them in its arena and its memory maps."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    done = threading.Event()

    def in_use() -> int:
        info = libc.mallinfo2()
        return info.uordblks + info.hblkhd

    most = before = in_use()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.0005):
            most = max(most, in_use())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most - before


def seen_by_profiler(work: Callable[[], None]) -> int:
    """Peak bytes alive during work, by the allocations of this thread."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    alive: dict[int, int] = {}  # address -> bytes
    now = most = 0
    for _, address, size in sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree())):
        now += max(size, 0) - alive.pop(address, 0)
        if size > 0:
            alive[address] = size
        most = max(most, now)
    return most


def _allocations(events: list) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes; negative if released) of all allocations in the profiler's tree."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0].name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


if __name__ == "__main__":
    main()
