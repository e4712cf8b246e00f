"""Tokens a second of replies to 8 prompts of 64 tokens together, 256 new tokens each, with a key-value cache, against a loop
without one, which runs the model on all 8 whole rows for every new token.

d6 in fp32, as in command=chat. The loop is timed at one new token in 32, in the middle of each 32, and that time counts 32 times,
because its cost grows smoothly with the length. Its likeliest tokens there must be those of our replies.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.multiple_choice import VOCABULARY, random_model
from benchmarks.timing import row, show
from chattrain.config.words import Device
from chattrain.device import pick_device
from chattrain.model.generate import generate_batch

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, STRIDE, TURNS = 8, 64, 256, 32, 2


def measure() -> list[dict]:
    device = pick_device(Device.auto)
    model = random_model(device)
    prompts = torch.randint(0, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    generate_batch(model, prompts.tolist(), 16, stop_ids=set())  # warm up
    ours, reference = [], []
    for _ in range(TURNS):
        begun = time.perf_counter()
        replies = generate_batch(model, prompts.tolist(), NEW_TOKENS, stop_ids=set())
        ours.append(time.perf_counter() - begun)
        reference.append(without_cache(model, torch.cat([prompts, torch.tensor(replies)], dim=1).to(device)))
    return [
        row(
            f"generation, d6, {PROMPTS} prompts, {NEW_TOKENS} new tokens",
            PROMPTS * NEW_TOKENS,
            "tokens",
            statistics.median(ours),
            statistics.median(reference),
        )
    ]


@torch.no_grad()
def without_cache(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Seconds for all new tokens of rows (B, prompt and reply). Raises RuntimeError if the likeliest token differs."""
    seconds = 0.0
    for length in range(PROMPT_TOKENS + STRIDE // 2, PROMPT_TOKENS + NEW_TOKENS, STRIDE):
        begun = time.perf_counter()
        tokens = model(rows[:, :length])[:, -1].argmax(dim=1).tolist()
        seconds += STRIDE * (time.perf_counter() - begun)
        if tokens != rows[:, length].tolist():
            raise RuntimeError(f"token {length}: {rows[:, length].tolist()} with the cache, {tokens} without")
    return seconds


if __name__ == "__main__":
    show(measure())
