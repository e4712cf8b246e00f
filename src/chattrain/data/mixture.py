"""Several sources as one data set: the documents of an epoch and their order, which depend on (seed, epoch) only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from chattrain.config.data import SourceConfig
from chattrain.data.cache import TokenizedSource
from chattrain.storage.files import make_folder


def epoch_counts(sizes: list[int], sources: list[SourceConfig]) -> list[int]:
    """The number of documents that each source contributes to one epoch of the mixture. `sizes`: documents of each source.

    Without weights, each source is repeated `epochs` times. With weights, the counts are proportional to the weights, and the
    epoch is as large as it can be without repeating any source more than `epochs` times; the other sources are subsampled.

    >>> epoch_counts([100, 10], [SourceConfig("a"), SourceConfig("b", epochs=2)])
    [100, 20]
    >>> epoch_counts([100, 10], [SourceConfig("a", weight=3), SourceConfig("b", weight=1)])
    [30, 10]
    """
    most = [n * source.epochs for n, source in zip(sizes, sources, strict=True)]
    weights = [source.weight for source in sources if source.weight is not None]  # all have one, or none: DataConfig.check
    if not weights:
        return [max(1, round(n)) for n in most]
    unit = min(n / weight for n, weight in zip(most, weights, strict=True))
    return [max(1, round(unit * weight)) for weight in weights]


class Mixture:
    """The documents of all sources under common indices, and their order in each epoch.

    `lengths` (documents,) int64: tokens of each document. `keep` (documents,) bool: documents that epochs may use; None: all.
    `folder`: cache for arrays computed from the mixture, see `load_or_compute`; None: no cache.
    """

    def __init__(
        self,
        caches: list[TokenizedSource],
        sources: list[SourceConfig],
        seed: int,
        keep: np.ndarray | None = None,
        folder: Path | None = None,
    ):
        self.caches, self.sources, self.seed, self.folder = caches, sources, seed, folder
        self.starts = np.cumsum([0] + [len(c) for c in caches])
        self.lengths = np.concatenate([np.diff(c.offsets) for c in caches])
        keep = np.ones(len(self.lengths), dtype=bool) if keep is None else keep
        self.kept = [np.flatnonzero(keep[a:b]) + a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        present = [i for i, ids in enumerate(self.kept) if len(ids)]
        counts = epoch_counts([len(self.kept[i]) for i in present], [sources[i] for i in present]) if present else []
        self.counts = dict(zip(present, counts, strict=True))
        self.epoch_size = sum(counts)
        self.order = lru_cache(maxsize=4)(self._order)

    def __len__(self) -> int:
        return len(self.lengths)

    def restricted(self, keep: np.ndarray) -> Mixture:
        """The same mixture, using only the documents where `keep` (documents,) is true."""
        return Mixture(self.caches, self.sources, self.seed, keep, self.folder)

    def load_or_compute(self, key: list, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays that `compute` returns, memory-mapped from `folder` if an earlier run has saved them.

        They may depend only on the documents, their sources, the seed and the key: a hash of these names the cache folder.
        """
        if self.folder is None:
            return compute()
        sources = [[c.content_hash, s.epochs, s.weight] for c, s in zip(self.caches, self.sources, strict=True)]
        folder = self.folder / hashlib.sha256(json.dumps([sources, self.seed, key]).encode()).hexdigest()[:24]
        if not folder.is_dir():
            arrays = compute()

            def save(scratch: Path) -> None:
                for name, array in arrays.items():
                    np.save(scratch / f"{name}.npy", array)

            make_folder(folder, save)
        return {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, loss_mask) of document i."""
        cache, at = self._find(i)
        return cache[at]

    def release(self) -> None:
        """Drop the pages that were read from this process's memory, see TokenizedSource.release."""
        for cache in self.caches:
            cache.release()

    def describe(self, i: int) -> str:
        """Source and place of document i for messages, as `talk.jsonl line 7` or `gsm8k row 6`."""
        cache, at = self._find(i)
        return f"{cache.name} {cache.places.short(int(cache.record_indices[at]))}"

    def _find(self, i: int) -> tuple[TokenizedSource, int]:
        """(source of document i, its index in that source)."""
        source = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.caches[source], i - int(self.starts[source])

    def _order(self, epoch: int) -> np.ndarray:
        """(epoch_size,) int64: document indices in the order of this epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        drawn = []
        for source, count in self.counts.items():
            ids = self.kept[source]
            whole, part = divmod(count, len(ids))
            drawn += [ids] * whole + [rng.permutation(ids)[:part]]
        return rng.permutation(np.concatenate(drawn))
