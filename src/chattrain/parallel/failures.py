"""How the failure of one rank ends all ranks, and how a hang is reported: both use the process group's store.

The store lives in the launcher, so it outlives the ranks. The first rank that fails writes the reason into it. A thread in every
other rank polls the store and ends its process, whatever its main thread is doing. Each rank also publishes how far it has come
(its arrivals), so that when a collective times out, the message can say which rank is missing.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed import DistStoreError, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from chattrain.errors import REPORT_DELAY_S, OtherRankFailed, RunFailed, UserError

log = logging.getLogger("chattrain")

FIRST_FAILURE = "chattrain/first_failure"  # key in the store
POLL_S = 0.5  # seconds between two reads of the store
GRACE_S = 3.0  # seconds that a rank has to end by itself after another has failed
ENDING_S = 20.0  # seconds that it has after that if it is already ending
TIMEOUT_SPREAD_S = 2.0  # seconds between the first and the last rank that see the same collective time out
# gloo's messages for a collective that timed out, and for another that was pending on the same connection.
TIMED_OUT = ("Timed out waiting", "Application timeout caused pair closure")


@dataclass(frozen=True)
class Failure:
    """Why a run ends, as reported by the first rank that failed."""

    rank: int
    node: str
    kind: str  # UserError, RunFailed or KeyboardInterrupt
    message: str

    def error(self, node: str, silent: bool) -> BaseException:
        """The error that another rank, on `node`, raises because of this failure.

        `silent`: every rank prints its own error (torchrun), so this one must print nothing; our own launch prints one for all.
        """
        if self.kind == "KeyboardInterrupt":
            return KeyboardInterrupt()
        if silent or node != self.node:
            return OtherRankFailed(self.message)
        return UserError(self.message) if self.kind == "UserError" else RunFailed(self.message)


@dataclass(frozen=True)
class Arrival:
    """How far a rank has come."""

    place: str  # such as `step 12`
    count: int  # arrivals so far; comparable between ranks, as all run the same program
    waited: bool  # did it wait there for other ranks until the time-out?
    host: str
    pid: int


class Watch:
    """Reports this rank's arrivals and failure, and polls for failures of other ranks until `close`.

    Before it ends this process it writes the stacks to `log_file` and calls `on_forced_exit`; both are set once the run folder
    is known.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout_s: int):
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.log_file: Path | None = None
        self.on_forced_exit: Callable[[BaseException], None] | None = None
        self._store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._node = os.environ.get("GROUP_RANK", "0")
        self._spawned = multiprocessing.parent_process() is not None  # by our own launch, whose parent prints errors
        self._arrival = Arrival("", 0, False, socket.gethostname(), os.getpid())
        self._error: BaseException | None = None  # the error that this rank ends with
        self.failed = threading.Event()  # this rank has heard that some rank has failed
        self._closed = threading.Event()
        listener = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._thread = threading.Thread(target=self._listen, args=(listener,), daemon=True, name="watch")
        self.at("the start")
        self._thread.start()

    def at(self, place: str, waited: bool = False) -> None:
        """Publish that this rank has arrived at a place, or that it `waited` there for other ranks until the time-out."""
        old = self._arrival
        self._arrival = Arrival(place, old.count + (not waited), waited, old.host, old.pid)
        self._store.set(f"chattrain/arrival/{self.rank}", json.dumps(asdict(self._arrival)))

    def close(self) -> None:
        """Stop polling."""
        self._closed.set()
        self._thread.join()

    def report_failure(self, raised: BaseException, where: str | None = None) -> BaseException:
        """Publish why this rank failed, unless another failed first. Returns the error that the run ends with: the first one.

        `where`: what this rank was doing; None: its last arrival.
        """
        self.failed.set()
        if self._error is not None:
            return self._error
        try:
            own = self._describe(raised, where or self._arrival.place)
            stored = self._store.compare_set(FIRST_FAILURE, "", json.dumps(asdict(own)))
        except RuntimeError as lost:  # the launcher has ended, and its store with it
            log.error("the store of the process group is gone: %s", lost, extra={"file_only": True})
            self._error = raised
            return raised
        first = Failure(**json.loads(stored))
        if first.rank != self.rank:
            self._error = first.error(self._node, silent=not self._spawned)
            return self._error
        self._error = error = first.error(self._node, silent=False)
        error.reported_here = True  # pyright: ignore[reportAttributeAccessIssue]
        time.sleep(REPORT_DELAY_S)
        return error

    def _describe(self, raised: BaseException, where: str) -> Failure:
        """This rank's failure, as other ranks will see it. If others may know the cause, they get time to report it first."""
        kind, text = type(raised).__name__, str(raised)
        more = f"; {self.log_file.name} has the traceback" if self.log_file else ""
        if isinstance(raised, UserError | RunFailed | KeyboardInterrupt):
            kind = "UserError" if isinstance(raised, UserError) else kind
            return Failure(self.rank, self._node, kind, text)
        if any(words in text for words in TIMED_OUT) or (isinstance(raised, DistStoreError) and "wait timeout" in text):
            self.at(self._arrival.place, waited=True)
            time.sleep(TIMEOUT_SPREAD_S)
            return Failure(self.rank, self._node, "RunFailed", self._describe_hang())
        if "gloo" in text or "NCCL" in text:
            self._wait_for_first_failure(GRACE_S)
            return Failure(
                self.rank,
                self._node,
                "RunFailed",
                f"rank {self.rank} lost its connection at {where}: another rank exited without reporting, possibly out of "
                f"memory; see the launcher's output{more}",
            )
        if self.log_file is None:
            traceback.print_exception(raised)  # there is no log file that could have the traceback
        return Failure(self.rank, self._node, "RunFailed", f"rank {self.rank} failed at {where}: {kind}: {text}{more}")

    def _wait_for_first_failure(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._store.check([FIRST_FAILURE]):
            time.sleep(POLL_S)

    def _describe_hang(self) -> str:
        """Which ranks are missing. Those on this host get SIGCONT: one that was stopped can then write its stacks."""
        arrivals = {}
        for rank in range(self.world_size):
            key = f"chattrain/arrival/{rank}"
            if self._store.check([key]):
                arrivals[rank] = Arrival(**json.loads(self._store.get(key)))
        for rank in missing_ranks(arrivals, self.world_size):
            if rank in arrivals and arrivals[rank].host == self._arrival.host:
                os.kill(arrivals[rank].pid, signal.SIGCONT)
        return describe_timeout(arrivals, self.world_size, self.timeout_s)

    def _listen(self, store: Store) -> None:
        """If another rank has failed and the main thread does not end this process, end it. Runs in the watch's thread."""
        while not self._closed.wait(POLL_S):
            try:
                if not store.check([FIRST_FAILURE]):
                    continue
                failure = Failure(**json.loads(store.get(FIRST_FAILURE)))
            except RuntimeError:
                failure = Failure(-1, "", "RunFailed", "the launcher that holds the store of the process group has ended")
            self.failed.set()
            if not self._closed.wait(GRACE_S) and (self._error is None or not self._closed.wait(ENDING_S)):
                self._force_exit(failure)

    def _force_exit(self, failure: Failure) -> None:
        error = failure.error(self._node, silent=False)
        try:
            if self.log_file is not None:
                with self.log_file.open("a", encoding="utf-8") as file:
                    file.write(f"rank {self.rank} is ended by force, with the stacks below: {failure.message}\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
            if self.on_forced_exit is not None and self._error is None:
                self.on_forced_exit(error)
            if self._spawned and isinstance(error, Exception):  # the parent may see this rank exit before the one that failed
                get_error_handler().record_exception(error)
        finally:
            os._exit(getattr(error, "exit_status", 130))


def missing_ranks(arrivals: dict[int, Arrival], world_size: int) -> list[int]:
    """The ranks that did not wait for others until the time-out: the others waited for them."""
    return [rank for rank in range(world_size) if rank not in arrivals or not arrivals[rank].waited]


def describe_timeout(arrivals: dict[int, Arrival], world_size: int, timeout_s: int) -> str:
    """The message for a collective that timed out: names the missing ranks, the place, and each one's last arrival.

    >>> arrivals = {0: Arrival("step 12", 14, True, "a", 1), 1: Arrival("step 11", 13, False, "a", 2)}
    >>> describe_timeout(arrivals, 2, 60)  # doctest: +ELLIPSIS
    'rank 1 did not arrive at step 12 within 60 s (its last was step 11); see rank_1.log. If it was only ...'
    """
    front = max((a for a in arrivals.values() if a.waited), key=lambda a: a.count)
    missing = missing_ranks(arrivals, world_size)
    if not missing:
        return f"no rank got through {front.place} within {timeout_s} s, though all arrived: is the network between them blocked?"
    messages = []
    for rank in missing:
        last = arrivals.get(rank)
        if last is None:
            messages.append(f"rank {rank} did not arrive at {front.place} within {timeout_s} s (it never started)")
        elif last.count < front.count:
            messages.append(
                f"rank {rank} did not arrive at {front.place} within {timeout_s} s (its last was {last.place}); "
                f"see {log_name(rank)}"
            )
        else:
            messages.append(f"rank {rank} did not get through {front.place} within {timeout_s} s; see {log_name(rank)}")
    more = [f"and {len(messages) - 4} more ranks"] if len(messages) > 4 else []
    return "; ".join([*messages[:4], *more]) + ". If it was only slow, raise distributed.timeout_s"


def log_name(rank: int) -> str:
    """The log of a rank in the run folder.

    >>> log_name(0), log_name(1)
    ('train.log', 'rank_1.log')
    """
    return f"rank_{rank}.log" if rank else "train.log"
