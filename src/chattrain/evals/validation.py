"""Loss a token and bits per byte on the validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from chattrain.data.collators import Collator
from chattrain.data.loader import evaluation_batches
from chattrain.model.head import sum_dtype
from chattrain.parallel.ranks import Ranks


class Validation:
    """val/loss: nats a supervised token. val/bpb: bits a byte of the target tokens.

    Both divide a sum over all rows by another, so they do not depend on the batch size (to rounding) or the number of ranks (to
    the bit). A special token has no bytes, and bpb leaves out its loss too, so that bpb can be compared across tokenizers.
    """

    def __init__(
        self,
        collator: Collator,
        num_rows: int,
        device_batch_size: int,
        token_bytes: np.ndarray,
        device: torch.device,
        ranks: Ranks,
    ):
        self.collator, self.num_rows, self.device_batch_size = collator, num_rows, device_batch_size
        self.token_bytes = torch.from_numpy(token_bytes).to(device)
        self.device, self.ranks = device, ranks

    @torch.no_grad()
    def __call__(self, losses_of: Callable[..., torch.Tensor]) -> dict[str, float]:
        """The two metrics by name. losses_of(*batch.arguments) returns the loss of each target in nats, fp32 (B, T)."""
        passes = []  # of each batch: nats, nats of tokens that have bytes, targets, bytes
        for batch in evaluation_batches(
            self.collator, self.num_rows, self.device_batch_size, self.ranks.rank, self.ranks.world_size
        ):
            batch = batch.to(self.device)
            losses = losses_of(*batch.arguments)
            sizes = self.token_bytes[batch.targets.clamp(min=0)] * (batch.targets >= 0)
            dtype = sum_dtype(self.device)
            passes.append(
                [
                    float(losses.sum(dtype=dtype)),
                    float((losses * (sizes > 0)).sum(dtype=dtype)),
                    batch.num_supervised,
                    int(sizes.sum()),
                ]
            )
        nats, nats_with_bytes, targets, num_bytes = (
            math.fsum(column) for column in zip(*self.ranks.all_gather_interleaved(passes), strict=True)
        )
        return {"val/loss": nats / max(1, targets), "val/bpb": nats_with_bytes / math.log(2) / max(1, num_bytes)}
