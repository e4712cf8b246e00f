"""What differs between releases of torch comes to the same, whichever is installed here."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import varlen

from chattrain import torch_compat
from chattrain.data.packing import cu_seqlens_of
from chattrain.model.attention import attention, document_mask
from chattrain.model.gpt import GPT

POSITIONS = torch.cat([torch.arange(40), torch.arange(24)]).expand(2, 64).contiguous()
BEGINS = torch.from_numpy(cu_seqlens_of(POSITIONS.numpy()))


def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    """As torch 2.11 has it: it wants as many key heads as query heads."""
    assert query.size(1) == key.size(1) and window_size == (-1, 0) and max_q == max_k == 64
    return attended(query, key, value, cu_seq_q)


def newer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (query.size(1) != key.size(1)) and window_size == (-1, 0) and max_q == max_k == 64
    return attended(query, key, value, cu_seq_q)


def attended(query, key, value, begins):
    """On a CPU, where torch has none."""
    places = torch.arange(len(query))
    document = torch.bucketize(places, begins[1:], right=True)
    mask = (document[:, None] == document) & (places[:, None] >= places)
    return attention(query[None], key[None], value[None], mask)[0]


@contextmanager
def under_autocast_of_cuda():
    """torch.autocast("cuda") does nothing without a GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("release", [older, newer])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_varlen_attention_serves_grouped_heads_in_every_release(monkeypatch, release, kv_heads):
    monkeypatch.setattr(varlen, "varlen_attn", release)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 64, heads, 16, generator=random) for heads in (4, kv_heads, kv_heads))
    ours = torch_compat.varlen_attn(*(x.flatten(0, 1) for x in (q, k, v)), BEGINS, longest=64).view(q.shape)
    torch.testing.assert_close(ours, attention(q, k, v, document_mask(POSITIONS)))


@pytest.mark.parametrize("release", [older, newer, None])
def test_compiling_with_and_without_flash_attention_warns_of_nothing(monkeypatch, release):
    torch.compiler.reset()  # what other tests of this process have compiled counts towards the limit of a function
    if release:
        monkeypatch.setattr(varlen, "varlen_attn", release)
        monkeypatch.setattr(GPT, "varlen", True)
    model = GPT(vocab_size=50, n_layer=2, n_embd=32, n_head=4, n_kv_head=2)
    model.init_weights(torch.Generator().manual_seed(0))
    inputs = torch.randint(0, 50, (2, 64), generator=torch.Generator().manual_seed(1))
    masked = model.features(inputs, positions=POSITIONS)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
    with warnings.catch_warnings(record=True) as warned, under_autocast_of_cuda():
        warnings.simplefilter("always")
        features = model.features(inputs, POSITIONS, BEGINS)
    assert not warned  # torch hides one of its own, which "error" would raise
    torch.testing.assert_close(features, masked)
