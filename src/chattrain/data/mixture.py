"""Several sources as one data set: the documents of an epoch and their order, which depend on (seed, epoch) only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from chattrain.chat import Kind
from chattrain.config.data import SourceConfig
from chattrain.config.words import Supervise, WeightBy
from chattrain.data.cache import TokenizedSource
from chattrain.data.loss_weights import LossWeights
from chattrain.data.recent import Recent
from chattrain.data.shares import Shares, epoch_counts
from chattrain.storage.files import make_folder

DRAWS = 16  # of documents of a source whose share is one of tokens


class Mixture:
    """The documents of all sources under common indices, and their order in each epoch.

    `lengths` (documents,) int64: tokens of each document. `keep` (documents,) bool: documents that epochs may use; None: all.
    `row_tokens`: tokens of a document that a row takes at most; None: all of them. `folder`: cache for arrays computed from the
    mixture, see `load_or_compute`; None: no cache. `loss`: what of a document carries loss; auto: what the collator says, and
    without one its assistant tokens. `shares`: how much of an epoch each source makes up.
    """

    def __init__(
        self,
        caches: list[TokenizedSource],
        sources: list[SourceConfig],
        seed: int,
        keep: np.ndarray | None = None,
        folder: Path | None = None,
        loss: LossWeights = LossWeights(),
        shares: Shares = Shares(),
        row_tokens: int | None = None,
    ):
        self.caches, self.sources, self.seed, self.folder = caches, sources, seed, folder
        self.loss, self.shares, self.row_tokens = loss, shares, row_tokens
        self.weights = loss.resolved(Supervise.assistant)
        self.starts = np.cumsum([0] + [len(c) for c in caches])
        self.lengths = np.concatenate([np.diff(c.offsets) for c in caches])
        keep = self.keep = np.ones(len(self.lengths), dtype=bool) if keep is None else keep
        self.kept = [np.flatnonzero(keep[a:b]) + a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        self.counts = self._counts()
        self.epoch_size = sum(self.counts.values())
        self._orders: Recent[np.ndarray] = Recent(4)

    def __len__(self) -> int:
        return len(self.lengths)

    def _counts(self) -> dict[int, int]:
        """Documents of an epoch by index of their source, of the sources that have any."""
        present = [i for i, ids in enumerate(self.kept) if len(ids)]
        if not present:
            return {}
        lengths = self.lengths if self.row_tokens is None else np.minimum(self.lengths, self.row_tokens)
        num_replay = sum(i >= len(self.sources) - self.shares.num_replay for i in present)
        counts = epoch_counts(
            [len(self.kept[i]) for i in present],
            [self.sources[i] for i in present],
            [float(lengths[self.kept[i]].mean()) for i in present],
            replace(self.shares, num_replay=num_replay),
        )
        return dict(zip(present, counts, strict=True))

    def restricted(self, keep: np.ndarray, row_tokens: int | None = None) -> Mixture:
        """The same mixture, using only the documents where `keep` (documents,) is true, of which rows take row_tokens at most."""
        return Mixture(self.caches, self.sources, self.seed, keep, self.folder, self.loss, self.shares, row_tokens)

    def weighed(self, implied: Supervise) -> Mixture:
        """The same mixture, in which the tokens carry loss that the collator implies, unless loss.supervise says which. Raises
        UserError for a prompt_weight that no token has."""
        loss = self.loss.resolved(implied)
        return Mixture(self.caches, self.sources, self.seed, self.keep, self.folder, loss, self.shares, self.row_tokens)

    @cached_property
    def worth_a_row(self) -> np.ndarray:
        """(documents,) int64: how many tokens of each document make it worth a row of its own: those that carry loss."""
        if not self.weights.prompts_count:
            return self._num_replies
        return self.lengths - np.concatenate([c.num_off for c in self.caches])

    @cached_property
    def num_supervised(self) -> np.ndarray:
        """(documents,) int64: how many tokens of each document weigh 1."""
        every = self.weights.supervise == Supervise.all or self.weights.prompt_weight == 1
        return self.lengths - np.concatenate([c.num_off for c in self.caches]) if every else self._num_replies

    @cached_property
    def starts_supervised(self) -> np.ndarray:
        """(documents,) bool: whether the first token of each document weighs 1. That of a conversation is prompt, so only a plain
        text, which is one turn, can begin with a reply."""
        first = np.concatenate([c.kinds[c.offsets[:-1]] for c in self.caches])
        every = self.weights.supervise == Supervise.all or self.weights.prompt_weight == 1
        return (first & Kind.OFF == 0) if every else first == Kind.ASSISTANT

    @property
    def _num_replies(self) -> np.ndarray:
        """(documents,) int64: assistant tokens, of the last reply only under last_assistant."""
        last = self.weights.supervise == Supervise.last_assistant
        return np.concatenate([c.num_last_assistant if last else c.num_assistant for c in self.caches])

    def load_or_compute(self, key: list, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays that `compute` returns, memory-mapped from `folder` if an earlier run has saved them.

        They may depend only on the documents, their sources, the seed and the key: a hash of these names the cache folder.
        """
        if self.folder is None:
            return compute()
        folder = self.folder / hashlib.sha256(json.dumps([self.identity(), self.seed, key]).encode()).hexdigest()[:24]
        if not folder.is_dir():
            arrays = compute()

            def save(scratch: Path) -> None:
                for name, array in arrays.items():
                    np.save(scratch / f"{name}.npy", array)

            make_folder(folder, save)
        return {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}

    def identity(self) -> list:
        """What the documents of an epoch depend on, besides the seed and the rows that they are cut to."""
        found: list = [[c.content_hash, s.epochs, s.weight] for c, s in zip(self.caches, self.sources, strict=True)]
        if self.shares != Shares():
            found.append([self.shares.weight_by.name, self.shares.replay, self.shares.num_replay])
        return found

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, loss weights fp32) of document i, each (tokens,)."""
        tokens, kinds, turns = self.read(i)
        return tokens, self.weights.of(kinds, turns)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, kinds, turns) of document i, each (tokens,)."""
        source, at = self._find(i)
        return self.caches[source][at]

    def source_of(self, i: int) -> int:
        """Index of the source of document i."""
        return self._find(i)[0]

    def release(self) -> None:
        """Drop the pages that were read from this process's memory, see TokenizedSource.release."""
        for cache in self.caches:
            cache.release()

    def describe(self, i: int) -> str:
        """Source and place of document i for messages, as `talk.jsonl line 7` or `gsm8k row 6`."""
        source, at = self._find(i)
        cache = self.caches[source]
        return f"{cache.name} {cache.places.short(int(cache.record_indices[at]))}"

    def _find(self, i: int) -> tuple[int, int]:
        """(index of the source of document i, its index in that source)."""
        source = int(np.searchsorted(self.starts, i, side="right")) - 1
        return source, i - int(self.starts[source])

    def order(self, epoch: int) -> np.ndarray:
        """(epoch_size,) int64: document indices in the order of this epoch."""
        return self._orders.get(epoch, self._order)

    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        drawn = []
        for source, count in self.counts.items():
            ids = self.kept[source]
            whole, part = divmod(count, len(ids))
            drawn += [ids] * whole + [self._draw(rng, source, part)]
        return rng.permutation(np.concatenate(drawn))

    def _draw(self, rng: np.random.Generator, source: int, count: int) -> np.ndarray:
        """This many documents of a source. Where its share is one of tokens, the draw of several whose tokens are nearest to what
        documents have on average."""
        ids = self.kept[source]
        if not self._shares_tokens(source):
            return rng.permutation(ids)[:count]
        lengths = self.lengths if self.row_tokens is None else np.minimum(self.lengths, self.row_tokens)
        wanted = count * lengths[ids].mean()
        draws = [rng.permutation(ids)[:count] for _ in range(DRAWS)]
        return min(draws, key=lambda draw: abs(lengths[draw].sum() - wanted))

    def _shares_tokens(self, source: int) -> bool:
        replayed = source >= len(self.sources) - self.shares.num_replay
        return replayed or (self.shares.weight_by == WeightBy.tokens and self.sources[source].weight is not None)
