"""Results of command=evaluate, as text: one checkpoint, or a table of several."""

from __future__ import annotations

import sys
from pathlib import Path

from chattrain.tracking.chatcore import CHANCE, NAME
from chattrain.tracking.metrics import is_detail


def describe(result: dict) -> list[str]:
    """The lines that say what was measured, on what, and how sure it is. `result`: what command=evaluate returns."""
    metrics, measured = result["metrics"], result.get("validation")
    lines = [f"{label(result)}, {PARTS[result['part']]}" + (f": {measured['label']}" if measured else "")]
    for name in metrics:
        if not is_detail(name):
            lines.append(f"  {name + _over(name, measured):44s} {_value(name, result)}{_counted(name, measured)}".rstrip())
    return lines


PARTS = {"val": "validation part", "test": "test part"}


def label(result: dict) -> str:
    """`sft/farm step_000050` for a run's checkpoint, the folder for another."""
    folder = Path(result["checkpoint"])
    if folder.parent.name == "checkpoints":
        run = folder.parents[1]
        trained = f"{result['trained']}/{run.name} {folder.name}"
        return trained if result["stage"] == result["trained"] else f"{trained} measured as stage={result['stage']}"
    return f"{folder} measured as stage={result['stage']}"


def _over(name: str, measured: dict | None) -> str:
    return " over replies" if measured and name.endswith("/loss") else ""


def _counted(name: str, measured: dict | None) -> str:
    return f"  {measured['tokens']:,} tokens of {measured['rows']:,} rows" if measured and name.endswith("/loss") else ""


def _value(name: str, result: dict) -> str:
    """A metric; an accuracy with its error, count, and bits per byte or share of ended replies."""
    metrics, stem = result["metrics"], name.removesuffix("_acc")
    if name == NAME:
        return f"{metrics[name]:.4f}  mean of {', '.join(CHANCE)}, centred on chance"
    if stem == name or f"{stem}_n" not in metrics:
        return f"{metrics[name]:.4f}"
    more = ""
    if f"{stem}_bpb" in metrics:
        more = f", {metrics[f'{stem}_bpb']:.3f} bits per byte of the right answer"
    elif f"{stem}_ended" in metrics:
        more = f", {metrics[f'{stem}_ended']:.1%} of the replies end"
    questions = questions_of(name, result)
    return f"{metrics[name]:.1%} +- {metrics[f'{stem}_stderr']:.1%}  standard error, {questions} questions{more}"


def questions_of(accuracy: str, result: dict) -> str:
    """How many questions an accuracy is over: `100 of 1,319` where a limit leaves some out.

    >>> questions_of("eval/gsm8k_acc", {"metrics": {"eval/gsm8k_n": 100}, "questions": {"gsm8k": {"asked": 100, "of": 1319}}})
    '100 of 1,319'
    """
    stem = accuracy.removesuffix("_acc")
    asked = result["metrics"][f"{stem}_n"]
    known = result.get("questions", {}).get(stem.partition("/")[2].removesuffix("_flexible"), {}).get("of")
    return f"{asked:,}" if known in (None, asked) else f"{asked:,} of {known:,}"


def show_evaluations(results: list[dict]) -> None:
    """Print one row a result, as `command=evaluate` returns it; `tokens`: of replies, which the loss is over."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for result in results for name in result["metrics"] if not is_detail(name)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("checkpoint", "part", "tokens", *(name.removeprefix("eval/") for name in names)):
        table.add_column(column, no_wrap=True, justify="left" if column in ("checkpoint", "part") else "right")
    for result in results:
        measured, metrics = result.get("validation"), result["metrics"]
        table.add_row(
            label(result),
            result["part"],
            f"{measured['tokens']:,}" if measured else "",
            *(_value(name, result).partition("  ")[0] if name in metrics else "" for name in names),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
