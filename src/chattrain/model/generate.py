"""Replies to prompts that are known from the start: thin layers on the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from chattrain.model.causal_lm import CausalLM
from chattrain.model.engine import Engine, Request
from chattrain.model.sampling import Sampling


def generate(
    model: CausalLM,
    prompt: list[int],
    max_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    tool: Callable[[list[int]], list[int]] | None = None,
) -> Iterator[int]:
    """Yield the token ids after the prompt, until a stop id (which is not yielded), for `max_tokens` tokens or
    as many as the model has positions for.

    temperature 0 takes the likeliest token; otherwise tokens are drawn from the top_k likeliest (None: all). `tool` is given the
    reply after each token and returns tokens that must follow, which are yielded too: see chat/tools.py.
    """
    room = room_for(model, prompt, max_tokens)
    request = Request(prompt, room, stop_ids, Sampling(temperature, top_k), seed, tool)
    engine, yielded = Engine(model, 1, request.most_tokens), 0
    engine.submit(request)
    while engine.busy:
        engine.step()
        yield from request.reply[yielded:]
        yielded = len(request.reply)


def generate_batch(
    model: CausalLM,
    prompts: list[list[int]],
    max_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    tool: Callable[[list[int]], list[int]] | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """The reply to each prompt, as `generate` yields it, `batch_size` of them computed at once. Prompts may differ in length.

    A reply that ends makes room for the next prompt. Long prompts come first: short ones then fill the gaps.
    """
    sampling = Sampling(temperature, top_k)
    rooms = [room_for(model, prompt, max_tokens) for prompt in prompts]
    requests = [Request(prompt, n, stop_ids, sampling, seed, tool) for prompt, n in zip(prompts, rooms, strict=True)]
    answer(model, requests, batch_size)
    return [request.reply for request in requests]


def room_for(model: CausalLM, prompt: list[int], max_tokens: int) -> int:
    """Tokens of a reply at most, where the model knows only so many positions."""
    return max_tokens if model.max_positions is None else max(0, min(max_tokens, model.max_positions - len(prompt)))


def answer(model: CausalLM, requests: Sequence[Request], rows: int) -> None:
    """Bring all requests to their ends, `rows` of them at once."""
    if not requests:
        return
    engine = Engine(model, min(rows, len(requests)), max(request.most_tokens for request in requests))
    for request in sorted(requests, key=lambda request: len(request.prompt), reverse=True):
        engine.submit(request)
    while engine.busy:
        engine.step()
