"""Attention in blocks gives what torch's own gives, forward and backward, whatever the documents of a row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain import torch_compat
from chattrain.data.packing import positions_of
from chattrain.device import can_compile
from chattrain.model.attention import (
    attention,
    block_attention,
    block_attention_pays,
    block_size,
    choose_attention,
    document_mask,
    varlen_attention,
)
from chattrain.model.gpt import GPT

pytestmark = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler for torch.compile")


def with_gradients(attend, q, k, v, grad):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def tensors(B, T, heads, kv_heads, D, dtype=torch.float32):
    random = torch.Generator().manual_seed(T)
    return [torch.randn(B, T, h, D, generator=random).to(dtype) for h in (heads, kv_heads, kv_heads, heads)]


def assert_near(ours, reference, tolerance):
    for a, b in zip(ours, reference, strict=True):
        assert (a - b).float().norm() <= tolerance * (1 + b.float().norm())


@pytest.mark.parametrize("T", [1, 48, 128, 136, 320, 509])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2)])
def test_blocks_give_what_torch_gives(T, heads, kv_heads):
    *qkv, grad = tensors(2, T, heads, kv_heads, 16)
    one_document = torch.arange(T).expand(2, T)
    ours = with_gradients(lambda q, k, v: block_attention(q, k, v, one_document), *qkv, grad)
    assert_near(ours, with_gradients(attention, *qkv, grad), 1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=12), min_size=1, max_size=3), st.sampled_from([256, 376, 389]))
def test_blocks_stay_within_documents_of_any_lengths(rows, T):
    fitting = [[size for i, size in enumerate(sizes) if sum(sizes[: i + 1]) <= T] for sizes in rows]
    positions = torch.stack([torch.from_numpy(positions_of(sizes, T)) for sizes in fitting])
    *qkv, grad = tensors(len(rows), T, 2, 2, 16)
    ours = with_gradients(lambda q, k, v: block_attention(q, k, v, positions), *qkv, grad)
    masked = with_gradients(lambda q, k, v: attention(q, k, v, document_mask(positions)), *qkv, grad)
    assert_near(ours, masked, 1e-5)


def test_in_bf16_blocks_are_as_exact_as_torch():
    *qkv, grad = tensors(2, 256, 2, 2, 64, torch.bfloat16)
    exact = with_gradients(attention, *(x.float() for x in qkv), grad.float())
    assert_near(with_gradients(block_attention, *qkv, grad), exact, 1e-2)
    assert_near(with_gradients(attention, *qkv, grad), exact, 1e-2)


@pytest.mark.parametrize(
    "amx, T, isolated, bf16, blocks",
    [
        (False, 512, False, True, True),
        (False, 512, True, False, True),
        (False, 512, False, False, False),
        (True, 512, True, True, False),
        (True, 2048, True, False, True),
        (True, 2048, False, True, False),
    ],
)
def test_a_compiled_model_attends_by_blocks_where_that_pays(monkeypatch, amx, T, isolated, bf16, blocks):
    monkeypatch.setattr(torch_compat, "has_amx", lambda: amx)
    positions = torch.arange(T).remainder(100).expand(1, T) if isolated else None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        attend = choose_attention(positions, use_block_attention=block_attention_pays(positions))
    assert isinstance(attend, partial) and attend.func is (block_attention if blocks else attention)


def test_blocks_hold_every_row_and_little_more():
    for T in range(1, 2000):
        n = block_size(T)
        assert n <= 128 and 0 <= -(-T // n) * n - T < -(-T // n)


@pytest.mark.parametrize("isolated, dynamic", [(False, False), (True, False), (False, True)])
def test_the_compiled_model_has_the_gradients_of_the_plain_one(isolated, dynamic):
    model = GPT(vocab_size=50, n_layer=2, n_embd=32, n_head=2)
    model.init_weights(torch.Generator().manual_seed(0))
    inputs = torch.randint(0, 50, (2, 256), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(256).remainder(100).expand(2, 256).contiguous() if isolated else None
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_blocks(dynamic)
        model.zero_grad()
        features = model.features(inputs, positions)
        features.square().mul(torch.arange(32)).sum().backward()
        found.append([features.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert_near(*found, 1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_varlen_attention_has_the_shapes_of_attention(kv_heads):
    """What can be seen of it without a GPU: torch knows the operator and its gradients' shapes on tensors without values."""
    formats = (4, torch.float32), (kv_heads, torch.float32), (kv_heads, torch.bfloat16)  # as autocast on a GPU leaves them
    q, k, v = (torch.empty(2, 64, h, 16, dtype=dtype, device="meta", requires_grad=True) for h, dtype in formats)
    out = varlen_attention(q, k, v, torch.empty(9, dtype=torch.int32, device="meta"))
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
