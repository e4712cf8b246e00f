"""The model: what it may see, what it starts as, and that its ways of computing agree."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from chattrain.model.generate import generate, generate_batch
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
def test_the_key_value_cache_changes_no_logit(n_kv_head):
    model, x = random_gpt(n_kv_head), tokens(2, 20)
    cache = model.new_cache(torch.zeros(2, dtype=torch.long), max_tokens=20)
    parts = [model.decode(part, cache) for part in (x[:, :7], x[:, 7:8], x[:, 8:])]  # prompt, one token, a chunk
    torch.testing.assert_close(torch.cat(parts, dim=1), model.features(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_what_pads_a_row_at_its_left_is_never_seen(n_kv_head):
    model, x, padding = random_gpt(n_kv_head), tokens(3, 16), torch.tensor([0, 5, 9])
    other = torch.where(torch.arange(16) < padding[:, None], (x + 1) % 97, x)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        cache = model.new_cache(padding, 16)
        return torch.stack([model.next_logits(part, cache) for part in (rows[:, :12], rows[:, 12:13], rows[:, 13:])])

    assert torch.equal(logits(x), logits(other))
    for row, pad in zip(range(3), padding.tolist(), strict=True):
        alone = model(x[row : row + 1, pad:])[0]
        torch.testing.assert_close(logits(x)[:, row], alone[[11 - pad, 12 - pad, 15 - pad]], rtol=1e-4, atol=1e-5)


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


def test_greedy_generation_is_the_argmax_of_the_whole_row():
    model, prompt = random_gpt(), tokens(6).tolist()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    out = list(generate(model, prompt, max_tokens=8, stop_ids=set()))
    row = list(prompt)
    for token in out:
        assert token == int(model(torch.tensor([row]))[0, -1].argmax())
        row.append(token)
    assert len(out) == 8


def test_generation_ends_at_a_stop_token_which_is_not_part_of_the_reply():
    model, prompt = random_gpt(), tokens(6).tolist()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    free = list(generate(model, prompt, max_tokens=8, stop_ids=set()))
    stop = free[3]
    assert list(generate(model, prompt, max_tokens=8, stop_ids={stop})) == free[: free.index(stop)]


def test_sampling_follows_from_the_seed():
    model, prompt = random_gpt(), tokens(6).tolist()
    one, two, other = (list(generate(model, prompt, 12, set(), temperature=1.0, top_k=50, seed=s)) for s in (1, 1, 2))
    assert one == two and one != other


PROMPTS = [tokens(40)[a:b].tolist() for a, b in ((0, 6), (6, 7), (7, 20), (20, 38))]


@pytest.mark.parametrize("n_kv_head", [None, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_many_lengths_get_together_what_each_gets_alone(n_kv_head, temperature):
    model = random_gpt(n_kv_head)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    free = generate_batch(model, PROMPTS, 12, set(), temperature, 50, seed=3)
    assert all(len(reply) == 12 for reply in free) and len(set(map(tuple, free))) == len(PROMPTS)
    for stop in (reply[at] for reply in free for at in (0, 5, 11)):
        together = generate_batch(model, PROMPTS, 12, {stop}, temperature, 50, seed=3)
        assert together == [reply[: reply.index(stop)] if stop in reply else reply for reply in free]
    assert free == [list(generate(model, prompt, 12, set(), temperature, 50, seed=3)) for prompt in PROMPTS]


def test_a_reply_does_not_depend_on_its_company():
    model = random_gpt()
    replies = generate_batch(model, PROMPTS, 12, set(), temperature=1.0, seed=1)
    assert generate_batch(model, PROMPTS[::-1], 12, set(), temperature=1.0, seed=1) == replies[::-1]
    assert generate_batch(model, PROMPTS[1:3], 12, set(), temperature=1.0, seed=1) == replies[1:3]
    assert generate_batch(model, [], 12, set()) == []


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
