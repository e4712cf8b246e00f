"""Is the difference between two models more than noise? Both answered the same questions, or have losses on the same rows.

Pairs cancel what questions have in common: two accuracies whose error bars overlap may still differ beyond doubt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from chattrain.errors import UserError

LEVEL = 0.05  # a difference that chance makes less often is called more than noise
RESAMPLES = 10_000
LEAST_BATCHES = 10  # of fewer, resampling says nothing


@dataclass(frozen=True)
class Difference:
    """Second model minus first, in one measure."""

    name: str
    first: float
    second: float
    text: str  # how sure that is
    significant: bool

    @property
    def verdict(self) -> str:
        return "more than noise" if self.significant else "no more than noise"


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact test (McNemar 1947, https://doi.org/10.1007/BF02295996): questions that only one of the models
    answers right are coin tosses if the models are equally good.

    >>> round(mcnemar(2, 10), 4), mcnemar(3, 3), mcnemar(0, 0)
    (0.0386, 1.0, 1.0)
    """
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def compare_answers(first: list[dict], second: list[dict]) -> list[Difference]:
    """The difference in accuracy on each question set. Raises UserError where the models were not asked the same questions."""
    found = []
    for name in dict.fromkeys(answer["set"] for answer in first + second):
        a, b = (sorted((x for x in answers if x["set"] == name), key=lambda x: x["key"]) for answers in (first, second))
        if [x["key"] for x in a] != [x["key"] for x in b]:
            shared = len({x["key"] for x in a} & {x["key"] for x in b})
            raise UserError(
                f"the runs were not asked the same questions in {name}: {len(a)} and {len(b)}, {shared} of them in both. "
                f"Each run is asked its own; give both the same, {_same(a, b, shared)}"
            )
        right_a, right_b = (np.array([is_right(x) for x in answers]) for answers in (a, b))
        only_a, only_b, n = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()), len(a)
        p = mcnemar(only_a, only_b)
        error = math.sqrt(only_a + only_b - (only_a - only_b) ** 2 / n) / n
        text = (
            f"{(only_b - only_a) / n:+.1%} +- {error:.1%} of {n:,} questions; {only_a} only the first has right, {only_b} only "
            f"the second; exact McNemar p = {p:.2g}"
        )
        found.append(Difference(f"{name}_acc", right_a.mean(), right_b.mean(), text, p < LEVEL))
    return found


def is_right(answer: dict) -> bool:
    """Is an answer, a line of answers.jsonl, the right one?"""
    return answer["right"] if "right" in answer else answer["choice"] == answer["answer"]


def _same(a: list[dict], b: list[dict], shared: int) -> str:
    """How to ask both the same questions."""
    fewer = min(len(a), len(b))
    return (
        f"such as eval.max_problems={fewer}" if 0 < shared == fewer else "with data=<the data of one of them>, or eval.mmlu_path="
    )


def compare_losses(name: str, first: list[list[float]], second: list[list[float]]) -> Difference | None:
    """The difference in loss, from (summed loss, targets) of each batch of rows; None where the batches are not the same.

    Paired bootstrap over batches (Koehn 2004, https://aclanthology.org/W04-3250): significant where 0 lies outside the middle
    95 % of the differences in 10,000 resamples.
    """
    a, b = np.array(first), np.array(second)
    if a.shape != b.shape or len(a) < LEAST_BATCHES or not np.array_equal(a[:, 1], b[:, 1]):
        return None
    difference, targets = b[:, 0] - a[:, 0], a[:, 1]
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(a), len(a)) for _ in range(RESAMPLES)]
    low, high = np.quantile([difference[i].sum() / targets[i].sum() for i in drawn], [LEVEL / 2, 1 - LEVEL / 2])
    total = targets.sum()
    text = f"{difference.sum() / total:+.4f}, 95 % between {low:+.4f} and {high:+.4f} (paired bootstrap over {len(a)} batches)"
    return Difference(name, a[:, 0].sum() / total, b[:, 0].sum() / total, text, bool(low > 0 or high < 0))
