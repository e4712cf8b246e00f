"""Head, attention and compilation of models of transformers: the numbers of transformers, with less kept and compiled."""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chattrain import torch_compat
from chattrain.data.batch import Batch, as_batch
from chattrain.data.packing import Tokens
from chattrain.device import can_compile
from chattrain.model import attention, hf, hf_attention
from chattrain.model.head import head_settings
from chattrain.model.hf_head import OwnHead
from tests.model.test_recompute import Watch
from tests.test_torch_compat import attended, under_autocast_of_cuda
from tests.tiny_hf import tiny_model

pytest.importorskip("transformers")

KINDS = ["llama", "qwen3", "gemma2", "cohere", "granite", "phi", "gpt2"]
SIZES = [20, 12]  # two documents a row


def batch(isolated: bool = False, width: int = 32) -> Batch:
    """Two rows, without loss on the first third."""
    ids = torch.randint(3, 340, (2, width + 1), generator=torch.Generator().manual_seed(1)).numpy()
    targets = ids[:, 1:].copy()
    targets[:, : width // 3] = -1
    rows = [tokens(x, y) for x, y in zip(ids[:, :-1], targets, strict=True)]
    return as_batch(rows, width, 0, [SIZES, SIZES] if isolated else None)


def documents(packed: Batch) -> Batch:
    """The same documents, each in a row of its own."""
    rows = [pair for x, y in zip(packed.inputs.numpy(), packed.targets.numpy(), strict=True) for pair in split(x, y)]
    return as_batch(rows, max(SIZES), 0)


def split(inputs, targets):
    return [tokens(inputs[:20], targets[:20]), tokens(inputs[20:], targets[20:])]


def tokens(inputs, targets) -> Tokens:
    return Tokens(inputs, targets, (targets >= 0).astype(np.float32), np.zeros(len(targets), np.int16))


def model_of(kind: str, **changes) -> hf.HFModel:
    return hf.HFModel(tiny_model(kind, **changes), {}).check().train()


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def plain_loss(inner, batch: Batch) -> torch.Tensor:
    logits = inner(input_ids=batch.inputs, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1, reduction="sum")


@contextmanager
def compiled_anew():
    """Gives a function that counts the graphs compiled within."""
    torch.compiler.reset()
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    yield lambda: stats["unique_graphs"] - before
    torch.compiler.reset()


# --- head ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_models_own_logits(kind, tied):
    model = model_of(kind, tie_word_embeddings=tied)
    assert not isinstance(model.head, OwnHead)
    rows = batch()
    expected = plain_loss(model.inner, rows)
    loss = model.loss(rows)
    torch.testing.assert_close(loss, expected.double(), rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    losses = model.losses(rows)
    assert losses.shape == rows.targets.shape and losses[rows.targets < 0].eq(0).all()
    torch.testing.assert_close(losses.sum(), expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_scored_as_the_models_own_logits(kind):
    model, ids = model_of(kind), batch().inputs
    places, choices = torch.tensor([31, 4]), torch.tensor([[9, 10], [300, 2]])
    logits, log_sum = model.choice_logits(ids, places, choices)
    own = model.inner(ids).logits[torch.arange(2), places].detach()
    torch.testing.assert_close(logits, own.gather(1, choices), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_sum, own.logsumexp(1), rtol=1e-4, atol=1e-4)


class Shifted(torch.nn.Linear):
    """A head that no entry of config.json tells of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * torch.arange(self.out_features)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_head_that_computes_more_is_used_as_it_is_and_said_once(caplog, bf16):
    inner = tiny_model("llama", tie_word_embeddings=False)
    inner.lm_head.__class__ = Shifted
    with caplog.at_level(logging.WARNING):
        model = hf.HFModel(inner, {}).check().train()
    assert len(caplog.records) == 1 and "the head of llama" in caplog.text
    rows, places, choices = batch(), torch.tensor([31, 4]), torch.tensor([[9, 10], [300, 2]])
    torch.testing.assert_close(model.loss(rows), plain_loss(inner, rows).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.losses(rows).sum(), plain_loss(inner, rows).detach(), rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits, _ = model.choice_logits(rows.inputs, places, choices)
    expected = inner(rows.inputs).logits[torch.arange(2), places].gather(1, choices)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def kept(model: torch.nn.Module, loss_of) -> int:
    with Watch(model) as watch:
        loss = loss_of()
        held = watch.held
    loss.backward()
    return held


def test_logits_are_not_kept_for_backward():
    model = model_of("llama", vocab_size=8000)
    rows = batch(width=128)
    logits, gradient = rows.inputs.numel() * 8000 * 4, 64 * 8000 * 4  # bytes; that of the head's weight is kept
    everything = kept(model, lambda: plain_loss(model.inner, rows))
    assert kept(model, lambda: model.loss(rows)) < everything - 0.9 * logits + gradient


def test_the_stream_of_a_bf16_run_is_bf16_and_keeps_less_at_no_loss_of_exactness():
    model = model_of("qwen3")
    rows = batch()
    exact = float(plain_loss(model.inner, rows).detach())
    fp32_stream = copy.deepcopy(model)
    fp32_stream.inner.get_input_embeddings().register_forward_hook(lambda module, inputs, embedded: embedded.float())
    sizes, errors = [], []
    for each in (model, fp32_stream):
        with torch.autocast("cpu", torch.bfloat16):
            sizes.append(kept(each, lambda each=each: each.loss(rows)))
            errors.append(abs(float(each.losses(rows).sum()) - exact) / exact)
    assert sizes[0] < sizes[1] and errors[0] < 5e-3 and errors[1] < 5e-3


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_one_row_have_the_losses_of_rows_of_their_own(kind):
    model, rows = model_of(kind), batch(isolated=True)
    alone = documents(rows)
    together = model.losses(rows)[rows.targets >= 0]
    torch.testing.assert_close(together, model.losses(alone)[alone.targets >= 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        model(rows.inputs, rows.targets, rows.positions)[rows.targets >= 0], together, rtol=1e-3, atol=1e-4
    )


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("isolated", [False, True])
def test_in_bf16_on_a_cpu_the_attention_of_compiled_models_gives_the_losses_of_the_plain_one(kind, isolated):
    model, rows = model_of(kind), batch(isolated)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.losses(rows)
        model.use_block_attention = attention.always
        blocked = model.losses(rows)
        model.loss(rows).backward()
    torch.testing.assert_close(blocked, plain, rtol=2e-2, atol=2e-2)


def varlen(monkeypatch, seen: list) -> None:
    """FlashAttention's stand-in on this CPU; `seen` gets the number of documents of each call."""

    def stand_in(q, k, v, cu_seqlens, longest):
        seen.append(len(cu_seqlens) - 1)
        assert longest == 32 and q.dtype == k.dtype == v.dtype
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        return attended(q, k, v, cu_seqlens)

    monkeypatch.setattr(torch_compat, "varlen_attn", stand_in)
    monkeypatch.setattr(hf, "has_varlen", lambda device, head_dim: True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])
def test_isolated_documents_go_through_varlen_attention_without_a_mask(kind, monkeypatch):
    seen: list[int] = []
    model, rows = model_of(kind), batch(isolated=True)
    expected = gradients(model.loss(rows), model)
    varlen(monkeypatch, seen)
    monkeypatch.setattr(attention, "document_mask", None)  # would fail
    with under_autocast_of_cuda():
        loss = model.loss(rows)
    assert len(seen) == 3  # one a layer
    for ours, theirs in zip(gradients(loss, model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind, why", [("gemma2", "does not use torch's SDPA"), ("mistral", "attention window of 16")])
def test_soft_caps_and_windows_keep_the_models_own_masks_and_say_so_once(kind, why, monkeypatch, caplog):
    seen: list[int] = []
    varlen(monkeypatch, seen)
    model, rows = model_of(kind), batch(isolated=True)
    alone = documents(rows)
    with caplog.at_level(logging.WARNING), under_autocast_of_cuda():
        together = [model.losses(rows) for _ in range(2)][1][rows.targets >= 0]
    torch.testing.assert_close(together, model.losses(alone)[alone.targets >= 0], rtol=1e-3, atol=1e-4)
    assert not seen and len(caplog.records) == 1 and why in caplog.text


def test_rows_within_the_window_go_through_varlen_attention(monkeypatch):
    seen: list[int] = []
    varlen(monkeypatch, seen)
    model, rows = model_of("mistral", sliding_window=32), batch(isolated=True)
    with under_autocast_of_cuda():
        model.losses(rows)
    assert len(seen) == 3


def test_an_architecture_whose_layers_do_more_than_attention_keeps_its_own(monkeypatch):
    """A layer that drops the arguments of the interface."""
    inner = tiny_model("llama")
    forward = inner.model.layers[1].self_attn.forward
    inner.model.layers[1].self_attn.forward = lambda *args, attend=None, **kwargs: forward(*args, **kwargs)
    model, rows = hf.HFModel(inner, {}).check().train(), batch(isolated=True)
    assert inner.config._attn_implementation == "sdpa" and model.keeps_attention
    alone = documents(rows)
    torch.testing.assert_close(
        model.losses(rows)[rows.targets >= 0], model.losses(alone)[alone.targets >= 0], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"sliding_window": 8}, 8),
        ({"sliding_window": 8, "use_sliding_window": False}, None),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, None),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, 8),
        ({"attention_chunk_size": 4}, 4),
        ({"sliding_window": None}, None),
    ],
)
def test_the_window_of_a_config(config, expected):
    assert hf_attention.window(type("Config", (), config)) == expected


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, isolated", [("llama", False), ("gemma2", False), ("qwen3", True)])
def test_one_compiled_layer_serves_all_layers_shapes_and_validation(kind, isolated, monkeypatch):
    """And gives the losses and gradients of the uncompiled model. Traced, but without the C++ compiler, which takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    graphs = []
    for layers in (2, 4):
        model = model_of(kind, num_hidden_layers=layers)
        rows, short = batch(isolated), batch(width=24)
        expected = gradients(model.loss(rows), model)
        losses = model.losses(rows)
        with compiled_anew() as num_graphs:
            model.compile_blocks(dynamic=True)
            model.head_settings = head_settings("cpu", compiled=False)
            for ours, theirs in zip(gradients(model.loss(rows), model), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
            first = num_graphs()
            torch.testing.assert_close(model.losses(rows), losses, rtol=1e-4, atol=1e-4)
            if not isolated:
                model.loss(short).backward()
            model.choice_logits(rows.inputs[:1, :7], torch.tensor([3]), torch.tensor([[4, 5]]))
            assert num_graphs() == first
            graphs.append(first)
    assert graphs[0] == graphs[1]


def test_layers_that_torch_cannot_compile_run_uncompiled_and_say_so_once(monkeypatch, caplog):
    model, rows = model_of("llama"), batch()
    expected = model.loss(rows)

    def broken(graph, inputs):
        raise NotImplementedError("no such operator")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiler(function, dynamic=dynamic, backend=broken))
    with compiled_anew(), caplog.at_level(logging.WARNING):
        model.compile_blocks(dynamic=True)
        model.head_settings = head_settings("cpu", compiled=False)
        for _ in range(2):
            torch.testing.assert_close(model.loss(rows), expected)
    assert [record for record in caplog.records if "cannot take the layers of llama" in record.getMessage()] == caplog.records
    assert len(caplog.records) == 1
