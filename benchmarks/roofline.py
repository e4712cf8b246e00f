"""The matrix products of a step alone, in the shapes and number format of the model: what no trainer can be faster than.

Timed here and now, never taken from a data sheet. M tokens a forward pass, T tokens a row, D channels a head.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter

import torch

from chattrain.config import Device
from chattrain.device import pick_device
from chattrain.model.gpt import GPT


def step_seconds(model: GPT, rows: int, seq_len: int, micro_batches: int, bf16: bool, ns_steps: int = 5) -> float:
    """Seconds of the products of forward, backward and Muon's step of `micro_batches` x rows x seq_len tokens."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    M = rows * seq_len
    products: Counter = Counter()
    for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        out, into = linear.weight.shape
        products.update([(1, M, into, out), (1, M, out, into), (1, out, M, into)])  # forward, and gradients of both factors
    seconds = micro_batches * (_seconds(products, dtype) + _attention_seconds(model, rows, seq_len, dtype))
    return seconds + optimizer_seconds(model, ns_steps)


def optimizer_seconds(model: GPT, ns_steps: int = 5) -> float:
    """Of Muon's Newton-Schulz iterations, which are in bf16 whatever the model is in."""
    products: Counter = Counter()
    for name, p in model.named_parameters():
        if name.startswith("transformer.h"):
            r, c = sorted(p.shape)
            products.update([(1, r, c, r), (1, r, r, r), (1, r, r, c)] * ns_steps)
    return _seconds(products, torch.bfloat16)


def _attention_seconds(model: GPT, rows: int, seq_len: int, dtype: torch.dtype) -> float:
    """Two products forward and four backward, of the half of the square below the diagonal."""
    heads = rows * model.n_head
    square = Counter({(heads, seq_len, model.head_dim, seq_len): 3, (heads, seq_len, seq_len, model.head_dim): 3})
    return model.n_layer * _seconds(square, dtype) / 2


def _seconds(products: Counter, dtype: torch.dtype) -> float:
    """Median seconds of products (batch, n, k) x (batch, k, m), each as often as it is counted."""
    return sum(count * _median(*shape, dtype) for shape, count in products.items())


def _median(batch: int, n: int, k: int, m: int, dtype: torch.dtype, rounds: int = 5) -> float:
    where = pick_device(Device.auto)
    wait = torch.cuda.synchronize if where.type == "cuda" else (lambda: None)
    a, b = torch.randn(batch, n, k, device=where).to(dtype), torch.randn(batch, k, m, device=where).to(dtype)
    if batch == 1:
        a, b = a[0], b[0]
    torch.matmul(a, b)
    wait()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        torch.matmul(a, b)
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)
