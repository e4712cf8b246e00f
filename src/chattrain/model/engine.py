"""Many replies at once: requests come and go while others are answered (continuous batching,
https://www.usenix.org/conference/osdi22/presentation/yu).

A reply is the same, to rounding, whichever requests share its batch: each draws its tokens with numbers of its own seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from chattrain.model.causal_lm import CausalLM
from chattrain.model.decoder import Decoder
from chattrain.model.kv_cache import KVCache
from chattrain.model.sampling import GREEDY, Sampling, draw, to_device, to_host

PREFILL = 16_384  # tokens of prompts that are read in one pass, padding counted, unless a single prompt is longer


@dataclass(eq=False)
class Request:
    """A prompt and its reply so far. `ended` says why the reply has ended: by a stop token (which is not part of it), by its
    length, as it was cancelled, or as the model failed; None while it goes on."""

    prompt: list[int]
    max_tokens: int
    stop_ids: Set[int] = frozenset()
    sampling: Sampling = GREEDY
    seed: int = 0
    tool: Callable[[list[int]], list[int]] | None = None  # the reply so far -> tokens that it must go on with, see chat/tools.py
    reply: list[int] = field(default_factory=list, init=False)
    ended: str | None = field(default=None, init=False)  # stop, length, cancelled, failed
    forced: deque[int] = field(default_factory=deque, init=False)  # what the tool has said and the reply does not have yet

    def __post_init__(self) -> None:
        self._random = Random(self.seed)
        if self.max_tokens < 1:
            self.ended = "length"

    @property
    def most_tokens(self) -> int:
        """Of prompt and reply together."""
        return len(self.prompt) + self.max_tokens

    def number(self) -> float:
        """What decides the next token: drawn for each, forced or not, so that it depends on its place alone."""
        return self._random.random()

    def take(self, token: int) -> None:
        """Go on with a token."""
        if token in self.stop_ids:
            self.ended = "stop"
            return
        self.reply.append(token)
        if self.forced:
            self.forced.popleft()
        elif self.tool:
            self.forced.extend(self.tool(self.reply))
        if len(self.reply) == self.max_tokens:
            self.ended = "length"


class Engine:
    """Answers requests, up to `rows` of them at once, of at most `max_tokens` tokens each, prompt and reply.

    `submit`, then `step` while it is busy: each step adds a token to the reply of each request that has a row. It computes in the
    dtype of autocast at the first step, or of the weights. Its methods may be called from one thread only.
    """

    def __init__(self, model: CausalLM, rows: int, max_tokens: int):
        self.model, self.rows, self.max_tokens = model, rows, max_tokens
        # Some models of transformers keep rows in our cache only where these are short (hf_generate.py).
        self._takes_all = isinstance(model.new_cache(1, max_tokens), KVCache)
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []  # those with a row, in the order of rows
        self._decoder: Decoder | None = None
        self._tokens: Tensor | None = None  # (B,) drawn, and not yet followed by a pass
        self._logits: Tensor | None = None  # (B, V) of the next tokens, where the pass has been made

    @property
    def busy(self) -> bool:
        """Is there a request that has not ended?"""
        return any(not request.ended for request in (*self._active, *self._waiting))

    def submit(self, request: Request) -> None:
        """Answer a request as soon as a row is free. Raises ValueError for one without a prompt, or that is too long."""
        if not request.prompt or (request.max_tokens > 0 and request.most_tokens > self.max_tokens):
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and a reply of {request.max_tokens}: the prompt must not be empty and "
                f"both together at most {self.max_tokens}"
            )
        if not request.ended:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request as it is. Its row is free at the next step."""
        request.ended = request.ended or "cancelled"

    def step(self) -> None:
        """Add a token to each reply that has a row. Raises what the model raises: the requests that had rows end as failed, and
        the others can be answered by further steps."""
        try:
            with torch.inference_mode():
                self._step()
        except BaseException:
            for request in self._active:
                request.ended = request.ended or "failed"
            self._active, self._decoder, self._tokens, self._logits = [], None, None, None
            raise

    def _step(self) -> None:
        self._drop()
        if self._tokens is not None and self._decoder:
            self._logits = self._decoder.step(self._tokens)
        self._admit()
        if self._decoder is None or self._logits is None:
            return
        active = self._active
        numbers = [request.number() for request in active]
        tokens = draw(self._logits, [request.sampling for request in active], numbers)
        forced = {row: request.forced[0] for row, request in enumerate(active) if request.forced}
        if forced:
            rows, values = to_device(list(forced), tokens.device), to_device(list(forced.values()), tokens.device)
            tokens = tokens.index_put((rows,), values)
        read = to_host(tokens)
        self._tokens, self._logits = tokens, None
        # A device that computes on its own goes on with the next token before we have read this one.
        if tokens.device.type == "cuda" and any(len(request.reply) + 1 < request.max_tokens for request in active):
            self._tokens, self._logits = None, self._decoder.step(tokens)
        for request, token in zip(active, read(), strict=True):
            if not request.ended:
                request.take(token)

    def _drop(self) -> None:
        """Free the rows of the requests that have ended; without `refills`, when all have."""
        live = [row for row, request in enumerate(self._active) if not request.ended]
        if self._decoder is None or len(live) == len(self._active):
            return
        if self._decoder.refills:
            live = self._decoder.keep(live)
        elif live:
            return
        self._active = [self._active[row] for row in live]
        kept = to_device(live, self._decoder.device) if live else None
        self._tokens = None if self._tokens is None or kept is None else self._tokens[kept]
        self._logits = None if self._logits is None or kept is None else self._logits[kept]

    def _admit(self) -> None:
        """Read prompts that wait, as many as there are rows for and one pass takes."""
        if len(self._active) == self.rows or (self._active and self._decoder and not self._decoder.refills):
            return
        self._waiting = deque(request for request in self._waiting if not request.ended)
        if not self._active and not self._takes_all:
            self._decoder = None  # the next requests may be shorter, or longer
        new = self._next_to_read()
        if not new:
            return
        self._active += new  # before anything that may fail
        known = [*self._active, *self._waiting] if self._takes_all else self._active
        space = max(request.most_tokens for request in known)
        if self._decoder is None:
            self._decoder = Decoder(self.model, self.rows, self.max_tokens if self._takes_all else space)
        self._decoder.reserve(min(len(known), self.rows), space)
        logits = self._decoder.read([request.prompt for request in new])
        self._logits = logits if self._logits is None else torch.cat([self._logits, logits])

    def _next_to_read(self) -> list[Request]:
        """Take from those that wait what there are rows for, one pass takes and the decoder has space for."""
        new: list[Request] = []
        while self._waiting and len(self._active) + len(new) < self.rows:
            request = self._waiting[0]
            longest = max(len(request.prompt), *(len(other.prompt) for other in new), 0)
            if new and longest * (len(new) + 1) > PREFILL:
                break
            if self._decoder and not self._takes_all and request.most_tokens > self._decoder.max_tokens:
                break  # until the others have ended
            new.append(self._waiting.popleft())
        return new
