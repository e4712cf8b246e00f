"""Starting the processes of a run: how many, on which devices and nodes, and what becomes of them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chattrain import torch_compat
from chattrain.config.words import Device
from chattrain.errors import OtherRankFailed, RunFailed, UserError
from chattrain.parallel import slurm
from chattrain.parallel.signals import signals_to_ranks

STOP_S = 10  # seconds that ranks have to end after a second signal, where torch takes the number
OTHER_NODES_S = 4  # seconds that the ranks of other nodes need to hear of a failure and end
INTERRUPTED = 130  # exit status of a rank that was stopped at once
ERRORS = {kind.__name__: kind for kind in (UserError, RunFailed, OtherRankFailed)}


class Stopped(Exception):
    """The launch was stopped by a signal."""


def started_by_launcher() -> bool:
    """Is this process a rank that torchrun, Slurm's torchrun or our own launch started?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size(nproc: str, device: Device) -> int:
    """Processes a run will have: the launcher's number, or distributed.nproc (auto: the visible GPUs where the run may
    use them, else 1) on each node.

    Raises UserError where a launcher started another number than distributed.nproc asks for.
    """
    if started_by_launcher():
        started = int(os.environ["WORLD_SIZE"])
        if nproc != "auto" and int(nproc) != int(os.environ.get("LOCAL_WORLD_SIZE", started)):
            raise UserError(
                f"distributed.nproc={nproc}, but the launcher started "
                f"{os.environ.get('LOCAL_WORLD_SIZE', started)} processes here; leave distributed.nproc out"
            )
        return started
    nodes = slurm.nodes()
    return processes_here(nproc, device) * (nodes.count if nodes else 1)


def processes_here(nproc: str, device: Device) -> int:
    """What distributed.nproc means on this host."""
    if nproc != "auto":
        return int(nproc)
    return max(1, torch.cuda.device_count()) if device in (Device.auto, Device.cuda) else 1


def check_devices(device: torch.device, world_size: int) -> None:
    """Raises UserError where the ranks of this host do not have a device each."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on this host and {torch.cuda.device_count()} visible GPUs; use "
            f"distributed.nproc={torch.cuda.device_count()}, or train.device=cpu"
        )
    if device.type == "mps" and world_size > 1:
        raise UserError(f"{world_size} processes, but MPS works with one; use distributed.nproc=1, or train.device=cpu")


def start(nproc: int, nodes: slurm.Nodes | None, entry: Callable, *arguments: Any) -> Any:
    """Run entry(*arguments) in nproc processes of this host through torch's elastic launcher, together with those that the
    same call starts on the other `nodes`; the result of the first rank here.

    Raises what the first failing rank raised: UserError and RunFailed as they are, others as RunFailed. Raises Stopped
    where a signal ended the ranks before they could say so themselves.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    nodes = nodes or slurm.Nodes(1, f"localhost:{_free_port()}", str(os.getpid()))
    try:
        with tempfile.TemporaryDirectory(prefix="chattrain-") as scratch, signals_to_ranks() as asked, _threads(nproc):
            config = torch_compat.launch_config(
                STOP_S,
                min_nodes=nodes.count,
                max_nodes=nodes.count,
                nproc_per_node=nproc,
                rdzv_backend="c10d",
                start_method="spawn",
                rdzv_endpoint=nodes.endpoint,
                run_id=nodes.run_id,
                max_restarts=0,
                monitor_interval=0.1,
                signals_to_handle="",
                logs_specs=DefaultLogsSpecs(log_dir=scratch),
            )
            results = elastic_launch(config, _rank)(entry, *arguments)
            return results[min(results)]
    except SignalException:
        raise Stopped from None
    except ChildFailedError as error:
        if nodes.count > 1:
            time.sleep(OTHER_NODES_S)  # this process may hold the store, until it leaves this block
        raise _reason(error, asked()) from None
    except RendezvousError as error:
        raise RunFailed(
            f"the {nodes.count} nodes of Slurm job {nodes.run_id} are not together at {nodes.endpoint} (any more): "
            f"{error}; the output of the other nodes may say why"
        ) from None


@contextmanager
def _threads(nproc: int) -> Iterator[None]:
    """The ranks share the cores of this host, unless the user says otherwise; jobs after this one are not told."""
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    try:
        yield
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


def _rank(entry: Callable, *arguments: Any) -> Any:
    """What each process runs. torch takes a KeyboardInterrupt in it for an end without fault, and would wait for a result."""
    try:
        return entry(*arguments)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _reason(error: Exception, asked: bool) -> Exception:
    """What a launch raises for the rank that torch saw fail first."""
    rank, failure = error.get_first_failure()
    message = failure.message["message"] if isinstance(failure.message, dict) else str(failure.message)
    kind, _, text = message.partition(": ")
    if kind in ERRORS:
        return ERRORS[kind](text)
    if failure.exitcode in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        return Stopped()
    if failure.exitcode == -signal.SIGKILL:
        return RunFailed(f"rank {rank} was killed (SIGKILL), as the kernel does where memory runs out; dmesg would say so")
    if failure.exitcode < 0:
        return RunFailed(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}; see its log for the stacks")
    return Stopped() if asked else RunFailed(f"rank {rank} ended with status {failure.exitcode}: {message}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
