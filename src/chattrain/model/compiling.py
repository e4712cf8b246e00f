"""torch.compile, a block at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("chattrain")


def compile_each(blocks: Iterable[nn.Module], dynamic: bool) -> None:
    """Compile the forward of each module, in place. The modules are alike, so one compilation serves all."""
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic)


class CompiledBlocks:
    """Blocks of any architecture, compiled in place as `compile_each` does, for the passes within `running()` alone.

    Other passes (questions, replies), which have other shapes, run the blocks as they were. A pass without gradients runs the
    graph that training compiled: see `GPT.features`. Where torch cannot compile a block, all of them run uncompiled from then
    on, with one warning.
    """

    def __init__(self, blocks: Iterable[nn.Module], dynamic: bool, architecture: str):
        self.architecture = architecture
        self.works, self._runs = True, False
        for block in blocks:
            block.forward = self._forward(block.forward, torch.compile(block.forward, dynamic=dynamic))

    @contextmanager
    def running(self) -> Iterator[None]:
        """A pass of the compiled blocks."""
        self._runs = True
        try:
            with recomputing_inputs():
                yield
        finally:
            self._runs = False

    def _forward(self, plain: Callable, compiled: Callable) -> Callable:
        from torch._dynamo.exc import TorchDynamoException  # takes seconds, and the compiler imports it anyway

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._runs or not self.works:
                return plain(*args, **kwargs)
            try:
                return compiled(*args, **kwargs) if torch.is_grad_enabled() else _without_gradient(compiled, args, kwargs)
            except TorchDynamoException as error:
                self.works = False
                reason = str(error).strip().splitlines()[0]
                log.warning("torch.compile cannot take the layers of %s; uncompiled, slower: %s", self.architecture, reason)
                return plain(*args, **kwargs)

        return forward


@contextmanager
def recomputing_inputs() -> Iterator[None]:
    """Of what is compiled within this context, backward computes the inputs of matrix products (norms, activations, weights in
    bf16) from what it needs anyway, instead of keeping them: a fifth less memory in bf16, for one more write of each."""
    import torch._functorch.config as functorch

    with functorch.patch(ban_recompute_materialized_backward=False):
        yield


def _without_gradient(compiled: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The output of the graph that training compiled; what it saves for backward is freed at once."""
    with torch.enable_grad():
        (args[0] if args else kwargs["hidden_states"]).requires_grad_()
        outputs = compiled(*args, **kwargs)
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in outputs)
