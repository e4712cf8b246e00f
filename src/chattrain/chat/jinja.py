"""Render a conversation with the chat template of a Hugging Face tokenizer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chattrain.chat.format import Malformed
from chattrain.errors import UserError
from chattrain.tokenizer.huggingface import HFTokenizer

LIMIT_S, LIMIT_S_A_MESSAGE = 30.0, 0.001  # of CPU time; a rendering takes about 20 us a message


def render_template(
    tokenizer: HFTokenizer,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
    keep_null: bool = False,
) -> str:
    """The text of `apply_chat_template`. Raises Malformed with the template's reason, also where it takes longer than a template
    can, and UserError if there is no template.

    `keep_null`: the template is given a content of null as null, which some look for; transformers leaves the key out.
    """
    backend = tokenizer.backend
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.source} has no chat template, so conversations cannot be "
            "rendered; put a chat_template.jinja into that folder, or take the instruct model's"
        )
    try:
        with _cpu_limit(LIMIT_S + LIMIT_S_A_MESSAGE * len(messages)):
            if keep_null:
                from transformers.utils.chat_template_utils import render_jinja_template

                template = backend.get_chat_template(None, tools or None)
                arguments = {"add_generation_prompt": add_generation_prompt, **backend.special_tokens_map}
                return render_jinja_template([messages], tools=tools or None, chat_template=template, **arguments)[0][0]
            return backend.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except Exception as error:  # the template is a program: it may divide by zero, or recurse without end
        raise Malformed(f"the chat template refuses it: {error}") from None


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the body once it has taken that much CPU time. Only in the main thread: others get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it is still at work after {seconds:.0f} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
