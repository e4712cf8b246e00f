"""The pure functions under every row: shift, cut a stream, pad."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.data.packing import IGNORE_INDEX, Tokens, pad_rows, shift, slice_stream

many = settings(max_examples=200, deadline=None, derandomize=True, database=None)
tokens = st.lists(st.integers(0, 65_535), min_size=1, max_size=20)


@many
@given(tokens)
def test_each_target_is_the_token_after_its_input(ids):
    inputs, targets, *_ = shift(np.array(ids, dtype=np.uint16))
    assert inputs.dtype == targets.dtype == np.int64
    assert list(zip(inputs, targets, strict=True)) == list(pairwise(ids))


@many
@given(st.lists(st.tuples(st.integers(0, 65_535), st.integers(0, 1)), min_size=1, max_size=20))
def test_the_mask_goes_with_the_target_and_not_with_the_input(pairs):
    ids, mask = (list(column) for column in zip(*pairs, strict=True))
    inputs, targets, weights, _ = shift(np.array(ids, dtype=np.uint16), np.array(mask, dtype=np.float32))
    assert inputs.tolist() == ids[:-1]
    for i, target in enumerate(targets):
        assert target == (ids[i + 1] if mask[i + 1] else IGNORE_INDEX)
    assert weights.tolist() == mask[1:]


def test_shifting_leaves_the_given_arrays_as_they_were():
    ids, mask = np.array([5, 6, 7]), np.array([0, 0, 1])
    shift(ids, mask)[1][:] = 99
    assert ids.tolist() == [5, 6, 7] and mask.tolist() == [0, 0, 1]


@many
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.data())
def test_a_stretch_is_made_of_the_tokens_that_stand_there(lengths, data):
    stream = [(document, i) for document, n in enumerate(lengths) for i in range(n)]
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream) + 3))
    found = slice_stream(np.cumsum(lengths), start, stop)
    assert [(document, i) for document, a, b in found for i in range(a, b)] == stream[start:stop]
    assert all(a < b for _, a, b in found)


@many
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 99), st.integers(-1, 99)), max_size=6), min_size=1, max_size=5), st.integers(6, 9)
)
def test_padding_fills_rows_up_and_is_never_a_target(rows, width):
    columns = [np.array(row, np.int64).reshape(-1, 2).T for row in rows]
    tokens = [Tokens(x, y, np.ones(len(x), np.float32), np.ones(len(x), np.int16)) for x, y in columns]
    inputs, targets, weights, sources = pad_rows(tokens, width, pad_id=77)
    assert inputs.shape == targets.shape == (len(rows), width)
    assert weights.tolist() == sources.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    for row, x, y in zip(rows, inputs.tolist(), targets.tolist(), strict=True):
        assert list(zip(x, y, strict=True)) == row + [(77, IGNORE_INDEX)] * (width - len(row))


def test_a_row_wider_than_the_width_is_not_cut_in_silence():
    row = np.arange(5)
    with pytest.raises(ValueError):
        pad_rows([shift(row)], 3, pad_id=0)
