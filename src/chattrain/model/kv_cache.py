"""Keys and values of the tokens so far, so that generation computes each token once.

B rows, T tokens, H heads of D channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chattrain.model.attention import attention, causal_mask

if TYPE_CHECKING:
    from chattrain.model.gpt import GPT


class KVCache:
    """Keys and values of the tokens so far, (layers, B, max_tokens, H, D); `length` tokens of it are filled.

    The first padding[b] tokens of row b are none of its own. They move no position: rotary embeddings tell distances only.
    """

    def __init__(self, model: GPT, batch_size: int, max_tokens: int, padding: Tensor | None = None):
        shape = (model.n_layer, batch_size, max_tokens, model.n_kv_head, model.head_dim)
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.padding = torch.zeros(batch_size, dtype=torch.long, device=device) if padding is None else padding  # (B,)
        self.length = 0

    def mask(self, count: int) -> Tensor:
        """(B, 1, count, keys) bool: the next tokens see those before them, padding (which must see something) itself only."""
        keys = torch.arange(self.length + count, device=self.padding.device)
        padded = (keys < self.padding[:, None])[:, None]  # (B, 1, keys)
        causal = causal_mask(count, len(keys), keys.device)
        return causal & (padded[..., None, :] == padded[..., self.length :, None])

    def attend(self, layer: int, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, T, H, D) behind what is there, and attend to all. `length` moves when the pass is over."""
        end = self.length + k.size(1)
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return attention(q, self.keys[layer, :, :end].to(k.dtype), self.values[layer, :, :end].to(v.dtype), mask)
