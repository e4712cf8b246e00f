"""Generation of replies, token by token, with a key-value cache; several prompts at once.

Shorter prompts are padded on the left, so that the next token of every row is in the same column; no token attends to padding.
Each row draws from its own generator, so a reply is the same, to rounding, whichever prompts share its batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from chattrain.model.causal_lm import CausalLM


def generate(
    model: CausalLM,
    prompt: list[int],
    max_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the token ids after the prompt, until a stop id (which is not yielded) or for `max_tokens` tokens.

    temperature 0 takes the likeliest token; otherwise tokens are drawn from the top_k likeliest (None: all).
    """
    for (token,) in _columns(model, [prompt], max_tokens, stop_ids, temperature, top_k, seed):
        if token is not None:  # a single reply has not ended while there are columns
            yield token


def generate_batch(
    model: CausalLM,
    prompts: list[list[int]],
    max_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """The reply to each prompt, as `generate` yields it, computed together. The prompts may differ in length."""
    replies: list[list[int]] = [[] for _ in prompts]
    if prompts:
        for column in _columns(model, prompts, max_tokens, stop_ids, temperature, top_k, seed):
            for reply, token in zip(replies, column, strict=True):
                if token is not None:
                    reply.append(token)
    return replies


@torch.inference_mode()
def _columns(
    model: CausalLM,
    prompts: list[list[int]],
    max_tokens: int,
    stop_ids: set[int],
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[list[int | None]]:
    """Yield the next token of each reply, None where it has ended, until all have ended or have `max_tokens` tokens."""
    device = next(model.parameters()).device
    generators = [torch.Generator(device=device).manual_seed(seed) for _ in prompts]
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    cache = model.new_cache(torch.tensor(padding, device=device), width + max_tokens)
    inputs = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=device)
    ended = [False] * len(prompts)
    for _ in range(max_tokens):
        tokens = _draw(model.next_logits(inputs, cache), temperature, top_k, generators)
        ended = [done or token in stop_ids for done, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
        inputs = torch.tensor(tokens, device=device)[:, None]


def _draw(logits: torch.Tensor, temperature: float, top_k: int | None, generators: list[torch.Generator]) -> list[int]:
    """Draw a token for each row of logits (B, V); at temperature 0 the likeliest."""
    if temperature <= 0:
        return logits.argmax(dim=1).tolist()
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(probabilities, generators, strict=True)]
