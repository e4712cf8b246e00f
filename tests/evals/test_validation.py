"""Validation loss and bits per byte, against a loop over single tokens of single rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from chattrain.config.data import SourceConfig
from chattrain.data.cache import TokenizedSource
from chattrain.data.collators import BestFit, Packed, Padded
from chattrain.data.loss_weights import MEASURED
from chattrain.data.mixture import Mixture
from chattrain.data.passes import PassLimits
from chattrain.evals.validation import Validation
from chattrain.model.gpt import GPT
from chattrain.parallel.ranks import Ranks
from tests.documents import tokenized

CPU = torch.device("cpu")
VOCAB, SPECIAL = 61, 9  # the last 9 ids are special: they stand for no bytes
SEQ_LEN = 24


@pytest.fixture(scope="module")
def model() -> GPT:
    """Two layers with random weights everywhere, so that every token has another loss."""
    model = GPT(VOCAB, n_layer=2, n_embd=32, n_head=2)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def token_bytes() -> np.ndarray:
    sizes = np.random.default_rng(2).integers(1, 6, VOCAB).astype(np.int32)
    sizes[-SPECIAL:] = 0
    return sizes


def mixture() -> Mixture:
    """25 documents of 3 to 40 tokens, special tokens among them, about half of the tokens supervised."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 40, 25)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = rng.integers(0, 2, offsets[-1]).astype(np.uint8)
    mask[offsets[:-1]], mask[offsets[:-1] + 1] = 0, 1
    tokens = rng.integers(0, VOCAB, offsets[-1]).astype(np.uint16)
    return Mixture([tokenized("a", tokens, mask, offsets)], [SourceConfig("a")], seed=0, loss=MEASURED)


def packed() -> Packed:
    return Packed(mixture(), SEQ_LEN, VOCAB - 1, last_epoch=0)


def masked() -> Padded:
    return Padded(mixture(), SEQ_LEN, VOCAB - 1, last_epoch=0)


def packed_rows() -> list[tuple[list[int], list[bool]]]:
    """(tokens, is each the assistant's) of a row: SEQ_LEN inputs and the token after the last."""
    documents = mixture()
    pairs = [zip(*documents.document(i), strict=True) for i in documents.order(0)]
    stream = [(int(token), weight == 1) for pair in pairs for token, weight in pair]
    rows = [stream[start : start + SEQ_LEN + 1] for start in range(0, len(stream) - 1, SEQ_LEN)]
    return [([token for token, _ in row], [reply for _, reply in row]) for row in rows]


def masked_rows() -> list[tuple[list[int], list[bool]]]:
    documents = mixture()
    cut = [[array[: SEQ_LEN + 1].tolist() for array in documents.document(i)] for i in documents.order(0)]
    return [(ids, [weight == 1 for weight in weights]) for ids, weights in cut]


@torch.no_grad()
def slow(model: GPT, rows, token_bytes) -> dict[str, float]:
    """A token at a time: its probability after what stands before it in its row."""
    of_replies, of_all, bits, bytes_ = [], [], 0.0, 0
    for ids, replies in rows:
        probabilities = torch.softmax(model(torch.tensor([ids[:-1]]))[0].double(), dim=-1)
        for i in range(1, len(ids)):
            p = float(probabilities[i - 1, ids[i]])
            of_all.append(-math.log(p))
            of_replies += [-math.log(p)] if replies[i] else []
            if token_bytes[ids[i]] > 0:
                bits, bytes_ = bits - math.log2(p), bytes_ + int(token_bytes[ids[i]])
    return {"val/loss": np.mean(of_replies), "val/loss_all": np.mean(of_all), "val/bpb": bits / bytes_}


def validate(collator, losses_of, token_bytes, device_batch_size: int = 4, rows: int | None = None, ranks=None) -> dict:
    rows = collator.rows_in(1) if rows is None else rows
    limits = PassLimits(device_batch_size, device_batch_size * collator.seq_len, "cpu")
    return Validation(collator, rows, limits, token_bytes, CPU, ranks or Ranks())(losses_of)


@pytest.mark.parametrize("make, rows", [(packed, packed_rows), (masked, masked_rows)], ids=["packed", "masked"])
def test_loss_and_bits_per_byte_equal_a_loop_over_single_tokens(model, token_bytes, make, rows):
    assert validate(make(), model.losses, token_bytes) == pytest.approx(slow(model, rows(), token_bytes), rel=1e-5)


@pytest.mark.parametrize("make", [packed, masked])
def test_the_numbers_do_not_depend_on_the_batch_size(model, token_bytes, make):
    one = validate(make(), model.losses, token_bytes, 1)
    for device_batch_size in (2, 7, 16, 64):  # with a last batch that is not full
        assert validate(make(), model.losses, token_bytes, device_batch_size) == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("make", [packed, masked])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_measure_the_same_to_the_bit(model, token_bytes, make, world_size):
    class OneAfterTheOther(Ranks):
        def sum(self, values):
            tables.append(values)
            return [sum(column) for column in zip(*tables, strict=True)]

    tables: list[list[float]] = []
    for rank in range(world_size):
        measured = validate(make(), model.losses, token_bytes, 2, ranks=OneAfterTheOther(rank, rank, world_size))
    assert len(tables) == world_size and measured == validate(make(), model.losses, token_bytes, 2)


