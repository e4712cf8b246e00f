"""The passes of generation: a prompt in one pass, then a token a pass, as fast as the device allows.

- Under autocast, weights are cast once for all passes (2 bytes a weight while it generates), not in every pass.
- On CUDA a pass of one token is recorded as a CUDA graph and replayed: to start its kernels one by one takes many times as long
  as they run. Recording takes as long as a few passes, so it pays in every reply, where compiling would pay after thousands. More
  rows take hardly longer there and another number of rows is another recording, so passes keep rows that nothing uses.
- On a CPU, products of few rows are computed as in thin.py, and a pass has as many rows as replies that go on.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from chattrain.model.causal_lm import CausalLM
from chattrain.model.head import compute_dtype
from chattrain.model.kv_cache import KVCache
from chattrain.model.thin import ROWS, ThinProducts

log = logging.getLogger("chattrain")

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
RECORDINGS = 4  # shapes of passes that are kept recorded
# cuDNN's attention, which is not among them, plans anew for each shape.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_not_recorded: WeakSet[CausalLM] = WeakSet()  # models whose recording has failed: it is not tried again in every reply


class Decoder:
    """Logits of the next tokens of up to `rows` rows, of at most `max_tokens` tokens each, prompts included.

    It computes in the dtype of autocast where it is made, or of the weights. `record` makes of a pass a function that repeats it
    with whatever its tensors hold then; None: CUDA graphs on CUDA, nothing elsewhere. Where it fails, passes run unrecorded from
    then on, with one warning a model.
    """

    def __init__(self, model: CausalLM, rows: int, max_tokens: int, record: Record | None = None):
        weight = model.lm_head.weight
        self.model, self.device, self.dtype = model, weight.device, compute_dtype(weight)
        self._pass, self._weights = _Pass(model), {}
        if self.dtype != weight.dtype:
            self._weights = {name: p.to(self.dtype) for name, p in self._pass.named_parameters()}
        self.rows, self.max_tokens = rows, max_tokens
        self.cache = model.new_cache(rows, max_tokens)
        self._record: Record | None = None
        if isinstance(self.cache, KVCache):
            self.cache.keep([])
            if self.cache.recordable and model not in _not_recorded:
                self._record = record or (cuda_graph if self.device.type == "cuda" else None)
                self.cache.static = self._record is not None
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)  # what recorded passes read
        self._recorded: dict[Any, Callable[[], Tensor]] = {}  # by shape, the last recorded one last
        self._width = 0  # rows of the last recorded pass, used or not

    @property
    def refills(self) -> bool:
        """May rows come and go while others go on? Otherwise the rows of one `read` stay until the next."""
        return isinstance(self.cache, KVCache)

    def reserve(self, rows: int, max_tokens: int) -> None:
        """Make space for so many rows of so many tokens, more than which neither has space."""
        if isinstance(self.cache, KVCache) and self.cache.reserve(min(rows, self.rows), min(max_tokens, self.max_tokens)):
            self._recorded.clear()  # they know where the memory was

    def read(self, prompts: list[list[int]]) -> Tensor:
        """Logits (B, V) of the token after each prompt. The prompts become rows behind those in use; without `refills`, the only
        ones."""
        counts = [len(prompt) for prompt in prompts]
        inputs = [prompt + [0] * (max(counts) - len(prompt)) for prompt in prompts]
        if isinstance(self.cache, KVCache):
            self.cache.admit(len(prompts))
        else:
            self.cache = self.model.new_cache(self.rows, self.max_tokens)
        logits = self._run(torch.tensor(inputs, device=self.device), torch.tensor(counts, device=self.device))
        self.cache.advance(counts)
        if isinstance(self.cache, KVCache):
            self.cache.first = 0
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the token after tokens (B,) of all rows in use. Valid until the next `step`."""
        again = self._recorded_pass(self._record, tokens) if self._record else None
        logits = again()[: len(tokens)] if again else self._run(tokens[:, None])
        self.cache.advance([1] * len(tokens))
        return logits

    def _recorded_pass(self, record: Record, tokens: Tensor) -> Callable[[], Tensor] | None:
        """The pass of tokens (B,), recorded now if none of its shape is kept; None, with a warning, if that fails."""
        cache: KVCache = self.cache
        self._width = _width(len(tokens), self._width, cache.rows)
        inputs = self._tokens[: self._width]
        inputs[: len(tokens), 0] = tokens
        shape = self._width, cache.window(1)
        if shape not in self._recorded:
            if len(self._recorded) == RECORDINGS:  # the memory of the oldest is free for the next
                del self._recorded[next(iter(self._recorded))]
            cache.idle = self._width - len(tokens)
            try:
                self._recorded[shape] = record(lambda: self._run(inputs))
            except RuntimeError as error:  # the model waits for the device, or the device is out of memory
                self._record, cache.static = None, False
                self._recorded.clear()
                _not_recorded.add(self.model)
                reason = str(error).strip().partition("\n")[0]
                log.warning("a pass of generation cannot be recorded (%s): its kernels start one by one, slower", reason)
                return None
            finally:
                cache.idle = 0
        return self._recorded[shape]

    def keep(self, rows: list[int]) -> list[int]:
        """Give the space of all rows in use but these to new ones; these in their new order. Only with `refills`."""
        assert isinstance(self.cache, KVCache)
        return self.cache.keep(rows)

    def _run(self, inputs: Tensor, counts: Tensor | None = None) -> Tensor:
        with ExitStack() as contexts:
            contexts.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.device.type == "cpu" and inputs.numel() in ROWS.get(self.dtype, ()):
                contexts.enter_context(ThinProducts())
            if self.device.type == "cuda":
                contexts.enter_context(sdpa_kernel(BACKENDS))
            return torch.func.functional_call(self._pass, self._weights, (inputs, self.cache, counts))


def _width(rows: int, before: int, space: int) -> int:
    """The rows of a recorded pass of which `rows` are used, where the last one had `before` (0: there was none).

    >>> [_width(rows, before, 32) for rows, before in ((5, 0), (5, 5), (3, 5), (2, 5), (6, 5), (20, 20), (21, 20))]
    [5, 5, 5, 2, 10, 20, 32]
    """
    if before == 0 or 2 * rows <= before:
        return rows
    return before if rows <= before else max(rows, min(2 * before, space))  # where rows were added, more may come


class _Pass(nn.Module):
    """`next_logits` as a forward, which is what functional_call calls."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, cache: Any, counts: Tensor | None) -> Tensor:
        return self.model.next_logits(inputs, cache, counts)


def cuda_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` as a CUDA graph. It runs once before it is recorded, so that libraries set themselves up outside the recording."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the thread of the loader pins memory
            logits = run()
    finally:
        torch.cuda.set_stream(current)  # a recording that fails leaves its own

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
