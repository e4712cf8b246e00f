"""What `make gpu-check` measures, with the goals on one H100, and the table of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Metric(NamedTuple):
    unit: str  # tokens/s, s, ms, GiB, share (a fraction, shown in per cent), x (a ratio), count
    at_least: float | None = None
    at_most: float | None = None


# By `<part>/<name>`. Without a goal: measured to explain another.
METRICS = {
    "own/tokens_per_second": Metric("tokens/s", at_least=161_000),
    "own/mfu": Metric("share", at_least=0.57),
    "own/peak_memory": Metric("GiB", at_most=50),
    "own/start_to_first_step_cold": Metric("s", at_most=20),
    "own/start_to_first_step_warm": Metric("s", at_most=10),
    "own/first_step_cold": Metric("s"),
    "own/first_step_warm": Metric("s"),
    "own/optimizer": Metric("ms"),
    "own/kernels/products": Metric("share"),
    "own/kernels/attention": Metric("share"),
    "own/kernels/norm, rotary, activation": Metric("share"),
    "own/kernels/loss": Metric("share"),
    "own/kernels/optimizer": Metric("share"),
    "own/kernels/copies": Metric("share"),
    "own/kernels/other": Metric("share"),
    "hf/tokens_per_second": Metric("tokens/s", at_least=40_000),
    "hf/peak_memory": Metric("GiB"),
    "hf/start_to_first_step": Metric("s"),
    "hf/pass_of_8x1024": Metric("ms"),
    "hf/memory_of_8x1024": Metric("GiB", at_most=14),
    "trl/tokens_per_second_padded": Metric("tokens/s"),
    "trl/tokens_per_second_padding_free": Metric("tokens/s"),
    "trl/ours_to_its_best": Metric("x", at_least=1.0),
    "sft/tokens_per_second": Metric("tokens/s"),
    "sft/tokens_per_second_of_full_rows": Metric("tokens/s"),
    "sft/share_of_full_rows": Metric("share", at_least=0.6),
    "sft/passes_a_step": Metric("count"),
    "talk_d12/tokens_per_second_1": Metric("tokens/s"),
    "talk_d12/ratio_1": Metric("x", at_least=2.0),
    "talk_d12/tokens_per_second_32": Metric("tokens/s"),
    "talk_d12/ratio_32": Metric("x", at_least=2.0),
    "talk_hf/tokens_per_second_1": Metric("tokens/s"),
    "talk_hf/ratio_1": Metric("x", at_least=2.0),
    "talk_hf/tokens_per_second_32": Metric("tokens/s"),
    "talk_hf/ratio_32": Metric("x", at_least=2.0),
    "questions/seconds": Metric("s", at_most=15),
    "questions/warm_up": Metric("s"),
    "tests/passed": Metric("count"),
    "tests/skipped": Metric("count"),
    "fp8/tokens_per_second": Metric("tokens/s"),
    "fp8/ratio_to_bf16": Metric("x", at_least=1.2),
    "forecast/memory": Metric("GiB"),
    "forecast/memory_error": Metric("share", at_least=-0.1, at_most=0.1),
    "forecast/memory_uncompiled": Metric("GiB"),
    "forecast/memory_uncompiled_measured": Metric("GiB"),
    "forecast/memory_uncompiled_error": Metric("share", at_least=-0.1, at_most=0.1),
    "forecast/step_error": Metric("share"),
    "forecast/optimizer_error": Metric("share"),
    "quickstart/seconds": Metric("s", at_most=60),
    "quickstart/share_of_training_steps": Metric("share"),
    "nanochat/tokens_per_second": Metric("tokens/s"),
    "nanochat/ours_to_it": Metric("x", at_least=1.08),
    "nanochat/peak_memory": Metric("GiB"),
    "nanochat/first_step": Metric("s"),
}


class Outcome(NamedTuple):
    """A part that has ended. `status`: done, skipped, failed, timed out, not run, interrupted."""

    part: str
    status: str
    seconds: float
    measured: dict[str, float]  # by name; of a part that failed: until then
    note: str = ""  # why it has that status
    details: dict | None = None  # settings and the like, for the JSON file alone

    @property
    def failed(self) -> bool:
        return self.status not in ("done", "skipped")


def verdict(metric: Metric, value: float, goals_hold: bool) -> tuple[str, str]:
    """The goal as text, and whether it is met. `goals_hold`: are the goals for this device?

    >>> verdict(Metric("GiB", at_most=50), 73.3, True), verdict(Metric("share", at_least=0.57), 0.58, True)
    (('<= 50.0 GiB', 'NOT MET'), ('>= 57.0 %', 'met'))
    >>> verdict(Metric("share", at_least=-0.1, at_most=0.1), -0.2, True), verdict(Metric("s", at_most=20), 9, False)
    (('-10.0 % to 10.0 %', 'NOT MET'), ('n/a', ''))
    >>> verdict(Metric("s"), 9, True)
    ('', '')
    """
    low, high = metric.at_least, metric.at_most
    if low is None and high is None:
        return "", ""
    if not goals_hold:
        return "n/a", ""
    if low is not None and high is not None:
        goal = f"{shown(metric.unit, low)} to {shown(metric.unit, high)}"
    else:
        goal = f">= {shown(metric.unit, low)}" if low is not None else f"<= {shown(metric.unit, high)}"
    met = (low is None or value >= low) and (high is None or value <= high)
    return goal, "met" if met else "NOT MET"


def shown(unit: str, value: float | None) -> str:
    """A value with its unit.

    >>> [shown(unit, 1234.5678) for unit in ("tokens/s", "s", "x", "count")], shown("share", 0.5)
    (['1,235 tokens/s', '1,234.6 s', '1,234.57 x', '1,235'], '50.0 %')
    """
    assert value is not None
    if unit == "share":
        return f"{100 * value:.1f} %"
    digits = {"tokens/s": 0, "count": 0, "x": 2}.get(unit, 1)
    return f"{value:,.{digits}f}" + ("" if unit == "count" else f" {unit}")


def rows(outcomes: list[Outcome], goals_hold: bool) -> Iterator[tuple[str, str, str, str, str, str]]:
    """The rows of the table: part, measured, value, goal, met or not, seconds of the part.

    >>> own = Outcome("own", "failed", 12.3, {"mfu": 0.5}, "out of memory")
    >>> for row in rows([own, Outcome("fp8", "skipped", 1.0, {}, "torchao is not installed")], True): print(row)
    ('own', 'FAILED: out of memory', '', '', '', '12')
    ('', 'mfu', '50.0 %', '>= 57.0 %', 'NOT MET', '')
    ('fp8', 'skipped: torchao is not installed', '', '', '', '1')
    """
    for outcome in outcomes:
        head, seconds = outcome.part, f"{outcome.seconds:.0f}"
        if outcome.status != "done":
            status = outcome.status.upper() if outcome.failed else outcome.status
            yield head, f"{status}: {outcome.note}" if outcome.note else status, "", "", "", seconds
            head = seconds = ""
        elif not outcome.measured:
            yield head, outcome.note or "done", "", "", "", seconds
        for name, value in outcome.measured.items():
            metric = METRICS[f"{outcome.part}/{name}"]
            yield head, name.replace("_", " "), shown(metric.unit, value), *verdict(metric, value, goals_hold), seconds
            head = seconds = ""


def table(outcomes: list[Outcome], goals_hold: bool) -> str:
    """All of it as text."""
    lines = [f"{'part':10s} {'measured':36s} {'value':>18s}  {'goal (one H100)':20s} {'':8s} {'seconds':>7s}"]
    for part, measured, value, goal, met, seconds in rows(outcomes, goals_hold):
        lines.append(f"{part:10s} {measured:36s} {value:>18s}  {goal:20s} {met:8s} {seconds:>7s}".rstrip())
    return "\n".join(lines)
