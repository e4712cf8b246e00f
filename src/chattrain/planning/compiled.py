"""What compiled blocks hold in memory, asked of the compiler: no weights, no GPU, and no kernels are made.

torch.compile takes a block apart in three parts: Dynamo makes a graph of its Python, AOTAutograd adds the backward, and a
partitioner decides by a minimal cut what forward keeps and what backward computes again
(https://dev-discuss.pytorch.org/t/min-cut-optimal-recomputation-i-e-activation-checkpointing-with-aotautograd/467). All of these
run here, with Inductor's own settings, on tensors without content. Only its code is not made. In place of the kernels stand
functions that allocate what they would: what is kept and returned, and as much beside it as liveness.py says.

The blocks of a model are alike, so one graph serves all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from chattrain.model.compiling import recomputing_inputs
from chattrain.planning import compiler
from chattrain.planning.liveness import Liveness, liveness, nbytes

log = logging.getLogger("chattrain")
Slot = tuple[str, Any]  # where an input of a graph comes from: ("parameter", name), ("argument", index) or ("value", tensor)


@dataclass(frozen=True)
class Traced:
    """A compiled forward: the function of flat tensors, where these come from, and the tree of its results."""

    function: Callable[..., Any]
    slots: list[Slot]
    results: list[int]  # of each leaf of the block's result: its index among the function's
    tree: pytree.TreeSpec


class CompiledBlocks:
    """Replaces the forward of blocks by one that takes the memory of the compiled forward."""

    def __init__(self, on_gpu: bool, recomputes_inputs: bool) -> None:
        self.on_gpu, self.recomputes_inputs = on_gpu, recomputes_inputs  # the latter: see CausalLM
        self.traced: dict[Any, Traced | None] = {}  # by what a block and its arguments look like; None: it cannot be traced

    def replace_forward(self, blocks: Iterable[nn.Module]) -> None:
        for block in blocks:
            block.forward = self._forward_of(block, block.forward)

    def _forward_of(self, block: nn.Module, forward: Callable) -> Callable:
        def called(*args: Any, **kwargs: Any) -> Any:
            leaves, parameters = pytree.tree_leaves((args, kwargs)), dict(block.named_parameters())
            key = _look(type(block), leaves, parameters)
            if key not in self.traced:
                self.traced[key] = self._trace(forward, args, kwargs, parameters)
            traced = self.traced[key]
            if traced is None:
                return forward(*args, **kwargs)
            sources = {"parameter": parameters, "argument": leaves}
            given = [value if kind == "value" else sources[kind][value] for kind, value in traced.slots]
            found = traced.function(*given)
            return pytree.tree_unflatten([found[index] for index in traced.results], traced.tree)

        return called

    def _trace(self, forward: Callable, args: Any, kwargs: Any, parameters: dict[str, nn.Parameter]) -> Traced | None:
        try:
            with recomputing_inputs() if self.recomputes_inputs else nullcontext():
                return self._traced(forward, args, kwargs, parameters)
        except Exception as error:  # of the compiler, whose errors are of many types
            log.warning(
                "the compiler of this torch (%s) cannot be asked what it keeps of a block (%s): blocks are counted uncompiled, "
                "which is too much for a compiled run",
                torch.__version__,
                str(error).strip().partition("\n")[0],
            )
            return None

    def _traced(self, forward: Callable, args: Any, kwargs: Any, parameters: dict[str, nn.Parameter]) -> Traced:
        calls: list[tuple[Callable, tuple, Any]] = []  # compiled function, inputs and outputs of each graph

        def record(function: Callable) -> Callable:
            def run(*inputs: Any) -> Any:
                outputs = function(*inputs)
                calls.append((function, inputs, outputs))
                return outputs

            return run

        with compiler.only_fake(pytree.tree_leaves((args, kwargs))):
            args, kwargs = pytree.tree_map_only(Tensor, _stand_in, (args, kwargs))
            result = compiler.traced(forward, self._allocating, record, *args, **kwargs)
        if len(calls) != 1:
            raise RuntimeError(f"a block became {len(calls)} graphs")
        function, inputs, outputs = calls[0]
        own = {id(p): name for name, p in parameters.items()}
        arguments = {id(leaf): i for i, leaf in enumerate(pytree.tree_leaves((args, kwargs))) if isinstance(leaf, Tensor)}
        order = {id(output): i for i, output in enumerate(outputs)}
        leaves, tree = pytree.tree_flatten(result)
        return Traced(function, [_slot(tensor, own, arguments) for tensor in inputs], [order[id(x)] for x in leaves], tree)

    def _allocating(self, graph: GraphModule, is_backward: bool) -> Callable[[list], list]:
        """A function that takes the memory of this graph's kernels, in place of them."""

        def is_kept(node: Node) -> bool:
            return not is_backward or node.name.startswith("primals")  # of forward's inputs, weights and the block's own input

        return allocating(graph, liveness(graph, is_kept, self._workspace))

    def _workspace(self, node: Node) -> int:
        """Bytes inside attention's backward. FlashAttention on a GPU sums the gradient on the queries in fp32
        (https://github.com/Dao-AILab/flash-attention, dq_accum); block attention on a CPU copies its inputs into blocks, and sums
        the gradients on keys and values in fp32."""
        name = str(node.target)
        if "attention" not in name or "backward" not in name:
            return 0
        in_fp32 = 4 * node.meta["val"][0].numel()
        in_blocks = 5 * nbytes(node.meta["val"][0]) + 2 * in_fp32 if "block_attention" in name else 0
        return int(in_fp32 if self.on_gpu else in_blocks)


