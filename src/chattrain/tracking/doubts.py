"""What to doubt about a sweep's answer: an optimum at the edge of the grid, a lead within the noise, too few points."""

from __future__ import annotations

import math

from chattrain.tracking.parabola import t_quantile
from chattrain.tracking.ranking import Ranking, Row, Setting, as_number
from chattrain.tracking.run_folder import TARGETS

FEW_RATES = 5


def find_doubts(ranking: Ranking) -> list[str]:
    """Each a sentence that says what to do about it."""
    doubts = [*_targets(ranking)]
    for winner in ranking.winners:
        doubts += [*_edges(ranking, winner), *_ties(ranking, winner)]
    doubts += _few_runs(ranking)
    unfinished = [row for row in ranking.rows if row.job.status in ("failed", "interrupted", "skipped")]
    if unfinished:
        doubts.append(f"{len(unfinished)} of {len(ranking.rows)} jobs did not complete; what they would have reached is unknown.")
    return doubts


def _targets(ranking: Ranking) -> list[str]:
    if len(ranking.winners) > 1:
        kinds = " and ".join(TARGETS.get(w.targets or "", w.targets or "targets that were not recorded") for w in ranking.winners)
        return [f"{ranking.objective} is over {kinds}: such losses are ranked apart, and no one is better than the other."]
    if len({row.validation_tokens for row in ranking.ranked if row.validation_tokens}) > 1 and ranking.objective == "val/loss":
        return ["The jobs were validated on different numbers of tokens, so their losses are not of the same data."]
    return []


def _edges(ranking: Ranking, winner: Row) -> list[str]:
    """An axis of numbers whose best value is its first or last: the optimum may lie beyond it."""
    said = []
    for key, value in winner.setting:
        found = {as_number(row.job.values.get(key)) for row in ranking.ranked if row.targets == winner.targets}
        numbers = sorted(number for number in found if number is not None)
        if len(numbers) < 2 or len(numbers) < len(found):
            continue
        for end, word, inner in ((numbers[0], "smallest", numbers[1]), (numbers[-1], "largest", numbers[-2])):
            if as_number(value) == end:
                further = f"; go on with {end * end / inner:.3g}" if key == ranking.rate_axis and inner > 0 else ""
                said.append(f"The best {key}, {value}, is the {word} of the grid: the optimum may lie beyond it{further}.")
    return said


def _ties(ranking: Ranking, winner: Row) -> list[str]:
    """The settings whose mean is no worse than the winner's by more than chance explains."""
    objectives: dict[Setting, list[float]] = {}
    rivals: dict[Setting, Row] = {}
    for row in ranking.ranked:
        if row.targets == winner.targets and row.job.objective is not None:
            objectives.setdefault(row.setting, []).append(row.job.objective)
            rivals.setdefault(row.setting, row)
    own = objectives[winner.setting]
    margins = {
        setting: _seed_margin(own, objectives[setting]) or _other_margin(ranking, winner, rivals[setting])
        for setting in rivals
        if setting != winner.setting
    }
    if not margins:
        return []
    if not any(margins.values()):
        return ["There is one run of each point, so how much is chance is unknown; add seeds, such as run.seed=1,2,3."]
    ties = [
        f"{rivals[setting].describe()} ({rivals[setting].mean:.4f})"
        for setting, margin in margins.items()
        if margin and abs((rivals[setting].mean or 0) - (winner.mean or 0)) <= margin
    ]
    return [f"Within the noise of the best: {', '.join(ties)}."] if ties else []


def _seed_margin(a: list[float], b: list[float]) -> float | None:
    """The least difference of two means that is significant at 5 %, by Student's t test of two samples; None without repeats.

    Of these two settings only, as a run's noise grows with its learning rate.
    """
    freedom = len(a) + len(b) - 2
    if not freedom:
        return None
    squares = sum((y - sum(ys) / len(ys)) ** 2 for ys in (a, b) for y in ys)
    return t_quantile(freedom) * math.sqrt(squares / freedom * (1 / len(a) + 1 / len(b)))


def _other_margin(ranking: Ranking, winner: Row, rival: Row) -> float | None:
    """Without repeats: from the standard error of an accuracy, else from the residuals of the winner's parabola."""
    errors = [row.accuracies[ranking.objective][1] for row in (winner, rival) if ranking.objective in row.accuracies]
    if len(errors) == 2 and all(errors):
        return math.hypot(*(error or 0 for error in errors))
    rest = tuple(pair for pair in winner.setting if pair[0] != ranking.rate_axis)
    for group in ranking.groups:
        if (group.setting, group.targets) == (rest, winner.targets) and group.fit and group.fit.residual_sd:
            return t_quantile(group.fit.num_runs - 3) * group.fit.residual_sd * math.sqrt(2)
    return None


def _few_runs(ranking: Ranking) -> list[str]:
    said = []
    if any(g.fit and g.fit.interval for g in ranking.groups) and all(row.num_seeds == 1 for row in ranking.ranked):
        said.append(
            "The interval is of one seed's runs; other seeds may move the optimum further. Add seeds, such as run.seed=1,2,3."
        )
    for group in ranking.groups:
        number = len({rate for rate, _ in group.points})
        if number < FEW_RATES:
            where = f" with {group.name}" if group.name else ""
            said.append(f"{number} rates{where} are few: ask for {FEW_RATES} or more, on both sides of the best.")
    return said
