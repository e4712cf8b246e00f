"""A conversation becomes token ids and a loss mask. The only place that decides what is supervised.

    <|bos|> <|user_start|> ... <|user_end|> <|assistant_start|> ... <|assistant_end|> <|user_start|> ...

Supervised are the assistant's text, its Python calls (with their start and end tokens) and `<|assistant_end|>`: all that
the model must produce itself. BOS, user turns, role tokens and tool output are given to it, so they carry no loss. A
tokenizer that brings a chat template of its own is rendered by that, to the same rule (chat_template.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from chattrain.tokenizer import (
    ASSISTANT_END,
    ASSISTANT_START,
    BOS,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    SPECIAL_TOKENS,
    USER_END,
    USER_START,
    Tokenizer,
)

RENDER_VERSION = 1  # part of the token cache's key; raised when rendering changes
MARKS = ([0], [1])  # of one token that is given, and one that is supervised


class Malformed(ValueError):
    """A conversation that cannot be rendered; the message says which message and why."""


class Rendered(NamedTuple):
    """`ids` and `loss_mask` have the same length; loss_mask[i] is 1 where token i is supervised (not yet shifted)."""

    ids: list[int]
    loss_mask: list[int]


class Piece(NamedTuple):
    """A stretch of a rendered document: text, or one special token by its name."""

    text: str
    special: bool
    supervised: bool


GIVEN = {name: Piece(name, special=True, supervised=False) for name in SPECIAL_TOKENS}
SAID = {name: Piece(name, special=True, supervised=True) for name in SPECIAL_TOKENS}  # by the model itself


def render(conversation: dict[str, Any], tokenizer: Tokenizer, max_tokens: int | None = 2048) -> Rendered:
    """Token ids and loss mask of `{"messages": [{"role", "content"}, ...]}`, cut after `max_tokens` (None: never).

    A system message is merged into the first user turn. Content is a string or, for the assistant, a list of parts
    `{"type": "text" | "python" | "python_output", "text": ...}`. Raises Malformed where roles do not alternate
    from user, a turn is missing, or content has another shape. A conversation may end with a user turn.
    """
    return encode_pieces([lay_out(conversation, tokenizer)], tokenizer, max_tokens)[0]


def render_prompt(conversation: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Ids up to and with `<|assistant_start|>` of the reply to come; a last assistant turn is left out."""
    messages = messages_of(conversation)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if tokenizer.template is not None:
        return tokenizer.template.prompt(messages)
    ids, _ = render({"messages": messages}, tokenizer, max_tokens=None)
    return [*ids, tokenizer.special(ASSISTANT_START)]


