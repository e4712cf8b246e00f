"""Render a conversation with the chat template of a Hugging Face tokenizer."""

from __future__ import annotations

from typing import Any

from chattrain.chat.format import Malformed
from chattrain.errors import UserError
from chattrain.tokenizer.huggingface import HFTokenizer


def render_template(
    tokenizer: HFTokenizer,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
    keep_null: bool = False,
) -> str:
    """The text of `apply_chat_template`. Raises Malformed with the template's reason, and UserError if there is no template.

    `keep_null`: the template is given a content of null as null, which some look for; transformers leaves the key out.
    """
    from jinja2 import TemplateError

    backend = tokenizer.backend
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.source} has no chat template, so conversations cannot be "
            "rendered; put a chat_template.jinja into that folder, or take the instruct model's"
        )
    try:
        if keep_null:
            from transformers.utils.chat_template_utils import render_jinja_template

            template = backend.get_chat_template(None, tools or None)
            arguments = {"add_generation_prompt": add_generation_prompt, **backend.special_tokens_map}
            return render_jinja_template([messages], tools=tools or None, chat_template=template, **arguments)[0][0]
        return backend.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise Malformed(f"the chat template refuses it: {error}") from None
