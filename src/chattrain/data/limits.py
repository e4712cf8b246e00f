"""Limits for data of unknown origin: the size of a row, and what a small compressed file may unpack to."""

from __future__ import annotations

from pathlib import Path

from chattrain.chat import Malformed
from chattrain.errors import UserError

ALWAYS_MB = 1024  # MiB that any file may unpack to


def check_row(size: int, max_row_mb: float) -> None:
    """Raises Malformed for a row of more bytes than data.max_row_mb."""
    if size > max_row_mb * 2**20:
        raise Malformed(f"the row has {size / 2**20:,.1f} MiB, over data.max_row_mb={max_row_mb:g}")


class Unpacking:
    """Counts what a compressed file has been unpacked to."""

    def __init__(self, name: str, file: Path, max_unpacked: float):
        self.name, self.file, self.max_unpacked = name, file, max_unpacked
        self.most = max(ALWAYS_MB * 2**20, max_unpacked * file.stat().st_size)
        self.size = 0

    def add(self, size: int) -> None:
        """Raises UserError where the file unpacks to more than it may."""
        self.size += size
        if self.size > self.most:
            raise UserError(
                f"data source {self.name} ({self.file}) unpacks to over {self.most / 2**20:,.0f} MiB, more than "
                f"{self.max_unpacked:g} times its size: it looks made to fill a machine; if you trust it, raise data.max_unpacked"
            )
