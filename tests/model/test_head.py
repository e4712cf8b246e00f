"""Head and loss in chunks, against the same written plainly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from chattrain.data.batch import Batch
from chattrain.model import head
from chattrain.model.gpt import soft_cap
from tests.foreign import random_gpt


def example(rows: int, vocab: int = 300) -> tuple[torch.nn.Parameter, torch.nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    features, weight = (torch.nn.Parameter(torch.randn(n, 24, generator=generator)) for n in (rows, vocab))
    return features, weight, torch.randint(0, vocab, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("compile", [False, True])
def test_loss_and_gradients_are_those_of_all_logits_at_once(rows, compile):
    settings = replace(head.head_settings("cpu", compile), chunk_elements=64 * 300)
    features, weight, targets = example(rows)
    plain = F.cross_entropy(soft_cap(features @ weight.T), targets, reduction="sum")
    expected = torch.autograd.grad(plain * 0.3, [features, weight])
    loss = head.summed_loss(features, weight, targets, 15.0, settings)
    torch.testing.assert_close(loss, plain.double(), rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss * 0.3, [features, weight]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_result_is_as_near_as_that_of_all_logits_at_once():
    features, weight, targets = example(150)
    exact = torch.autograd.grad(F.cross_entropy(soft_cap(features @ weight.T), targets, reduction="sum"), [features, weight])
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(soft_cap(F.linear(features, weight)), targets, reduction="sum")
        ours = head.summed_loss(features, weight, targets, 15.0, head.head_settings("cpu", compiled=False))
    torch.testing.assert_close(ours, plain.double(), rtol=1e-4, atol=1e-3)
    errors = [
        [(g - e).norm() / e.norm() for g, e in zip(torch.autograd.grad(loss, [features, weight]), exact, strict=True)]
        for loss in (ours, plain)
    ]
    assert all(mine < 1.2 * their for mine, their in zip(*errors, strict=True))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_loss_of_a_batch_is_the_sum_over_its_targets(share):
    model = random_gpt(300, n_layer=1, n_embd=32, n_head=2)
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randint(0, 300, (3, 20), generator=generator) for _ in range(2))
    targets[torch.rand(3, 20, generator=generator) > share] = -1
    places = (targets.flatten() >= 0).nonzero()[:, 0]
    batch = Batch(inputs, targets, 60, len(places), target_indices=places if share < 1 else None)
    expected = torch.autograd.grad(model(inputs, targets).sum(), list(model.parameters()))
    for ours, theirs in zip(torch.autograd.grad(model.loss(batch), list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
