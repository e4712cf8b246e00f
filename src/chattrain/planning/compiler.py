"""torch.compile up to the point where kernels would be made. All that is private in torch and used for plans is here; it is the
same in torch 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

MakeFunction = Callable[[GraphModule, bool], Callable[[list], list]]  # graph, is it a backward? -> a function of its inputs
NO_LIMIT = 1 << 30  # of compilations of one function: every plan traces the blocks of a model of its own


def traced(forward: Callable, make: MakeFunction, wrap: Callable[[Callable], Callable], *args: Any, **kwargs: Any) -> Any:
    """Call forward, compiled as Inductor would but with the functions of `make` in place of its kernels. Returns what it returns.

    wrap: gets the compiled function of each graph, from flat tensors to flat tensors, and returns the one to call. The tensors
    must be fake; modes other than theirs are off meanwhile, as Dynamo compiles nothing while another one looks on.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    def compiler(is_backward: bool) -> Callable[[GraphModule, Any], Callable]:
        def compile_graph(graph: GraphModule, _: Any) -> Callable[[list], list]:
            function = make(graph, is_backward)
            function._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]  # it takes a list, and empties it
            return function

        return compile_graph

    aot = aot_autograd(
        fw_compiler=compiler(False), bw_compiler=compiler(True), partition_fn=partition_fn, decompositions=select_decomp_table
    )
    limits = {"recompile_limit": NO_LIMIT, "accumulated_recompile_limit": NO_LIMIT, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        compiled = torch.compile(forward, backend=lambda graph, inputs: wrap(aot(graph, inputs)), dynamic=False)
        return compiled(*args, **kwargs)


@contextmanager
def only_fake(tensors: list) -> Iterator[None]:
    """Only the FakeTensorMode of these tensors is on, and no other mode."""
    mode = detect_fake_mode(tensors)
    assert mode is not None
    with _disable_current_modes(), mode:
        yield
