"""The contracts of parts: chattrain's own keep them, and a part that breaks one is told how."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from chattrain.config.words import Supervise
from chattrain.data.collators import BestFit, Packed, Padded
from chattrain.model import gpt
from chattrain.optim import adamw, muon_adamw, schedules
from chattrain.optim.named import NamedOptimizer, over_groups
from chattrain.parts import (
    ContractBroken,
    check_collator,
    check_model,
    check_optimizer,
    check_schedule,
    check_source,
)
from chattrain.tasks import generated
from tests.optim.small_model import ADAMW, MUON

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2}


def broken(check, part) -> str:
    with pytest.raises(ContractBroken) as told:
        check(part)
    return str(told.value)


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant_then_linear", "linear", "cosine", "wsd"])
def test_our_schedules_keep_the_contract(name):
    check_schedule(getattr(schedules, name))


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (lambda step, n: "1", "no number"),
        (lambda step, n: float("nan"), "not finite"),
        (lambda step, n: 1 - 2 * step / n, "below 0"),
        (lambda step, n: 0.0, "all factors"),
        (lambda step, n: random.random(), "when asked again"),
    ],
)
def test_a_schedule_that_breaks_its_contract_is_told_how(schedule, said):
    assert said in broken(check_schedule, schedule)


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [partial(adamw.build, **ADAMW), partial(muon_adamw.build, **MUON)], ids=["adamw", "muon_adamw"])
def test_our_optimizers_keep_the_contract(build):
    check_optimizer(build)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.NAdam, torch.optim.Adamax, torch.optim.RMSprop])
def test_torchs_optimizers_over_groups_keep_the_contract(make):
    check_optimizer(lambda model, strategy: over_groups(make, model, strategy, lr=0.01))


class Forgetful(torch.optim.SGD):
    """Keeps a number outside of its state."""

    seen = 0

    def step(self, closure=None):
        self.seen += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad / self.seen
        return super().step()


class Normed(torch.optim.SGD):
    """Divides a gradient by its norm, for which it would need whole parameters."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad / p.grad.norm()
        return super().step()


class Stubborn(torch.optim.SGD):
    """Says that it knows `found_inf`, and steps."""

    @property
    def found_inf(self):
        return None

    @found_inf.setter
    def found_inf(self, value):
        pass


def bare(model, strategy):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def without_head(model, strategy):
    own = {"rest": [(n, p) for n, p in model.named_parameters() if "lm_head" not in n]}
    return NamedOptimizer([torch.optim.SGD([{"name": "rest", "params": [p for _, p in own["rest"]]}], lr=0.1)], own)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (bare, "not a NamedOptimizer"),
        (without_head, "each parameter of the model exactly once"),
        (lambda m, s: over_groups(Forgetful, m, s, lr=0.01), "outside of `state`"),
        (lambda m, s: over_groups(Normed, m, s, lr=0.01), "on two ranks"),
        (lambda m, s: over_groups(Stubborn, m, s, lr=0.01), "not finite changes weights"),
    ],
    ids=["bare", "without head", "forgetful", "normed", "stubborn"],
)
def test_an_optimizer_that_breaks_its_contract_is_told_how(build, said):
    assert said in broken(check_optimizer, build)


# --- collators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Packed, partial(Packed, isolate_documents=True), Padded, BestFit])
def test_our_collators_keep_the_contract(build):
    check_collator(build)


class Unmasked(Padded):
    """Trains on the user's turns too, and says that it does not."""

    def __init__(self, mixture, *arguments, **named):
        super().__init__(mixture, *arguments, **named)
        self.mixture = self.mixture.weighed(Supervise.all)
        self.mixture.weights = type(self.mixture.weights)(Supervise.all)


class Shuffling(Padded):
    def _document(self, row):
        return random.randrange(self.mixture.epoch_size) if row >= 0 else None


class Lossless(Padded):
    def batch(self, rows):
        return super().batch(rows)._replace(num_supervised=1000)


class Dropping(Padded):
    def split_micro_batches(self, rows, limits, world_size):
        return super().split_micro_batches(rows, limits, world_size)[1:]


class Endless(Padded):
    def batch(self, rows):
        batch = super().batch(rows)
        ends = batch.targets == self.pad_id
        targets = batch.targets.masked_fill(ends, -1)
        return batch._replace(
            targets=targets,
            target_indices=(targets.flatten() >= 0).nonzero().flatten(),
            weights=None,
            num_supervised=int((targets >= 0).sum()),
            sum_of_weights=None,
        )


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (Unmasked, "context tokens carry loss"),
        (Shuffling, "another batch when asked again"),
        (Lossless, "is divided by 1000"),
        (Dropping, "each row of the step once"),
        (Endless, "end a reply carry no loss"),
        (lambda *a, **k: "a list", "not a Collator"),
    ],
)
def test_a_collator_that_breaks_its_contract_is_told_how(build, said):
    assert said in broken(check_collator, build)


# --- models ----------------------------------------------------------------------------------------------------------


def test_our_model_keeps_the_contract():
    check_model(partial(gpt.build, **SIZES))
    check_model(partial(gpt.build, **SIZES, n_kv_head=1))


class Peeking(gpt.GPT):
    """Each token sees the mean of all."""

    def _embed(self, inputs):
        x = super()._embed(inputs)
        return x + x.mean(dim=1, keepdim=True)


class Joined(gpt.GPT):
    """Does not look at where documents begin."""

    def features(self, inputs, positions=None, cu_seqlens=None):
        return super().features(inputs)


class Forgetting(gpt.GPT):
    """Its cache is off by one."""

    def next_logits(self, inputs, cache, counts=None):
        return super().next_logits((inputs + 1) % self.vocab_size, cache, counts)


class Halved(gpt.GPT):
    def loss(self, batch):
        return super().loss(batch) / 2


def of(kind):
    def build(vocab_size, start, seed):
        model = kind(vocab_size, **SIZES)
        if start is None:
            model.init_weights(torch.Generator().manual_seed(seed))
        else:
            model.load_state_dict(gpt.build(vocab_size, start, seed, **SIZES).state_dict())
        return model

    return build


def unseeded(vocab_size, start, seed):
    return gpt.build(vocab_size, start, random.randrange(1 << 30), **SIZES)


def not_loading(vocab_size, start, seed):
    return gpt.build(vocab_size, None, seed, **SIZES)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (unseeded, "of one seed have different weights"),
        (not_loading, "has not its weights"),
        (of(Peeking), "a token sees later ones"),
        (of(Joined), "see each other"),
        (of(Forgetting), "not the likeliest"),
        (of(Halved), "the losses times their weights sum to"),
    ],
)
def test_a_model_that_breaks_its_contract_is_told_how(build, said):
    assert said in broken(check_model, build)


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", generated.NAMES)
def test_our_generated_data_keep_the_contract_of_a_source(name):
    check_source(lambda split: generated.records(name, split, 20), schema=generated.NAMES[name])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda split: [], "no record"),
        (lambda split: ["text"], "not a dict"),
        (lambda split: [{"text": {1, 2}}], "cannot be written as JSON"),
        (lambda split: [{"text": "a", "more": {1: 2}}], "once it was written as JSON"),
        (lambda split: [{"words": "a"}], "words"),
        (lambda split: [{"messages": [{"role": "nobody", "content": "x"}]}], "none of schema messages"),
        (lambda split: [{"text": str(random.random())}], "when asked again"),
    ],
)
def test_a_source_that_breaks_its_contract_is_told_how(source, said):
    assert said in broken(check_source, source)
