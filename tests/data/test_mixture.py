"""An epoch holds each source as often as promised, in an order that follows from seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.config.data import SourceConfig
from chattrain.data.cache import TokenizedSource
from chattrain.data.mixture import Mixture
from chattrain.data.shares import epoch_counts
from tests.documents import tokenized

many = settings(max_examples=100, deadline=None, derandomize=True, database=None)
sizes = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def documents(name: str, n: int) -> TokenizedSource:
    """n documents; document i has i % 3 + 1 tokens and stands in row 10 i of its source."""
    lengths = np.arange(n) % 3 + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.repeat(np.arange(n), lengths).astype(np.uint16)
    return tokenized(name, tokens, np.ones(len(tokens)), offsets, record_indices=10 * np.arange(n))


def mixture(sizes: list[int], seed: int = 1, keep=None, **each) -> Mixture:
    """Sources a, b, ... of these sizes; `each` gives lists of SourceConfig's values, one a source."""
    names = "abcdefg"[: len(sizes)]
    sources = [SourceConfig(name, **{key: values[i] for key, values in each.items()}) for i, name in enumerate(names)]
    return Mixture([documents(name, n) for name, n in zip(names, sizes, strict=True)], sources, seed, keep)


def times(mix: Mixture, epoch: int) -> list[np.ndarray]:
    """How often an epoch holds each document, by source."""
    counts = np.bincount(mix.order(epoch), minlength=len(mix))
    return np.split(counts, mix.starts[1:-1])


@many
@given(sizes, st.integers(0, 5))
def test_an_epoch_holds_every_document_once_when_nothing_is_said(sizes, epoch):
    mix = mixture(sizes)
    assert len(mix) == mix.epoch_size == sum(sizes)
    assert sorted(mix.order(epoch)) == list(range(sum(sizes)))


@many
@given(sizes, st.integers(1, 5), st.integers(0, 5))
def test_whole_epochs_hold_every_document_that_many_times(sizes, n, epoch):
    first, *rest = times(mixture(sizes, epochs=[n] + [1] * (len(sizes) - 1)), epoch)
    assert set(first) == {n}
    assert all(set(counts) == {1} for counts in rest)


@many
@given(st.integers(2, 40), st.floats(0.1, 4.0), st.integers(0, 3))
def test_a_fraction_of_an_epoch_takes_each_document_as_evenly_as_can_be(n, epochs, epoch):
    (counts,) = times(mixture([n], epochs=[epochs]), epoch)
    assert counts.sum() == max(1, round(n * epochs))
    assert counts.max() - counts.min() <= 1


def test_half_an_epoch_draws_other_documents_each_time_and_all_of_them_in_the_long_run():
    mix = mixture([20], epochs=[0.5])
    drawn = [set(mix.order(epoch)) for epoch in range(12)]
    assert all(len(some) == 10 for some in drawn)
    assert len({frozenset(some) for some in drawn}) == 12
    assert set.union(*drawn) == set(range(20))


@many
@given(st.lists(st.tuples(st.integers(1, 400), st.floats(0.1, 5), st.floats(0.5, 3)), min_size=1, max_size=4))
def test_weights_set_the_shares_and_the_source_that_runs_short_first_the_size(some):
    n, weights, epochs = (list(column) for column in zip(*some, strict=True))
    counts = epoch_counts(n, [SourceConfig("x", weight=w, epochs=e) for w, e in zip(weights, epochs, strict=True)])
    full = [size * e for size, e in zip(n, epochs, strict=True)]
    unit = min(f / w for f, w in zip(full, weights, strict=True))  # documents that a weight of 1 gets
    for count, weight, most in zip(counts, weights, full, strict=True):
        assert abs(count - unit * weight) <= 0.5 or count == 1
        assert count <= max(1, most + 0.5)
    assert any(abs(count - most) <= 0.5 or count == 1 for count, most in zip(counts, full, strict=True))


def test_weighted_sources_appear_in_their_shares_in_every_epoch():
    mix = mixture([100, 10, 50], weight=[3, 1, 1])
    for epoch in range(3):
        a, b, c = times(mix, epoch)
        assert (a.sum(), b.sum(), c.sum()) == (30, 10, 10)
        assert set(b) == {1} and max(a) == max(c) == 1  # thinned out, never doubled


def test_epochs_and_weights_together_let_a_small_source_repeat():
    a, b = times(mixture([100, 10], weight=[1, 1], epochs=[1, 3]), 0)
    assert a.sum() == b.sum() == 30
    assert set(b) == {3} and a.max() == 1


@many
@given(sizes, st.integers(0, 2**31), st.integers(0, 50))
def test_the_order_follows_from_seed_and_epoch_alone(sizes, seed, epoch):
    one, two = mixture(sizes, seed), mixture(sizes, seed)
    for other in range(epoch, -1, -7):
        two.order(other)
    two.document(0)
    np.random.seed(1)
    assert one.order(epoch).tolist() == two.order(epoch).tolist()


def test_other_epochs_and_other_seeds_give_other_orders():
    orders = {tuple(mixture([15, 15], seed).order(epoch)) for seed in (1, 2, 3) for epoch in range(5)}
    assert len(orders) == 15


def test_an_epoch_mixes_the_sources():
    order = mixture([200, 200]).order(0)
    assert 70 < (order[:200] < 200).sum() < 130


def test_a_document_is_that_of_its_source_and_is_called_by_its_row_there():
    mix = mixture([3, 1, 4])
    cells = [(mix.describe(i), mix.document(i)[0].tolist()) for i in range(len(mix))]
    assert cells == [
        ("a row 0", [0]),
        ("a row 10", [1, 1]),
        ("a row 20", [2, 2, 2]),
        ("b row 0", [0]),
        ("c row 0", [0]),
        ("c row 10", [1, 1]),
        ("c row 20", [2, 2, 2]),
        ("c row 30", [3]),
    ]
    assert mix.lengths.tolist() == [len(tokens) for _, tokens in cells]


@many
@given(st.lists(st.integers(1, 10), min_size=1, max_size=3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_documents_left_out_for_good_never_appear_and_the_others_as_promised(sizes, n, random):
    keep = np.array([random.random() < 0.5 for _ in range(sum(sizes))])
    keep[0] = True
    mix = mixture(sizes, epochs=[n] * len(sizes)).restricted(keep)
    for epoch in range(2):
        assert (np.bincount(mix.order(epoch), minlength=len(mix)) == n * keep).all()
    assert mix.epoch_size == n * keep.sum()


@pytest.mark.parametrize("weight", [[None, None], [1, 1]])
def test_a_source_of_which_nothing_is_kept_does_not_keep_the_others_from_training(weight):
    mix = mixture([2, 5], weight=weight).restricted(np.array([False] * 2 + [True] * 5))
    assert sorted(mix.order(0)) == [2, 3, 4, 5, 6]
