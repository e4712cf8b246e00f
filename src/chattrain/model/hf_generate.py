"""Generation with a model of transformers.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class HFCache:
    """Keys and values of the tokens so far, in the architecture's own cache class, which grows by itself."""

    attention_mask: Tensor | None  # (B, max_tokens) 0 where padding, else 1; None: no row is padded
    past: Any = None  # past_key_values of transformers
    length: int = 0

    def step(self, count: int) -> dict[str, Any]:
        """Count the next tokens of each row, and return the arguments that transformers needs with them."""
        before, self.length = self.length, self.length + count
        if self.attention_mask is None:
            return {"past_key_values": self.past}
        mask = self.attention_mask[:, : self.length]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
        return {"past_key_values": self.past, "attention_mask": mask, "position_ids": positions}


def new_cache(padding: Tensor, max_tokens: int) -> HFCache:
    """An empty key-value cache; the first padding (B,) of max_tokens tokens in each row are padding."""
    mask = torch.arange(max_tokens, device=padding.device) >= padding[:, None]
    return HFCache(mask.long() if padding.any() else None)


def next_logits(inner: Any, inputs: Tensor, cache: HFCache) -> Tensor:
    """Logits, fp32 (B, V), of the token after inputs (B, T), which follow the tokens in the cache. Adds them to the cache."""
    out = inner(input_ids=inputs, use_cache=True, logits_to_keep=1, **cache.step(inputs.size(1)))
    cache.past = out.past_key_values
    return out.logits[:, -1].float()
