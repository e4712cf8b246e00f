"""Errors whose message names the problem, the value, and the way out."""

import errno
import os
from pathlib import Path

from chattrain.redact import redact

# Seconds that the first rank to fail waits after it has told the others: if it hosts the store, the store ends with it.
REPORT_DELAY_S = 1.5


class _WithoutCredentials(Exception):
    def __str__(self) -> str:
        return redact(super().__str__())


class UserError(_WithoutCredentials):
    """A mistake of the user. The program prints this one message on stderr, without a traceback, and exits with status 2."""

    exit_status = 2
    reported_here = False  # True on the rank that told the others of the failure; it prints the message, whatever its rank


class RunFailed(_WithoutCredentials):
    """The run itself failed, for example with a non-finite loss: one message, status `failed` in summary.json, exit status 1."""

    exit_status = 1
    reported_here = False


class OtherRankFailed(RunFailed):
    """The run failed, but the failing rank or the launcher prints the message, so this process prints nothing."""


def explain_file_error(error: OSError, where: str = "a file") -> Exception | None:
    """A full disk, a name that is too long, a folder that is read-only or another user's: no bugs. None: another error.

    where: named where the error names no file.
    """
    what = f"{error.filename or where}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFailed(f"{what}. Make room; a run that had begun goes on from its last checkpoint when it is started again")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(f"{what}. Name another folder (run.root, or CHATTRAIN_CACHE for caches), or change its permissions")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{what}. Shorten it: a file system takes 255 bytes at most for the name of a file or folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and (blocking := _file_in_the_way(error.filename)):
        return UserError(f"{blocking} is a file, but a folder of this name is needed; name another one, or move it away")
    return None


def _file_in_the_way(path: str | bytes | int | None) -> Path | None:
    """The part of a path that is a file, where a folder was to be made; None: there is none."""
    whole = Path(os.fsdecode(path)) if isinstance(path, str | bytes) else Path()
    return next((part for part in (whole, *whole.parents) if part.is_file()), None)


def describe_error(error: BaseException) -> str:
    """The error as summary.json records it: `<type>: <message>`, without passwords."""
    return redact(f"{'RunFailed' if isinstance(error, RunFailed) else type(error).__name__}: {error}")
