"""Keys and values of the tokens so far, so that generation computes each token once.

Every row has a length of its own: rows of any lengths share a pass, a row that has ended leaves while the others go on, and a new
one takes its space. New keys and values are written in place, so the memory stays where it is.

B rows of a pass, T tokens of a pass, H heads of D channels, R rows of S tokens of space.
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
        self.max_tokens = _aligned(max_tokens)
        self.recordable, self.static = recordable, False
        self.lengths = [0] * rows  # tokens of each row in use; these come first
        self.first, self.idle = 0, 0  # a pass is of the rows in use from `first` on, and of so many unused ones behind them
        self.rotary: tuple[Tensor, Tensor] | None = None  # tables of a GPT, held here because recorded passes read them
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # the same on the device; 0 of unused rows
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # (R, H, S, D) each, made in the first pass
        self._rows, self._positions = torch.arange(rows, device=device)[:, None], self._lengths[:, None]  # (B, 1), (B, T)
        self._mask: Tensor | None = None

    @property
    def rows(self) -> int:
        """R, used and unused."""
        return len(self._lengths)

    def reserve(self, rows: int, max_tokens: int) -> bool:
        """Make space for so many rows of so many tokens. True where the memory has moved: twice as much is then made at least, of
        what is short."""
        max_tokens = _aligned(max_tokens)
        if self._layers:
            if rows <= self.rows and max_tokens <= self.max_tokens:
                return False
            rows = self.rows if rows <= self.rows else max(rows, 2 * self.rows)
            max_tokens = self.max_tokens if max_tokens <= self.max_tokens else max(max_tokens, 2 * self.max_tokens)
        lengths = self._lengths.new_zeros(rows)
        lengths[: len(self.lengths)] = self._lengths[: len(self.lengths)]
        for layer, spaces in self._layers.items():
            self._layers[layer] = _larger(spaces[0], rows, max_tokens), _larger(spaces[1], rows, max_tokens)
        self._lengths, self.max_tokens, self.rotary = lengths, max_tokens, None
        return True

    def admit(self, count: int) -> None:
        """Take so many unused rows into use. The next pass is of them alone, and `first` says so until it is set to 0."""
        self.first = len(self.lengths)
        self.lengths += [0] * count

    def begin(self, count: int) -> Tensor:
        """Positions (B, T) of the next `count` tokens of each row. Those of rows that end sooner are padding, at their right: no
        token attends to them, and the next pass overwrites them."""
        end, device = len(self.lengths) + self.idle, self._lengths.device
        self._positions = self._lengths[self.first : end, None] + torch.arange(count, device=device)
        self._rows = torch.arange(self.first, end, device=device)[:, None]
        window = self.window(count)
        # A recorded pass is replayed for other lengths, so it always has a mask.
        alike = not self.static and count == 1 and min(self.lengths) + 1 == window  # every row sees all keys of the window
        self._mask = None
        if self._holds_tokens and not alike:
            keys = torch.arange(window, device=device)
            self._mask = (keys <= self._positions[..., None])[:, None]  # (B, 1, T, window)
        return self._positions

    @property
    def _holds_tokens(self) -> bool:
        """Does any row of this pass?"""
        return any(self.lengths[self.first :])

    def window(self, count: int) -> int:
        """Keys of each row that a pass of `count` tokens reads."""
        needed = max(self.lengths[self.first :]) + count
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
        if not self._holds_tokens:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        rows, window = slice(self.first, self.first + len(q)), self.window(q.size(2))
        knows_groups = q.device.type == "cpu"
        return attend_to_cache(q, keys[rows, :, :window], values[rows, :, :window], self._mask, scale, knows_groups)

    def advance(self, counts: list[int]) -> None:
        """Each row of the pass has `counts` tokens more."""
        rows = slice(self.first, len(self.lengths))
        self.lengths[rows] = [length + count for length, count in zip(self.lengths[rows], counts, strict=True)]
        if min(counts) == max(counts):
            self._lengths[rows] += counts[0]
        else:
            self._lengths[rows] += torch.tensor(counts, device=self._lengths.device)

    def keep(self, rows: list[int]) -> list[int]:
        """Forget all rows but these, and return them in their new order: the last ones move into the gaps."""
        gaps = [row for row in range(len(rows)) if row not in rows]
        order = list(range(len(rows)))
        for gap, moved in zip(gaps, [row for row in rows if row >= len(rows)], strict=True):
            order[gap] = moved
            self._lengths[gap].copy_(self._lengths[moved])
            for space in (tensor[:, :, : self.lengths[moved]] for layer in self._layers.values() for tensor in layer):
                space[gap].copy_(space[moved])
        self.lengths = [self.lengths[row] for row in order]
        self._lengths[len(rows) :] = 0
        return order

    def _space(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            k_space, v_space = (x.new_zeros(self.rows, x.size(1), self.max_tokens, x.size(3)) for x in (k, v))
            self._layers[layer] = k_space, v_space
        return self._layers[layer]


def _aligned(tokens: int) -> int:
    return tokens + -tokens % 16  # masks of this width are what kernels take as they are


def _larger(space: Tensor, rows: int, max_tokens: int) -> Tensor:
    """A space (R, H, S, D) with its content in a new one, of more rows and tokens."""
    larger = space.new_zeros(rows, space.size(1), max_tokens, space.size(3))
    larger[: len(space), :, : space.size(2)] = space
    return larger


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
