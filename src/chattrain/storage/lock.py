"""One writer a run folder: a lock beside it, held for the life of the run by the process that sets it up.

The lock is the operating system's (flock), so it ends with its process, however that ends. Where a file system has none, the
file itself is the lock: its owner touches it every HEARTBEAT_S seconds, and it is dead once the file is STALE_S seconds old, or,
on the same host, once its process is gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from chattrain.errors import UserError

log = logging.getLogger("chattrain")

HEARTBEAT_S, STALE_S = 20.0, 90.0
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class Owner:
    pid: int
    host: str
    since: float  # Unix time, s

    @classmethod
    def this_process(cls) -> Owner:
        return cls(os.getpid(), socket.gethostname(), time.time())


class RunLock:
    """The lock of one run folder. As a context manager it lets go at the end, whether it was taken or not."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.file = run_dir.with_name(f".{run_dir.name}.lock")  # beside the folder: that may be moved aside
        self._descriptor: int | None = None
        self._beat: threading.Event | None = None

    def check(self) -> None:
        """Raises UserError where another process holds the lock. Writes nothing."""
        if self.file.is_file():
            descriptor = os.open(self.file, os.O_RDWR)
            try:
                self._try(descriptor)
            finally:
                os.close(descriptor)  # which lets go of what was taken

    def take(self) -> None:
        """Take the lock. Raises UserError where another process holds it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                system_lock = self._try(descriptor)
                if self._is_current(descriptor):
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner has removed it in the meantime
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Owner.this_process())).encode(), 0)
        self._descriptor = descriptor
        if not system_lock:
            log.warning(
                "%s is on a file system without locks: that no other process trains there is told by the time of %s alone",
                self.run_dir,
                self.file.name,
            )
            self._beat = threading.Event()
            threading.Thread(target=self._keep_alive, args=(self._beat,), daemon=True, name="lock").start()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let go of the lock; nothing, if it was not taken."""
        if self._descriptor is None:
            return
        if self._beat is not None:
            self._beat.set()
        self.file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _try(self, descriptor: int) -> bool:
        """Lock the open file; False where the file system has no locks and nobody seems to hold it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise self._held() from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        owner = read_owner(self.file)
        if owner is not None and _seems_alive(owner, self.file):
            raise self._held()
        return False

    def _held(self) -> UserError:
        owner = read_owner(self.file)
        who = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
        return UserError(f"{self.run_dir} is being trained by {who}; use another run.name, or stop it first")

    def _is_current(self, descriptor: int) -> bool:
        """Is the open file still the one of this name?"""
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except FileNotFoundError:
            return False

    def _keep_alive(self, done: threading.Event) -> None:
        while not done.wait(HEARTBEAT_S):
            try:
                os.utime(self.file)
            except OSError:
                continue


def read_owner(file: Path) -> Owner | None:
    """Who wrote a lock file; None where it cannot be read, as while it is being written."""
    try:
        return Owner(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _seems_alive(owner: Owner, file: Path) -> bool:
    if owner.host == socket.gethostname():
        try:
            os.kill(owner.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return owner.pid != os.getpid()
    return time.time() - file.stat().st_mtime < STALE_S