def render_choices(conversation: dict[str, Any], replies: list[str], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids up to where one-token replies differ, the token of each). The last turn is an assistant's, which is replaced.

    For our own tokenizers that is the prompt of the reply, and each reply's own token. By a template the turns are rendered as
    they are in training, with whatever it puts before a reply. Raises Malformed where a reply is not one token.
    """
    if tokenizer.template is not None:
        messages = messages_of(conversation)[:-1]
        rendered = [render({"messages": [*messages, {"role": "assistant", "content": reply}]}, tokenizer, None).ids
                    for reply in replies]
        at = next((i for i, tokens in enumerate(zip(*rendered, strict=False)) if len(set(tokens)) > 1), 0)
        tokens = [ids[at] for ids in rendered]
        whole = all(ids[at + 1 :] == rendered[0][at + 1 :] for ids in rendered)
        ids = rendered[0][:at]
    else:
        encoded = tokenizer.encode_batch(replies)
        whole = all(len(t) == 1 for t in encoded)
        ids, tokens = render_prompt(conversation, tokenizer), [t[0] for t in encoded]
    if not whole or len(set(tokens)) != len(replies):
        raise Malformed(f"each of {replies} must be one token of the tokenizer")
    return ids, tokens


def lay_out(document: dict[str, Any], tokenizer: Tokenizer | None = None) -> list[Piece]:
    """Pieces in order of a conversation, or of a text `{"text": ...}`. Raises Malformed.

    Without a tokenizer, or with one of ours, in nanochat's format; else by the tokenizer's own template.
    """
    if tokenizer is not None and tokenizer.template is not None:
        return tokenizer.template.lay_out(document)
    return render_document(document["text"]) if is_text(document) else pieces(document)


def is_text(document: Any) -> bool:
    """Is it `{"text": ...}` and not a conversation?"""
    return isinstance(document, dict) and document.keys() == {"text"}


def render_document(text: str) -> list[Piece]:
    """Pieces of a plain text document: BOS, then the text, all of it supervised."""
    return [GIVEN[BOS], Piece(text, special=False, supervised=True)]


def pieces(conversation: dict[str, Any]) -> list[Piece]:
    """The conversation as pieces in order; raises Malformed."""
    out = [GIVEN[BOS]]
    messages = messages_of(conversation)
    turns = _merge_system(messages)
    first = len(messages) - len(turns)  # messages are counted as they were given
    check_turns(turns, first)
    for i, message in enumerate(turns, first):
        role, content = message["role"], message["content"]
        if role == "user":
            if not isinstance(content, str):
                raise Malformed(f"message {i}: a user's content must be a string, not {type(content).__name__}")
            out += [GIVEN[USER_START], Piece(content, False, False), GIVEN[USER_END]]
        else:
            out.append(GIVEN[ASSISTANT_START])
            out += _assistant_pieces(content, i)
            out.append(SAID[ASSISTANT_END])
    return out


def check_turns(turns: list[dict[str, Any]], first: int) -> None:
    """Raises Malformed where user and assistant do not take turns, the user first. `first`: number of the first message."""
    for i, message in enumerate(turns, first):
        expected = "user" if (i - first) % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise Malformed(f"message {i} is from {message['role']!r} where {expected!r} must speak")


def _assistant_pieces(content: Any, i: int) -> list[Piece]:
    if isinstance(content, str):
        return [Piece(content, False, True)]
    if not isinstance(content, list) or not content:
        raise Malformed(f"message {i}: an assistant's content must be a string or a list of parts")
    out = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if not isinstance(text, str):
            raise Malformed(f"message {i}: a part must be {{'type': ..., 'text': str}}, not {part!r:.80}")
        if kind == "text":
            out.append(Piece(text, False, True))
        elif kind == "python":
            out += [SAID[PYTHON_START], Piece(text, False, True), SAID[PYTHON_END]]
        elif kind == "python_output":
            out += [GIVEN[OUTPUT_START], Piece(text, False, False), GIVEN[OUTPUT_END]]
        else:
            raise Malformed(f"message {i}: unknown part type {kind!r}; known are text, python, python_output")
    return out


def messages_of(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages, each with a role and content; raises Malformed."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise Malformed("a conversation needs a non-empty list `messages`")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or message.get("content") is None:
            raise Malformed(f"message {i} needs `role` and `content`")
    return messages


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave the given messages as they are; return them with a leading system message inside the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise Malformed("a system message must be followed by a user message")
    texts = [messages[0]["content"], messages[1]["content"]]
    if not all(isinstance(text, str) for text in texts):
        raise Malformed("system and first user message must be strings")
    return [{"role": "user", "content": "\n\n".join(texts)}, *messages[2:]]


def encode_pieces(documents: list[list[Piece]], tokenizer: Tokenizer, max_tokens: int | None) -> list[Rendered]:
    """Ids and mask of each document; the texts of all of them go through the tokenizer in one batch."""
    if tokenizer.template is not None:
        return [Rendered(ids[:max_tokens], mask[:max_tokens]) for ids, mask in tokenizer.template.encode(documents)]
    encoded = iter(tokenizer.encode_batch([p.text for document in documents for p in document if not p.special]))
    rendered = []
    for document in documents:
        ids: list[int] = []
        mask: list[int] = []
        for text, special, supervised in document:
            new = (tokenizer.special(text),) if special else next(encoded)
            ids += new
            mask += MARKS[supervised] * len(new)
        rendered.append(Rendered(ids[:max_tokens], mask[:max_tokens]))
    return rendered
