"""Which job runs where and when. Knows nothing of Hydra or of trainings: a job is a call, a number, and what it waits for."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol

from chattrain.errors import RunFailed
from chattrain.sweeps.worker import Pool, Worker

POLL_S = 0.5  # seconds between looks at the running jobs, for the live table


@dataclass
class Task:
    """One job. `after`: the numbers of jobs that must have succeeded before."""

    num: int
    call: Callable[[], Any]
    after: list[int] = field(default_factory=list)


@dataclass
class Done:
    """How a job ended: with `result`, or with `error`."""

    result: Any = None
    error: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None


class Watcher(Protocol):
    """Is told what happens to jobs, to show and to record it."""

    def started(self, num: int) -> None: ...

    def ended(self, num: int, done: Done) -> None: ...

    def poll(self) -> None: ...


class Skipped(RunFailed):
    """A job that did not run, since one that it waits for failed."""


def run_here(tasks: list[Task], watcher: Watcher, earlier: dict[int, Done]) -> dict[int, Done]:
    """Run the jobs one after another in this process; returns how each ended. `earlier`: of jobs launched before these.

    A failed job does not end the others, only those that wait for it.
    """
    done: dict[int, Done] = {}
    for task in _in_order(tasks):
        if not _skip(task, {**earlier, **done}, done, watcher):
            watcher.started(task.num)
            try:
                done[task.num] = Done(task.call())
            except Exception as error:
                done[task.num] = Done(error=error)
            watcher.ended(task.num, done[task.num])
    return done


def run_side_by_side(tasks: list[Task], pool: Pool, watcher: Watcher, earlier: dict[int, Done]) -> dict[int, Done]:
    """Run the jobs in the workers of a pool, one job at a time in each; returns how each ended.

    A worker that dies is replaced, and its job has failed. Ctrl-C is passed on to the running jobs, which save and stop; then
    KeyboardInterrupt is raised.
    """
    waiting, done = _in_order(tasks), {}
    idle, running = list(range(len(pool.environments))), {}  # slots; slot -> (worker, task)
    interrupted = False
    while waiting or running:
        try:
            if not interrupted:
                _start_what_can(waiting, idle, running, pool, {**earlier, **done}, done, watcher)
            ready = wait([worker.connection for worker, _ in running.values()], timeout=POLL_S) if running else []
            for slot, (worker, task) in list(running.items()):
                if worker.connection in ready:
                    done[task.num], died = _receive(worker)
                    del running[slot]
                    if died:
                        pool.forget(slot)
                    idle.append(slot)
                    watcher.ended(task.num, done[task.num])
            watcher.poll()
            if interrupted and not running:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not running:
                raise
            interrupted = True
            for worker, _ in running.values():
                worker.interrupt()
    return done


def _start_what_can(
    waiting: list[Task],
    idle: list[int],
    running: dict[int, tuple[Worker, Task]],
    pool: Pool,
    known: dict[int, Done],
    done: dict[int, Done],
    watcher: Watcher,
) -> None:
    """Give idle slots the first jobs that wait for nothing."""
    for task in list(waiting):
        if _skip(task, known, done, watcher):
            waiting.remove(task)
            known[task.num] = done[task.num]
        elif idle and all(num in known for num in task.after):
            slot = idle.pop(0)
            waiting.remove(task)
            watcher.started(task.num)
            running[slot] = (pool.send(slot, task.call), task)


def _skip(task: Task, known: dict[int, Done], done: dict[int, Done], watcher: Watcher) -> bool:
    """Skip a job that waits for a failed one."""
    failed = [num for num in task.after if num in known and known[num].failed]
    if failed:
        done[task.num] = Done(error=Skipped(f"not run: job {failed[0] + 1}, from which it starts, failed"))
        watcher.ended(task.num, done[task.num])
    return bool(failed)


def _receive(worker: Worker) -> tuple[Done, bool]:
    """How the worker's job ended, and whether the worker died with it."""
    try:
        return Done(*worker.receive()), False
    except EOFError:
        status = worker.exit_status()
        killed = status is not None and status == -signal.SIGKILL
        reason = "killed (SIGKILL), as the kernel does when memory runs out" if killed else f"ended with status {status}"
        return Done(error=RunFailed(f"the job's process was {reason}; its train.log may say more")), True


def _in_order(tasks: list[Task]) -> list[Task]:
    """Every job after those that it waits for, otherwise as given.

    >>> [task.num for task in _in_order([Task(0, print, after=[1]), Task(1, print), Task(2, print)])]
    [1, 0, 2]
    """
    ordered: list[Task] = []
    by_num = {task.num: task for task in tasks}

    def add(task: Task) -> None:
        if task not in ordered:
            for num in task.after:
                if num in by_num:
                    add(by_num[num])
            ordered.append(task)

    for task in tasks:
        add(task)
    return ordered
