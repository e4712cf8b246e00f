"""Files: JSON read with a plain refusal, text and folders written whole or not at all."""

from __future__ import annotations

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
    """Raises UserError where the file is not there or holds no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


def replace_text(file: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    scratch = file.with_name(f".{file.name}.writing")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a folder beside its place, then put it there. Another process may have been faster: its folder stays."""
    with _filled(folder, fill) as scratch:
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """The same in the place of a folder that is there, which goes only when the new one is whole."""
    with _filled(folder, fill) as scratch:
        before = scratch.with_name(f"{scratch.name}.before")
        if folder.exists():
            folder.rename(before)
        try:
            scratch.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def _filled(folder: Path, fill: Callable[[Path], None]) -> Iterator[Path]:
    """A filled folder beside the place, gone at the end unless it was renamed; readable by whom the umask lets read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        fill(scratch)
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
