"""The one thread that computes: it feeds the engine with requests of many clients, and tells each what its reply has."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from chattrain.model.engine import Engine, Request
from chattrain.serving.speaker import Speaker

log = logging.getLogger("chattrain")

STOPPED = "stopped"  # why a reply has ended, besides what `Request` says: the server ends
Deliver = Callable[[list[int], str | None], None]  # new tokens of a reply, and why it has ended; None: it goes on


class Worker:
    """Answers requests, `rows` of them at once. Its methods may be called from any thread."""

    def __init__(self, speaker: Speaker, rows: int):
        self.speaker = speaker
        self._engine = Engine(speaker.model, rows, speaker.context)
        self._changed = threading.Condition()
        self._new: list[tuple[Request, Deliver]] = []
        self._cancelled: list[Request] = []
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="chattrain-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Answer the request as soon as a row is free. `deliver` is called from the worker's thread, last with an end."""
        with self._changed:
            if self._ends:
                deliver([], STOPPED)
                return
            self._new.append((request, deliver))
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Free the row of a request that nobody waits for. Nothing happens where it has ended."""
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify()

    def stop(self) -> None:
        """End all replies as they are."""
        with self._changed:
            self._ends = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        open_requests: dict[Request, tuple[Deliver, int]] = {}  # what to call, and how many tokens it knows
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ends or self._new or self._cancelled or open_requests)
                new, cancelled, ends = self._new, self._cancelled, self._ends
                self._new, self._cancelled = [], []
            for request, deliver in new:
                open_requests[request] = deliver, 0
                self._submit(request)
            for request in cancelled:
                self._engine.cancel(request)
            if ends:
                for deliver, _ in open_requests.values():
                    deliver([], STOPPED)
                return
            if self._engine.busy:
                self._step()
            for request, (deliver, known) in list(open_requests.items()):
                if len(request.reply) > known or request.ended:
                    open_requests[request] = deliver, len(request.reply)
                    deliver(request.reply[known:], request.ended)
                if request.ended:
                    del open_requests[request]

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request)
        except ValueError:  # nothing to read, as of a template that renders nothing
            log.exception("a request cannot be answered")
            request.ended = "failed"

    def _step(self) -> None:
        try:
            with self.speaker.autocast():
                self._engine.step()
        except Exception:  # whatever the model or the device raises: the requests that had rows have failed, others go on
            log.exception("a step of generation has failed; the requests that it was computing are answered with an error")
