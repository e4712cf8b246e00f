"""The jobs of a sweep from best to worst, and the parabola of each group of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from chattrain.tracking.parabola import Parabola, fit
from chattrain.tracking.run_folder import RunFolder
from chattrain.tracking.sweep_record import JobRecord, SweepRecord, shown

SEED = "run.seed"
Setting = tuple[tuple[str, str], ...]  # swept keys and values without the seed: what a sweep compares


@dataclass
class Row:
    """A job, with what its run folder tells."""

    job: JobRecord
    targets: str | None = None  # of its validation losses
    rates: dict[str, float] = field(default_factory=dict)  # highest learning rate by lr/<group>
    accuracies: dict[str, tuple[float, float | None]] = field(default_factory=dict)  # last value, half its 95 % interval
    validation_tokens: int | None = None
    mean: float | None = None  # objective over the seeds of its setting; None where it is not ranked
    num_seeds: int = 0
    best: bool = False

    @property
    def setting(self) -> Setting:
        return tuple((key, value) for key, value in self.job.values.items() if key not in (SEED, "stage"))

    def describe(self) -> str:
        return " ".join(f"{key}={shown(value)}" for key, value in self.setting) or f"job {self.job.num + 1}"


@dataclass
class Group:
    """Jobs that differ in the learning rate and the seed only."""

    setting: Setting  # what they have in common
    targets: str | None
    points: list[tuple[float, float]]  # (rate, objective) of each completed job
    fit: Parabola | None

    @property
    def name(self) -> str:
        return " ".join(f"{key}={shown(value)}" for key, value in self.setting)


@dataclass
class Ranking:
    """A sweep's jobs, compared."""

    record: SweepRecord
    objective: str
    maximize: bool
    rows: list[Row]  # ranked from the best on, then those that cannot be ranked, then the failed
    rate_axis: str | None  # the swept key that is a learning rate
    groups: list[Group]
    winners: list[Row]  # the best of each kind of target; one, unless losses are over different targets

    @property
    def last_stage(self) -> str:
        """Of a chain of stages the last one, whose objective is the sweep's."""
        return max(self.record.jobs, key=lambda job: job.num).stage if self.record.jobs else ""

    @property
    def ranked(self) -> list[Row]:
        return [row for row in self.rows if row.mean is not None]


def rank(record: SweepRecord, runs: dict[int, RunFolder]) -> Ranking:
    """`runs`: the run folder of each job that has one, by the job's number.

    Settings are ranked by the mean over their seeds: the best single run of several is partly luck. Losses over different targets
    are different measures, so they are ranked apart.
    """
    objective, maximize = record.objective or "objective", record.direction == "maximize"
    rows = [_row(job, runs.get(job.num)) for job in record.jobs]
    rankable = _rankable(rows)
    known = {row.targets for row in rankable} - {None}
    for row in rankable:
        if row.targets is None and len(known) == 1:  # a run that resumed at its end measured nothing again
            (row.targets,) = known
        if not objective.startswith("val/"):
            row.targets = None  # an accuracy is the same measure whatever the loss is over
    for row in rankable:
        seeds = [r.job.objective for r in rankable if (r.setting, r.targets) == (row.setting, row.targets)]
        row.mean, row.num_seeds = sum(y for y in seeds if y is not None) / len(seeds), len(seeds)
    rows.sort(key=lambda row: _order(row, maximize))
    winners: dict[str | None, Row] = {}
    for row in rows:
        if row.mean is not None:
            winners.setdefault(row.targets, row)
    for row in winners.values():
        row.best = True
    rate_axis = _rate_axis(rankable)
    groups = _groups(rankable, rate_axis, maximize) if rate_axis else []
    return Ranking(record, objective, maximize, rows, rate_axis, groups, list(winners.values()))


def read_runs(record: SweepRecord) -> dict[int, RunFolder]:
    """The run folder of each job that has one, by the job's number.

    Not of a failed job whose folder holds a complete run: that one had other settings, and the job was refused.
    """
    runs = {job.num: RunFolder.read(Path(job.run_dir)) for job in record.jobs if job.run_dir}
    failed = {job.num for job in record.jobs if job.status == "failed"}
    return {num: run for num, run in runs.items() if num not in failed or run.summary.get("status") != "completed"}


def _row(job: JobRecord, run: RunFolder | None) -> Row:
    if run is None:
        return Row(job)
    tokens = run.validation.get("tokens")
    return Row(job, run.validation.get("targets"), run.peak_rates(), run.accuracies(), tokens)


def _rankable(rows: list[Row]) -> list[Row]:
    """Completed jobs with a finite objective. Of a chain of stages only those of its last stage, whose objective it is."""
    if not rows:
        return []
    last_stage = max(rows, key=lambda row: row.job.num).job.stage
    return [
        row
        for row in rows
        if row.job.stage == last_stage
        and row.job.status == "completed"
        and row.job.objective is not None
        and math.isfinite(row.job.objective)
    ]


def _order(row: Row, maximize: bool) -> tuple:
    """Losses over the same targets together, best first; then what is not ranked, with failures at the end."""
    sign = -1 if maximize else 1
    if row.mean is not None:
        return (0, str(row.targets), sign * row.mean, row.setting, sign * (row.job.objective or 0))
    return (2 if row.job.status == "failed" else 1, "", 0.0, (), row.job.num)


def _rate_axis(rows: list[Row]) -> str | None:
    """The swept key that is a learning rate, or a factor on all of them; of several the one with the most values."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.job.values.items():
            if key.rpartition(".")[2] in ("lr_scale", "lr") or key.endswith("_lr"):
                values.setdefault(key, set()).add(value)
    values = {key: found for key, found in values.items() if len(found) > 1 and all(map(as_number, found))}
    return max(values, key=lambda key: len(values[key])) if values else None


def _groups(rows: list[Row], rate_axis: str, maximize: bool) -> list[Group]:
    found: dict[tuple, list[tuple[float, float]]] = {}
    for row in rows:
        rate, objective = as_number(row.job.values.get(rate_axis)), row.job.objective
        if rate and objective is not None:
            rest = tuple(pair for pair in row.setting if pair[0] != rate_axis)
            found.setdefault((rest, row.targets), []).append((rate, objective))
    return [Group(setting, targets, sorted(points), fit(points, maximize)) for (setting, targets), points in found.items()]


def as_number(text: str | None) -> float | None:
    """A value of the command line as a number; None where it is none."""
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None
