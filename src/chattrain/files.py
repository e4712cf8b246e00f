"""Writing whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    scratch = file.with_name(f".{file.name}.writing")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a folder beside its place, then put it there. Another process may have been faster: its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        fill(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