def test_special_tokens_count_no_bytes_and_their_loss_is_no_bits():
    """Each ordinary token costs 3 bits, each special one 100: only val/loss sees the special ones."""
    ids = np.array([60, 1, 2, 59, 58, 3, 4, 57], dtype=np.uint16)
    made = tokenized("a", ids, np.ones(8), [0, 8])
    collator = Packed(Mixture([made], [SourceConfig("a")], seed=0, loss=MEASURED), 8, pad_id=60, last_epoch=0)
    token_bytes = np.array([2] * (VOCAB - SPECIAL) + [0] * SPECIAL, dtype=np.int32)
    bits = torch.tensor([3.0] * (VOCAB - SPECIAL) + [100.0] * SPECIAL)

    def losses_of(batch):
        return bits[batch.targets.clamp(min=0)] * math.log(2) * (batch.targets >= 0)

    measured = validate(collator, losses_of, token_bytes)
    assert measured["val/bpb"] == pytest.approx(4 * 3 / (4 * 2))
    assert measured["val/loss"] == pytest.approx(math.log(2) * (4 * 3 + 3 * 100) / 7)


def test_a_model_that_knows_nothing_needs_the_bits_of_a_uniform_guess(token_bytes):
    model = GPT(VOCAB, n_layer=1, n_embd=16, n_head=2)
    model.init_weights(torch.Generator().manual_seed(0))
    measured = validate(packed(), model.losses, np.minimum(token_bytes, 1))
    assert measured["val/loss"] == pytest.approx(math.log(VOCAB))
    assert measured["val/bpb"] == pytest.approx(math.log2(VOCAB))


def test_fewer_rows_measure_the_first_ones(model, token_bytes):
    assert validate(packed(), model.losses, token_bytes, rows=5) == pytest.approx(slow(model, packed_rows()[:5], token_bytes))


def test_measuring_leaves_no_gradients(model, token_bytes):
    validate(masked(), model.losses, token_bytes)
    assert all(parameter.grad is None for parameter in model.parameters())


def isolated() -> Packed:
    return Packed(mixture(), SEQ_LEN, VOCAB - 1, last_epoch=0, isolate_documents=True)


def padded() -> Padded:
    return Padded(mixture(), 40, VOCAB - 1, last_epoch=0)


def best_fit() -> BestFit:
    return BestFit(mixture(), 40, VOCAB - 1, last_epoch=0)


@pytest.mark.parametrize("make", [packed, isolated, padded, best_fit])
def test_what_a_loss_was_measured_on_is_said(model, token_bytes, make):
    collator = make()
    rows = collator.rows_in(1)
    validation = Validation(collator, rows, PassLimits(4, 4 * SEQ_LEN, "cpu"), token_bytes, CPU, Ranks())
    validation(model.losses)
    batches = [collator.batch(np.array([row])) for row in range(rows)]
    measured = validation.measured
    assert measured is not None and measured.rows == rows
    assert measured.tokens == sum(b.num_supervised for b in batches) == sum(count for _, count in measured.passes)
    assert measured.all_tokens == sum(int((b.targets >= 0).sum()) for b in batches) > measured.tokens


@pytest.mark.parametrize("make", [Padded, BestFit])
def test_each_source_has_the_metrics_that_it_has_alone(model, token_bytes, make):
    (whole,) = mixture().caches
    halves = [whole_part(whole, "b/c d", 0, 10), whole_part(whole, "e", 10, 25)]
    together = validate(make(of(*halves), 40, VOCAB - 1, last_epoch=0), model.losses, token_bytes)
    for half, name in zip(halves, ("b_c_d", "e"), strict=True):
        alone = validate(make(of(half), 40, VOCAB - 1, last_epoch=0), model.losses, token_bytes)
        assert alone.keys() == {"val/loss", "val/loss_all", "val/bpb"}
        for metric, value in alone.items():
            assert together[f"{metric}/{name}"] == pytest.approx(value, rel=1e-6)
    assert len(together) == 9


def whole_part(whole: TokenizedSource, name: str, start: int, stop: int) -> TokenizedSource:
    """Documents start to stop as a source of their own."""
    a, b = whole.offsets[start], whole.offsets[stop]
    return tokenized(name, whole.tokens[a:b], whole.kinds[a:b], whole.offsets[start : stop + 1] - a)


def of(*sources: TokenizedSource) -> Mixture:
    return Mixture(list(sources), [SourceConfig(source.name) for source in sources], seed=0, loss=MEASURED)
