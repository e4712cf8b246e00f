"""command=chat: talk to a trained model, or have it answer chat.prompt."""

from __future__ import annotations

import sys

from chattrain import device
from chattrain.chat import Malformed, chat_format, render_prompt
from chattrain.config import Config
from chattrain.config.commands import ChatConfig
from chattrain.config.instantiate import instantiate_config
from chattrain.errors import UserError
from chattrain.model.causal_lm import CausalLM
from chattrain.model.generate import generate_batch
from chattrain.setup.start import find_checkpoint, with_own_settings
from chattrain.tokenizer import AnyTokenizer, Tokenizer

MAX_BATCH = 32  # prompts answered in one batch, at most


def main(cfg: Config) -> dict:
    """Print a reply to each text of chat.prompt, or, without it, talk with the user on the terminal.

    Each text is a conversation of its own. Returns the checkpoint and the replies to chat.prompt.
    """
    folder = find_checkpoint(cfg)
    cfg = with_own_settings(cfg, folder)
    tokenizer = Tokenizer.load(folder)
    model = instantiate_config(cfg.model, vocab_size=tokenizer.vocab_size, start=folder, seed=cfg.run.seed)
    model.to(device.pick_device(cfg.train.device)).eval()
    print(f"model {folder}", file=sys.stderr)
    given = cfg.chat.prompt if isinstance(cfg.chat.prompt, list) else [cfg.chat.prompt]
    prompts = [str(text) for text in given if text is not None]
    conversations = [[{"role": "user", "content": text}] for text in prompts]
    replies: list[str] = []
    for start in range(0, len(prompts), MAX_BATCH):
        replies += _replies(cfg.chat, cfg.run.seed, model, tokenizer, conversations[start : start + MAX_BATCH])
    for text, reply in zip(prompts, replies, strict=True):
        print(f"> {text}\n{reply}\n")
    if not prompts:
        _converse(cfg.chat, cfg.run.seed, model, tokenizer)
    return {"checkpoint": str(folder), "replies": replies}


def _converse(config: ChatConfig, seed: int, model: CausalLM, tokenizer: AnyTokenizer) -> None:
    """Read the user's turns from the terminal and print the replies, until Ctrl-D."""
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
            (reply,) = _replies(config, seed, model, tokenizer, [messages])
        except UserError as error:
            print(error, file=sys.stderr)
            messages.pop()
            continue
        print(f"{reply}\n")
        messages.append({"role": "assistant", "content": reply})


def _replies(
    config: ChatConfig, seed: int, model: CausalLM, tokenizer: AnyTokenizer, conversations: list[list[dict]]
) -> list[str]:
    """The reply to each conversation, computed in one batch."""
    try:
        prompts = [render_prompt({"messages": messages}, tokenizer) for messages in conversations]
    except Malformed as error:
        raise UserError(f"the prompt cannot be rendered: {error}") from error
    replies = generate_batch(
        model, prompts, config.max_tokens, chat_format(tokenizer).stop_ids, config.temperature, config.top_k, seed
    )
    return [tokenizer.decode(ids) for ids in replies]
