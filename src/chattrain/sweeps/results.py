"""What a launch prints at its end: the answer of a sweep, the stages of a chain, or evaluations side by side."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from chattrain.tracking.answer import find_answer
from chattrain.tracking.ranking import read_runs
from chattrain.tracking.sweep_record import SweepRecord
from chattrain.tracking.table import show_runs, show_sweep
from chattrain.tracking.table_evaluations import show_evaluations

log = logging.getLogger("chattrain")


def show_results(record: SweepRecord, folder: Path, results: list[dict], trains: bool, complete: bool) -> None:
    """`results`: what the commands of the jobs returned; `trains`: are the jobs trainings? `complete`: all jobs ran, in this
    process or in workers of this host, so that the best may be measured here."""
    if not trains:
        if measured := [result for result in results if "part" in result]:
            show_evaluations(measured)
        return
    if set(record.swept) - {"stage"}:
        show_sweep(folder, _score_winner(record) if complete else None)
        return
    done = [job for job in record.jobs if job.run_dir and job.status == "completed"]
    failed = [(job.stage, f"{job.status}: {job.error}" if job.error else job.status) for job in record.jobs if job not in done]
    show_runs([Path(job.run_dir or "") for job in done], failed, folder)


def read_answer(folder: Path) -> dict[str, float]:
    """The numbers of answer.json that a sweep's run in MLflow shows: the best objective, and where the fitted optimum lies."""
    file = folder / "answer.json"
    if not file.is_file():
        return {}
    answer = json.loads(file.read_text())
    best = next((row["objective"] for row in answer["rows"] if row["best"]), None)
    optima = [fit["minimum"] for fit in answer["fits"] if fit.get("minimum") is not None]
    numbers = {f"best/{answer['objective']}": best, f"optimum/{answer['rate_axis']}": optima[0] if len(optima) == 1 else None}
    return {name: value for name, value in numbers.items() if value is not None}


def _score_winner(record: SweepRecord) -> dict[str, float] | None:
    """Metrics of the best job on the test part of its data, which did not choose it; None where there is none."""
    winners = find_answer(record, read_runs(record)).ranking.winners
    if len(winners) != 1 or not winners[0].job.run_dir or len([job for job in record.jobs if job.status == "completed"]) < 2:
        return None
    from chattrain.commands.evaluate import score_on_test  # imports torch

    try:
        score = score_on_test(Path(winners[0].job.run_dir))
    except Exception as error:  # the sweep's answer stands without it
        log.warning("the best was not measured on the test part of its data: %s", error)
        return None
    return score["metrics"] if score else None
