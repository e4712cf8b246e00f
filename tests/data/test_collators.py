"""Packed: one stream, no padding, every token a target. Padded: one conversation a row, targets where the mask says."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.config.data import SourceConfig
from chattrain.data.cache import load_or_tokenize
from chattrain.data.collators import EMPTY, Packed, Padded
from chattrain.data.mixture import Mixture
from chattrain.data.passes import PassLimits
from chattrain.errors import UserError
from tests.documents import tokenized

many = settings(max_examples=150, deadline=None, derandomize=True, database=None)
PAD = 9_999  # no document holds it
lengths = st.lists(st.integers(2, 9), min_size=1, max_size=12)
masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=11).map(lambda m: [False, *m]), min_size=1, max_size=12)


def mixture(masks: list[list[bool]], seed: int = 1) -> Mixture:
    """TokenizedSource of source `a` with these masks; every token of all documents is another number."""
    flat, sizes = [m for mask in masks for m in mask], [len(mask) for mask in masks]
    made = tokenized("a", np.arange(len(flat)), flat, np.cumsum([0, *sizes]))
    return Mixture([made], [SourceConfig("a")], seed)


def text(sizes: list[int]) -> Mixture:
    return mixture([[False] + [True] * (n - 1) for n in sizes])


def stream(documents: Mixture, epochs: int) -> list[int]:
    """All tokens of these epochs, one document after the other."""
    return [int(t) for epoch in range(epochs) for i in documents.order(epoch) for t in documents.document(i)[0]]


def rows_of(collator, rows) -> list[tuple[list[int], list[int]]]:
    batch = collator.batch(np.array(rows))
    return list(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True))


@many
@given(lengths, st.integers(1, 8))
def test_packed_rows_one_after_the_other_are_the_token_stream(sizes, seq_len):
    documents = text(sizes)
    tokens = stream(documents, 3)
    collator = Packed(documents, seq_len, PAD)
    rows = rows_of(collator, range((len(tokens) - 1) // seq_len))  # over the ends of two epochs
    inputs, targets = ([t for row in rows for t in row[side]] for side in (0, 1))
    assert inputs == tokens[: len(inputs)]  # no padding, each token an input once
    assert targets == tokens[1 : len(targets) + 1]  # and a target once
    assert len(inputs) > 2 * sum(sizes) - seq_len
    batch = collator.batch(np.arange(len(rows)))
    assert batch.num_tokens == batch.num_supervised == len(inputs)


@many
@given(lengths, st.integers(1, 8), st.integers(1, 3), st.integers(1, 4))
def test_packed_steps_lose_no_token_of_the_epochs_and_make_no_step_too_many(sizes, seq_len, epochs, rows_per_step):
    documents = text(sizes)
    needed = len(stream(documents, epochs)) - 1  # targets: the first token has none
    collator = Packed(documents, seq_len, PAD)
    rows, steps = collator.rows_in(epochs), collator.steps_in(epochs, rows_per_step)
    assert (rows - 1) * seq_len < needed <= rows * seq_len
    assert (steps - 1) * rows_per_step < rows <= steps * rows_per_step


@many
@given(lengths, st.integers(1, 8))
def test_a_packed_stream_that_ends_has_ignored_targets_behind_its_end(sizes, seq_len):
    documents = text(sizes)
    tokens = stream(documents, 1)
    collator = Packed(documents, seq_len, PAD, last_epoch=0)
    n = collator.rows_in(1)
    rows = rows_of(collator, range(n + 2))
    pairs = [pair for x, y in rows for pair in zip(x, y, strict=True)]
    assert pairs[: len(tokens) - 1] == list(pairwise(tokens))
    assert set(pairs[len(tokens) - 1 :]) <= {(PAD, -1)}
    batch = collator.batch(np.arange(n + 2))
    assert batch.num_tokens == batch.num_supervised == len(tokens) - 1


@many
@given(lengths, st.integers(1, 8), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_packed_row_is_the_same_whatever_was_asked_for_before(sizes, seq_len, rows):
    collator = Packed(text(sizes), seq_len, PAD)
    asked_in_this_order = [rows_of(collator, [row])[0] for row in rows]
    assert asked_in_this_order == rows_of(Packed(text(sizes), seq_len, PAD), rows)


def test_half_an_epoch_of_packed_rows_ends_with_the_document_in_the_middle():
    documents = text([5] * 10)
    assert Packed(documents, 6, PAD).rows_in(0.5) == math.ceil((25 - 1) / 6)
    assert Packed(documents, 6, PAD).rows_in(1.5) == math.ceil((75 - 1) / 6)


def test_a_tenth_more_than_an_epoch_is_not_rounded_up_by_floating_point():
    documents = text([5] * 10)  # 1.1 x 10 documents are 11, though 1.1 * 10 is 11.000000000000002
    assert Packed(documents, 1, PAD).rows_in(1.1) == 11 * 5 - 1
    assert Padded(documents, 8, PAD).rows_in(1.1) == 11


def slow_masked(tokens, mask, seq_len: int) -> list[tuple[int, int]]:
    """(input, target) pairs of a conversation, a token at a time."""
    pairs = []
    for i in range(min(len(tokens) - 1, seq_len)):
        pairs.append((int(tokens[i]), int(tokens[i + 1]) if mask[i + 1] else -1))
    return pairs


def usable(mask: list[bool], seq_len: int) -> bool:
    return any(mask[1 : seq_len + 1])


@many
@given(masks, st.integers(1, 10))
def test_masked_rows_have_targets_where_the_mask_says_and_padding_that_is_ignored(masks, seq_len):
    documents = mixture(masks)
    if not any(usable(mask, seq_len) for mask in masks):
        masks[0][1] = True
        documents = mixture(masks)
    collator = Padded(documents, seq_len, PAD)
    n = collator.rows_in(1)
    order = collator.mixture.order(0).tolist()
    batch = collator.batch(np.arange(n))
    assert sorted(order) == [i for i, mask in enumerate(masks) if usable(mask, seq_len)]  # each once, the others never
    expected = [slow_masked(*documents.document(i), seq_len) for i in order]
    for row, (x, y) in zip(expected, rows_of(collator, range(n)), strict=True):
        assert list(zip(x, y, strict=True)) == row + [(PAD, -1)] * (len(x) - len(row))
        assert len(x) <= seq_len
    assert batch.num_tokens == sum(map(len, expected))
    assert batch.num_supervised == sum(target != -1 for row in expected for _, target in row) >= n


@many
@given(masks, st.integers(1, 10))
def test_what_masked_rows_cut_and_leave_out_is_counted(masks, seq_len):
    masks[0][1] = True
    counts = Padded(mixture(masks), seq_len, PAD).counts
    kept = [mask for mask in masks if usable(mask, seq_len)]
    cut = [len(mask) - seq_len - 1 for mask in kept if len(mask) > seq_len + 1]
    assert (counts.documents, counts.left_out) == (len(kept), len(masks) - len(kept))
    assert (counts.truncated, counts.truncated_tokens) == (len(cut), sum(cut))


def test_no_usable_conversation_is_a_users_mistake():
    with pytest.raises(UserError, match=r"train.seq_len=3 tokens.*shortest has 6 tokens"):
        Padded(mixture([[False] * 5 + [True], [False] * 8]), 3, PAD)


def test_masked_epochs_go_on_in_another_order():
    collator = Padded(text([5] * 30), 8, PAD)
    epochs = [[x[0] for x, _ in rows_of(collator, range(30 * e, 30 * (e + 1)))] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert collator.rows_in(3) == 90 and collator.steps_in(3, 8) == 12


def test_a_masked_evaluation_ends_with_its_epoch():
    collator = Padded(text([5] * 3), 8, PAD, last_epoch=0)
    assert [any(t != -1 for t in y) for _, y in rows_of(collator, range(5))] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("kind", [Packed, Padded])
def test_empty_rows_are_padding_without_targets(kind):
    collator = kind(text([6, 4, 5]), 4, PAD)
    (x, y), _, (x2, y2) = rows_of(collator, [EMPTY, 0, EMPTY])
    assert set(x) == set(x2) == {PAD} and set(y) == set(y2) == {-1}
    alone = collator.batch(np.array([EMPTY, EMPTY]))
    assert (alone.num_tokens, alone.num_supervised) == (0, 0)
    with_row, row = collator.batch(np.array([EMPTY, 1])), collator.batch(np.array([1]))
    assert (with_row.num_tokens, with_row.num_supervised) == (row.num_tokens, row.num_supervised)


@many
@given(masks, st.permutations(range(12)), st.integers(0, 4), st.sampled_from([(6, 2), (12, 2), (24, 1), (7, 4)]))
def test_dealing_keeps_the_rows_of_a_step_and_puts_like_lengths_together(masks, rows, empty, shape):
    masks[0][1] = True
    collator = Padded(mixture(masks), 6, PAD)
    tokens, world_size = shape
    given_rows = np.array([*rows, *[EMPTY] * empty])
    given_rows = given_rows[: len(given_rows) // world_size * world_size]
    dealt = collator.split_micro_batches(given_rows, PassLimits(1, tokens, "cpu"), world_size)
    assert all(len(group) == world_size and (group.shape[1] == 1 or group.shape[1] * 6 <= tokens) for group in dealt)
    in_order = [row for group in dealt for row in group.T.flatten()]
    assert sorted(in_order) == sorted(given_rows)
    sizes = [collator.batch(np.array([row])).num_tokens for row in in_order]
    assert sizes == sorted(sizes)


@many
@given(st.lists(st.booleans(), min_size=1, max_size=20).map(lambda m: [False, *m, True]), st.integers(0, 3))
def test_packed_with_the_assistants_mask_is_masked(mask, room):
    """One conversation, packed alone: the same inputs, and the same targets where the masked row has any."""
    seq_len = len(mask) - 1 + room
    ((x, y),) = rows_of(Padded(mixture([mask]), seq_len, PAD), [0])
    ((packed_x, packed_y),) = rows_of(Packed(mixture([mask]), seq_len, PAD, last_epoch=0), [0])
    n = len(mask) - 1
    assert x[:n] == packed_x[:n]
    assert y[:n] == [target if on else -1 for target, on in zip(packed_y[:n], mask[1:], strict=True)]
    assert set(y[n:]) | set(packed_y[n:]) <= {-1}


def test_rows_are_described_by_source_and_row():
    documents = text([4] * 5)
    first, second, *_ = (f"a row {i}" for i in documents.order(0))
    assert Padded(documents, 8, PAD).describe(0) == first
    assert Packed(documents, 6, PAD).describe(0) == f"{first} + {second}"  # 4 tokens and 3
    assert Packed(documents, 3, PAD).describe(0) == first


def test_from_the_file_to_the_targets_only_the_assistants_words_are_learned(tmp_path, tokenizer):
    talk = [
        {"role": "user", "content": "Ask"},
        {"role": "assistant", "content": "Tell"},
        {"role": "user", "content": "Once more"},
        {"role": "assistant", "content": "Again"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    source = SourceConfig(str(tmp_path / "a.jsonl"))
    end = tokenizer.special("<|assistant_end|>")
    documents = Mixture([load_or_tokenize("a", source, tokenizer, tmp_path / "cache")], [source], seed=1)
    ((x, y),) = rows_of(Padded(documents, 64, pad_id=end), [0])
    assert tokenizer.decode([t for t in y if t != -1]) == "Tell<|assistant_end|>Again<|assistant_end|>"
    assert tokenizer.decode(x).replace("<|assistant_end|>" * 2, "").endswith("Again<|assistant_end|>")
    ((_, y),) = rows_of(Packed(documents, 64, pad_id=end, last_epoch=0), [0])
    assert tokenizer.decode([t for t in y if t != -1]).startswith("<|user_start|>Ask<|user_end|><|assistant_start|>")
