"""Replies, token by token, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


@torch.inference_mode()
def generate(model: nn.Module, prompt: list[int], max_tokens: int, stop_ids: set[int], temperature: float = 0.0,
             top_k: int | None = None, seed: int = 0) -> Iterator[int]:
    """Token ids after the prompt until a stop id (which is not yielded) or `max_tokens`.

    temperature 0 takes the likeliest token; above, tokens are drawn from the top_k likeliest (None: all).
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    cache = model.new_cache(batch_size=1, max_tokens=len(prompt) + max_tokens)
    inputs = torch.tensor([prompt], device=device)
    for _ in range(max_tokens):
        token = _draw(model.next_logits(inputs, cache)[0], temperature, top_k, generator)
        if token in stop_ids:
            return
        yield token
        inputs = torch.tensor([[token]], device=device)


def _draw(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    if top_k is not None:
        threshold = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
