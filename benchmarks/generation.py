"""Tokens a second of greedy replies, 1 and 32 prompts together, against `generate` of transformers with the same weights in the
same dtype: d12, which transformers has as NanoChat, and a model of Qwen3-0.6B's shape through `model=hf`. Weights are random.

The seconds are those of whole calls: prompts of 32 tokens, the recording of CUDA graphs, and 256 new tokens. On two cores that is
20 minutes, so --quick, and `python -m benchmarks` on a CPU, take 8 tokens in the middle of such replies: caches are filled with
160 tokens that mean nothing. Both sides take turns. In bf16 ours runs under autocast and casts its fp32 weights in each call; the
other side's weights are bf16. Each token of ours must be the likeliest by transformers without a cache, to rounding.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from benchmarks.timing import row, show
from chattrain.config.words import Device, DType
from chattrain.device import autocast, pick_device, use_bf16
from chattrain.formats.huggingface import BLOCK_NAMES, EPS, OUTER_NAMES
from chattrain.model.causal_lm import CausalLM
from chattrain.model.decoder import Decoder
from chattrain.model.generate import generate_batch
from chattrain.model.gpt import GPT, LOGIT_CAP, ROPE_BASE
from chattrain.model.hf import HFModel

PROMPT_TOKENS, NEW_TOKENS, QUICK_TOKENS, TURNS, BATCHES = 32, 256, 8, 3, (1, 32)
MIDDLE = PROMPT_TOKENS + NEW_TOKENS // 2  # tokens of a row in the middle of its reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=[device.name for device in Device])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TOKENS} tokens of each reply")
    arguments = parser.parse_args()
    show(measure(Device[arguments.device], arguments.quick))


def measure(setting: Device = Device.auto, quick: bool | None = None) -> list[dict]:
    """quick: None for yes on a CPU, and no elsewhere."""
    device = pick_device(setting)
    quick = device.type == "cpu" if quick is None else quick
    rows = []
    for name, make in (("d12", d12), ("Qwen3-0.6B", qwen3)):
        ours, peer = make(device)
        for bf16 in (False, True) if use_bf16(DType.auto, device) else (False,):
            if bf16:
                peer = in_bf16(peer)
            for batch in BATCHES:
                rows.append(
                    compare(f"replies, {name}, {'bf16' if bf16 else 'fp32'}, batch {batch}", ours, peer, bf16, batch, quick)
                )
                print(rows[-1], file=sys.stderr)
    return rows


def compare(case: str, ours: CausalLM, peer: Any, bf16: bool, batch: int, quick: bool) -> dict:
    number_format = autocast(bf16, ours.lm_head.weight.device)
    prompts = torch.randint(0, ours.vocab_size, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))

    def reply(tokens: int) -> list[list[int]]:
        with number_format:
            return generate_batch(ours, prompts.tolist(), tokens, stop_ids=set())

    def peer_reply(tokens: int) -> list[list[int]]:
        return peer_generate(peer, prompts.to(peer.device), tokens, None)

    check(peer, prompts[:2].tolist(), [reply[:QUICK_TOKENS] for reply in reply(QUICK_TOKENS)[:2]], 0.1 if bf16 else 1e-3)
    if quick:
        functions = middle_of_ours(ours, batch, number_format), lambda: middle_of_peer(peer, batch)
    else:
        functions = (lambda: seconds_of(reply, NEW_TOKENS)), (lambda: seconds_of(peer_reply, NEW_TOKENS))
    seconds = [[function() for function in functions] for _ in range(1 + TURNS)][1:]  # the first warms up
    count = QUICK_TOKENS if quick else NEW_TOKENS
    return row(case, batch * count, "tokens", *(statistics.median(side) for side in zip(*seconds, strict=True)))


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


def peer_generate(peer: Any, ids: torch.Tensor, tokens: int, cache: Any) -> list[list[int]]:
    """The cache holds all of ids (B, T) but the last, or is None."""
    mask = torch.ones_like(ids)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens}
    return peer.generate(ids, attention_mask=mask, past_key_values=cache, **settings)[:, ids.size(1) :].tolist()


def middle_of_ours(model: CausalLM, batch: int, number_format: AbstractContextManager) -> Callable[[], float]:
    with torch.inference_mode(), number_format:
        decoder = Decoder(model, batch, MIDDLE + QUICK_TOKENS * (1 + TURNS))
        first = decoder.read([[0]] * batch).argmax(1)
        decoder.cache.advance([MIDDLE - 1] * batch)

    def steps() -> None:
        tokens = first
        with torch.inference_mode():
            for _ in range(QUICK_TOKENS):
                tokens = decoder.step(tokens).argmax(1)
                tokens.tolist()

    return lambda: seconds_of(steps)


def middle_of_peer(peer: Any, batch: int) -> float:
    from transformers import DynamicCache

    cache, config = DynamicCache(config=peer.config), peer.config
    for layer in range(config.num_hidden_layers):
        keys = torch.zeros(batch, config.num_key_value_heads, MIDDLE, config.head_dim, dtype=peer.dtype, device=peer.device)
        cache.update(keys, keys.clone(), layer)
    ids = torch.zeros(batch, MIDDLE + 1, dtype=torch.int64, device=peer.device)
    return seconds_of(peer_generate, peer, ids, QUICK_TOKENS, cache)


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
        head_dim=128,
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
