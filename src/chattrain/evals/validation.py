"""Loss a token and bits per byte on the validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from chattrain.data.batch import Batch
from chattrain.data.collators import Collator
from chattrain.data.loader import evaluation_batches
from chattrain.data.passes import PassLimits
from chattrain.model.head import sum_dtype
from chattrain.parallel.ranks import Ranks


@dataclass(frozen=True)
class Measured:
    """What a validation loss was measured on."""

    rows: int
    tokens: int  # targets: the tokens that the loss is a mean over
    targets: str  # `all`: every token of the documents; `replies`: only the supervised ones, which are the assistant's
    passes: list[tuple[float, int]]  # summed loss in nats and targets of each batch of rows, in an order that does not vary

    @property
    def facts(self) -> dict[str, int | str]:
        """For summary.json."""
        return {"rows": self.rows, "tokens": self.tokens, "targets": self.targets}

    @property
    def over(self) -> str:
        return "all tokens" if self.targets == "all" else "replies (assistant tokens)"

    @property
    def label(self) -> str:
        """
        >>> Measured(400, 12345, "replies", []).label
        '400 rows, 12,345 tokens, loss over replies (assistant tokens)'
        """
        return f"{self.rows:,} rows, {self.tokens:,} tokens, loss over {self.over}"


class Validation:
    """val/loss: nats a supervised token. val/bpb: bits a byte of the target tokens. `measured` says on what, after a call.

    Both divide a sum over all rows by another, so they do not depend on the batch size (to rounding) or the number of ranks (to
    the bit). A special token has no bytes, and bpb leaves out its loss too, so that bpb can be compared across tokenizers.
    """

    def __init__(
        self,
        collator: Collator,
        num_rows: int,
        limits: PassLimits,
        token_bytes: np.ndarray,
        device: torch.device,
        ranks: Ranks,
    ):
        self.collator, self.num_rows, self.limits = collator, num_rows, limits
        self.token_bytes = torch.from_numpy(token_bytes).to(device)
        self.device, self.ranks = device, ranks
        self.measured: Measured | None = None

    @torch.no_grad()
    def __call__(self, losses_of: Callable[[Batch], torch.Tensor]) -> dict[str, float]:
        """The two metrics by name. losses_of(batch) returns the loss of each target in nats, fp32 (B, T)."""
        passes = []  # of each batch: nats, nats of tokens that have bytes, targets, bytes, tokens left out of the loss
        for batch in evaluation_batches(self.collator, self.num_rows, self.limits, self.ranks.rank, self.ranks.world_size):
            batch = batch.to(self.device)
            losses = losses_of(batch)
            sizes = self.token_bytes[batch.targets.clamp(min=0)] * (batch.targets >= 0)
            dtype = sum_dtype(self.device)
            passes.append(
                [
                    float(losses.sum(dtype=dtype)),
                    float((losses * (sizes > 0)).sum(dtype=dtype)),
                    batch.num_supervised,
                    int(sizes.sum()),
                    batch.num_tokens - batch.num_supervised - _boundaries(batch),
                ]
            )
        table = self.ranks.all_gather_interleaved(passes)
        nats, nats_with_bytes, targets, num_bytes, left_out = (math.fsum(column) for column in zip(*table, strict=True))
        kind = "replies" if left_out > self.num_rows else "all"  # an isolated document that ends a row leaves out one token
        self.measured = Measured(self.num_rows, int(targets), kind, [(row[0], int(row[2])) for row in table if row[2]])
        return {"val/loss": nats / max(1, targets), "val/bpb": nats_with_bytes / math.log(2) / max(1, num_bytes)}


def _boundaries(batch: Batch) -> int:
    """Tokens of isolated documents that have no target because the next token begins another document."""
    return 0 if batch.positions is None else int((batch.targets[:, :-1] < 0)[batch.positions[:, 1:] == 0].sum())
