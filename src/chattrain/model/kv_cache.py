"""Keys and values of the tokens so far, so that generation computes each token once.

B rows, T tokens, H heads of D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chattrain.model.attention import attention, causal_mask


class KVCache:
    """Keys and values of the tokens so far, of `shape` (layers, B, max_tokens, H, D), of which `length` tokens are filled.

    The first padding[b] tokens of row b are padding. Positions count them, which changes nothing: rotary embeddings depend on
    distances only.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, padding: Tensor):
        """padding (B,) int64; its device is the cache's too."""
        self.keys = torch.zeros(shape, device=padding.device, dtype=dtype)
        self.values = torch.zeros(shape, device=padding.device, dtype=dtype)
        self.padding, self.max_tokens = padding, shape[2]
        self.length = 0

    def mask(self, count: int) -> Tensor:
        """(B, 1, count, keys) bool: a causal mask of the next `count` tokens, in which padding and other tokens do not see each
        other. (Padding must see something, or its soft-max is NaN.)"""
        keys = torch.arange(self.length + count, device=self.padding.device)
        padded = (keys < self.padding[:, None])[:, None]  # (B, 1, keys)
        causal = causal_mask(count, len(keys), keys.device)
        return causal & (padded[..., None, :] == padded[..., self.length :, None])

    def attend(self, layer: int, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v (B, T, H, D) to this layer and attend to all of them. The caller adds T to `length` after all layers."""
        end = self.length + k.size(1)
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return attention(q, self.keys[layer, :, :end].to(k.dtype), self.values[layer, :, :end].to(v.dtype), mask)
