"""AdamW with moments in bf16, against torch's with moments in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chattrain.config.words import StateDType
from chattrain.optim import adamw
from chattrain.optim.adamw_bf16 import AdamWBF16, round_stochastically
from tests.optim.small_model import ADAMW, gradients, small_gpt

BF16 = ADAMW | {"state_dtype": StateDType.bf16}


def regression(optimizer_of, steps: int = 200) -> tuple[list[float], torch.Tensor]:
    """Losses and weights of a small regression with noisy gradients."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(32, generator=generator)
    weight = nn.Parameter(torch.zeros(32))
    optimizer, losses = optimizer_of([weight]), []
    for _ in range(steps):
        x = torch.randn(64, 32, generator=generator)
        loss = (x @ weight - x @ truth - 0.1 * torch.randn(64, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, weight.detach()


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_a_regression_ends_where_moments_in_fp32_end(beta2):
    settings = {"lr": 0.05, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.0}
    losses, weights = regression(lambda params: AdamWBF16(params, **settings))
    theirs, reference = regression(lambda params: torch.optim.AdamW(params, **settings))
    assert (weights - reference).norm() < 0.01 * reference.norm()
    assert sum(losses[-20:]) == pytest.approx(sum(theirs[-20:]), rel=0.1) and losses[-1] < 0.01 * losses[0]


def test_the_state_takes_half_the_bytes_and_moves_weights_nearly_alike():
    full, half = small_gpt(), small_gpt()
    one, two = adamw.build(full, **ADAMW), adamw.build(half, **BF16)
    start = {name: p.detach().clone() for name, p in full.named_parameters()}
    for step in range(20):
        for model, optimizer in ((full, one), (half, two)):
            gradients(model, step)
            optimizer.step()
    sizes = [sum(t.nbytes for t in optimizer.state().values() if t.ndim) for optimizer in (one, two)]
    assert sizes[1] * 2 == sizes[0]
    for (name, p), q in zip(full.named_parameters(), half.parameters(), strict=True):
        assert (q - p).norm() < 0.02 * (p - start[name]).norm()


def test_squared_gradients_that_have_become_small_are_forgotten_as_in_fp32():
    """Rounded to the nearest number, their average would stay for ever: it falls by 0.1 % a step."""
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBF16([weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    weight.grad = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    first = optimizer.state[weight]["exp_avg_sq"].float().sum()
    weight.grad = torch.zeros(4096)
    for _ in range(1000):
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].float().sum() / first == pytest.approx(0.999**1000, rel=0.03)


def test_rounding_is_right_on_average_and_never_by_more_than_one_number_of_bf16():
    values = torch.rand(1_000_000, generator=torch.Generator().manual_seed(2)) + 0.01
    rounded = round_stochastically(values.clone(), step=7)
    assert torch.equal(rounded, rounded.bfloat16().float())
    error = (rounded - values) / values
    assert abs(error.mean()) < 1e-5 and error.abs().max() < 2**-7 and error.std() > 1e-3
    assert not torch.equal(rounded, round_stochastically(values.clone(), step=8))
    assert not round_stochastically(torch.zeros(8), step=3).any()


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_parameter_in_pieces_steps_as_the_whole_to_the_bit(chunk):
    """As ranks that share its state step it, and in chunks of any size."""
    whole, pieces = nn.Parameter(torch.ones(100)), [nn.Parameter(torch.ones(n)) for n in (30, 70)]
    one, two = (AdamWBF16(params, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1) for params in ([whole], pieces))
    two.chunk_elements = chunk
    for step in range(5):
        whole.grad = torch.randn(100, generator=torch.Generator().manual_seed(step))
        for piece, grad in zip(pieces, whole.grad.split([30, 70]), strict=True):
            piece.grad = grad.clone()
        one.step()
        two.step()
    assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("before, after", [("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_moments_are_taken_over_in_the_format_asked_for(before, after):
    model, twin = small_gpt(), small_gpt()
    one, two = (adamw.build(m, **ADAMW, state_dtype=StateDType[kind]) for m, kind in ((model, before), (twin, after)))
    for step in range(3):
        gradients(model, step)
        one.step()
    saved = one.state()
    twin.load_state_dict(model.state_dict())
    two.load_state(saved)
    wanted = torch.bfloat16 if after == "bf16" else torch.float32
    for name, tensor in two.state().items():
        assert not tensor.ndim or (tensor.dtype == wanted and torch.equal(tensor, saved[name].to(wanted)))
    gradients(model, 9)
    gradients(twin, 9)
    one.step()
    two.step()
    if before == after:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
