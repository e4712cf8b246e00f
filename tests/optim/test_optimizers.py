"""What the optimizers have in common: groups, learning rates, state. And AdamW against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chattrain.errors import UserError
from chattrain.optim import adamw, muon_adamw
from chattrain.optim.groups import parameter_groups
from chattrain.optim.named import over_groups
from tests.optim.small_model import ADAMW, MUON, gradients, small_gpt


def test_adamw_is_torchs_to_the_bit():
    model, reference = small_gpt(), small_gpt()
    ours = adamw.build(model, **ADAMW)
    decayed = [p for n, p in reference.named_parameters() if n.startswith("transformer.h")]
    plain = [p for n, p in reference.named_parameters() if not n.startswith("transformer.h")]
    theirs = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    for step in range(50):
        gradients(model, step)
        gradients(reference, step)
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


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


@pytest.mark.parametrize("build, settings", [(muon_adamw.build, MUON), (adamw.build, ADAMW)])
def test_lr_scale_multiplies_every_groups_learning_rate(build, settings):
    plain = build(small_gpt(), **settings).learning_rates()
    scaled = build(small_gpt(), **settings | {"lr_scale": 0.3}).learning_rates()
    assert scaled.keys() == plain.keys() and len(plain) == 3
    for name, rate in plain.items():
        assert scaled[name] == pytest.approx(0.3 * rate)


def test_the_factor_applies_to_the_learning_rate_the_optimizer_was_built_with():
    optimizer = muon_adamw.build(small_gpt(), **MUON)
    for factor in (0.5, 0.25):
        optimizer.set_lr_factor(factor)
        assert optimizer.learning_rates()["lr/matrix"] == pytest.approx(0.02 * factor)


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


class Signed(torch.optim.Optimizer):
    """One of a user's own, that knows nothing of chattrain."""

    def __init__(self, params, lr, decay=0.5):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, group["decay"])
                p.add_(average.sign(), alpha=-group["lr"])


ANY = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd without state": (torch.optim.SGD, {}),
    "nadam": (torch.optim.NAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "adamax": (torch.optim.Adamax, {}),
    "one's own": (Signed, {}),
}


@pytest.mark.parametrize("name", ANY)
def test_any_torch_optimizer_over_the_groups_goes_on_from_its_state_to_the_same_bits(name):
    make, settings = ANY[name]
    model, twin = small_gpt(), small_gpt()
    one, two = (over_groups(make, m, None, lr=0.01, **settings) for m in (model, twin))
    assert set(one.learning_rates()) == {"lr/matrix", "lr/embed", "lr/lm_head"}
    for step in range(2):
        gradients(model, step)
        one.step()
    twin.load_state_dict(model.state_dict())
    if one.state():
        two.load_state(one.state())
    for m, optimizer in ((model, one), (twin, two)):
        gradients(m, 9)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_state_of_another_torch_optimizer_is_refused():
    one = over_groups(torch.optim.SGD, small_gpt(), None, lr=0.01, momentum=0.9)
    gradients(model := small_gpt(), 0)
    other = over_groups(torch.optim.NAdam, model, None, lr=0.01)
    other.step()
    with pytest.raises(ValueError, match="another optimizer"):
        one.load_state(other.state())


@pytest.mark.parametrize("name", ANY)
def test_a_void_step_of_any_torch_optimizer_changes_nothing(name):
    make, settings = ANY[name]
    model = small_gpt()
    optimizer = over_groups(make, model, None, lr=0.01, **settings)
    before = [p.detach().clone() for p in model.parameters()]
    for void, same in ((1.0, True), (0.0, False)):
        gradients(model, 0)
        optimizer.void_if(torch.tensor(void))
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)) == same
