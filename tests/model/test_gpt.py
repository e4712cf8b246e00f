"""The model: what it may see, what it starts as, and that its ways of computing agree."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from chattrain.model.gpt import GPT


def random_gpt(n_kv_head: int | None = None) -> GPT:
    """Weights that are zero at the start made random, so that logits differ."""
    model = GPT(vocab_size=97, n_layer=3, n_embd=48, n_head=4, n_kv_head=n_kv_head)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1, generator=generator)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


def test_a_new_model_gives_every_token_the_same_chance():
    model = GPT(vocab_size=97, n_layer=3, n_embd=48, n_head=4)
    model.init_weights(torch.Generator().manual_seed(0))
    losses = model(tokens(2, 8), tokens(2, 8))
    torch.testing.assert_close(losses, torch.full((2, 8), math.log(97)))


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_no_token_sees_the_future(n_kv_head):
    model, x = random_gpt(n_kv_head), tokens(1, 20)
    changed = x.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 97
    before, after = model(x)[0], model(changed)[0]
    torch.testing.assert_close(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:])


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_choices_are_scored_as_by_all_logits(n_kv_head):
    model, x, places = random_gpt(n_kv_head), tokens(4, 12), torch.tensor([11, 0, 7, 3])
    choices = tokens(4, 3)
    every = model(x)[torch.arange(4), places]
    logits, log_sum = model.choice_logits(x, places, choices)
    torch.testing.assert_close(logits, every.gather(1, choices), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_sum, every.logsumexp(1), rtol=1e-4, atol=1e-5)


def test_losses_are_the_cross_entropy_of_the_logits_and_zero_where_ignored():
    model, x, y = random_gpt(), tokens(2, 9), tokens(2, 9).roll(1, 1)
    y[0, :4] = -1
    losses = model(x, y)
    expected = F.cross_entropy(model(x).transpose(1, 2), y.clamp(min=0), reduction="none") * (y >= 0)
    torch.testing.assert_close(losses, expected)
    assert not losses[0, :4].any()


def test_logits_stay_within_the_soft_cap():
    model = random_gpt()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert model(tokens(1, 5)).abs().max() <= 15.0


def test_initial_weights_follow_from_the_generator_alone():
    a, b = (GPT(97, 2, 32, 2) for _ in range(2))
    a.init_weights(torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    b.init_weights(torch.Generator().manual_seed(5))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_flops_count_the_matmuls_of_forward_and_backward():
    model = GPT(vocab_size=100, n_layer=1, n_embd=8, n_head=2)
    weights = 4 * 8 * 8 + 2 * 8 * 32 + 8 * 100  # attention, MLP, head
    assert model.flops_per_token(16) == 6 * weights + 12 * 1 * 8 * 16
