"""A process that runs one job after another. It keeps its imports, and the folder of compiled code is shared by all."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import cloudpickle

STOP_S = 10  # seconds that a worker has to end after it was told to


class Worker:
    """The launching process's side of a worker: sends it calls, one at a time, and receives their results."""

    def __init__(self, environment: dict[str, str]):
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch and MLflow
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, environment))  # no daemon: it may start ranks
        self.process.start()
        theirs.close()

    def send(self, call: Callable[[], object]) -> None:
        self.connection.send_bytes(cloudpickle.dumps(call))

    def receive(self) -> tuple[object, BaseException | None]:
        """The result of the call, or what it raised. Raises EOFError where the process died."""
        try:
            return cloudpickle.loads(self.connection.recv_bytes())
        except ConnectionError as died:
            raise EOFError from died

    def interrupt(self) -> None:
        """Like Ctrl-C in the worker: its run saves and stops."""
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, signal.SIGINT)

    def exit_status(self) -> int | None:
        """Of a worker that died; negative: the signal that ended it."""
        self.process.join(STOP_S)
        return self.process.exitcode

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(STOP_S)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(STOP_S)
            self.process.kill()


class Pool:
    """The workers of a sweep, by slot; each starts with its first call. Closed when the program ends, or before by `close`."""

    def __init__(self, environments: list[dict[str, str]]):
        self.environments = environments
        self.workers: dict[int, Worker] = {}
        atexit.register(self.close)  # before multiprocessing waits for its children

    def send(self, slot: int, call: Callable[[], object]) -> Worker:
        """Give the slot's worker a call. One that died while it had none, as the kernel may end it, is replaced."""
        if slot in self.workers:
            try:
                self.workers[slot].send(call)
                return self.workers[slot]
            except OSError:
                pass
        self.workers[slot] = Worker(self.environments[slot])
        self.workers[slot].send(call)
        return self.workers[slot]

    def forget(self, slot: int) -> None:
        """The slot's worker has died."""
        del self.workers[slot]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()
        atexit.unregister(self.close)


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """Run calls until the other side closes the connection. Runs before torch is imported, so that `environment` has effect."""
    os.environ.update(environment)
    os.setpgrp()  # Ctrl-C on the terminal reaches the launching process alone, which passes it on once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_with_launcher, daemon=True).start()
    while True:
        try:
            call = cloudpickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            answer = (call(), None)
        except BaseException as error:
            answer = (None, error)
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            connection.send_bytes(_dumps(answer))
        except OSError:
            return


def _dumps(answer: tuple[object, BaseException | None]) -> bytes:
    """The answer as bytes; an error or a result that cannot be pickled as a text."""
    try:
        data = cloudpickle.dumps(answer)
        cloudpickle.loads(data)  # some exceptions fail only here
        return data
    except Exception as failed:
        _, error = answer
        reason = f"{type(error).__name__}: {error}" if error is not None else f"a result that cannot be sent ({failed})"
        return cloudpickle.dumps((None, RuntimeError(reason)))


def _stop_with_launcher() -> None:
    """If the launching process is killed, stop this one as Ctrl-C would: nobody waits for its jobs any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
