"""Optimizers against those of torch, and the routing of parameters."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from chattrain.config.words import StateDType
from chattrain.errors import UserError
from chattrain.model.gpt import GPT
from chattrain.optim import adamw, muon_adamw, newton_schulz
from chattrain.optim.cores import on_cores
from chattrain.optim.groups import parameter_groups
from chattrain.optim.muon_adamw import STATE_DTYPES, Muon
from chattrain.optim.newton_schulz import group_by_shape, orthogonalize

MUON = {
    "lr_scale": 1.0,
    "matrix_lr": 0.02,
    "embed_lr": 0.2,
    "lm_head_lr": 0.004,
    "vector_lr": None,
    "momentum": 0.95,
    "momentum_start": 0.85,
    "momentum_warmup_steps": 300,
    "ns_steps": 5,
    "betas": [0.8, 0.95],
    "eps": 1e-10,
    "weight_decay": 0.0,
}
ADAMW = {"lr": 1e-3, "lr_scale": 1.0, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def small_gpt() -> GPT:
    model = GPT(vocab_size=300, n_layer=2, n_embd=32, n_head=2, n_kv_head=1)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


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


def test_adamw_follows_torchs_adamw_for_50_steps():
    model, reference = small_gpt(), small_gpt()
    ours = adamw.build(model, **ADAMW)
    decayed = [p for n, p in reference.named_parameters() if n.startswith("transformer.h")]
    plain = [p for n, p in reference.named_parameters() if not n.startswith("transformer.h")]
    theirs = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    for step in range(50):
        gradients(model, step)
        gradients(reference, step)
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


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


def test_when_a_piece_of_work_fails_none_is_under_way_any_more():
    begun, done = [], []

    def work(piece: int) -> None:
        begun.append(piece)
        time.sleep(0.05)
        if piece == 1:
            raise ValueError("piece 1")
        time.sleep(0.1)
        done.append(piece)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="piece 1"):
            on_cores(work, list(range(9)))
    finally:
        torch.set_num_threads(before)
    assert sorted([*done, 1]) == sorted(begun) and len(begun) < 9


def test_work_on_cores_raises_and_leaves_the_threads_of_others_alone():
    def fail(piece: int) -> None:
        raise ValueError(f"piece {piece}")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        done = []
        on_cores(lambda piece: done.append((piece, torch.get_num_threads())), list(range(6)))
        assert sorted(done) == [(piece, 1) for piece in range(6)]
        with pytest.raises(ValueError, match="piece 0"):
            on_cores(fail, [0])
        with pytest.raises(ValueError, match="piece"):
            on_cores(fail, [0, 1])
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_an_update_of_zeros_stays_zero():
    assert not orthogonalize(torch.zeros(3, 8, 16), steps=5).any()
    assert not orthogonalize(torch.zeros(8, 16), steps=5).any()


def test_every_parameter_belongs_to_exactly_one_group():
    model = small_gpt()
    groups = parameter_groups(model)
    names = [name for members in groups.values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [name for name, _ in groups["embed"]] == ["transformer.wte.weight"]
    assert [name for name, _ in groups["lm_head"]] == ["lm_head.weight"]
    assert all(name.startswith("transformer.h.") for name, _ in groups["matrix"]) and not groups["vector"]


def test_a_tied_embedding_is_the_heads_and_stepped_once():
    model = small_gpt()
    model.transformer.wte.weight = model.lm_head.weight
    groups = parameter_groups(model)
    assert not groups["embed"] and len(groups["lm_head"]) == 1


def test_a_parameter_of_three_dimensions_is_refused():
    model = small_gpt()
    model.odd = nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(UserError, match="odd"):
        parameter_groups(model)


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


@pytest.mark.parametrize("build, settings", [(muon_adamw.build, MUON), (adamw.build, ADAMW)])
def test_lr_scale_multiplies_every_groups_learning_rate(build, settings):
    plain = build(small_gpt(), **settings).learning_rates()
    scaled = build(small_gpt(), **settings | {"lr_scale": 0.3}).learning_rates()
    assert scaled.keys() == plain.keys() and len(plain) == 3
    for name, rate in plain.items():
        assert scaled[name] == pytest.approx(0.3 * rate)


def test_embeddings_and_head_are_scaled_by_the_width_and_matrices_are_not():
    rates = muon_adamw.build(small_gpt(), **MUON).learning_rates()
    width = (32 / 768) ** -0.5
    assert rates == pytest.approx({"lr/matrix": 0.02, "lr/embed": 0.2 * width, "lr/lm_head": 0.004 * width})


def test_the_factor_applies_to_the_learning_rate_the_optimizer_was_built_with():
    optimizer = muon_adamw.build(small_gpt(), **MUON)
    for factor in (0.5, 0.25):
        optimizer.set_lr_factor(factor)
        assert optimizer.learning_rates()["lr/matrix"] == pytest.approx(0.02 * factor)


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


@pytest.mark.parametrize("build, settings", [(muon_adamw.build, MUON), (adamw.build, ADAMW)])
def test_state_saved_and_loaded_goes_on_to_the_same_bits(build, settings):
    model, twin = small_gpt(), small_gpt()
    one, two = build(model, **settings), build(twin, **settings)
    for step in range(3):
        gradients(model, step)
        one.step()
    twin.load_state_dict(model.state_dict())
    two.load_state(one.state())
    gradients(model, 9)
    gradients(twin, 9)
    one.step()
    two.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


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


def test_no_optimizer_keeps_gradients_or_copies_of_them():
    model = small_gpt()
    optimizer = muon_adamw.build(model, **MUON)
    gradients(model, 0)
    held = {p.grad.data_ptr() for p in model.parameters()}
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    state = optimizer.state()
    assert {name.rpartition("/")[2] for name in state} == {"step", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert not held & {tensor.data_ptr() for tensor in state.values()}


def test_state_of_another_optimizer_is_refused():
    model = small_gpt()
    one = adamw.build(model, **ADAMW)
    gradients(model, 0)
    one.step()
    with pytest.raises(ValueError, match="another optimizer"):
        muon_adamw.build(small_gpt(), **MUON).load_state(one.state())
