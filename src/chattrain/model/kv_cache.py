"""Keys and values of the tokens so far, so that generation computes each token once.

Every row has a length of its own: rows of any lengths share a pass, and a row that has ended leaves while the others go on. New
keys and values are written in place, so the memory stays where it is.

B rows, T tokens of a pass, H heads of D channels, S tokens of space a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RUNG = 256  # tokens: the shortest window of a static cache


class KVCache:
    """Keys and values of each layer. A pass is `begin`, then `attend` in every layer, then `advance`.

    `static`: passes of one token have few shapes, so that a recorded one can be replayed: the keys that they read are padded to
    RUNG tokens, or that times a power of two.
    """

    def __init__(self, rows: int, max_tokens: int, device: torch.device, recordable: bool = True):
        """max_tokens: the space S of each row. recordable: may the model's passes be recorded, as none waits for the device?"""
        self.max_tokens = max_tokens + -max_tokens % 16  # masks of this width are what kernels take as they are
        self.recordable, self.static = recordable, False
        self.lengths = [0] * rows  # tokens of each row
        self.rotary: tuple[Tensor, Tensor] | None = None  # tables of a GPT, held here because recorded passes read them
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # the same on the device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # (B, H, S, D) each, made in the first pass
        self._rows, self._positions = torch.arange(rows, device=device)[:, None], self._lengths[:, None]  # (B, 1), (B, T)
        self._mask: Tensor | None = None

    def begin(self, count: int) -> Tensor:
        """Positions (B, T) of the next `count` tokens of each row. Those of rows that end sooner are padding, at their right: no
        token attends to them, and the next pass overwrites them."""
        offsets = torch.arange(count, device=self._lengths.device)
        self._positions = self._lengths[: len(self.lengths), None] + offsets
        self._rows = torch.arange(len(self.lengths), device=offsets.device)[:, None]
        window = self.window(count)
        alike = count == 1 and min(self.lengths) + 1 == window  # every row sees all keys of the window
        self._mask = None
        if any(self.lengths) and not alike:
            keys = torch.arange(window, device=offsets.device)
            self._mask = (keys <= self._positions[..., None])[:, None]  # (B, 1, T, window)
        return self._positions

    def window(self, count: int) -> int:
        """Keys of each row that a pass of `count` tokens reads."""
        needed = max(self.lengths) + count
        if not self.static:
            return needed
        window = RUNG
        while window < needed:
            window *= 2
        return min(window, self.max_tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Store k and v (B, heads or a divisor of them, T, D) and attend to all tokens so far: (B, H, T, D) as q.

        scale: of the scores before the soft-max; 1 / sqrt(D) by default.
        """
        keys, values = self._space(layer, k, v)
        keys[self._rows, :, self._positions] = k.transpose(1, 2)
        values[self._rows, :, self._positions] = v.transpose(1, 2)
        if not any(self.lengths):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        window = self.window(q.size(2))
        knows_groups = q.device.type == "cpu"
        return attend_to_cache(q, keys[:, :, :window], values[:, :, :window], self._mask, scale, knows_groups)

    def advance(self, counts: list[int]) -> None:
        """Each row has `counts` tokens more."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if min(counts) == max(counts):
            self._lengths[: len(counts)] += counts[0]
        else:
            self._lengths[: len(counts)] += torch.tensor(counts, device=self._lengths.device)

    def keep(self, rows: list[int]) -> list[int]:
        """Forget all rows but these, and return them in their new order: the last ones move into the gaps."""
        gaps = [row for row in range(len(rows)) if row not in rows]
        order = list(range(len(rows)))
        for gap, moved in zip(gaps, [row for row in rows if row >= len(rows)], strict=True):
            order[gap] = moved
            for space in (*self._layers.values(), (self._lengths,)):
                for tensor in space:
                    tensor[gap].copy_(tensor[moved])
        self.lengths = [self.lengths[row] for row in order]
        return order

    def _space(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            rows, heads = k.shape[:2]
            k_space, v_space = (x.new_zeros(rows, heads, self.max_tokens, x.size(3)) for x in (k, v))
            self._layers[layer] = k_space, v_space
        keys, values = self._layers[layer]
        return keys[: len(k)], values[: len(k)]


def attend_to_cache(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, knows_groups: bool
) -> Tensor:
    """Attention of q (B, H, T, D) to keys and values (B, H or a divisor, window, D). mask (B, 1, T, window); None: all are seen.

    knows_groups: the device's masked kernel takes fewer heads of keys than of queries. Otherwise, where T is 1, the heads that
    share keys become the queries of one head.
    """
    grouped = q.size(1) != keys.size(1)
    if not grouped or knows_groups or q.size(2) > 1:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
    together = q.reshape(len(q), keys.size(1), -1, q.size(3))
    return F.scaled_dot_product_attention(together, keys, values, attn_mask=mask, scale=scale).reshape(*q.shape[:3], -1)
