"""Replies, token by token, with a key-value cache; several prompts at once.

Shorter prompts are padded at the left, and no token sees padding, so that the next token of all stands in one column. A reply
is the same alone and in any company, to rounding: each row draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def generate(
    model: nn.Module,
    prompt: list[int],
    max_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Token ids after the prompt until a stop id (which is not yielded) or `max_tokens`.

    temperature 0 takes the likeliest token; above, tokens are drawn from the top_k likeliest (None: all).
    """
    for (token,) in _columns(model, [prompt], max_tokens, stop_ids, temperature, top_k, seed):
        yield token


def generate_batch(
    model: nn.Module,
    prompts: list[list[int]],
    max_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """What `generate` yields for each prompt alone, computed together; the prompts may differ in length."""
    replies: list[list[int]] = [[] for _ in prompts]
    if prompts:
        for column in _columns(model, prompts, max_tokens, stop_ids, temperature, top_k, seed):
            for reply, token in zip(replies, column, strict=True):
                if token is not None:
                    reply.append(token)
    return replies


@torch.inference_mode()
def _columns(
    model: nn.Module,
    prompts: list[list[int]],
    max_tokens: int,
    stop_ids: set[int],
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[list[int | None]]:
    """The next token of each reply, None where the reply has ended; until all have, or have `max_tokens`."""
    device = next(model.parameters()).device
    generators = [torch.Generator(device=device).manual_seed(seed) for _ in prompts]
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    cache = model.new_cache(torch.tensor(padding, device=device), width + max_tokens)
    inputs = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=device)
    ended = [False] * len(prompts)
    for _ in range(max_tokens):
        tokens = _draw(model.next_logits(inputs, cache), temperature, top_k, generators)
        ended = [over or token in stop_ids for over, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, tokens, strict=True)]
        inputs = torch.tensor(tokens, device=device)[:, None]


def _draw(logits: torch.Tensor, temperature: float, top_k: int | None, generators: list[torch.Generator]) -> list[int]:
    """A token for each row of logits (B, V)."""
    if temperature <= 0:
        return logits.argmax(dim=1).tolist()
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(probabilities, generators, strict=True)]
