"""Generation of replies, token by token, with a key-value cache; several prompts at once.

A reply is the same, to rounding, whichever prompts share its batch: every row draws with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from chattrain.model.causal_lm import CausalLM
from chattrain.model.decoder import Decoder


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
    for column in _columns(model, [prompt], max_tokens, stop_ids, temperature, top_k, seed):
        yield column[0]


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
            for reply, token in column.items():
                replies[reply].append(token)
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
) -> Iterator[dict[int, int]]:
    """Yield the next token of each reply that has not ended, by its index, until all have ended or have `max_tokens` tokens."""
    if max_tokens < 1:
        return
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + max_tokens)
    generator = torch.Generator(device=decoder.device).manual_seed(seed)
    # A device that computes on its own goes on with the next token before we have read this one.
    ahead = decoder.device.type == "cuda"
    replies: list[int | None] = list(range(len(prompts)))  # the reply of each row of the batch; None: it has ended
    logits = decoder.read(prompts)
    for left in reversed(range(max_tokens)):
        tokens = _draw(logits, temperature, top_k, generator)
        read = _to_host(tokens)
        if ahead and left:
            logits = decoder.step(tokens)
        column: dict[int, int] = {}
        for row, (reply, token) in enumerate(zip(replies, read(), strict=True)):
            if reply is None or token in stop_ids:
                replies[row] = None
            else:
                column[reply] = token
        if not column:
            return
        yield column
        rows = decoder.keep([row for row, reply in enumerate(replies) if reply is not None], of=len(replies))
        if len(rows) < len(replies):
            replies, tokens, logits = [replies[row] for row in rows], tokens[rows], logits[rows]
        if not ahead and left:
            logits = decoder.step(tokens)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Draw a token (B,) for each row of logits (B, V); at temperature 0 the likeliest.

    Of probabilities p, the index of the largest p / e is drawn, with e from an exponential distribution: as torch.multinomial
    does, but with the same e for every row, so that no row depends on the number of others.
    """
    if temperature <= 0:
        return logits.argmax(dim=1)
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return (probabilities / torch.empty_like(probabilities[0]).exponential_(generator=generator)).argmax(dim=1)


def _to_host(tokens: Tensor) -> Callable[[], list[int]]:
    """Begin to copy tokens (B,) from the device; the function returned waits for them, and for nothing that is started later."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    copy, arrived = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        return copy.tolist()

    return read
