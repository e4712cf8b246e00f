"""Data sets of the Hugging Face hub, and folders that `datasets` has saved."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from chattrain.config.data import SourceConfig
from chattrain.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def load_saved(name: str, folder: Path) -> Dataset:
    """A folder that `Dataset.save_to_disk` has written. Raises UserError if a file of it is broken or missing."""
    import datasets

    try:
        return cast("Dataset", datasets.load_from_disk(str(folder)))
    except Exception as error:  # as below
        raise UserError(f"data source {name} ({folder}) cannot be read: {_reason(error)}; fetch or save it again") from error


def load(name: str, source: SourceConfig, cache_dir: Path) -> Dataset:
    """One split of a data set of the hub. Raises UserError if it cannot be loaded."""
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no warnings for retries; the error below says how they ended
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.path, source.subset, cache_dir=str(cache_dir / "datasets"), split=source.split)
    except Exception as error:  # the library raises many types of error; all of them mean that the data cannot be loaded
        raise UserError(
            f"data source {name}: cannot load {source.path}: {_reason(error)}; check the name and the network, or give a "
            "local file or folder"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
