"""Starts the processes of a run: how many, on which devices and nodes; and turns a failed process into an error."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from chattrain import torch_compat
from chattrain.config.words import Device
from chattrain.errors import OtherRankFailed, RunFailed, UserError
from chattrain.parallel import slurm
from chattrain.parallel.cores import CORES_VARIABLE, cores
from chattrain.parallel.signals import signals_to_ranks

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

STOP_S = 10  # seconds that ranks have to exit after a second signal, in releases of torch that let us set it
OTHER_NODES_S = 4  # seconds that the ranks of other nodes need to hear of a failure and exit
INTERRUPTED = 130  # exit status of a rank that was stopped before it could save
ERRORS = {kind.__name__: kind for kind in (UserError, RunFailed, OtherRankFailed)}


class Stopped(Exception):
    """The launch was stopped by a signal."""


def started_by_launcher() -> bool:
    """Is this process a rank, started by torchrun or by our own launch?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size(nproc: str, device: Device) -> int:
    """Number of processes of the run: the launcher's, or distributed.nproc on each node (auto: one for each visible GPU if the
    run may use GPUs, else 1).

    Raises UserError if a launcher started a different number of processes than distributed.nproc asks for.
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
    """Number of processes on this host, with `auto` resolved."""
    if nproc != "auto":
        return int(nproc)
    return max(1, torch.cuda.device_count()) if device in (Device.auto, Device.cuda) else 1


def check_devices(device: torch.device, world_size: int) -> None:
    """Raises UserError unless each rank of this host has a device of its own."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device.type == "cuda" and local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{local_world_size} processes on this host and {torch.cuda.device_count()} visible GPUs; use "
            f"distributed.nproc={torch.cuda.device_count()}, or train.device=cpu"
        )
    if device.type == "mps" and world_size > 1:
        raise UserError(f"{world_size} processes, but MPS works with one; use distributed.nproc=1, or train.device=cpu")


def start(nproc: int, nodes: slurm.Nodes | None, entry: Callable, *arguments: Any) -> Any:
    """Run entry(*arguments) in nproc processes of this host, with torch's elastic launcher. Returns the result of the first of
    these ranks. With `nodes`, the same call on each node makes its processes ranks of one run.

    Raises what the first failing rank raised: UserError and RunFailed unchanged, other errors as RunFailed. Raises Stopped if
    a signal ended the ranks before they could report it.
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
        with tempfile.TemporaryDirectory(prefix="chattrain-") as scratch, signals_to_ranks() as signalled, _threads(nproc):
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
            time.sleep(OTHER_NODES_S)  # this process may hold the store that the other nodes read
        raise _reason(error, signalled()) from None
    except RendezvousError as error:
        raise RunFailed(
            f"the {nodes.count} nodes of Slurm job {nodes.run_id} did not meet at {nodes.endpoint}, or one has left: "
            f"{error}; the output of the other nodes may say why"
        ) from None


@contextmanager
def _threads(nproc: int) -> Iterator[None]:
    """Divide the cores of this host between the ranks, unless the user has set OMP_NUM_THREADS. Undone after the launch."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or given == os.environ.get(CORES_VARIABLE):  # a sweep gives a job its cores in both variables
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // nproc))
    try:
        yield
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = given


def _rank(entry: Callable, *arguments: Any) -> Any:
    """The entry of each process. torch would take a KeyboardInterrupt for success, and wait for a result."""
    try:
        return entry(*arguments)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _reason(error: ChildFailedError, signalled: bool) -> Exception:
    """The error to raise for the rank that torch saw fail first. `signalled`: has the launcher received a signal?"""
    rank, failure = error.get_first_failure()
    reported: Any = failure.message  # a dict if the rank could record its error
    message = reported["message"] if isinstance(reported, dict) else str(reported)
    kind, _, text = message.partition(": ")
    if kind in ERRORS:
        return ERRORS[kind](text)
    if failure.exitcode in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        return Stopped()
    if failure.exitcode == -signal.SIGKILL:
        return RunFailed(f"rank {rank} was killed (SIGKILL), as the kernel does when memory runs out; dmesg would say so")
    if failure.exitcode < 0:
        return RunFailed(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}; see its log for the stacks")
    return Stopped() if signalled else RunFailed(f"rank {rank} exited with status {failure.exitcode}: {message}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
