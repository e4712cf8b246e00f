"""Muon against torch's, its iterations, and nanochat's optimizer around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from chattrain.config.words import StateDType
from chattrain.errors import UserError
from chattrain.optim import muon_adamw, newton_schulz
from chattrain.optim.muon_adamw import STATE_DTYPES, Muon
from chattrain.optim.newton_schulz import group_by_shape, orthogonalize
from tests.optim.small_model import MUON, gradients, small_gpt


@pytest.mark.parametrize("shape", [(32, 32), (128, 32), (32, 128), (48, 16)])
def test_muon_follows_torchs_muon_for_50_steps(shape):
    ours = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    theirs = nn.Parameter(ours.detach().clone())
    a = Muon([ours], lr=0.02, momentum=0.95, momentum_start=0.95, momentum_warmup_steps=0)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, ns_steps=5)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        grad = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
def test_orthogonalized_updates_have_singular_values_near_one(shape):
    update = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(3)), steps=5)
    values = torch.linalg.svdvals(update.float())
    assert values.median() > 0.6 and values.max() < 1.4


@pytest.mark.parametrize("together", [2, 16])
def test_matrices_of_a_shape_take_the_same_step_together_and_alone(monkeypatch, together):
    """As on a GPU, where they go through one batched iteration."""
    alone, batched = small_gpt(), small_gpt()
    optimizers = [muon_adamw.build(model, **MUON) for model in (alone, batched)]
    for step in range(5):
        for model, optimizer, most in ((alone, optimizers[0], 1), (batched, optimizers[1], together)):
            monkeypatch.setitem(newton_schulz.SETTINGS, "cpu", newton_schulz.MuonSettings(batch=most))
            gradients(model, step)
            optimizer.step()
    for p, q in zip(alone.parameters(), batched.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)
    assert group_by_shape([p for p in alone.transformer.h.parameters()], 2)[:2] == [[0, 3], [6, 9]]


@pytest.mark.parametrize("shape", [(500, 500), (200, 900), (500, 300), (192, 192), (193, 400)])
def test_symmetric_products_in_strips_change_no_direction(shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    in_strips = orthogonalize(update, 5, torch.float64)
    torch.testing.assert_close(in_strips, orthogonalize(update, 5, torch.float64, strip=math.inf), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(256, 512), (200, 800), (800, 200), (256, 256)])
@pytest.mark.parametrize("decades", [0.5, 2, 3])
def test_several_iterations_at_once_round_at_most_1_8_times_as_much_as_torchs_single_ones(shape, decades):
    """In bf16, against the same polynomials in fp64, with singular values over so many decades. In fp32 it hardly rounds."""
    generator = torch.Generator().manual_seed(5)
    short, long = sorted(shape)
    left, right = (torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64))[0] for n in (short, long))
    update = left * torch.logspace(0, -decades, short, dtype=torch.float64) @ right.T
    update = update if shape[0] == short else update.T
    exact = orthogonalize(update, 5, torch.float64)
    theirs = nn.Parameter(torch.zeros(shape))
    theirs.grad = update.float()
    torch.optim.Muon([theirs], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    theirs = -theirs.detach() / max(1.0, shape[0] / shape[1]) ** 0.5
    error, reference = (torch.dist(found.double(), exact) / exact.norm() for found in (orthogonalize(update, 5), theirs))
    assert error < 1.8 * reference < 0.15
    assert torch.dist(orthogonalize(update, 5, torch.float32).double(), exact) / exact.norm() < 2e-5


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_a_step_is_the_same_to_the_bit_on_any_number_of_cores(cores):
    def stepped(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        model = small_gpt()
        optimizer = muon_adamw.build(model, **MUON)
        for step in range(3):
            gradients(model, step)
            optimizer.step()
        assert torch.get_num_threads() == threads
        return list(model.parameters())

    before = torch.get_num_threads()
    try:
        for p, q in zip(stepped(1), stepped(cores), strict=True):
            assert torch.equal(p, q)
    finally:
        torch.set_num_threads(before)


def test_an_update_of_zeros_stays_zero():
    assert not orthogonalize(torch.zeros(3, 8, 16), steps=5).any()
    assert not orthogonalize(torch.zeros(8, 16), steps=5).any()


def test_muon_adamw_refuses_vector_parameters_by_name_unless_they_have_a_learning_rate():
    model = small_gpt()
    model.gain = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="gain"):
        muon_adamw.build(model, **MUON)
    optimizer = muon_adamw.build(model, **MUON | {"vector_lr": 0.01, "lr_scale": 0.5, "weight_decay": 0.1})
    assert optimizer.learning_rates()["lr/vector"] == pytest.approx(0.005)
    assert {group["name"]: group.get("weight_decay") for group in optimizer.param_groups} == {
        "matrix": None,
        "embed": 0.1,
        "lm_head": 0.1,
        "vector": 0.0,
    }


def test_a_learning_rate_for_vectors_that_are_not_there_is_refused():
    with pytest.raises(UserError, match=r"vector_lr=0.01 has no effect"):
        muon_adamw.build(small_gpt(), **MUON | {"vector_lr": 0.01})


def test_embeddings_and_head_are_scaled_by_the_width_and_matrices_are_not():
    rates = muon_adamw.build(small_gpt(), **MUON).learning_rates()
    width = (32 / 768) ** -0.5
    assert rates == pytest.approx({"lr/matrix": 0.02, "lr/embed": 0.2 * width, "lr/lm_head": 0.004 * width})


def test_muons_momentum_warms_up_with_its_steps():
    p, q = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    warm = Muon([p], lr=0.1, momentum=0.95, momentum_start=0.0, momentum_warmup_steps=2)
    plain = Muon([q], lr=0.1, momentum=0.0, momentum_start=0.0, momentum_warmup_steps=0)
    generator = torch.Generator().manual_seed(5)
    p.grad = torch.randn(4, 4, generator=generator)
    q.grad = p.grad.clone()
    warm.step()
    plain.step()
    torch.testing.assert_close(p, q)  # step 0: no momentum yet
    p.grad = torch.randn(4, 4, generator=generator)
    q.grad = p.grad.clone()
    warm.step()
    plain.step()
    assert not torch.allclose(p, q)


def test_momentum_in_bf16_takes_half_the_bytes_and_moves_nearly_alike():
    full, half = small_gpt(), small_gpt()
    one, two = (
        muon_adamw.build(model, **MUON, momentum_dtype=kind) for model, kind in ((full, StateDType.fp32), (half, StateDType.bf16))
    )
    start = {name: p.detach().clone() for name, p in full.named_parameters()}
    for step in range(20):
        gradients(full, step)
        gradients(half, step)
        one.step()
        two.step()
    momentum = [state for name, state in two.state().items() if name.endswith("momentum_buffer")]
    assert momentum and all(tensor.dtype == torch.bfloat16 for tensor in momentum)
    assert all(t.dtype == torch.float32 for name, t in two.state().items() if not name.endswith("momentum_buffer"))
    for (name, p), q in zip(full.named_parameters(), half.parameters(), strict=True):
        assert (q - p).norm() < 0.02 * (p - start[name]).norm()


@pytest.mark.parametrize("before, after", [("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_momentum_is_taken_over_in_the_format_asked_for(before, after):
    model, twin = small_gpt(), small_gpt()
    one, two = (muon_adamw.build(m, **MUON, momentum_dtype=StateDType[kind]) for m, kind in ((model, before), (twin, after)))
    for step in range(3):
        gradients(model, step)
        one.step()
    saved = one.state()
    twin.load_state_dict(model.state_dict())
    two.load_state(saved)
    for name, tensor in two.state().items():
        assert tensor.dtype == (STATE_DTYPES[StateDType[after]] if name.endswith("momentum_buffer") else torch.float32)
        assert torch.equal(tensor, saved[name].to(tensor.dtype))
    if before == after:
        gradients(model, 9)
        gradients(twin, 9)
        one.step()
        two.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
