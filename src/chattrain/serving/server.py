"""The server: OpenAI's /v1/chat/completions and /v1/models, and a web page at /."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from chattrain.chat import Malformed
from chattrain.chat.tools import tool_of
from chattrain.config.serve import ServeConfig
from chattrain.model import engine
from chattrain.serving import page
from chattrain.serving.answers import Completion, as_json, error, error_body, event, model, models
from chattrain.serving.guard import Guard
from chattrain.serving.parameters import Asked, BadRequest, parse
from chattrain.serving.speaker import Speaker, TooLong
from chattrain.serving.stops import StopTexts
from chattrain.serving.worker import STOPPED, Worker

log = logging.getLogger("chattrain")

TAKES_S = 1  # seconds that a client has, beyond those of a request, to take the end of a stream
TIMED_OUT, HUNG_UP = "timed out", "hung up"  # why a reply has ended, besides what `Request` and the worker say


class Failed(Exception):
    """A reply that ended otherwise than the model ended it: the status and message of the answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Answer:
    """What is known of a reply on its way."""

    completion: Completion
    request: engine.Request
    tokens: int = 0  # that have arrived
    reason: str = "stop"
    streams: bool = False

    @property
    def usage(self) -> dict[str, int]:
        prompt = len(self.request.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}


class _Stream(StreamingResponse):
    """Events, of which nothing goes on when the client has hung up, even before the first, or reads nothing for too long."""

    def __init__(self, events: AsyncGenerator[str, None], release: Callable[[], None], timeout_s: float):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, 200, headers, "text/event-stream")
        self.events, self.release, self.timeout_s = events, release, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect, TimeoutError):
                async with asyncio.timeout(self.timeout_s):
                    await super().__call__(scope, receive, send)
        finally:
            self.release()
            await self.events.aclose()


