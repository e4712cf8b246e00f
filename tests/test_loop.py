"""The loop on its own: when it reads from the device."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from chattrain import loop
from chattrain.config.words import StateDType
from chattrain.data.batch import Batch
from chattrain.errors import RunFailed
from chattrain.model.gpt import GPT
from chattrain.optim import adamw
from chattrain.optim.adamw_bf16 import AdamWBF16
from chattrain.optim.groups import parameter_groups
from chattrain.optim.muon_adamw import build
from chattrain.optim.named import NamedOptimizer
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import SingleProcess
from tests.optim.small_model import ADAMW

RATES = dict(
    lr_scale=1.0,
    matrix_lr=0.02,
    embed_lr=0.2,
    lm_head_lr=0.004,
    vector_lr=None,
    momentum=0.95,
    momentum_start=0.85,
    momentum_warmup_steps=300,
    ns_steps=5,
    betas=[0.8, 0.95],
    eps=1e-10,
    weight_decay=0.0,
)


def muon_adamw_build(model):
    return build(model, **RATES)


def adamw_build(model):
    return adamw.build(model, **ADAMW)


def adamw_bf16_build(model):
    return adamw.build(model, **ADAMW, state_dtype=StateDType.bf16)


def as_on_cuda(model):
    """muon_adamw, with an AdamW that reads nothing on the device meta either: torch's fused one does not run there."""
    muon, adamw = muon_adamw_build(model).optimizers
    members = [{key: group[key] for key in ("name", "params", "lr")} for group in adamw.param_groups]
    return NamedOptimizer([muon, AdamWBF16(members, lr=0.0, betas=(0.8, 0.95), eps=1e-10)], parameter_groups(model))


class Recorder:
    """Parts of a run of a tiny model on a device, and what the loop asked of them."""

    def __init__(self, device: str, factors=None, build=muon_adamw_build):
        with torch.device(device):
            self.model = GPT(vocab_size=64, n_layer=2, n_embd=32, n_head=2)
            ids = torch.randint(0, 64, (2, 16))
        if device == "cpu":
            self.model.init_weights(torch.Generator().manual_seed(0))
        batch = Batch(inputs=ids, targets=ids, num_tokens=32, num_supervised=32)
        self.factors, self.calls = iter(factors or []), []
        loader = SimpleNamespace(waited_s=0.0, step=lambda step: [batch, batch], describe=lambda step: f"rows of step {step}")
        self.parts = loop.TrainerComponents(
            model=self.model,
            loss_of=self.loss,
            optimizer=build(self.model),
            lr_factor=lambda step: 1.0,
            loader=loader,
            evaluate=lambda step: self.calls.append(("evaluate", step)) or {},
            save=lambda state: self.calls.append(("save", state.step)),
            finish_saving=lambda: None,
            is_best=lambda step, metrics: False,
            track=lambda step, metrics: self.calls.append(("track", step)),
            show=lambda step: None,
            stop_asked=lambda: False,
            save_asked=lambda: False,
            ranks=Ranks(),
            strategy=SingleProcess(),
            max_grad_norm=1.0,
            checks_each_step=device == "cpu",
            max_skipped=None,
            watch=lambda step, loss: None,
            flops_per_token=1,
            peak_flops=None,
            meters=dict,
        )

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.model(batch.inputs, batch.targets).sum() * next(self.factors, 1.0)


def test_a_step_on_another_device_reads_nothing_back():
    """A meta tensor has no values: whatever asks for one raises, as waiting for a GPU would cost time."""
    there = Recorder("meta", build=as_on_cuda)
    for step in range(2):
        result = loop.train_step(there.parts, there.parts.loader.step(step), step, logged=True)
    with pytest.raises(RuntimeError):
        result.loss.item()


def test_a_parameter_that_the_loss_does_not_reach_counts_as_one_of_gradient_zero():
    here = Recorder("cpu")
    here.model.unused = torch.nn.Linear(4, 4, bias=False)
    here.parts.optimizer = build(here.model, **RATES)
    before = here.model.unused.weight.detach().clone()
    loop.train_step(here.parts, here.parts.loader.step(0), 0)
    assert torch.equal(here.model.unused.weight, before)
    assert "unused.weight/momentum_buffer" in here.parts.optimizer.state()


