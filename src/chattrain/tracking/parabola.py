"""A parabola through an objective over log10(rate): where its minimum lies, and how well the runs determine that.

y = a + b u + c u^2 by least squares, u = log10(rate / centre), over the runs near the best (see near_best). Its minimum is at
u* = -b / (2 c).

The interval is Fieller's: all u at which the slope b + 2 c u is compatible with 0,

    (b + 2 c u)^2 <= t^2 s^2 (V_bb + 4 u V_bc + 4 u^2 V_cc),    s^2 = RSS / (n - 3),  V = (X^T X)^-1,

with t the 97.5 % quantile of Student's t with n - 3 degrees of freedom. It is exact for normal errors of equal size, where the
delta method (2 standard errors of a ratio), is too short for few runs. With several seeds their spread is part of s.
Source: E. C. Fieller, "Some problems in interval estimation", J. R. Statist. Soc. B 16 (1954) 175-185.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEAST_RATES = 4  # distinct rates of an interval; three fit exactly, so nothing says how wrong the fit is
NEAR = 10.0  # runs within this factor of the best rate are fitted,
LEAST_NEAR = 5  # or those of this many nearest rates
OUTLYING = 4.0  # without those that are worse than the best by more than this many times the median: see near_best
T_TABLES = {  # level -> quantile of the normal distribution, and of t with 1 to 9 degrees of freedom
    0.05: (1.959964, (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)),
    0.01: (2.575829, (63.6567, 9.9248, 5.8409, 4.6041, 4.0321, 3.7074, 3.4995, 3.3554, 3.2498)),
}


@dataclass(frozen=True)
class Parabola:
    """A fit. `rates`: the distinct rates of the runs that were used."""

    rates: list[float]  # sorted
    num_runs: int
    centre: float  # rate at u = 0
    coefficients: tuple[float, float, float]  # a, b, c; in the objective's own direction
    residual_sd: float | None  # s, in units of the objective; None where runs are no more than coefficients
    minimum: float | None  # rate of the minimum (maximum, if that is sought); None where there is none between the rates used
    interval: tuple[float, float] | None  # rates, 95 %; None where none is claimed
    why_not: str | None  # why there is no minimum or no interval

    def __call__(self, rate: float) -> float:
        a, b, c = self.coefficients
        u = math.log10(rate / self.centre)
        return a + b * u + c * u * u


def fit(points: list[tuple[float, float]], maximize: bool = False) -> Parabola | None:
    """Fit (rate, objective) pairs, several of a rate if there are seeds. None with fewer than three rates above 0."""
    points = near_best([(rate, y) for rate, y in points if rate > 0 and math.isfinite(y)], maximize)
    rates = sorted({rate for rate, _ in points})
    if len(rates) < 3:
        return None
    centre = math.sqrt(rates[0] * rates[-1])
    u = np.log10([rate / centre for rate, _ in points])
    y = np.array([y for _, y in points]) * (-1 if maximize else 1)
    design = np.stack([np.ones_like(u), u, u * u], axis=1)
    a, b, c = (float(value) for value in np.linalg.lstsq(design, y, rcond=None)[0])
    freedom = len(points) - 3
    s2 = float(np.sum((y - design @ np.array([a, b, c])) ** 2)) / freedom if freedom else None
    low, high = math.log10(rates[0] / centre), math.log10(rates[-1] / centre)
    minimum, bounds, why_not = -b / (2 * c) if c > 0 else None, None, None
    if minimum is None:
        why_not = "the fitted parabola curves the wrong way"
    elif not low <= minimum <= high:
        minimum, why_not = None, "the fitted minimum lies outside the rates that were fitted"
    elif len(rates) < LEAST_RATES or s2 is None:
        why_not = f"three rates fit a parabola exactly; an interval needs {LEAST_RATES} or more"
    elif is_cubic(points):
        why_not = "the runs do not lie on a parabola; add rates near the best"
    else:
        covariance = s2 * np.linalg.inv(design.T @ design)
        bounds = _fieller(b, c, covariance, t_quantile(freedom))
        why_not = None if bounds else "the curvature is within the noise, so the runs do not bound the minimum"
    sign = -1 if maximize else 1
    return Parabola(
        rates=rates,
        num_runs=len(points),
        centre=centre,
        coefficients=(sign * a, sign * b, sign * c),
        residual_sd=math.sqrt(s2) if s2 is not None else None,
        minimum=None if minimum is None else centre * 10**minimum,
        interval=(centre * 10 ** bounds[0], centre * 10 ** bounds[1]) if bounds else None,
        why_not=why_not if not maximize or why_not is None else why_not.replace("minimum", "maximum"),
    )


def near_best(points: list[tuple[float, float]], maximize: bool = False) -> list[tuple[float, float]]:
    """The points that a parabola can describe: near the best rate, without runs that went wrong.

    A loss over log(rate) is a parabola near its minimum only: it flattens to the left and rises ever faster to the right. Points
    are kept within a factor of 10 of the rate with the best mean (or of the five nearest rates). Then, for as long as more than
    four rates remain, the worst is left out if it is worse than the best by more than four times the median of the others (of
    five or more evenly spaced rates around the minimum of a parabola, none is), or if a cubic term is significant at 1 %. A rate
    that is alone on its side of the best stays: without it nothing would bound the minimum there.

    >>> near_best([(1, 0.60), (3, 0.55), (10, 0.50), (30, 0.55), (100, 7.0), (1000, 9.0)])
    [(1, 0.6), (3, 0.55), (10, 0.5), (30, 0.55)]
    """
    values: dict[float, list[float]] = {}
    for rate, y in points:
        values.setdefault(rate, []).append(-y if maximize else y)
    means = {rate: sum(ys) / len(ys) for rate, ys in values.items()}
    if len(means) < 3:
        return points
    best = min(means, key=lambda rate: means[rate])
    distance = {rate: abs(math.log10(rate / best)) for rate in means}
    nearest = sorted(means, key=lambda rate: distance[rate])
    near = {rate for i, rate in enumerate(nearest) if i < LEAST_NEAR or distance[rate] <= math.log10(NEAR) * (1 + 1e-9)}
    while len(near) > LEAST_RATES:
        sides = [[rate for rate in near if rate < best], [rate for rate in near if rate > best]]
        last = {side[0] for side in sides if len(side) == 1}  # the only one on its side of the best bounds the minimum: it stays
        worst = max(near - last, key=lambda rate: means[rate])
        median = float(np.median([means[rate] - means[best] for rate in near if rate != best]))
        if means[worst] - means[best] <= OUTLYING * median and not is_cubic([p for p in points if p[0] in near]):
            break
        near.remove(worst)
    return [(rate, y) for rate, y in points if rate in near]


def is_cubic(points: list[tuple[float, float]]) -> bool:
    """Is the coefficient of u^3 in a cubic through the points significant, by a t test at 1 %?"""
    freedom = len(points) - 4
    if freedom < 1:
        return False
    u = np.log10([rate for rate, _ in points])
    y = np.array([y for _, y in points])
    design = np.vander(u - u.mean(), 4)  # highest power first
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    s2 = float(np.sum((y - design @ coefficients) ** 2)) / freedom
    error = math.sqrt(s2 * float(np.linalg.inv(design.T @ design)[0, 0]))
    return abs(float(coefficients[0])) > t_quantile(freedom, 0.01) * error + 1e-9 * float(np.ptp(y))


def t_quantile(freedom: int, level: float = 0.05) -> float:
    """Student's t that chance exceeds, in either direction, in `level` (0.05 or 0.01) of the cases.

    From 10 degrees of freedom on by Cornish and Fisher's series (Abramowitz and Stegun, 26.7.5).

    >>> [round(t_quantile(n), 3) for n in (1, 5, 10, 30)], round(t_quantile(20, 0.01), 3)
    ([12.706, 2.571, 2.228, 2.042], 2.845)
    """
    z, table = T_TABLES[level]
    if freedom <= len(table):
        return table[freedom - 1]
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _fieller(b: float, c: float, covariance: np.ndarray, t: float) -> tuple[float, float] | None:
    """The interval of -b / (2 c), as roots of the quadratic above; None where it is unbounded: c is not clearly above 0."""
    v_bb, v_bc, v_cc = (float(covariance[i, j]) for i, j in ((1, 1), (1, 2), (2, 2)))
    square = 4 * (c * c - t * t * v_cc)
    if square <= 0:
        return None
    linear = 4 * (b * c - t * t * v_bc)
    constant = b * b - t * t * v_bb
    half = math.sqrt(max(linear * linear - 4 * square * constant, 0.0))
    return (-linear - half) / (2 * square), (-linear + half) / (2 * square)
