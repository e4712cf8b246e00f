"""The next token of each row, drawn from its logits.

The number that decides a draw is the row's own, so what is drawn does not depend on the rows beside it, nor on the device.

B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

COLDEST = 1e-6  # temperatures between 0 and this count as this


class Sampling(NamedTuple):
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int | None = None  # of the k likeliest tokens; None: of all
    top_p: float = 1.0  # of the likeliest tokens that have this probability together


GREEDY = Sampling()


def draw(logits: Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]) -> Tensor:
    """Tokens (B,) from logits (B, V) as each row's sampling says; numbers: one from 0 to 1 (exclusive) for each row.

    The tokens are laid end to end on a line, each as long as it is probable, and the number says where on it.
    """
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    likeliest = logits.argmax(dim=1)
    if not rows:
        return likeliest
    columns = zip(*((*samplings[row], numbers[row]) for row in rows), strict=True)
    temperatures, top_ks, top_ps, wanted = map(list, columns)
    sizes = [min(k, logits.size(1)) if k else 0 for k in top_ks]
    # One copy to the device: each would wait for it.
    given = to_device([[max(t, COLDEST) for t in temperatures], top_ps, wanted, sizes, rows], logits.device).double()
    chosen = given[4].long()
    some = logits if len(rows) == len(logits) else logits[chosen]
    if any(sizes):
        some = _of_likeliest(some, max(sizes), given[3].long())
    scaled = (some - some.amax(dim=1, keepdim=True)) / given[0].float()[:, None]
    p = torch.softmax(scaled, dim=1)
    if min(top_ps) < 1:
        p = _of_mass(p, given[1].float()[:, None])
    ends = p.double().cumsum(dim=1)
    drawn = torch.searchsorted(ends, given[2][:, None] * ends[:, -1:], right=True).clamp_(max=logits.size(1) - 1)[:, 0]
    return drawn if len(rows) == len(logits) else likeliest.index_put((chosen,), drawn)


def _of_likeliest(logits: Tensor, most: int, sizes: Tensor) -> Tensor:
    """Logits without those below the likeliest sizes (B,), of at most `most`; 0: all stay. Equal ones stay together."""
    least = logits.topk(most).values.gather(1, (sizes - 1).clamp(min=0)[:, None])
    return logits.masked_fill((logits < least) & (sizes > 0)[:, None], float("-inf"))


def _of_mass(p: Tensor, mass: Tensor) -> Tensor:
    """Probabilities without those of the tokens behind the likeliest that have `mass` (B, 1) together; one stays at least.
    https://arxiv.org/abs/1904.09751"""
    ordered = p.sort(dim=1, descending=True).values
    before = ordered.cumsum(dim=1) - ordered
    last = ((before < mass).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return p.masked_fill(p < ordered.gather(1, last), 0)


def to_device(values: Any, device: torch.device) -> Tensor:
    """A tensor of the values on the device. It does not wait for what the device does."""
    dtype = torch.float64 if isinstance(values[0], list) else None
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def to_host(tokens: Tensor) -> Callable[[], list[int]]:
    """Begin to copy tokens (B,) from the device; the function returned waits for them, and for nothing that is started later."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    copy, arrived = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        return copy.tolist()

    return read
