"""Loss by tokens and bits per byte of the validation rows."""

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
    """val/loss: nats a supervised token. val/bpb: bits a byte of the tokens predicted.

    Both are sums over sums, so they do not depend on batch size (but for rounding) or number of ranks (to the bit). Bytes are
    those of each target token; special tokens stand for no bytes, and their loss is left out of bpb too, so bpb compares
    across tokenizers.
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
        """`losses_of` gives the loss in nats of each target, fp32 (B, T), from a batch's arguments."""
        passes = []  # of each: nats, nats of tokens that stand for bytes, targets, bytes
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
        nats, counted_nats, targets, bytes_ = (
            math.fsum(column) for column in zip(*self.ranks.all_gather_interleaved(passes), strict=True)
        )
        return {"val/loss": nats / max(1, targets), "val/bpb": counted_nats / math.log(2) / max(1, bytes_)}
