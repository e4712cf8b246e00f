"""Read JSON with a clear error; write texts and folders completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chattrain.errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if the file does not exist or contains anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


def replace_text(file: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old content or the new one, never part of it."""
    scratch = file.with_name(f".{file.name}.writing")
    try:
        with naming(file):
            scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Errors of writing name this place: those of a full disk name none, and NumPy's of a write cut short has no number."""
    try:
        yield
    except OSError as error:
        number = errno.ENOSPC if "requested and" in str(error) else error.errno
        if error.filename is not None or number is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder that is complete as soon as it exists: `fill` writes to a temporary folder, which is then renamed.

    If another process has created the folder in the meantime, that one is kept.
    """
    with _filled(folder, fill) as scratch:
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Like `make_folder`, but replaces an existing folder, which is removed only after the new one is complete."""
    with _filled(folder, fill) as scratch:
        backup = scratch.with_name(f"{scratch.name}.before")
        if folder.exists():
            folder.rename(backup)
        try:
            scratch.rename(folder)
        except OSError:
            if backup.exists():
                backup.rename(folder)
            raise
        shutil.rmtree(backup, ignore_errors=True)


@contextmanager
def _filled(folder: Path, fill: Callable[[Path], None]) -> Iterator[Path]:
    """A filled temporary folder in the same parent folder, removed at the end unless it was renamed. Its permissions follow the
    umask; those of mkdtemp would let only this user read it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        with naming(folder):
            fill(scratch)
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
