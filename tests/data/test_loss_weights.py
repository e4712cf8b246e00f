"""What of a document carries loss, with every collator: policies apart from rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from chattrain.chat import Kind
from chattrain.config.data import SourceConfig
from chattrain.config.words import Supervise
from chattrain.data.collators import BestFit, Packed, Padded
from chattrain.data.loss_weights import LossWeights
from chattrain.data.mixture import Mixture
from chattrain.errors import UserError
from chattrain.model.gpt import GPT
from tests.documents import tokenized

VOCAB, SEQ_LEN = 97, 48
COLLATORS = [Packed, Padded, BestFit]


def documents(loss: LossWeights, off: bool = True, seed: int = 0, count: int = 12) -> Mixture:
    """Conversations of one to four turns, each a prompt and a reply of 2 to 5 tokens after a first token; some turns are off."""
    rng = np.random.default_rng(seed)
    kinds, turns, offsets = [], [], [0]
    for _ in range(count):
        kinds.append(Kind.PROMPT)
        turns.append(0)
        for turn in range(rng.integers(1, 5)):
            flag = Kind.OFF if off and rng.random() < 0.3 else 0
            for kind in (Kind.PROMPT, Kind.ASSISTANT):
                size = int(rng.integers(2, 6))
                kinds += [kind | flag] * size
                turns += [turn] * size
        offsets.append(len(kinds))
    tokens = rng.integers(0, VOCAB, len(kinds))
    return Mixture([tokenized("a", tokens, kinds, offsets, turns)], [SourceConfig("a")], seed=0, loss=loss)


def expected_weights(mixture: Mixture, document: int, loss: LossWeights) -> list[float]:
    """The weight of each token, by the words of docs/data.md."""
    _, kinds, turns = mixture.caches[0][document]
    replied = [t for k, t in zip(kinds.tolist(), turns.tolist(), strict=True) if k & Kind.ASSISTANT]
    weights = []
    for kind, turn in zip(kinds.tolist(), turns.tolist(), strict=True):
        reply = kind & Kind.ASSISTANT and (loss.supervise != Supervise.last_assistant or turn == max(replied))
        supervised = loss.supervise == Supervise.all or reply
        weights.append(0.0 if kind & Kind.OFF else 1.0 if supervised else loss.prompt_weight)
    return weights


POLICIES = [
    LossWeights(Supervise.all),
    LossWeights(Supervise.assistant),
    LossWeights(Supervise.last_assistant),
    LossWeights(Supervise.assistant, 0.25),
    LossWeights(Supervise.last_assistant, 0.25),
    LossWeights(Supervise.assistant, 1.0),
]


@pytest.mark.parametrize("loss", POLICIES, ids=lambda p: f"{p.supervise.name}-{p.prompt_weight}")
def test_a_padded_row_weighs_each_target_as_its_kind_and_turn_say(loss):
    mixture = documents(loss)
    padded = Padded(mixture, SEQ_LEN, 0)
    for row, document in enumerate(padded.mixture.order(0).tolist()):
        batch, expected = padded.batch(np.array([row])), expected_weights(mixture, document, loss)[1 : SEQ_LEN + 1]
        weights = (batch.targets >= 0).float() if batch.weights is None else batch.weights
        assert weights[0, : len(expected)].tolist() == expected and not weights[0, len(expected) :].any()
        assert torch.equal(batch.targets >= 0, weights > 0)
        assert batch.num_supervised == expected.count(1.0)
        assert batch.loss_weight == pytest.approx(sum(expected))


@pytest.mark.parametrize("make", COLLATORS)
def test_without_a_word_packed_supervises_everything_and_the_others_the_assistant(make):
    plain, said = make(documents(LossWeights()), SEQ_LEN, 0), make(documents(LossWeights(make.supervises)), SEQ_LEN, 0)
    rows = np.arange(plain.rows_in(1))
    assert make.supervises == (Supervise.all if make is Packed else Supervise.assistant)
    assert torch.equal(plain.batch(rows).targets, said.batch(rows).targets)


@pytest.mark.parametrize("make", COLLATORS)
def test_a_turn_that_is_off_is_never_a_target(make):
    for loss in POLICIES:
        collator = make(documents(loss), SEQ_LEN, 0)
        mixture = collator.mixture
        off = [int(t) for i in range(len(mixture)) for t, k in zip(*mixture.caches[0][i][:2], strict=True) if k & Kind.OFF]
        kept = [int(t) for i in range(len(mixture)) for t, k in zip(*mixture.caches[0][i][:2], strict=True) if not k & Kind.OFF]
        batch = collator.batch(np.arange(collator.rows_in(1)))
        targets = batch.targets[batch.targets >= 0].tolist()
        for token in set(off) - set(kept):
            assert token not in targets


@pytest.fixture(scope="module")
def model() -> GPT:
    model, generator = GPT(VOCAB, n_layer=2, n_embd=32, n_head=2), torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def gradients(model: GPT, collator) -> torch.Tensor:
    """Loss and gradient of an epoch, divided by its loss weight, as one vector."""
    model.zero_grad()
    batch = collator.batch(np.arange(collator.rows_in(1)))
    loss = model.loss(batch) / batch.loss_weight
    loss.backward()
    return torch.cat([loss.detach().flatten().float(), *(p.grad.flatten() for p in model.parameters())])


@pytest.mark.parametrize("make", [Padded, BestFit])
@pytest.mark.parametrize("weight, same", [(1.0, LossWeights(Supervise.all)), (0.0, LossWeights(Supervise.assistant))])
def test_prompt_weight_goes_from_assistant_to_all(model, make, weight, same):
    weighed = make(documents(LossWeights(Supervise.assistant, weight), off=False), SEQ_LEN, 0)
    expected = gradients(model, make(documents(same, off=False), SEQ_LEN, 0))
    found = gradients(model, weighed)
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("make", COLLATORS)
def test_loss_and_gradient_are_the_weighted_mean_over_tokens(model, make):
    """Against cross-entropies of all tokens, weighed one by one."""
    collator = make(documents(LossWeights(Supervise.assistant, 0.25)), SEQ_LEN, 0)
    batch = collator.batch(np.arange(collator.rows_in(1)))
    assert batch.weights is not None and 0 < batch.num_supervised < batch.loss_weight < int((batch.targets >= 0).sum())
    losses = model(*batch.arguments)
    model.zero_grad()
    expected = (losses * batch.weights).sum() / batch.weights.sum()
    expected.backward()
    slow = torch.cat([expected.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])
    found = gradients(model, collator)
    assert (found - slow).norm() < 1e-5 * slow.norm()


def test_packed_isolated_with_supervised_assistants_gives_each_whole_document_the_losses_of_best_fit(model):
    loss = LossWeights(Supervise.assistant)
    found = [losses_by_document(model, make) for make in (isolated(loss), BestFit(documents(loss), SEQ_LEN, 0))]
    common = found[0].keys() & found[1].keys()
    assert len(common) >= 6  # the documents that the stream does not cut
    for document in common:
        assert found[0][document] == pytest.approx(found[1][document], rel=1e-4, abs=1e-5)


def isolated(loss: LossWeights) -> Packed:
    return Packed(documents(loss), SEQ_LEN, 0, isolate_documents=True)


def losses_by_document(model: GPT, collator) -> dict[tuple[int, ...], list[float]]:
    """Input tokens of each whole document of an epoch -> losses of its targets."""
    whole = {tuple(collator.mixture.document(i)[0].tolist()) for i in range(len(collator.mixture))}
    batch = collator.batch(np.arange(collator.rows_in(1)))
    with torch.no_grad():
        losses = model(*batch.arguments)
    found = {}
    for row in range(len(batch.inputs)):
        cuts = [*(batch.positions[row] == 0).nonzero()[:, 0].tolist(), SEQ_LEN]
        for a, b in pairwise(cuts):
            inputs = tuple(batch.inputs[row, a:b].tolist())
            targets = batch.targets[row, a:b]
            for document in whole:
                # Packed keeps the last token of a document as an input whose target is the next document's first.
                if inputs in (document, document[:-1]):
                    found[document] = losses[row, a:b][targets >= 0].tolist()
    return found


def test_a_document_without_a_token_that_carries_loss_has_no_row():
    kinds = [0, 0, 1, 1, 0, 0, 3, 3]  # two turns, the second off
    mixture = [
        Mixture([tokenized("a", range(8), kinds, [0, 8], [0] * 4 + [1] * 4)], [SourceConfig("a")], 0, loss=loss)
        for loss in (LossWeights(Supervise.last_assistant), LossWeights(Supervise.last_assistant, 0.5))
    ]
    with pytest.raises(UserError, match="last_assistant"):
        Padded(mixture[0], SEQ_LEN, 0)
    assert Padded(mixture[1], SEQ_LEN, 0).batch(np.array([0])).loss_weight == 0.5 * 5  # first and last of the turns before it


def test_a_prompt_weight_that_no_token_has_is_refused():
    with pytest.raises(UserError, match=r"loss\.prompt_weight=0\.5 has no effect"):
        Packed(documents(LossWeights(Supervise.auto, 0.5)), SEQ_LEN, 0)


@pytest.mark.parametrize("loss", POLICIES, ids=lambda p: f"{p.supervise.name}-{p.prompt_weight}")
@pytest.mark.parametrize("seq_len", [7, SEQ_LEN])
@pytest.mark.parametrize("make", [*COLLATORS, lambda *a: Packed(*a, isolate_documents=True)])
def test_counting_rows_gives_what_their_batches_hold(make, seq_len, loss):
    collator = make(documents(loss), seq_len, 0)
    for start, stop in ((0, 1), (0, 5), (3, 5 + collator.rows_in(2))):
        batch = collator.batch(np.arange(start, stop))
        assert collator.count(np.arange(start, stop)) == (batch.num_tokens, batch.num_supervised)


@pytest.mark.parametrize("make", COLLATORS)
def test_a_budget_ends_with_the_first_step_that_reaches_it(make):
    collator = make(documents(LossWeights(Supervise.assistant)), SEQ_LEN, 0)
    batches = [collator.batch(np.arange(3 * step, 3 * step + 3)) for step in range(9)]  # into the second epoch
    tokens = np.cumsum([batch.num_tokens for batch in batches])
    supervised = np.cumsum([batch.num_supervised for batch in batches])
    for step in range(9):
        assert collator.steps_within(3, tokens=int(tokens[step])) == step + 1
        assert collator.steps_within(3, supervised=int(supervised[step])) == step + 1
        assert collator.steps_within(3, supervised=int(supervised[step]) + 1) == step + 2
