"""The body of a request to /v1/chat/completions, checked: OpenAI's names and ranges, and `top_k`.

What we do not have is refused by name, unless its value asks for nothing: a parameter that is quietly ignored would change what
the client gets.
"""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass
from typing import Any

from chattrain.chat.reply import with_calls
from chattrain.model.sampling import Sampling

# Parameters of OpenAI's that we do not have -> values that ask for nothing. `any`: they say nothing about the reply.
NEUTRAL: dict[str, tuple[Any, ...] | str] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "user": "any",
    "metadata": "any",
    "safety_identifier": "any",
    "service_tier": "any",
}
KNOWN = (
    *("model", "messages", "tools", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "top_k", "seed", "stop", "n"),
)
MOST_STOPS = 4


class BadRequest(ValueError):
    """A mistake of the client: the message, the parameter, and OpenAI's code for it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Asked:
    """A checked request."""

    model: str
    conversation: dict[str, Any]
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool  # in a stream


def parse(body: bytes, most_tokens: int, has_calculator: bool) -> Asked:
    """The request in a body. most_tokens: of a reply. has_calculator: does the model call ours, so that calls which are shown in
    earlier replies become calls again? Raises BadRequest."""
    given = _object(body)
    for name, value in given.items():
        if name in NEUTRAL:
            neutral = NEUTRAL[name]
            if neutral != "any" and value is not None and not any(_same(value, each) for each in neutral):
                raise BadRequest(f"{name}={_shown(value)} is not supported; leave it out", name, "unsupported_value")
        elif name not in KNOWN:
            raise BadRequest(f"unknown parameter {name[:100]!r}; known are {', '.join(KNOWN)}", name[:100], "unknown_parameter")
    if not isinstance(given.get("model"), str):
        raise BadRequest("model must be given: the name that /v1/models lists", "model")
    if _whole(given, "n", 1, 128) not in (None, 1):
        raise BadRequest("n must be 1: one reply a request", "n", "unsupported_value")
    temperature, top_p = _number(given, "temperature", 0, 2), _number(given, "top_p", 0, 1)
    sampling = Sampling(
        1.0 if temperature is None else temperature,
        _whole(given, "top_k", 1, 2**31),
        1.0 if top_p is None else top_p,
    )
    seed = _whole(given, "seed", -(2**63), 2**63 - 1)
    stream = _flag(given, "stream")
    options = given.get("stream_options")
    if options is not None and (not stream or not isinstance(options, dict) or options.keys() - {"include_usage"}):
        raise BadRequest("stream_options may be {'include_usage': true} or false, with stream=true", "stream_options")
    return Asked(
        given["model"],
        _conversation(given, has_calculator),
        _max_tokens(given, most_tokens),
        sampling,
        secrets.randbits(62) if seed is None else seed,
        _stops(given.get("stop")),
        stream,
        _flag(options or {}, "include_usage"),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise BadRequest("the body must be a JSON object")
    return given


def _conversation(given: dict[str, Any], has_calculator: bool) -> dict[str, Any]:
    """What the chat format renders; it checks the rest."""
    messages, tools = given.get("messages"), given.get("tools")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise BadRequest("messages must be a list of objects, one or more", "messages")
    if messages[-1].get("role") == "assistant":
        raise BadRequest("the last message must not be the assistant's: it is what is asked for", "messages")
    if has_calculator:
        messages = [_with_calls(message) for message in messages]
    return {"messages": messages} if tools is None else {"messages": messages, "tools": tools}


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str):
        return message
    return {**message, "content": with_calls(content)}


def _max_tokens(given: dict[str, Any], most: int) -> int:
    names = ("max_tokens", "max_completion_tokens")
    values = [value for name in names if (value := _whole(given, name, 1, most)) is not None]
    if len(set(values)) > 1:
        raise BadRequest(f"max_tokens={values[0]} and max_completion_tokens={values[1]} differ; give one", names[1])
    return values[0] if values else most


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(text, str) and text for text in stops):
        raise BadRequest(f"stop must be a text or up to {MOST_STOPS} texts, none of them empty", "stop")
    return tuple(stops)


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}={_shown(value)} must be true or false", name)
    return bool(value)


def _number(given: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRequest(f"{name}={_shown(value)} must be a number from {low} to {high}", name)
    return float(value)


def _whole(given: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
    if isinstance(value, bool) or not whole or not low <= value <= high:
        raise BadRequest(f"{name}={_shown(value)} must be a whole number from {low} to {high}", name)
    return int(value)


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _shown(value: Any) -> str:
    return f"{json.dumps(value):.60}"
