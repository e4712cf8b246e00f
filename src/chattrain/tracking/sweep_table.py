"""The table of a sweep as cells of text, for a terminal, Markdown and HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from chattrain.tracking.ranking import SEED, Ranking, Row
from chattrain.tracking.run_folder import format_accuracy, label
from chattrain.tracking.sweep_record import shown

BEST = "★"


def cells(ranking: Ranking) -> tuple[list[str], list[list[str]]]:
    """The header and the rows. Losses over different targets have a column each; `lr/<group>` is the highest rate of the run."""
    keys = list(dict.fromkeys(key for row in ranking.rows for key in row.job.values))
    names = short_names(keys)
    kinds = list(dict.fromkeys(row.targets for row in ranking.rows if row.job.objective is not None))
    seeds = any(row.num_seeds > 1 for row in ranking.rows)
    groups = sorted({name for row in ranking.rows for name in row.rates})
    accuracies = sorted({name for row in ranking.rows for name in row.accuracies})
    header = ["", *names, *(label(ranking.objective, kind) for kind in kinds), *(["mean of seeds"] if seeds else [])]
    header += [
        *(f"peak {name}" for name in groups),
        *(f"{name.removeprefix('eval/')} ± 95 %" for name in accuracies),
        "steps",
        "status",
    ]
    table = []
    for row in ranking.rows:
        objective = "" if row.job.objective is None else f"{row.job.objective:.4f}"
        line = [BEST if row.best else "", *(shown(row.job.values.get(key, "")) for key in keys)]
        line += [objective if row.targets == kind else "" for kind in kinds]
        line += [f"{row.mean:.4f} ({row.num_seeds})" if row.mean is not None else ""] if seeds else []
        line += [f"{row.rates[name]:.3g}" if name in row.rates else "" for name in groups]
        line += [format_accuracy(*row.accuracies[name]) if name in row.accuracies else "" for name in accuracies]
        table.append([*line, _steps(row), _status(row)])
    return header, table


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(_escape(cell) for cell in line) + " |\n" for line in lines)


def short_names(keys: list[str]) -> list[str]:
    """Keys without what they need not say.

    >>> short_names(["optimizer.lr_scale", "run.seed", "optimizer.lr", "schedule.lr"])
    ['lr_scale', 'seed', 'optimizer.lr', 'schedule.lr']
    """
    last = Counter(key.rpartition(".")[2] for key in keys)
    return [key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 or key == SEED else key for key in keys]


def _steps(row: Row) -> str:
    if row.job.steps is None:
        return ""
    whole = row.job.num_steps in (None, row.job.steps)
    return str(row.job.steps) if whole else f"{row.job.steps}/{row.job.num_steps}"


def _status(row: Row) -> str:
    return f"{row.job.status}: {row.job.error}" if row.job.error else row.job.status


def _escape(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
