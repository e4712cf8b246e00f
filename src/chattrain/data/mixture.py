"""Several sources as one: which documents an epoch holds, and in which order. A function of (seed, epoch) alone."""

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
    """TokenizedSource of each source in one epoch of the mixture.

    Without weights a source appears `epochs` times. With weights the shares follow them: the source that runs short
    first (at its `epochs`) sets the size, larger ones are thinned out.

    >>> epoch_counts([100, 10], [SourceConfig("a"), SourceConfig("b", epochs=2)])
    [100, 20]
    >>> epoch_counts([100, 10], [SourceConfig("a", weight=3), SourceConfig("b", weight=1)])
    [30, 10]
    """
    full = [n * source.epochs for n, source in zip(sizes, sources, strict=True)]
    if sources[0].weight is None:
        return [max(1, round(f)) for f in full]
    unit = min(f / source.weight for f, source in zip(full, sources, strict=True))
    return [max(1, round(unit * source.weight)) for source in sources]


class Mixture:
    """TokenizedSource of all sources under one numbering, and the order of every epoch.

    `lengths` (documents,) int64 counts tokens. `keep` (documents,) bool leaves documents out for good. `folder`: where what is
    worked out from them is kept from run to run; None: nowhere.
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
        return Mixture(self.caches, self.sources, self.seed, keep, self.folder)

    def worked_out(self, key: list, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of `make`, which follow from these documents and their sources, the seed and the key: memory-mapped where
        an earlier run has made them."""
        if self.folder is None:
            return make()
        decides = [[c.content_hash, s.epochs, s.weight] for c, s in zip(self.caches, self.sources, strict=True)]
        folder = self.folder / hashlib.sha256(json.dumps([decides, self.seed, key]).encode()).hexdigest()[:24]
        if not folder.is_dir():
            made = make()
            make_folder(folder, lambda scratch: [np.save(scratch / f"{name}.npy", array) for name, array in made.items()])
        return {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, loss_mask) of document i."""
        source = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.caches[source][i - self.starts[source]]

    def release(self) -> None:
        """Keep nothing of what was read in this process's memory."""
        for cache in self.caches:
            cache.release()

    def describe(self, i: int) -> str:
        """`source row number` of document i, for messages."""
        source = int(np.searchsorted(self.starts, i, side="right")) - 1
        cache = self.caches[source]
        return f"{cache.name} row {cache.rows[i - self.starts[source]]}"

    def _order(self, epoch: int) -> np.ndarray:
        """(epoch_size,) document numbers in the order of this epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        drawn = []
        for source, count in self.counts.items():
            ids = self.kept[source]
            whole, part = divmod(count, len(ids))
            drawn += [ids] * whole + [rng.permutation(ids)[:part]]
        return rng.permutation(np.concatenate(drawn))
