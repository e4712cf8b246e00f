"""Schedules as functions: where they begin, where they end, and that nothing runs past the end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chattrain.optim.schedules import constant_then_linear, cosine, linear, wsd

ALL = [constant_then_linear, linear, cosine, wsd]


@pytest.mark.parametrize("schedule", ALL)
@given(num_steps=st.integers(1, 500), init=st.floats(0.01, 2.0), low=st.floats(0.0, 1.0))
def test_every_step_has_a_factor_between_its_end_and_its_start(schedule, num_steps, init, low):
    for step in range(num_steps):
        factor = schedule(step, num_steps, init_lr_frac=init, min_lr_factor=low)
        assert init * low - 1e-9 <= factor <= init + 1e-9
    assert schedule(0, num_steps, init_lr_frac=init, min_lr_factor=low) == pytest.approx(init) or num_steps < 5


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("num_steps", [5, 14, 300])
def test_the_decay_ends_exactly_after_the_last_step(schedule, num_steps):
    assert schedule(num_steps - 1, num_steps) > 0
    assert schedule(num_steps, num_steps) == pytest.approx(0.0, abs=1e-12)
    assert schedule(num_steps, num_steps, min_lr_factor=0.1) == pytest.approx(0.1)


def test_mid_is_constant_for_80_percent_then_linear_to_zero():
    factors = [constant_then_linear(s, 100) for s in range(100)]
    assert factors[:81] == [1.0] * 81
    assert factors[90] == pytest.approx(0.5)
    drops = [a - b for a, b in itertools.pairwise(factors[80:])]
    assert drops == pytest.approx([0.05] * len(drops))


def test_sft_starts_at_its_fraction_and_is_linear_from_the_first_step():
    assert [linear(s, 4, init_lr_frac=0.02) for s in range(4)] == pytest.approx([0.02, 0.015, 0.01, 0.005])


@pytest.mark.parametrize("schedule", ALL)
def test_warmup_rises_linearly_to_the_schedule(schedule):
    warm = [schedule(s, 1000, warmup_steps=10) for s in range(10)]
    assert warm == sorted(warm) and warm[0] == pytest.approx(0.1, rel=0.01) and warm[9] == pytest.approx(1.0, rel=0.02)
