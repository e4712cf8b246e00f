"""Whether two models differ by more than noise, against enumeration and simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from chattrain.errors import UserError
from chattrain.evals.paired import compare_answers, compare_losses, mcnemar


def answers(right: list[bool], keys: list[str] | None = None) -> list[dict]:
    names = keys or [f"q{i}" for i in range(len(right))]
    return [{"set": "s", "key": key, "answer": 0, "choice": 0 if r else 1} for key, r in zip(names, right, strict=True)]


@pytest.mark.parametrize("only_first, only_second", [(0, 0), (0, 5), (2, 7), (4, 4), (6, 1)])
def test_p_is_the_share_of_coin_tosses_at_least_as_uneven(only_first, only_second):
    n = only_first + only_second
    uneven = [abs(2 * sum(tosses) - n) >= abs(only_first - only_second) for tosses in product((0, 1), repeat=n)]
    assert mcnemar(only_first, only_second) == pytest.approx(np.mean(uneven))


def test_few_questions_answered_otherwise_are_noise_and_many_are_not():
    base = [True] * 50 + [False] * 50
    slightly = [True] * 53 + [False] * 47
    clearly = [True] * 60 + [False] * 40
    assert not compare_answers(answers(base), answers(slightly))[0].significant
    found = compare_answers(answers(base), answers(clearly))[0]
    assert found.significant and (found.first, found.second) == (0.5, 0.6)
    assert "0 only the first has right, 10 only the second" in found.text


def test_answers_are_paired_by_question_whatever_their_order():
    a, b = answers([True, False, True], ["x", "y", "z"]), answers([True, True, False], ["z", "x", "y"])
    assert "0 only the first has right, 0 only the second" in compare_answers(a, b)[0].text


def test_other_questions_are_refused_with_their_numbers():
    with pytest.raises(UserError, match=r"same questions in s: 3 and 2, 2 of them in both.*such as eval\.max_problems=2"):
        compare_answers(answers([True] * 3), answers([True] * 2))


def test_a_loss_differs_where_every_batch_agrees_and_not_where_they_scatter():
    rng = np.random.default_rng(1)
    first = [[100 + float(rng.normal(0, 20)), 50] for _ in range(40)]
    better = [[nats - 2 + float(rng.normal(0, 1)), 50] for nats, _ in first]
    scattered = [[nats + float(rng.normal(0, 20)), 50] for nats, _ in first]
    found = compare_losses("val/loss", first, better)
    assert found is not None and found.significant and found.second < found.first
    noise = compare_losses("val/loss", first, scattered)
    assert noise is not None and not noise.significant
    assert compare_losses("val/loss", first, first[1:]) is None
    assert compare_losses("val/loss", first, [[nats, 51] for nats, _ in first]) is None
