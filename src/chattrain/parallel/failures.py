"""How the failure of one rank ends all of them, and how a hang is named: through the process group's store.

The store lives in the launcher, so it outlasts the ranks. The first rank that fails writes down why; a thread in every other
rank hears of it, wherever that rank's main thread is, and ends the process. Each rank also writes down where it has arrived,
so that a collective that times out can say who is missing.
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

from torch.distributed import DistStoreError, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from chattrain.errors import REPORT_DELAY_S, OtherRankFailed, RunFailed, UserError

log = logging.getLogger("chattrain")

FIRST = "chattrain/first_failure"
POLL_S = 0.5  # seconds between two looks at the store
GRACE_S = 3.0  # seconds that a rank has to end by itself, once another has failed
ENDING_S = 20.0  # seconds that it has where it has begun to
LATE_S = 2.0  # seconds between the first and the last rank that find the same collective timed out
# What gloo says of a collective whose time was out, and of another that was on its way over the same connection.
TIMED_OUT = ("Timed out waiting", "Application timeout caused pair closure")


@dataclass(frozen=True)
class Failure:
    """Why a run ends, as the first rank that failed tells it."""

    rank: int
    node: str
    kind: str  # UserError, RunFailed or KeyboardInterrupt
    message: str

    def error(self, node: str, silent: bool) -> BaseException:
        """What a rank on `node` that failed because of this raises. `silent`: no parent speaks for the ranks of a node."""
        if self.kind == "KeyboardInterrupt":
            return KeyboardInterrupt()
        if silent or node != self.node:
            return OtherRankFailed(self.message)
        return UserError(self.message) if self.kind == "UserError" else RunFailed(self.message)


@dataclass(frozen=True)
class Arrival:
    """The last place that a rank has come to."""

    place: str
    count: int  # places before it: the same on all ranks, as they run the same program
    waited: bool  # for the others, there, until the time was out
    host: str
    pid: int


class Watch:
    """One rank's part in it; listens until `close`.

    `log_file` gets the stacks of a rank that has to be ended, and `last_words` is called before that: both are known only once
    the run folder is.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout_s: int):
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.log_file: Path | None = None
        self.last_words: Callable[[BaseException], None] | None = None
        self._store = store.clone()
        self._node = os.environ.get("GROUP_RANK", "0")
        self._spawned = multiprocessing.parent_process() is not None  # by our own launch, whose parent speaks
        self._arrival = Arrival("", 0, False, socket.gethostname(), os.getpid())
        self._ended: BaseException | None = None
        self.failed = threading.Event()  # some rank has
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(store.clone(),), daemon=True, name="watch")
        self.at("the start")
        self._thread.start()

    def at(self, place: str, waited: bool = False) -> None:
        """Write down that this rank has come to a place."""
        old = self._arrival
        self._arrival = Arrival(place, old.count + (not waited), waited, old.host, old.pid)
        self._store.set(f"chattrain/arrival/{self.rank}", json.dumps(asdict(self._arrival)))

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def report_failure(self, raised: BaseException, where: str | None = None) -> BaseException:
        """The error that the run ends with: this one, told to all, if this rank is the first to fail; else that rank's.
        `where` it was raised; None: the last place that this rank came to."""
        self.failed.set()
        if self._ended is not None:
            return self._ended
        try:
            mine = self._describe(raised, where or self._arrival.place)
            told = self._store.compare_set(FIRST, "", json.dumps(asdict(mine)))
        except RuntimeError as gone:  # and the store, with its launcher
            log.error("the store of the process group is gone: %s", gone, extra={"file_only": True})
            self._ended = raised
            return raised
        first = Failure(**json.loads(told))
        if first.rank != self.rank:
            self._ended = first.error(self._node, silent=not self._spawned)
            return self._ended
        self._ended = error = first.error(self._node, silent=False)
        error.reported_here = True
        time.sleep(REPORT_DELAY_S)
        return error

    def _describe(self, raised: BaseException, where: str) -> Failure:
        """What this rank would tell the others. Waits, where others can know more, for them to speak first."""
        kind, text = type(raised).__name__, str(raised)
        more = f"; {self.log_file.name} has the traceback" if self.log_file else ""
        if isinstance(raised, UserError | RunFailed | KeyboardInterrupt):
            kind = "UserError" if isinstance(raised, UserError) else kind
            return Failure(self.rank, self._node, kind, text)
        if any(words in text for words in TIMED_OUT) or (isinstance(raised, DistStoreError) and "wait timeout" in text):
            self.at(self._arrival.place, waited=True)
            time.sleep(LATE_S)
            return Failure(self.rank, self._node, "RunFailed", self._late())
        if "gloo" in text or "NCCL" in text:
            self._await_another(GRACE_S)
            return Failure(
                self.rank,
                self._node,
                "RunFailed",
                f"rank {self.rank} lost the connection to another rank at {where}, which ended without a word, as "
                f"one does that is killed for memory; the launcher says which{more}",
            )
        if self.log_file is None:
            traceback.print_exception(raised)  # there is nowhere else to read it
        return Failure(self.rank, self._node, "RunFailed", f"rank {self.rank} failed at {where}: {kind}: {text}{more}")

    def _await_another(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._store.check([FIRST]):
            time.sleep(POLL_S)

    def _late(self) -> str:
        """Who is missing; each such rank on this host is woken where it was stopped, so that it can leave its stacks."""
        arrivals = {}
        for rank in range(self.world_size):
            key = f"chattrain/arrival/{rank}"
            if self._store.check([key]):
                arrivals[rank] = Arrival(**json.loads(self._store.get(key)))
        for rank in absent(arrivals, self.world_size):
            if rank in arrivals and arrivals[rank].host == self._arrival.host:
                os.kill(arrivals[rank].pid, signal.SIGCONT)
        return late(arrivals, self.world_size, self.timeout_s)

    def _listen(self, store: Store) -> None:
        """End this process when another rank has failed and the main thread does not end it. Runs in the thread."""
        while not self._over.wait(POLL_S):
            try:
                if not store.check([FIRST]):
                    continue
                failure = Failure(**json.loads(store.get(FIRST)))
            except RuntimeError:
                failure = Failure(-1, "", "RunFailed", "the launcher that holds the store of the process group has ended")
            self.failed.set()
            if not self._over.wait(GRACE_S) and (self._ended is None or not self._over.wait(ENDING_S)):
                self._end(failure)

    def _end(self, failure: Failure) -> None:
        error = failure.error(self._node, silent=False)
        try:
            if self.log_file is not None:
                with self.log_file.open("a", encoding="utf-8") as file:
                    file.write(f"rank {self.rank} is ended where it stands: {failure.message}\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
            if self.last_words is not None and self._ended is None:
                self.last_words(error)
            if self._spawned and isinstance(error, Exception):  # the parent may see this rank end before the one that failed
                get_error_handler().record_exception(error)
        finally:
            os._exit(getattr(error, "exit_status", 130))


def absent(arrivals: dict[int, Arrival], world_size: int) -> list[int]:
    """Ranks that the others waited for: those that did not wait themselves."""
    return [rank for rank in range(world_size) if rank not in arrivals or not arrivals[rank].waited]


def late(arrivals: dict[int, Arrival], world_size: int, timeout_s: int) -> str:
    """One message that names the missing ranks, the place, and where each was last seen.

    >>> late({0: Arrival("step 12", 14, True, "a", 1), 1: Arrival("step 11", 13, False, "a", 2)}, 2, 60)  # doctest: +ELLIPSIS
    'rank 1 did not arrive at step 12 within 60 s (its last was step 11); see rank_1.log. Where it was only ...'
    """
    front = max((a for a in arrivals.values() if a.waited), key=lambda a: a.count)
    missing = absent(arrivals, world_size)
    if not missing:
        return f"no rank got through {front.place} within {timeout_s} s, though all arrived: is the network between them blocked?"
    said = []
    for rank in missing:
        last = arrivals.get(rank)
        if last is None:
            said.append(f"rank {rank} did not arrive at {front.place} within {timeout_s} s (it never started)")
        elif last.count < front.count:
            said.append(
                f"rank {rank} did not arrive at {front.place} within {timeout_s} s (its last was {last.place}); "
                f"see {log_name(rank)}"
            )
        else:
            said.append(f"rank {rank} did not get through {front.place} within {timeout_s} s; see {log_name(rank)}")
    more = [f"and {len(said) - 4} ranks more"] if len(said) > 4 else []
    return "; ".join([*said[:4], *more]) + ". Where it was only slow, raise distributed.timeout_s"


def log_name(rank: int) -> str:
    """The log of a rank in the run folder.

    >>> log_name(0), log_name(1)
    ('train.log', 'rank_1.log')
    """
    return f"rank_{rank}.log" if rank else "train.log"
