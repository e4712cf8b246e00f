"""A small model that talks, and a server of it in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from chattrain.chat import chat_format, render_prompt
from chattrain.chat.reply import reply_text
from chattrain.chat.tools import tool_of
from chattrain.config.serve import ServeConfig
from chattrain.model.generate import generate
from chattrain.model.gpt import GPT
from chattrain.serving.run import Server, listen
from chattrain.serving.speaker import Speaker
from chattrain.tokenizer import AnyTokenizer, Tokenizer

CONTEXT = 6000  # a reply that nothing ends takes so many passes


def small_gpt(vocab_size: int) -> GPT:
    """Random weights, with logits far apart, so that rounding decides no token."""
    model = GPT(vocab_size=vocab_size, n_layer=2, n_embd=32, n_head=2)
    generator = torch.Generator().manual_seed(5)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.3, generator=generator)
        model.lm_head.weight.mul_(4)
    return model.eval()


def speaker_of(tokenizer: Tokenizer, context: int = CONTEXT) -> Speaker:
    return Speaker("sft/small", small_gpt(tokenizer.vocab_size), tokenizer, context, bf16=False)


def reply_of(speaker: Speaker, messages: list[dict[str, Any]], max_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """The reply that the model gives alone, as it is shown."""
    tokenizer: AnyTokenizer = speaker.tokenizer
    prompt = render_prompt({"messages": messages}, tokenizer)
    stops, tool = chat_format(tokenizer).stop_ids, tool_of(tokenizer)
    return reply_text(tokenizer, list(generate(speaker.model, prompt, max_tokens, stops, temperature, None, seed, tool)))


@contextmanager
def running(speaker: Speaker, **keys: Any) -> Iterator[str]:
    """The URL of a server of the model, with these keys of `serve.*`."""
    torch.set_num_threads(1)
    config = replace(ServeConfig(port=0, batch_size=4, max_tokens=CONTEXT), **keys)
    config.check()
    listening, url = listen(config)
    server = Server(speaker, config)
    thread = threading.Thread(target=server.run_at, args=(listening,))
    thread.start()
    try:
        yield url
    finally:
        server.worker.stop()
        server.should_exit = True
        thread.join()
        listening.close()


class Passes:
    """Counts the passes of a model, which wait where `gate` is closed."""

    def __init__(self, model: GPT):
        self.count, self.gate, self.fail = 0, threading.Event(), False
        self.gate.set()
        self._hook = model.transformer.wte.register_forward_pre_hook(self._pass)

    def _pass(self, *_: Any) -> None:
        self.gate.wait(60)
        self.count += 1
        if self.fail:
            raise RuntimeError("the device is lost")

    def close(self) -> None:
        self.gate.set()
        self._hook.remove()
