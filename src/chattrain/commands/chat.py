"""command=chat: talk to a trained model, or let it answer chat.prompt."""

from __future__ import annotations

import sys

from chattrain import device
from chattrain.chat import Malformed, chat_format, render_prompt
from chattrain.config import Config
from chattrain.config.instantiate import instantiate_config
from chattrain.errors import UserError
from chattrain.model.generate import generate_batch
from chattrain.setup.start import find_checkpoint
from chattrain.tokenizer import Tokenizer
from chattrain.tracking.console import setup_logging

TOGETHER = 32  # prompts answered in one batch, at most


def main(cfg: Config) -> dict:
    """Replies go to stdout. With chat.prompt (a text, or a list of texts: one conversation each) it ends after them."""
    close_log = setup_logging(None, console=True, resume=False)
    folder = find_checkpoint(cfg)
    tokenizer = Tokenizer.load(folder)
    where = device.pick_device(cfg.train.device)
    model = instantiate_config(cfg.model, vocab_size=tokenizer.vocab_size, start=folder, seed=cfg.run.seed).to(where).eval()
    print(f"model {folder}", file=sys.stderr)
    asked = cfg.chat.prompt if isinstance(cfg.chat.prompt, list) else [cfg.chat.prompt]
    prompts = [str(text) for text in asked if text is not None]
    replies = [
        reply
        for start in range(0, len(prompts), TOGETHER)
        for reply in _answers(
            cfg, model, tokenizer, [[{"role": "user", "content": text}] for text in prompts[start : start + TOGETHER]]
        )
    ]
    for text, reply in zip(prompts, replies, strict=True):
        print(f"> {text}\n{reply}\n")
    if not prompts:
        _converse(cfg, model, tokenizer)
    close_log()
    return {"checkpoint": str(folder), "replies": replies}


def _converse(cfg: Config, model, tokenizer: Tokenizer) -> None:
    print("An empty line starts a new conversation, Ctrl-D ends.", file=sys.stderr)
    messages: list[dict] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": text})
        try:
            (reply,) = _answers(cfg, model, tokenizer, [messages])
        except UserError as error:
            print(error, file=sys.stderr)
            messages.pop()
            continue
        print(f"{reply}\n")
        messages.append({"role": "assistant", "content": reply})


def _answers(cfg: Config, model, tokenizer: Tokenizer, conversations: list[list[dict]]) -> list[str]:
    """The reply to each conversation; all are computed together."""
    try:
        prompts = [render_prompt({"messages": messages}, tokenizer) for messages in conversations]
    except Malformed as error:
        raise UserError(f"the prompt cannot be rendered: {error}") from error
    replies = generate_batch(
        model, prompts, cfg.chat.max_tokens, chat_format(tokenizer).stop_ids, cfg.chat.temperature, cfg.chat.top_k, cfg.run.seed
    )
    return [tokenizer.decode(ids) for ids in replies]
