"""The passes of generation: a prompt in one pass, then a token a pass, as fast as the device allows.

- Under autocast, weights are cast once for all passes (2 bytes a weight while it generates), not in every pass.
- On CUDA a pass of one token is recorded as a CUDA graph and replayed: to start its kernels one by one takes many times as long
  as they run. Recording takes as long as a few passes, so it pays in every reply, where compiling would pay after thousands.
- On a CPU, products of few rows are computed as in thin.py, and a row that has ended leaves the batch.

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
# cuDNN's attention, which is not among them, plans anew for each shape.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_not_recorded: WeakSet[CausalLM] = WeakSet()  # models whose recording has failed: it is not tried again in every reply


class Decoder:
    """Logits of the next tokens of `rows` rows, of at most `max_tokens` tokens each, prompts included.

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
        self.cache = model.new_cache(rows, max_tokens)
        self._record: Record | None = None
        if isinstance(self.cache, KVCache) and self.cache.recordable and model not in _not_recorded:
            self._record = record or (cuda_graph if self.device.type == "cuda" else None)
            self.cache.static = self._record is not None
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)  # what recorded passes read
        self._recorded: tuple[Any, Callable[[], Tensor]] | None = None  # the shape of the last recorded pass, and the pass

    def read(self, prompts: list[list[int]]) -> Tensor:
        """Logits (B, V) of the token after each prompt."""
        counts = [len(prompt) for prompt in prompts]
        inputs = [prompt + [0] * (max(counts) - len(prompt)) for prompt in prompts]
        logits = self._run(torch.tensor(inputs, device=self.device), torch.tensor(counts, device=self.device))
        self.cache.advance(counts)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the token after tokens (B,). Valid until the next pass."""
        inputs = self._tokens[: len(tokens)].copy_(tokens[:, None])
        again = self._recorded_pass(self._record, inputs) if self._record else None
        logits = again() if again else self._run(inputs)
        self.cache.advance([1] * len(tokens))
        return logits

    def _recorded_pass(self, record: Record, inputs: Tensor) -> Callable[[], Tensor] | None:
        """The pass of inputs (B, 1), recorded now if none of its shape was the last; None, with a warning, if that fails."""
        shape = len(inputs), self.cache.window(1)
        if self._recorded is None or self._recorded[0] != shape:
            self._recorded = None  # its memory is free for the next
            try:
                self._recorded = shape, record(lambda: self._run(inputs))
            except RuntimeError as error:  # the model waits for the device, or the device is out of memory
                self._record, self.cache.static = None, False
                _not_recorded.add(self.model)
                reason = str(error).strip().partition("\n")[0]
                log.warning("a pass of generation cannot be recorded (%s): its kernels start one by one, slower", reason)
                return None
        return self._recorded[1]

    def keep(self, rows: list[int], of: int) -> list[int]:
        """Drop all of the `of` rows but these where that pays. The rows that are left, in their new order."""
        # On CUDA more rows take hardly longer, and another number of rows is another recording.
        few_enough = len(rows) * 2 <= of if self._record else len(rows) < of
        return self.cache.keep(rows) if few_enough and isinstance(self.cache, KVCache) else list(range(of))

    def _run(self, inputs: Tensor, counts: Tensor | None = None) -> Tensor:
        with ExitStack() as contexts:
            contexts.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.device.type == "cpu" and inputs.numel() in ROWS.get(self.dtype, ()):
                contexts.enter_context(ThinProducts())
            if self.device.type == "cuda":
                contexts.enter_context(sdpa_kernel(BACKENDS))
            return torch.func.functional_call(self._pass, self._weights, (inputs, self.cache, counts))


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
        with torch.cuda.graph(graph):
            logits = run()
    finally:
        torch.cuda.set_stream(current)  # a recording that fails leaves its own

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
