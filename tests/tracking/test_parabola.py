"""The fitted minimum of a sweep, and its interval."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chattrain.tracking.parabola import fit, near_best


def draw(rng, rates, seeds, optimum, noise, curvature=0.3):
    return [
        (rate, 0.5 + curvature * np.log10(rate / optimum) ** 2 + rng.normal(0, noise)) for rate in rates for _ in range(seeds)
    ]


@given(
    optimum=st.floats(2.0, 50.0),
    curvature=st.floats(0.01, 10.0),
    level=st.floats(-5, 5),
    maximize=st.booleans(),
)
def test_points_of_a_parabola_give_back_its_minimum(optimum, curvature, level, maximize):
    sign = -1 if maximize else 1
    points = [(rate, level + sign * curvature * np.log10(rate / optimum) ** 2) for rate in (1.0, 3.0, 10.0, 30.0, 100.0)]
    fitted = fit(points, maximize)
    assert fitted is not None and fitted.minimum == pytest.approx(optimum, rel=1e-5)
    assert fitted.interval == pytest.approx((optimum, optimum), rel=1e-4)  # there is no noise
    assert all(fitted(rate) == pytest.approx(value, abs=1e-6) for rate, value in points)


@pytest.mark.parametrize(
    ("rates", "seeds", "noise"),
    [
        ((1, 2, 4, 8, 16, 32), 1, 0.01),
        ((1, 3, 10, 30), 3, 0.01),
        ((1, 3, 10, 30, 100), 1, 0.01),
        ((1, 3, 10, 30, 100), 2, 0.03),
        ((0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000), 2, 0.02),  # those near the best are chosen, by the same draw
    ],
)
def test_the_interval_covers_the_true_minimum_in_95_percent_of_draws(rates, seeds, noise):
    """3,000 draws have a standard error of 0.4 %. An unbounded set covers everything and is no miss."""
    rng = np.random.default_rng(0)
    optimum = 7.0
    missed = bounded = 0
    for _ in range(3000):
        fitted = fit(draw(rng, rates, seeds, optimum, noise))
        assert fitted is not None
        if fitted.interval:
            bounded += 1
            missed += not fitted.interval[0] <= optimum <= fitted.interval[1]
    assert bounded > 2700
    assert 0.038 < missed / 3000 < 0.065  # 0.047 to 0.059 were seen: choosing the runs by the same draw costs up to 1 %


def test_an_interval_is_shorter_with_more_seeds():
    def width(seeds):
        fitted = fit(draw(np.random.default_rng(1), (1, 3, 10, 30, 100), seeds, 9.0, 0.02))
        return fitted.interval[1] / fitted.interval[0]

    assert width(20) < width(3)


def test_three_rates_have_a_minimum_and_no_interval():
    one_seed = fit([(1, 2.0), (10, 1.0), (100, 2.0)])
    assert one_seed.minimum == pytest.approx(10) and one_seed.interval is None and "exactly" in one_seed.why_not
    seeds = fit([(1, 2.0), (10, 1.0), (100, 2.0), (1, 2.1), (10, 1.1), (100, 2.1)])
    assert seeds.interval is None and seeds.residual_sd > 0


@pytest.mark.parametrize("points", [[], [(1, 1.0)], [(1, 1.0), (3, 0.5)], [(1, 1.0), (3, 0.5), (3, 0.6)]])
def test_two_rates_have_no_parabola(points):
    assert fit(points) is None


def test_a_hill_has_no_minimum():
    fitted = fit([(1, 1.0), (3, 1.5), (10, 1.6), (30, 1.5), (100, 1.0)])
    assert fitted.minimum is None and fitted.interval is None and "wrong way" in fitted.why_not


def test_a_minimum_outside_the_rates_is_not_claimed():
    points = [(rate, (np.log10(rate) - 4) ** 2) for rate in (1.0, 3.0, 10.0, 30.0)]
    fitted = fit(points)
    assert fitted.minimum is None and fitted.interval is None and "outside" in fitted.why_not


def test_noise_larger_than_the_curvature_bounds_nothing():
    rng = np.random.default_rng(3)
    fits = [fit(draw(rng, (1, 3, 10, 30, 100), 1, 10.0, 1.0, curvature=0.05)) for _ in range(50)]
    unbounded = [f for f in fits if f.interval is None]
    assert len(unbounded) > 40 and all(f.why_not for f in unbounded)


def test_a_run_that_diverged_is_not_fitted():
    points = [(1, 0.60), (3, 0.55), (10, 0.50), (30, 0.55), (100, 7.0), (1000, 1e6)]
    assert fit(points).rates == [1, 3, 10, 30]
    assert fit(points).minimum == pytest.approx(fit(points[:4]).minimum)


def test_a_parabola_is_fitted_within_a_factor_of_ten_of_its_best():
    points = [(rate, np.log10(rate / 10) ** 2) for rate in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)]
    assert near_best(points) == points[2:7]


def test_the_only_rate_beyond_the_best_is_kept():
    """Without it the fitted minimum would lie outside the rates."""
    points = [(1, 0.8462), (3, 0.8397), (6, 0.8360), (10, 0.8345), (30, 0.88), (100, 0.95)]
    found = fit(points)
    assert 30 in found.rates and found.minimum is not None and 3 < found.minimum < 30
