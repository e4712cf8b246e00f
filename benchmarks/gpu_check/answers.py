"""Talking, against transformers' generate, and the questions of MMLU and ARC."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import gpu
from benchmarks.gpu_check.context import Context, own_model, own_shape
from benchmarks.gpu_check.tuning import SHAPE
from benchmarks.peers.folders import model_folder
from chattrain import device as devices
from chattrain.config.compose import compose
from chattrain.evals.multiple_choice import MultipleChoice, Question
from chattrain.formats import huggingface
from chattrain.model import hf
from chattrain.model.causal_lm import CausalLM
from chattrain.model.generate import generate_batch
from chattrain.model.gpt import GPT
from chattrain.parallel.ranks import Ranks
from chattrain.setup.build import build_model
from chattrain.tokenizer import Tokenizer

PROMPT_TOKENS, NEW_TOKENS, QUESTIONS = 64, 256, 14_000


def talk_d12(context: Context) -> None:
    """Our own d12 against the same weights in transformers' NanoChat."""
    size = {"n_layer": 2, "n_embd": 64, "n_head": 2} if context.tiny else {"n_layer": 12, "n_embd": 768, "n_head": 6}
    model = GPT(512 if context.tiny else 65_536, **size)
    model.init_weights(torch.Generator().manual_seed(0))
    fill_zeros(model)
    folder = context.folder("d12")
    tokenizer = Tokenizer.train(["a few words are enough for a tokenizer that nothing is encoded with"] * 9, 300)
    huggingface.write(folder, model.shape, model.weights(), tokenizer, seq_len=PROMPT_TOKENS + NEW_TOKENS)
    talk(context, model, folder)


def talk_hf(context: Context) -> None:
    """A model of transformers in our loop against its own generate."""
    folder = model_folder(context.folder("models"), "tiny" if context.tiny else SHAPE, context.device)
    talk(context, hf.build(8, folder, seed=0), folder)


def talk(context: Context, model: CausalLM, folder: Path) -> None:
    """Greedy replies to 1 and to 32 prompts, of the model and of transformers on the folder's weights, timed the second time.

    In bf16 on a GPU, else in fp32. The details say how many tokens the replies have in common until they first differ: in bf16,
    random weights soon give other tokens."""
    from transformers import AutoModelForCausalLM

    dtype, new = (torch.float32, 16) if context.tiny else (torch.bfloat16, NEW_TOKENS)
    model = model.to(context.device, dtype).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(context.device).eval()
    theirs.generation_config.eos_token_id = None  # random weights may give any token
    generator = torch.Generator().manual_seed(0)
    for count in (1, 4) if context.tiny else (1, 32):
        prompts = torch.randint(8, model.vocab_size, (count, PROMPT_TOKENS), generator=generator)
        ids = prompts.to(context.device)

        def ours(prompts: torch.Tensor = prompts) -> list[list[int]]:
            return generate_batch(model, prompts.tolist(), new, stop_ids=set())

        def reference(ids: torch.Tensor = ids) -> list[list[int]]:
            mask = torch.ones_like(ids)
            out = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
            return out[:, PROMPT_TOKENS:].tolist()

        (replies, seconds), (other, their_seconds) = second_call(ours), second_call(reference)
        assert len(replies[0]) == len(other[0]) == new
        name = 1 if count == 1 else 32
        context.details[f"batch_{count}"] = {
            "tokens": count * new,
            "ours_s": seconds,
            "transformers_s": their_seconds,
            "tokens_in_common": [common(a, b) for a, b in zip(replies, other, strict=True)],
        }
        context.add(f"tokens_per_second_{name}", count * new / seconds)
        context.add(f"ratio_{name}", their_seconds / seconds)


def second_call(work: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    """What work() returns, and the seconds of its second call."""
    work()
    gpu.wait_for_device()
    begun = time.perf_counter()
    found = work()
    gpu.wait_for_device()
    return found, time.perf_counter() - begun


def common(one: list[int], other: list[int]) -> int:
    """Tokens that two replies begin with alike.

    >>> common([1, 2, 3], [1, 2, 4])
    2
    """
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def questions(context: Context) -> None:
    """As many questions as MMLU and ARC have, of their lengths, asked of our own model as a run's evaluation asks."""
    cfg = compose([f"model={own_model(context)}", "stage=sft", f"train.device={context.device}", *own_shape(context)])
    device = devices.pick_device(cfg.train.device)
    bf16 = devices.use_bf16(cfg.train.dtype, device)
    model, _ = build_model(cfg, cfg.tokenizer.vocab_size, None, device, Ranks(), bf16, cfg.train.compile is True)
    fill_zeros(model)
    model.eval()
    asked = random_questions(40 if context.tiny else QUESTIONS, cfg.tokenizer.vocab_size)
    few = asked[: len(asked) // 20]
    seconds = []
    for part in (few, asked):
        measure = MultipleChoice(
            "random", part, cfg.eval.batch_size, 0, device, Ranks(), np.ones(cfg.tokenizer.vocab_size, np.int64)
        )
        begun = time.perf_counter()
        measure(model, devices.autocast(bf16, device))
        seconds.append(time.perf_counter() - begun)
    context.details |= {"questions": len(asked), "tokens": sum(len(q.ids) for q in asked), "passes": len(measure.passes)}
    context.add("warm_up", seconds[0])
    context.add("seconds", seconds[1])


def random_questions(count: int, vocab_size: int) -> list[Question]:
    """Prompts of 60 to 600 random tokens, most of them near 130, as MMLU's are, with four letters."""
    rng, out = random.Random(0), []
    for number in range(count):
        size = int(min(600, max(60, rng.lognormvariate(4.85, 0.5))))
        ids = [rng.randrange(8, vocab_size) for _ in range(size)]
        out.append(Question(ids, [1, 2, 3, 4], rng.randrange(4), number))
    return out


@torch.no_grad()
def fill_zeros(model: CausalLM) -> None:
    """Random values for weights that begin at zero, so that logits differ."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
