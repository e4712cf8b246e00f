"""Norm, rotation and squared ReLU against the same in stock operations, whose backward autograd derives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chattrain.model.elementwise import norm, rotated_norm, squared_relu

ANGLES = torch.outer(torch.arange(12.0), 0.3 ** torch.arange(8.0))[:, None, :]  # (T, 1, D/2)
COS, SIN = ANGLES.cos(), ANGLES.sin()


def plain_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)


def plain_rotated_norm(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = COS.to(x.dtype), SIN.to(x.dtype)
    return plain_norm(torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1))


OPERATIONS = {
    "norm": (norm, plain_norm),
    "rotated_norm": (lambda x: rotated_norm(x, COS.to(x.dtype), SIN.to(x.dtype)), plain_rotated_norm),
    "squared_relu": (squared_relu, lambda x: F.relu(x).square()),
}


def values_and_gradients(function, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None and x.grad.dtype == x.dtype == y.dtype
    return y.detach(), x.grad


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 12, 3, 16, generator=generator) for _ in range(2))
    return x * torch.logspace(-4, 3, 12)[:, None, None], grad  # (B, T, H, D), of very different sizes


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_those_of_stock_operations(name, compiled):
    ours, plain = OPERATIONS[name]
    x, grad = example()
    found = values_and_gradients(torch.compile(ours) if compiled else ours, x, grad)
    for mine, theirs in zip(found, values_and_gradients(plain, x, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_in_bf16_they_are_as_near_to_the_exact_ones_as_stock_operations(name):
    ours, plain = OPERATIONS[name]
    x, grad = (tensor.bfloat16() for tensor in example())
    exact = values_and_gradients(plain, x.float(), grad.float())
    mine, stock = (values_and_gradients(function, x, grad) for function in (ours, plain))
    for index in (0, 1):
        errors = [float((found[index].float() - exact[index]).norm() / exact[index].norm()) for found in (mine, stock)]
        assert errors[0] < max(1.5 * errors[1], 4e-3)


@pytest.mark.parametrize("name", OPERATIONS)
def test_zeros_have_finite_gradients(name):
    ours, _ = OPERATIONS[name]
    for found in values_and_gradients(ours, torch.zeros(1, 12, 3, 16), torch.ones(1, 12, 3, 16)):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_kept_for_backward_but_the_output_and_a_number_a_row(name):
    ours, _ = OPERATIONS[name]
    x, _ = example()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = ours(x.requires_grad_())
    own = [tensor for tensor in kept if tensor.data_ptr() not in (y.data_ptr(), COS.data_ptr(), SIN.data_ptr())]
    assert sum(tensor.numel() for tensor in own) <= 2 * 12 * 3 + COS.numel()  # the inverse rotation may keep -sin