class Service:
    """Answers the requests of one server."""

    def __init__(self, speaker: Speaker, config: ServeConfig, worker: Worker):
        self.speaker, self.config, self.worker = speaker, config, worker
        self.open = 0  # requests that are being answered
        self._renderer = ThreadPoolExecutor(1, "chattrain-prompts")

    def app(self) -> Starlette:
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        handlers = {HTTPException: _http_error, Exception: _server_error}
        return Starlette(routes=routes, middleware=[Middleware(Guard, self.config.api_key)], exception_handlers=handlers)

    async def page(self, _: Request) -> Response:
        return page.response(self.speaker.name, self.config.api_key is not None)

    async def health(self, _: Request) -> Response:
        alive = self.worker.is_alive
        return as_json({"status": "ok" if alive else "failed", "requests": self.open}, 200 if alive else 503)

    async def models(self, _: Request) -> Response:
        return as_json(models(self.speaker.name))

    async def model(self, http: Request) -> Response:
        name = http.path_params["name"]
        return as_json(model(name)) if name == self.speaker.name else self._no_model(name)

    async def complete(self, http: Request) -> Response:
        if self.open >= self.config.max_requests:
            message = f"{self.open} requests are being answered, as many as this server takes; try again later"
            return error(429, message, code="too_many_requests", headers={"Retry-After": "1"})
        self.open += 1
        answer: Answer | None = None
        try:
            asked, request = await self._read(http)
            answer = Answer(Completion(asked.model), request)
            texts = self._texts(http, asked, answer)
            if not asked.stream:
                text = "".join([text async for text in texts])
                return as_json(answer.completion.whole(text, answer.reason, answer.usage))
            first = await anext(texts, "")  # what fails before it still has a status
            answer.streams = True
            return _Stream(self._events(asked, answer, first, texts), self._release, self.config.timeout_s + TAKES_S)
        except BadRequest as refused:
            return error(refused.status, str(refused), refused.param, refused.code)
        except Failed as failed:
            return error(failed.status, str(failed))
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            if answer is None or not answer.streams:
                self._release()

    def _release(self) -> None:
        self.open -= 1

    async def _read(self, http: Request) -> tuple[Asked, engine.Request]:
        """The request, checked and rendered. Raises BadRequest."""
        speaker = self.speaker
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("the header Content-Type must be application/json", status=415)
        asked = parse(await self._body(http), self.config.max_tokens, tool_of(speaker.tokenizer) is not None)
        if asked.model != speaker.name:
            raise BadRequest(f"no model {asked.model[:100]!r}: this server has {speaker.name!r}", "model", "model_not_found", 404)
        try:
            prompt = await self._render(asked)
        except (Malformed, RecursionError) as malformed:  # RecursionError: of lists within lists
            raise BadRequest(f"the conversation cannot be rendered: {malformed}", "messages") from None
        except TooLong as too_long:
            raise BadRequest(str(too_long), "messages", "context_length_exceeded") from None
        return asked, speaker.request(prompt, asked.max_tokens, asked.sampling, asked.seed)

    async def _render(self, asked: Asked) -> list[int]:
        """The prompt, made beside the event loop: streams go on while a long conversation takes its second. One at a time, as
        not every tokenizer may be asked by two threads."""
        make = partial(self.speaker.prompt, asked.conversation, asked.max_tokens)
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._renderer, make)
        except TimeoutError:
            raise _failure(TIMED_OUT, self.config.timeout_s) from None

    async def _body(self, http: Request) -> bytes:
        most, body = self.config.max_request_bytes, b""
        too_large = BadRequest(f"the body has more than {most} bytes (serve.max_request_bytes)", status=413)
        length = http.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.config.timeout_s):
                async for part in http.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise BadRequest("the body has not arrived in time (serve.timeout_s)", status=408) from None
        return body

    async def _texts(self, http: Request, asked: Asked, answer: Answer) -> AsyncGenerator[str, None]:
        """The text of a reply as it arrives. Its row is free when this is closed. Raises Failed where it cannot be had."""
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[list[int], str | None]] = asyncio.Queue()
        reader, stops = self.speaker.reader(), StopTexts(asked.stops)

        def deliver(tokens: list[int], ended: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, (tokens, ended))

        timer = loop.call_later(self.config.timeout_s, arrived.put_nowait, ([], TIMED_OUT))
        hangup = asyncio.ensure_future(_until_hangup(http))
        hangup.add_done_callback(lambda _: arrived.put_nowait(([], HUNG_UP)))
        self.worker.submit(answer.request, deliver)
        ended: str | None = "cancelled"
        try:
            while True:
                tokens, ended = await arrived.get()
                answer.tokens += len(tokens)
                text = stops.add(reader.add(tokens) + (reader.finish() if ended else ""), final=ended is not None)
                ended = "stop" if stops.found else ended
                if text:
                    yield text
                if ended in ("stop", "length"):
                    answer.reason = ended
                    return
                if ended:
                    raise _failure(ended, self.config.timeout_s)
        finally:
            self.worker.cancel(answer.request)
            timer.cancel()
            hangup.cancel()
            seconds = time.perf_counter() - began
            log.info("%d tokens read, %d written in %.1f s: %s", len(answer.request.prompt), answer.tokens, seconds, ended)

    async def _events(
        self, asked: Asked, answer: Answer, first: str, texts: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        """The events of a stream."""
        completion = answer.completion
        try:
            async with aclosing(texts):
                yield completion.chunk({"role": "assistant", "content": first})
                async for text in texts:
                    yield completion.chunk({"content": text})
            yield completion.chunk({}, answer.reason)
            if asked.include_usage:
                yield completion.usage(answer.usage)
            yield "data: [DONE]\n\n"
        except Failed as failed:
            yield event(error_body(failed.status, str(failed)))

    def _no_model(self, name: str) -> Response:
        return error(404, f"no model {name[:100]!r}: this server has {self.speaker.name!r}", "model", "model_not_found")


def _failure(ended: str, timeout_s: float) -> Failed:
    if ended == TIMED_OUT:
        return Failed(504, f"the reply took more than {timeout_s:g} s (serve.timeout_s)")
    if ended == STOPPED:
        return Failed(503, "the server is stopping")
    if ended == HUNG_UP:
        return Failed(499, "the client has hung up")
    return Failed(500, "the model has failed; the server's log says why")


async def _until_hangup(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _http_error(_: Request, raised: Exception) -> Response:
    assert isinstance(raised, HTTPException)
    return error(raised.status_code, f"{raised.detail}; this server has /, /health, /v1/models and /v1/chat/completions")


async def _server_error(_: Request, raised: Exception) -> Response:
    log.error("a request has failed", exc_info=raised)
    return error(500, "the server has failed; its log says why")
