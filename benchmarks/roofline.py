"""The matrix products of a step alone, in the model's shapes and dtype: no trainer can be faster.

They are timed in the same run and never taken from a data sheet. M tokens a forward pass, T tokens a row, D channels a head.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chattrain.config.words import Device
from chattrain.device import pick_device
from chattrain.model.gpt import GPT
from chattrain.optim import cores
from chattrain.optim.newton_schulz import group_by_shape, muon_settings, orthogonalize

aten = torch.ops.aten


def step_seconds(model: GPT, rows: int, seq_len: int, micro_batches: int, bf16: bool, ns_steps: int = 5) -> float:
    """Seconds of the products of forward, backward and Muon's step of `micro_batches` x rows x seq_len tokens."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    M = rows * seq_len
    products: Counter = Counter()
    for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        out, into = linear.weight.shape
        products.update([(1, M, into, out), (1, M, out, into), (1, out, M, into)])  # forward, and gradients of both factors
    seconds = micro_batches * (_seconds(products, dtype) + _attention_seconds(model, rows, seq_len, dtype))
    return seconds + optimizer_seconds(model, dtype, ns_steps)


def optimizer_seconds(model: GPT, dtype: torch.dtype = torch.bfloat16, ns_steps: int = 5) -> float:
    """Seconds of the matrix products in Muon's orthogonalization, as our implementation does it."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("transformer.h")]
    batches = group_by_shape(matrices, muon_settings(pick_device(Device.auto)).batch)
    shapes = Counter((len(indices), *matrices[indices[0]].shape) for indices in batches)
    return sum(count * _direction_seconds(*shape, dtype, ns_steps) for shape, count in shapes.items())


def _direction_seconds(together: int, rows: int, columns: int, dtype: torch.dtype, ns_steps: int) -> float:
    """Seconds for a batch of `together` matrices; on a CPU with as many batches in parallel as in a real step."""
    device = pick_device(Device.auto)
    with Products() as seen:
        orthogonalize(torch.randn(*([together] if together > 1 else []), rows, columns, device=device), ns_steps, dtype)
    factors = [[torch.randn(size, device=device).to(dtype) for size in sizes] for sizes in seen.sizes]
    side_by_side = torch.get_num_threads() if device.type == "cpu" else 1

    def products(_: int) -> None:
        for a, b in factors:
            torch.matmul(a, b)

    return _median(lambda: cores.on_cores(products, list(range(side_by_side)))) / side_by_side


class Products(TorchDispatchMode):
    """Records the sizes of the factors of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[torch.Size, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            self.sizes.append((args[-2].shape, args[-1].shape))
        return func(*args, **(kwargs or {}))


def _attention_seconds(model: GPT, rows: int, seq_len: int, dtype: torch.dtype) -> float:
    """Two products forward and four backward, of the half of the square below the diagonal."""
    heads = rows * model.n_head
    square = Counter({(heads, seq_len, model.head_dim, seq_len): 3, (heads, seq_len, seq_len, model.head_dim): 3})
    return model.n_layer * _seconds(square, dtype) / 2


def _seconds(products: Counter, dtype: torch.dtype) -> float:
    """Median seconds of products (batch, n, k) x (batch, k, m), each as often as it is counted."""
    return sum(count * _product_seconds(*shape, dtype) for shape, count in products.items())


def _product_seconds(batch: int, n: int, k: int, m: int, dtype: torch.dtype) -> float:
    device = pick_device(Device.auto)
    a, b = torch.randn(batch, n, k, device=device).to(dtype), torch.randn(batch, k, m, device=device).to(dtype)
    if batch == 1:
        a, b = a[0], b[0]
    return _median(lambda: torch.matmul(a, b))


def _median(work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds, after one call that warms up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times = []
    for _ in range(1 + rounds):
        begun = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])