@pytest.mark.parametrize("waits", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("make", [muon_adamw_build, adamw_build, adamw_bf16_build], ids=["muon_adamw", "adamw", "adamw_bf16"])
@pytest.mark.parametrize("alone", [False, True], ids=["loss and gradient", "the loss alone"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_state(make, waits, alone):
    here = Recorder("cpu", factors=[1.0, 1.0, 1.0 if alone else float("nan"), 1.0, 1.0, 1.0], build=make)
    added = iter([0.0, 0.0, float("inf") if alone else 0.0])
    here.parts.loss_of = lambda batch: here.loss(batch) + next(added, 0.0)  # as of a target whose logit is -inf
    here.parts.checks_each_step = waits
    loop.train_step(here.parts, here.parts.loader.step(0), 0)
    weights = [p.detach().clone() for p in here.model.parameters()]
    state = {name: value.clone() for name, value in here.parts.optimizer.state().items()}
    loop.train_step(here.parts, here.parts.loader.step(1), 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, here.model.parameters(), strict=True))
    after = here.parts.optimizer.state()
    assert all(torch.equal(state[name], after[name]) for name in state if not name.endswith("/step"))
    loop.train_step(here.parts, here.parts.loader.step(2), 2)
    assert not all(torch.equal(a, b) for a, b in zip(weights, here.model.parameters(), strict=True))


def test_on_a_cpu_the_run_ends_with_the_step_that_is_not_finite():
    here = Recorder("cpu", factors=[1.0, 1.0, float("nan")])
    with pytest.raises(RunFailed, match=r"step 2: .*rows of step 1"):
        loop.fit(here.parts, loop.State(), loop.Cadence(log=9, evaluate=None, save=None, last_step=9))
    assert here.calls == [("evaluate", 0)]


@pytest.mark.parametrize("waits", [True, False])
def test_steps_that_are_not_finite_are_skipped_and_counted_up_to_a_limit(waits, caplog):
    bad = [1.0, float("nan")]
    for limit, ends in ((2, True), (1, False)):
        here = Recorder("cpu", factors=[*bad, 1.0, 1.0, *bad, 1.0, 1.0])
        here.parts.checks_each_step, here.parts.max_skipped = waits, limit
        tracked = []
        here.parts.track = lambda step, metrics, tracked=tracked: tracked.append(metrics)
        cadence, state = loop.Cadence(log=4, evaluate=None, save=None, last_step=4), loop.State()
        if ends:
            assert loop.fit(here.parts, state, cadence).skipped == 2
            assert tracked[-1]["train/skipped"] == 2 and math.isfinite(tracked[-1]["train/loss"])
            assert sum("skipped: it changed nothing" in record.message for record in caplog.records) == 2
        else:
            with pytest.raises(RunFailed, match=r"step 3: .*2th step of this kind"):
                loop.fit(here.parts, state, cadence)


def test_elsewhere_the_first_step_that_is_not_finite_is_named_before_anything_is_tracked_or_saved():
    here = Recorder("cpu", factors=[1.0, 1.0, float("inf"), 1.0])
    here.parts.checks_each_step = False  # as on a device whose step is not waited for
    unread = [loop.train_step(here.parts, here.parts.loader.step(step), step) for step in range(3)]
    with pytest.raises(RunFailed, match=r"step 2: non-finite loss \(inf\)"):
        loop.sync_and_check_finite(here.parts, unread, loop.State())
    assert here.calls == []


def test_the_gradient_norm_of_each_group_is_tracked_with_that_of_all():
    here = Recorder("cpu")
    tracked = []
    here.parts.track = lambda step, metrics: tracked.append(metrics)
    loop.fit(here.parts, loop.State(), loop.Cadence(log=1, evaluate=None, save=None, last_step=2))
    for metrics in tracked:
        groups = {name: norm for name, norm in metrics.items() if name.startswith("train/grad_norm/")}
        assert {name.removeprefix("train/grad_norm/") for name in groups} == {"matrix", "embed", "lm_head"}
        assert sum(norm**2 for norm in groups.values()) == pytest.approx(metrics["train/grad_norm"] ** 2, rel=1e-5)


def test_the_loop_evaluates_logs_and_saves_when_due():
    here = Recorder("cpu")
    state = loop.fit(here.parts, loop.State(), loop.Cadence(log=2, evaluate=3, save=4, last_step=5))
    assert (state.step, state.tokens_seen) == (5, 5 * 64)
    assert here.calls == [
        ("evaluate", 0),
        ("track", 2),
        ("evaluate", 3),
        ("track", 4),
        ("save", 4),
        ("track", 5),
        ("evaluate", 5),
        ("save", 5),
    ]
