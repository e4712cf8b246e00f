"""The next token of each row, drawn from its logits.

The number that decides a draw is the row's own, so what is drawn does not depend on the rows beside it, nor on the device.

B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # tokens
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
    greedy = [row for row, sampling in enumerate(samplings) if sampling.temperature <= 0]
    few = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0 and sampling.top_k]
    all_tokens = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0 and not sampling.top_k]
    tokens: Tensor | None = None
    for rows in (greedy, few, all_tokens):
        if not rows:
            continue
        at = None if len(rows) == len(logits) else to_device(rows, logits.device)
        some = logits if at is None else logits[at]
        drawn = some.argmax(1) if rows is greedy else _drawn(some, [samplings[i] for i in rows], [numbers[i] for i in rows])
        if at is None:
            return drawn
        tokens = drawn.new_empty(len(logits)) if tokens is None else tokens
        tokens[at] = drawn
    assert tokens is not None
    return tokens


def _drawn(logits: Tensor, samplings: list[Sampling], numbers: list[float]) -> Tensor:
    """Tokens (B,) of rows that are all drawn, all from their likeliest few or all from the whole vocabulary."""
    columns = [[max(s.temperature, COLDEST), s.top_p, s.top_k or 0, number] for s, number in zip(samplings, numbers, strict=True)]
    temperature, top_p, top_k, number = to_device(columns, logits.device).unsqueeze(1).unbind(2)  # (B, 1) each
    names = None
    if samplings[0].top_k:
        most = min(max(sampling.top_k or 0 for sampling in samplings), logits.size(1))
        names, logits, is_kept = _likeliest(logits, most, top_k)
        logits = logits.masked_fill(~is_kept, float("-inf"))
    p = torch.softmax(logits / temperature.float(), dim=1)
    if any(sampling.top_p < 1 for sampling in samplings):
        p = _of_mass(p, top_p.float())
    drawn = _place(p, number)
    return (drawn if names is None else names.gather(1, drawn))[:, 0]


def _likeliest(logits: Tensor, most: int, top_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` likeliest tokens (B, most) in their order in the vocabulary, their logits, and whether each is among the row's
    top_k (B, 1)."""
    values, names = logits.topk(most, dim=1)
    names, order = names.sort(dim=1)
    return names, values.gather(1, order), order < top_k


def _of_mass(p: Tensor, mass: Tensor) -> Tensor:
    """Probabilities (B, V) without those of the tokens behind the likeliest that have `mass` (B, 1) together; one stays at least.
    https://arxiv.org/abs/1904.09751"""
    ordered = p.sort(dim=1, descending=True).values
    before = ordered.cumsum(dim=1) - ordered
    last = ((before < mass).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return p.masked_fill(p < ordered.gather(1, last), 0)


def _place(p: Tensor, number: Tensor) -> Tensor:
    """Where (B, 1) on the line of probabilities (B, V) the number (B, 1) falls: first the block of tokens, then the token in it,
    as a running sum over a whole vocabulary takes long."""
    blocks = F.pad(p, (0, -p.size(1) % BLOCK)).unflatten(1, (-1, BLOCK))
    block, number = _place_in(blocks.sum(2), number)
    token, _ = _place_in(blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0], number)
    return (block * BLOCK + token).clamp(max=p.size(1) - 1)


def _place_in(p: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """The part (B, 1) of the line in which the number falls, and where in that part, from 0 to 1."""
    ends = p.double().cumsum(1)
    number = number * ends[:, -1:]
    part = torch.searchsorted(ends, number, right=True).clamp(max=p.size(1) - 1)
    length = p.gather(1, part).double()
    return part, ((number - ends.gather(1, part) + length) / length).clamp(0, 1 - 2**-53)


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
