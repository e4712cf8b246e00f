"""Loss a token and bits per byte on the validation rows, over all of them and by source."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chattrain.data.batch import Batch
from chattrain.data.collators import Collator
from chattrain.data.loader import evaluation_batches
from chattrain.data.passes import PassLimits
from chattrain.model.head import sum_dtype
from chattrain.parallel.ranks import Ranks

NAME_LENGTH = 40  # characters of a source's name in a metric's, at most


@dataclass(frozen=True)
class Measured:
    """What a validation loss was measured on."""

    rows: int
    tokens: int  # assistant tokens: val/loss is a mean over them
    all_tokens: int  # val/loss_all is a mean over them
    passes: list[tuple[float, int]]  # val/loss's nats and tokens of each batch of rows, in an order that does not vary

    @property
    def facts(self) -> dict[str, int | str]:
        """For summary.json."""
        return {"rows": self.rows, "tokens": self.tokens, "all_tokens": self.all_tokens, "targets": "assistant"}

    @property
    def label(self) -> str:
        """
        >>> Measured(400, 12345, 45678, []).label
        '400 rows, 12,345 assistant tokens (val/loss) of 45,678 (val/loss_all, val/bpb)'
        """
        return f"{self.rows:,} rows, {self.tokens:,} assistant tokens (val/loss) of {self.all_tokens:,} (val/loss_all, val/bpb)"


class Validation:
    """val/loss: nats a token of the assistant's. val/loss_all: nats a token. val/bpb: bits a byte of all tokens. With several
    sources, each of them for each source, as val/loss/<source>. `measured` says on what, after a call.

    What a training supervises changes none of them: the collator's batches weigh assistant tokens 1 and other real tokens less
    (loss_weights.MEASURED), and the losses are not weighed. Each divides a sum over all rows by another, so they do not depend on
    the batch size (to rounding) or the number of ranks (to the bit). A special token has no bytes, and bpb leaves out its loss
    too, so that bpb can be compared across tokenizers.
    """

    def __init__(
        self,
        collator: Collator,
        num_rows: int,
        limits: PassLimits,
        token_bytes: np.ndarray,
        device: torch.device,
        ranks: Ranks,
        taken: Sequence[str] = (),
    ):
        self.collator, self.num_rows, self.limits = collator, num_rows, limits
        self.token_bytes = torch.from_numpy(token_bytes).to(device)
        self.device, self.ranks = device, ranks
        names = metric_names([*taken, *(cache.name for cache in collator.mixture.caches)])
        self.sources = names[len(taken) :]  # `taken`: names that mean something else after val/loss/
        self.measured: Measured | None = None

    @torch.no_grad()
    def __call__(self, losses_of: Callable[[Batch], torch.Tensor]) -> dict[str, float]:
        """The metrics by name. losses_of(batch) returns the loss of each target in nats, fp32 (B, T)."""
        passes = []
        for batch in evaluation_batches(self.collator, self.num_rows, self.limits, self.ranks.rank, self.ranks.world_size):
            batch = batch.to(self.device)
            passes.append(self._sums(batch, losses_of(batch)))
        table = np.array(self.ranks.all_gather_interleaved(passes)).reshape(-1, len(self.sources), len(SUMS))
        by_batch = [Sums(*(math.fsum(column) for column in batch.T)) for batch in table]
        whole = _total(by_batch)
        self.measured = Measured(
            self.num_rows, int(whole.tokens), int(whole.all_tokens), [(s.nats, int(s.tokens)) for s in by_batch if s.tokens]
        )
        metrics = whole.metrics("")
        if len(self.sources) > 1:
            for i, source in enumerate(self.sources):
                metrics |= _total([Sums(*batch[i]) for batch in table]).metrics(f"/{source}")
        return metrics

    def _sums(self, batch: Batch, losses: torch.Tensor) -> list[float]:
        """The `Sums` of each source in a batch, one after the other."""
        dtype = sum_dtype(self.device)
        real = batch.targets >= 0
        replies = real if batch.weights is None else batch.weights == 1
        sizes = self.token_bytes[batch.targets.clamp(min=0)]
        sums = []
        for i in range(len(self.sources)):
            here = real if batch.sources is None else real & (batch.sources == i)
            of_replies, with_bytes = here & replies, here & (sizes > 0)
            for values, chosen in ((losses, of_replies), (losses, here), (losses, with_bytes), (sizes, here)):
                sums.append((values * chosen).sum(dtype=dtype))
            sums += [of_replies.sum().to(dtype), here.sum().to(dtype)]
        return torch.stack(sums).tolist()


@dataclass(frozen=True)
class Sums:
    nats: float  # of assistant tokens
    all_nats: float
    nats_with_bytes: float  # of tokens that have bytes
    num_bytes: float
    tokens: float  # assistant tokens
    all_tokens: float

    def metrics(self, suffix: str) -> dict[str, float]:
        """The metrics that there are tokens for."""
        found = {}
        if self.tokens:
            found[f"val/loss{suffix}"] = self.nats / self.tokens
        if self.all_tokens:
            found[f"val/loss_all{suffix}"] = self.all_nats / self.all_tokens
        if self.num_bytes:
            found[f"val/bpb{suffix}"] = self.nats_with_bytes / math.log(2) / self.num_bytes
        return found


SUMS = Sums.__dataclass_fields__


def _total(parts: list[Sums]) -> Sums:
    return Sums(*(math.fsum(getattr(part, name) for part in parts) for name in SUMS))


def metric_names(sources: list[str]) -> list[str]:
    """Names of sources as parts of a metric's name, short and unique, of characters that every tracker takes.

    >>> metric_names(["smol talk/train.jsonl", "smol_talk/train.jsonl", "gsm8k"])
    ['smol_talk_train.jsonl', 'smol_talk_train.jsonl_2', 'gsm8k']
    """
    names: list[str] = []
    for source in sources:
        name = short = re.sub(r"[^A-Za-z0-9_.-]+", "_", source)[-NAME_LENGTH:].strip("_") or "source"
        number = 1
        while name in names:
            number += 1
            name = f"{short}_{number}"
        names.append(name)
    return names
