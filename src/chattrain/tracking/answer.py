"""What a sweep found, in words: the best, the fitted optimum, what to doubt, and the command that runs the best again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from chattrain.tracking.doubts import find_doubts
from chattrain.tracking.metrics import is_detail
from chattrain.tracking.ranking import Group, Ranking, Row, rank
from chattrain.tracking.run_folder import RunFolder, label
from chattrain.tracking.sweep_record import SweepRecord


@dataclass
class Answer:
    ranking: Ranking
    sentences: list[str]
    doubts: list[str]
    commands: list[str]  # for a shell: each trains a winner again; one, unless losses are over different targets


def find_answer(record: SweepRecord, runs: dict[int, RunFolder], test: dict | None = None) -> Answer:
    """`runs`: the run folder of each job that has one, by its number.

    `test`: metrics of the best by name, measured on data that did not choose it.
    """
    ranking = rank(record, runs)
    several = len(ranking.winners) > 1
    names = [f"{record.name}-best" + (f"-{row.targets or 'unknown'}" if several else "") for row in ranking.winners]
    commands = [_rerun(name, row) for name, row in zip(names, ranking.winners, strict=True)]
    return Answer(ranking, _sentences(ranking, test), find_doubts(ranking), commands)


def _sentences(ranking: Ranking, test: dict | None) -> list[str]:
    """One thought each."""
    if not ranking.winners:
        return [f"No job completed with a value of {ranking.objective}, so there is no answer."]
    said = []
    for row in ranking.winners:
        name = label(ranking.objective, row.targets)
        seeds = f" on average over {row.num_seeds} seeds; {row.job.objective:.4f} in the marked run" if row.num_seeds > 1 else ""
        said.append(f"Best: {row.describe()}, {name} {row.mean:.4f}{seeds}.")
    said += [_fit_sentence(group, ranking) for group in ranking.groups if group.fit]
    if test:
        shown = {name: value for name, value in test.items() if isinstance(value, int | float) and not is_detail(name)}
        values = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
        said.append(f"The best on data that did not choose it: {values}.")
    elif len(ranking.ranked) > 1:
        said.append(
            f"{ranking.objective} of the best is also what chose it, so it is biased: too good. Where its data has a test part, "
            f"this measures it there: {_measure(ranking.winners[0])}"
        )
    return said


def _measure(row: Row) -> str:
    """The command, quoted for a shell, that measures this row's run on the test part of its data."""
    named = [f"init.from={row.job.run_dir}"] if row.job.run_dir else []
    return shlex.join(["python", "-m", "chattrain", "command=evaluate", "eval.on=test", *named])


def _rerun(name: str, row: Row) -> str:
    """The command, quoted for a shell, that trains this row's job alone, under this name."""
    dropped = ("run.name=", "run.dir=", "run.resume=", "sweep.", "hydra/", "hydra.launcher", "hydra.sweeper")
    kept = [o for o in row.job.overrides if not o.lstrip("+~").startswith(dropped)]
    return shlex.join(["python", "-m", "chattrain", *kept, f"run.name={name}"])


def _fit_sentence(group: Group, ranking: Ranking) -> str:
    parabola = group.fit
    assert parabola is not None
    where = f"With {group.name}, a" if group.name else "A"
    kind = label(ranking.objective, group.targets) if len(ranking.winners) > 1 else ranking.objective
    start = (
        f"{where} parabola of {kind} over log10({ranking.rate_axis}), through {parabola.num_runs} runs at the "
        f"{len(parabola.rates)} rates from {parabola.rates[0]:g} to {parabola.rates[-1]:g},"
    )
    extreme = "maximum" if ranking.maximize else "minimum"
    if parabola.minimum is None:
        return f"{start} gives no {extreme}: {parabola.why_not}."
    if parabola.interval is None:
        return f"{start} has its {extreme} at {parabola.minimum:.3g}. No interval is claimed: {parabola.why_not}."
    low, high = parabola.interval
    beyond = low < parabola.rates[0] or high > parabola.rates[-1]
    end = ", which goes beyond the rates that were fitted" if beyond else ""
    return f"{start} has its {extreme} at {parabola.minimum:.3g}; 95 % interval {low:.3g} to {high:.3g}{end}."
