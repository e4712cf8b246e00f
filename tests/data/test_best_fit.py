"""Conversations side by side in rows: nothing lost, little left free, and each as if it stood alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chattrain
from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.cache import load_or_tokenize
from chattrain.data.collators import EMPTY, BestFit, Packed, Padded
from chattrain.data.mixture import Mixture
from chattrain.data.packing import IGNORE_INDEX, best_fit, positions_of
from chattrain.errors import RunFailed
from chattrain.model.gpt import GPT
from chattrain.setup.build import check_isolation
from tests.conftest import SHARED_DATA
from tests.foreign import random_gpt
from tests.helpers import TINY, metrics, write_talk

SEQ_LEN = 96


@pytest.fixture
def documents(tmp_path, tokenizer) -> Mixture:
    write_talk(tmp_path, count=40)
    return Mixture(
        [load_or_tokenize("talk", SourceConfig(str(tmp_path / "talk.jsonl")), tokenizer, tmp_path / "cache")],
        [SourceConfig("talk.jsonl")],
        seed=3,
    )


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return random_gpt(tokenizer.vocab_size, n_layer=2, n_embd=32, n_head=2)


# --- packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(50, 120))
def test_no_row_overflows_and_none_could_be_emptied_into_another(sizes, capacity):
    rows = best_fit(np.array(sizes), capacity)
    filled = np.bincount(rows, weights=sizes)
    assert sorted(set(rows)) == list(range(len(filled))) and filled.max() <= capacity
    assert sum(f <= capacity / 2 for f in filled) <= 1


@pytest.mark.parametrize(
    "sizes, capacity, rows",
    [
        ([6, 5, 4, 3], 10, [0, 1, 0, 1]),
        ([10, 10], 10, [0, 1]),
        ([7, 4, 2, 1], 10, [0, 1, 0, 0]),
        ([5, 5, 5], 10, [0, 0, 1]),
        ([4, 3, 3, 5], 10, [0, 1, 1, 0]),
        ([1], 1, [0]),
    ],
)
def test_a_row_is_filled_exactly_where_one_or_two_items_do_it(sizes, capacity, rows):
    assert best_fit(np.array(sizes), capacity).tolist() == rows


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_conversation_of_an_epoch_is_there_once_and_whole(documents):
    best, alone = BestFit(documents, SEQ_LEN, 0), Padded(documents, SEQ_LEN, 0)
    for epoch in (0, 1):
        rows = np.arange(best.rows_in(epoch), best.rows_in(epoch + 1)) if epoch else np.arange(best.rows_in(1))
        batch = best.batch(rows)
        found = []
        for inputs, targets, positions in zip(*(t.numpy() for t in batch.arguments), strict=True):
            cuts = np.flatnonzero(positions == 0).tolist()
            found += [(inputs[a:b].tolist(), targets[a:b].tolist()) for a, b in zip(cuts, [*cuts[1:], SEQ_LEN], strict=True)]
        found = sorted(pair for pair in found if any(t != IGNORE_INDEX for t in pair[1]))
        expected = []
        for row in range(len(documents)):
            one = alone.batch(np.array([row]))
            expected.append((one.inputs[0, : one.num_tokens].tolist(), one.targets[0, : one.num_tokens].tolist()))
        assert found == sorted(expected)
        assert batch.num_supervised == sum(t != IGNORE_INDEX for _, targets in expected for t in targets)


def test_losses_are_those_of_conversations_alone(documents, model):
    best, alone = BestFit(documents, SEQ_LEN, 0), Padded(documents, SEQ_LEN, 0)
    together = best.batch(np.arange(best.rows_in(1)))
    apart = [alone.batch(np.array([row])) for row in range(len(documents))]
    with torch.no_grad():
        a = model(*together.arguments)[together.targets >= 0].sort().values
        b = torch.cat([model(*one.arguments)[one.targets >= 0] for one in apart]).sort().values
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_conversations_alone(documents, model):
    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            model(*batch.arguments).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    best, alone = BestFit(documents, SEQ_LEN, 0), Padded(documents, SEQ_LEN, 0)
    together = gradients([best.batch(np.arange(best.rows_in(1)))])
    apart = gradients([alone.batch(np.array([row])) for row in range(len(documents))])
    assert (together - apart).norm() < 1e-5 * apart.norm()


def test_rows_follow_from_seed_and_number_alone_and_epochs_differ(documents):
    one, two = BestFit(documents, SEQ_LEN, 0), BestFit(documents, SEQ_LEN, 0)
    last = one.rows_in(3) - 1
    assert torch.equal(one.batch(np.array([last, 0])).inputs, two.batch(np.array([last, 0])).inputs)  # in any order asked
    rows = one.rows_in(1)
    assert [one.describe(r) for r in range(rows)] != [one.describe(rows + r) for r in range(rows)]


def test_rows_are_packed_once_and_taken_from_the_cache_by_later_runs(documents, tmp_path, monkeypatch):
    def kept(seed: int, seq_len: int = SEQ_LEN) -> BestFit:
        return BestFit(Mixture(documents.caches, documents.sources, seed, folder=tmp_path / "rows"), seq_len, 0)

    def packs(*_):
        raise AssertionError("packed again")

    fresh, first = BestFit(documents, SEQ_LEN, 0), kept(documents.seed)
    rows = fresh.rows_in(2)
    assert [first.describe(r) for r in range(rows)] == [fresh.describe(r) for r in range(rows)]
    monkeypatch.setattr("chattrain.data.collators.conversations.best_fit", packs)
    again = kept(documents.seed)
    assert [again.describe(r) for r in range(rows)] == [fresh.describe(r) for r in range(rows)]
    for other in (lambda: kept(documents.seed + 1), lambda: kept(documents.seed, SEQ_LEN + 1)):
        with pytest.raises(AssertionError, match="packed again"):
            other().describe(0)


def test_evaluation_ends_with_its_epoch(documents):
    best = BestFit(documents, SEQ_LEN, 0, last_epoch=0)
    batch = best.batch(np.array([best.rows_in(1), EMPTY]))
    assert batch.num_supervised == batch.num_tokens == 0


def test_conversations_longer_than_a_row_are_cut_and_counted(documents):
    best = BestFit(documents, 20, 0)
    assert best.counts.truncated == (documents.lengths > 21).sum() > 0


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
def test_real_conversations_fill_rows_to_99_5_percent(tmp_path, tokenizer):
    source = SourceConfig(str(SHARED_DATA / "gsm8k" / "main" / "train.parquet"))
    source.schema = Schema.gsm8k
    documents = Mixture([load_or_tokenize("gsm8k", source, tokenizer, tmp_path)], [source], seed=0)
    best = BestFit(documents, 2048, 0)
    rows = best.rows_in(1)
    assert (documents.lengths - 1).sum() >= 0.995 * rows * 2048 and best.counts.truncated == 0


# --- isolation -------------------------------------------------------------------------------------------------------


def test_packed_rows_with_isolated_documents_end_each_document_without_a_target(documents, tokenizer):
    plain, isolated = Packed(documents, SEQ_LEN, 0), Packed(documents, SEQ_LEN, 0, isolate_documents=True)
    rows = np.arange(plain.rows_in(1) - 1)
    a, b = plain.batch(rows), isolated.batch(rows)
    assert torch.equal(a.inputs, b.inputs) and a.positions is None
    begins = a.targets == tokenizer.special("<|bos|>")
    assert begins.any() and torch.equal(b.targets, a.targets.masked_fill(begins, IGNORE_INDEX))
    assert torch.equal(b.positions == 0, (a.inputs == tokenizer.special("<|bos|>")) | (torch.arange(SEQ_LEN) == 0))


def test_a_token_sees_its_own_document_only(model):
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.from_numpy(np.stack([positions_of([9, 15], 24), positions_of([1, 20, 3], 24)]))
    with torch.no_grad():
        together = model(ids, None, positions)
        torch.testing.assert_close(together[0, :9], model(ids[:1, :9])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[0, 9:], model(ids[:1, 9:])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[1, 1:21], model(ids[1:, 1:21])[0], rtol=1e-4, atol=1e-4)


def test_the_canary_dies_where_documents_see_each_other(model):
    check_isolation(model.features, (2, 32), 300, torch.device("cpu"))
    with pytest.raises(RunFailed, match="not isolated on cpu"):
        check_isolation(lambda inputs, *isolated: model.features(inputs), (2, 32), 300, torch.device("cpu"))


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, collator",
    [
        ("sft", ["collator=best_fit"]),
        ("mid", ["collator.isolate_documents=true"]),
        ("sft", ["collator=best_fit", "train.compile=true", "model.n_layer=1"]),
    ],
)
def test_a_run_trains_on_isolated_documents_and_resumes_to_the_bit(workplace, stage, collator):
    write_talk(workplace)
    settings = [
        f"stage={stage}",
        *TINY,
        "init.from=scratch",
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "train.max_steps=4",
        *collator,
    ]
    whole = chattrain.run([*settings, "run.name=whole"])
    chattrain.run([*settings, "run.name=parts"])
    (Path("runs") / stage / "parts/checkpoints/step_000004/manifest.json").unlink()
    parts = chattrain.run([*settings, "run.name=parts"])
    assert whole["metrics"]["val/loss"] == parts["metrics"]["val/loss"]
    losses = [line["train/loss"] for line in metrics(whole["run_dir"]) if "train/loss" in line]
    assert losses[-1] < losses[0]
