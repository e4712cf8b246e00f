"""Tests, speed and memory on a machine with one GPU, against the goals; no network, nothing installed, at most 8 minutes.

    make gpu-check PYTHON=python3
    python -m benchmarks.gpu_check --only own,hf,trl
    python -m benchmarks.gpu_check --device cpu

Each part is a process with a limit of its own; one that fails or takes too long does not stop the others. What is measured is in
the JSON file after each part. What parts share (compiled kernels, model folders, the results that others are compared with) is
in a temporary folder, or in --folder, from which a later call goes on. `--device cpu` rehearses all of it with tiny shapes, whose
figures mean nothing.

Exit status: 0 if no part failed, though goals may be missed; 1 if one failed, took too long or had no time left; 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu_check.goals import METRICS, Outcome, shown, table, verdict
from benchmarks.gpu_check.parts import PARTS, Part, run

BUDGET_S = 470  # and some seconds to end what runs


def main(arguments: list[str] | None = None) -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default=",".join(names), help=f"parts by commas (default {','.join(names)})")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds in all (default {BUDGET_S})")
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat of December 2025, to set beside ours")
    parser.add_argument("--folder", type=Path, help="folder for what parts share, kept afterwards")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="JSON file to write")
    asked = parser.parse_args(arguments)
    chosen = asked.only.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--only {unknown[0]} is not known; choose from {', '.join(names)}")
    parts, outcomes = [part for part in PARTS if part.name in chosen], []
    nanochat = asked.nanochat.resolve() if asked.nanochat else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this gets the table too
    stopped = False
    with shared_folder(asked.folder) as scratch:
        try:
            for outcome in outcomes_of(parts, asked.device, scratch, nanochat, asked.budget):
                outcomes.append(outcome)
                write(asked.out, asked.device, outcomes)
                stopped = outcome.status == "interrupted"
        except KeyboardInterrupt:  # between two parts
            stopped = True
    write(asked.out, asked.device, outcomes)
    report(outcomes, asked.device == "cuda")
    print(f"written to {asked.out}")
    if stopped:
        sys.exit(130)
    sys.exit(1 if any(outcome.failed for outcome in outcomes) else 0)


@contextmanager
def shared_folder(given: Path | None) -> Iterator[Path]:
    """The folder that was given, made where it is missing; else a temporary one."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="chattrain-gpu-check-", ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)


def outcomes_of(parts: list[Part], device: str, scratch: Path, nanochat: Path | None, budget_s: float) -> Iterator[Outcome]:
    """Run the parts in their order while there is time. The last one is that in which Ctrl-C came."""
    begun = time.perf_counter()
    for part in parts:
        left = budget_s - (time.perf_counter() - begun)
        if left < 1:
            yield Outcome(part.name, "not run", 0.0, {}, f"the budget of {budget_s:.0f} s is spent; --only {part.name} runs it")
            continue
        print(f"{part.name} ...", end=" ", file=sys.stderr, flush=True)
        outcome = run(part, device, scratch, nanochat, min(part.limit_s, left))
        print(f"{outcome.status}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        yield outcome
        if outcome.status == "interrupted":
            return


def write(file: Path, device: str, outcomes: list[Outcome]) -> None:
    """All so far as JSON, whole or not at all."""
    parts = [outcome._asdict() | {"goals": goals(outcome, device == "cuda")} for outcome in outcomes]
    replacement = file.with_name(f"{file.name}.new")
    replacement.write_text(json.dumps({"command": "benchmarks.gpu_check", "device": device, "parts": parts}, indent=1) + "\n")
    replacement.replace(file)


def goals(outcome: Outcome, goals_hold: bool) -> dict[str, dict]:
    """By metric: unit, the goal in words, and whether it is met."""
    found = {}
    for name, value in outcome.measured.items():
        metric = METRICS[f"{outcome.part}/{name}"]
        goal, met = verdict(metric, value, goals_hold)
        found[name] = {"unit": metric.unit, "shown": shown(metric.unit, value), "goal": goal, "met": met}
    return found


def report(outcomes: list[Outcome], goals_hold: bool) -> None:
    """Print the machine, the table, the kernels, and the end of what failed parts have said."""
    texts = {outcome.part: outcome.details["text"] for outcome in outcomes if outcome.details and "text" in outcome.details}
    print(f"\n{texts.pop('versions', '')}\n\n{table(outcomes, goals_hold)}\n")
    for text in texts.values():
        print(f"{text}\n")
    for outcome in outcomes:
        if outcome.failed and outcome.details and outcome.details.get("output"):
            print(f"--- the end of what {outcome.part} said\n" + "\n".join(outcome.details["output"]) + "\n")


if __name__ == "__main__":
    main()