def allocating(graph: GraphModule, found: Liveness) -> Callable[[list], list]:
    """A function from a graph's inputs, a list that it empties, to its outputs: it allocates what the graph's kernels would."""
    inputs = {node: index for index, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    (output,) = graph.graph.find_nodes(op="output")
    returned = list(output.args[0])
    scratch = max(0, found.peak() - found.inputs())

    def run(arguments: list) -> list:
        device = next((x.device for x in arguments if isinstance(x, Tensor)), None)
        at_peak = torch.empty(scratch, dtype=torch.uint8, device=device)
        del at_peak
        held = {found.owner[node]: arguments[inputs[found.owner[node]]] for node in returned if found.owner.get(node) in inputs}
        arguments.clear()
        outputs = []
        for node in returned:
            value = node.meta["val"] if isinstance(node, Node) else node
            outputs.append(_output(node, value, found, held, device) if isinstance(value, Tensor) else value)
        return outputs

    return run


def _output(node: Node, value: Tensor, found: Liveness, held: dict[Node, Tensor], device: torch.device | None) -> Tensor:
    """A tensor like `value`, which is the node's, with the storage of its owner in `held`: allocated if it is not there yet."""
    owner = found.owner[node]
    if owner not in held:
        like = owner.meta["val"]
        held[owner] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if owner is node:
        return held[owner]
    return held[owner].as_strided(value.shape, value.stride(), value.storage_offset())


def _look(kind: type, leaves: list, parameters: dict[str, nn.Parameter]) -> Any:
    """What a graph depends on: sizes and number formats."""

    def of(value: Any) -> Any:
        return (tuple(value.shape), value.dtype, value.requires_grad) if isinstance(value, Tensor) else type(value)

    return kind, tuple(map(of, leaves)), tuple((name, of(p)) for name, p in parameters.items())


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).requires_grad_(
        tensor.requires_grad
    )


def _slot(tensor: Any, own: dict[int, str], arguments: dict[int, int]) -> Slot:
    if id(tensor) in own:
        return "parameter", own[id(tensor)]
    return ("argument", arguments[id(tensor)]) if id(tensor) in arguments else ("value", tensor)
