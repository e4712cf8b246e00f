"""How much memory the kernels that the compiler makes of a graph hold at once.

The compiler fuses element-wise operations and reductions into the kernels that need their results, so most nodes of a graph
never get a tensor. These do: results of matrix products, attention and other operations that are not fused, what such operations
read, reductions, and what the graph returns. Everything else is computed again wherever it is read. A tensor is released after
the last kernel that reads it, and inputs that only this graph holds are too. We follow torch's Inductor in this
(https://docs.pytorch.org/docs/stable/torch.compiler.html), and leave out its further choices, such as a result that takes the
place of a tensor that the kernel has read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten, prims = torch.ops.aten, torch.ops.prims
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.as_strided.default,
    aten.alias.default,
    aten.detach.default,
}
REDUCTIONS = {
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var_mean.correction,
}
# Element-wise, though not tagged so: they are indexed reads, or make values from indices.
ELEMENTWISE = {
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.full.default,
    aten.full_like.default,
    aten.embedding.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.clone.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
    prims.iota.default,
}


@dataclass
class Buffer:
    """A tensor of the graph: its bytes, the index of the node that makes it, and that of the last kernel that reads it."""

    size: int
    made: int
    last: int
    released: bool = True  # is it released after its last use?
    workspace: int = 0  # bytes that are needed beside it while it is made


@dataclass
class Liveness:
    """The tensors of a graph; `owner` gives that of a node, which the node may be a view of."""

    buffers: dict[Node, Buffer] = field(default_factory=dict)
    owner: dict[Node, Node] = field(default_factory=dict)

    def peak(self) -> int:
        """Bytes alive at the worst time, inputs included."""
        changes: dict[int, int] = {}
        for buffer in self.buffers.values():
            changes[buffer.made] = changes.get(buffer.made, 0) + buffer.size + buffer.workspace
            changes[buffer.made + 1] = changes.get(buffer.made + 1, 0) - buffer.workspace
            if buffer.released:
                changes[buffer.last + 1] = changes.get(buffer.last + 1, 0) - buffer.size
        alive = most = 0
        for index in sorted(changes):
            alive += changes[index]
            most = max(most, alive)
        return most

    def inputs(self) -> int:
        """Bytes of inputs."""
        return sum(buffer.size for node, buffer in self.buffers.items() if node.op == "placeholder")


def nbytes(value: object) -> int:
    """Bytes of a tensor's storage, as far as this tensor spans it; 0 for anything else."""
    if not isinstance(value, Tensor) or not value.numel():
        return 0
    return value.itemsize * (1 + sum((int(n) - 1) * int(s) for n, s in zip(value.shape, value.stride(), strict=True)))


def liveness(graph: GraphModule, keeps_input: Callable[[Node], bool], workspace: Callable[[Node], int]) -> Liveness:
    """The tensors of a graph that AOTAutograd made. keeps_input: is the input also held outside, so that it is never released?
    workspace: bytes that the kernel of a node needs while it runs."""
    nodes = list(graph.graph.nodes)
    kernels = _kernels(nodes)
    found = Liveness()
    reads: dict[Node, set[Node]] = {}  # the nodes with a tensor that a node is, is a view of, or is computed from
    for index, node in enumerate(nodes):
        parents: list[Node] = node.all_input_nodes
        sources = {source for parent in parents for source in reads.get(parent, ())}
        found.owner[node] = found.owner[parents[0]] if _is_view(node) else node
        reads[node] = sources
        if node.op == "output":
            for parent in parents:
                if buffer := found.buffers.get(found.owner[parent]):
                    buffer.last, buffer.released = index, False
        elif node.op == "placeholder":
            found.buffers[node] = Buffer(nbytes(node.meta.get("val")), 0, 0, released=not keeps_input(node))
            reads[node] = {node}
        elif node in kernels:
            for source in sources:
                found.buffers[source].last = index
            # Of several results, each is taken out by a node of its own.
            found.buffers[node] = Buffer(nbytes(node.meta.get("val")), index, index, workspace=workspace(node))
            reads[node] = {node}
    return found


def _kernels(nodes: list[Node]) -> set[Node]:
    """The nodes that get a tensor of their own."""
    own: set[Node] = set()
    for node in nodes:
        if node.op == "output" or (node.op == "call_function" and not _is_fused(node)):
            own |= set(_bases(node.all_input_nodes))
        if node.op == "call_function" and not _is_view(node) and (not _is_fused(node) or node.target in REDUCTIONS):
            own.add(node)
    return {node for node in own if node.op == "call_function"}


def _bases(nodes: list[Node]) -> Iterator[Node]:
    """The nodes that these are views of."""
    for node in nodes:
        while _is_view(node):
            node = node.all_input_nodes[0]
        yield node


def _is_view(node: Node) -> bool:
    """Does the node share the storage of its first input?"""
    if node.target is operator.getitem:  # of a split, or one of several results
        return node.all_input_nodes[0].target in VIEWS
    return node.target in VIEWS


def _is_fused(node: Node) -> bool:
    """Can it be part of another's kernel?"""
    target = node.target
    if _is_view(node) or target in REDUCTIONS or target in ELEMENTWISE:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
