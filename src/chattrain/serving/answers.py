"""The JSON of OpenAI's API: completions, chunks of a stream, models, errors."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from starlette.responses import Response

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, media_type="application/json")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    return as_json(error_body(status, message, param, code), status, headers)


def models(name: str) -> dict[str, Any]:
    return {"object": "list", "data": [model(name)]}


def model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "chattrain"}


class Completion:
    """What the answers to one request have in common."""

    def __init__(self, model: str):
        self.common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self.common, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        """An event of a stream: the beginning of a reply, a text, or its end."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self.common, "object": "chat.completion.chunk", "choices": [choice]})

    def usage(self, usage: dict[str, int]) -> str:
        return event({**self.common, "object": "chat.completion.chunk", "choices": [], "usage": usage})


def event(content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"
