"""Tokens a second of greedy replies, 1 and 32 prompts together, against `generate` of transformers with the same weights in the
same dtype: d12, which transformers has as NanoChat, and a model of Qwen3-0.6B's shape through `model=hf`. Weights are random.

The seconds are those of the whole call: prompts of 32 tokens, recorded CUDA graphs, and 256 new tokens, or fewer with --quick,
as `python -m benchmarks` runs it on a CPU. Few tokens are the harder case, as a cache that is copied for each costs more the
longer it is. Both sides take turns. In bf16 ours runs under autocast and casts its fp32 weights in each call; the other side's
weights are bf16. Each of our tokens must be the likeliest by transformers without a cache, to rounding.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import row, show
from chattrain.config.words import Device, DType
from chattrain.device import autocast, pick_device, use_bf16
from chattrain.formats.huggingface import BLOCK_NAMES, EPS, OUTER_NAMES
from chattrain.model.causal_lm import CausalLM
from chattrain.model.generate import generate_batch
from chattrain.model.gpt import GPT, LOGIT_CAP, ROPE_BASE
from chattrain.model.hf import HFModel

PROMPT_TOKENS, NEW_TOKENS, QUICK_TOKENS, TURNS, BATCHES = 32, 256, 16, 3, (1, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=[device.name for device in Device])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TOKENS} new tokens in place of {NEW_TOKENS}")
    arguments = parser.parse_args()
    show(measure(Device[arguments.device], arguments.quick))


def measure(setting: Device = Device.auto, quick: bool | None = None) -> list[dict]:
    """quick: None for yes on a CPU, and no elsewhere."""
    device = pick_device(setting)
    count = QUICK_TOKENS if quick or (quick is None and device.type == "cpu") else NEW_TOKENS
    rows = []
    for name, make in (("d12", d12), ("Qwen3-0.6B", qwen3)):
        ours, peer = make(device)
        for bf16 in (False, True) if use_bf16(DType.auto, device) else (False,):
            if bf16:
                peer = in_bf16(peer)
            for batch in BATCHES:
                rows.append(
                    compare(f"replies, {name}, {'bf16' if bf16 else 'fp32'}, batch {batch}", ours, peer, bf16, batch, count)
                )
                print(rows[-1], file=sys.stderr)
    return rows


def compare(case: str, ours: CausalLM, peer: Any, bf16: bool, batch: int, count: int) -> dict:
    device = ours.lm_head.weight.device
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, ours.vocab_size, (batch, PROMPT_TOKENS), generator=generator)

    def reply(tokens: int) -> list[list[int]]:
        with autocast(bf16, device):
            return generate_batch(ours, prompts.tolist(), tokens, stop_ids=set())

    def peer_reply(tokens: int) -> list[list[int]]:
        ids = prompts.to(device)
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return out[:, PROMPT_TOKENS:].tolist()

    reply(4), peer_reply(4)  # warm up
    seconds: tuple[list[float], list[float]] = ([], [])
    replies: list[list[int]] = []
    for _ in range(TURNS):
        replies = timed(reply, count, seconds[0])
        timed(peer_reply, count, seconds[1])
    check(peer, prompts[:2].tolist(), replies[:2], 0.1 if bf16 else 1e-3)
    return row(case, batch * count, "tokens", *map(statistics.median, seconds))


def timed(reply: Callable[[int], list[list[int]]], tokens: int, seconds: list[float]) -> list[list[int]]:
    begun = time.perf_counter()
    replies = reply(tokens)
    seconds.append(time.perf_counter() - begun)
    return replies


@torch.no_grad()
def check(peer: Any, prompts: list[list[int]], replies: list[list[int]], tolerance: float) -> None:
    """Raises RuntimeError if the logit of a token of ours is below the highest by more than tolerance x that."""
    rows = torch.tensor([prompt + reply for prompt, reply in zip(prompts, replies, strict=True)], device=peer.device)
    logits = peer(rows).logits[:, PROMPT_TOKENS - 1 : -1].float()
    highest = logits.amax(dim=2)
    missing = (highest - logits.gather(2, rows[:, PROMPT_TOKENS:, None])[..., 0]) / highest.abs()
    if missing.max() > tolerance:
        raise RuntimeError(f"a token whose logit is below the highest by {float(missing.max()):.2g} of it")


def d12(device: torch.device) -> tuple[CausalLM, Any]:
    """Our d12, and NanoChat of transformers with its weights."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    model = GPT(vocab_size=65_536, n_layer=12, n_embd=768, n_head=6)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    config = NanoChatConfig(
        vocab_size=65_536,
        hidden_size=768,
        intermediate_size=4 * 768,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        final_logit_softcapping=LOGIT_CAP,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
    )
    peer = NanoChatForCausalLM(config)
    peer.load_state_dict({hf_name(name): tensor for name, tensor in model.weights().items()})
    return model.to(device).eval(), peer.to(device).eval()


def hf_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, layer, within = name.removesuffix(".weight").split(".", 3)
    return f"model.layers.{layer}.{BLOCK_NAMES[within]}.weight"


def qwen3(device: torch.device) -> tuple[CausalLM, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    peer = Qwen3ForCausalLM(config).to(device).eval()
    return HFModel(peer, {}).eval(), peer


def in_bf16(model: Any) -> Any:
    """A copy with bf16 weights, and buffers as they are, as from_pretrained(dtype=torch.bfloat16) loads it."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


if __name__ == "__main__":
    main()
