"""What a run folder holds, for tables and reports.

Any of its files may be missing or cut off: a run that ended badly needs its report most.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from chattrain.config.plain_yaml import load_plain
from chattrain.tracking.metrics import parse_row, read_metrics

Points = list[tuple[float, float]]  # (step, value)
SAMPLES = "samples.jsonl"  # replies to eval.prompts, a line each: step, prompt, reply, ended, repeating

# What the validation metrics of a run are over, in words. Earlier versions had one kind of targets for all of them.
TARGETS = {"all": "all tokens", "replies": "replies"}
Z95 = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class RunFolder:
    """config.yaml, summary.json and metrics.jsonl of a run."""

    path: Path
    config_text: str
    settings: dict[str, Any]  # config.yaml's; {} where it cannot be read
    summary: dict[str, Any]  # {} where there is none
    rows: list[dict]  # of metrics.jsonl

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Never fails on what the files hold."""
        path = Path(path)
        config_text = _text(path / "config.yaml")
        return cls(
            path, config_text, _yaml(config_text), _json(_text(path / "summary.json")), read_metrics(path / "metrics.jsonl")
        )

    @cached_property
    def samples(self) -> list[dict]:
        """The lines of samples.jsonl."""
        return read_samples(self.path / SAMPLES)

    @property
    def stage(self) -> str:
        return str(self.settings.get("stage") or self.summary.get("stage") or "")

    @property
    def name(self) -> str:
        """run.name; the folder's name where the config does not tell."""
        run = self.settings.get("run")
        name = run.get("name") if isinstance(run, dict) else None
        return str(name or self.path.resolve().name)

    @property
    def status(self) -> str:
        """Of summary.json; `unfinished` without one: the run goes on, or was killed."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def validation(self) -> dict[str, Any]:
        """rows, tokens and targets of the validation losses; {} where a run did not record them."""
        validation = self.summary.get("validation")
        return validation if isinstance(validation, dict) else {}

    @property
    def audit(self) -> list[str]:
        """What the audit of the data found, a sentence each; [] where a run recorded none."""
        data = self.summary.get("data")
        audit = data.get("audit") if isinstance(data, dict) else None
        findings = audit.get("findings") if isinstance(audit, dict) else None
        found = [finding for finding in findings if isinstance(finding, dict)] if isinstance(findings, list) else []
        return [f"{finding.get('level', '')}: {finding.get('message', '')}" for finding in found]

    @cached_property
    def curves(self) -> dict[str, Points]:
        """The points of each metric, without values that were not finite."""
        curves: dict[str, Points] = {}
        for row in self.rows:
            for name, value in row.items():
                if name not in ("step", "time") and isinstance(value, int | float):
                    curves.setdefault(name, []).append((row["step"], value))
        return curves

    @cached_property
    def last(self) -> dict[str, float | None]:
        """The last value of each metric, None where it was not finite."""
        return {name: value for row in self.rows for name, value in row.items() if name not in ("step", "time")}

    def peak_rates(self) -> dict[str, float]:
        """The highest learning rate of each group, by `lr/<group>`: that of summary.json.

        A run of an earlier version did not record it, and a schedule that decays from its first step has passed its peak when a
        run first logs. There the peak is the logged rate divided by its factor, times schedule.init_lr_frac; where the config
        does not tell, the highest that was logged.
        """
        recorded = self.summary.get("learning_rates")
        if isinstance(recorded, dict) and recorded:
            return {f"lr/{group}": rate for group, rate in recorded.items() if isinstance(rate, int | float)}
        schedule = self.settings.get("schedule")
        peak = schedule.get("init_lr_frac") if isinstance(schedule, dict) else None
        rates: dict[str, float] = {}
        for row in self.rows:
            factor, scale = row.get("lr_factor"), 1.0
            if isinstance(peak, int | float) and isinstance(factor, int | float) and factor > 0:
                scale = peak / factor
            for name, value in row.items():
                if name.startswith("lr/") and isinstance(value, int | float):
                    rates[name] = max(rates.get(name, 0.0), value * scale)
        return rates

    def accuracies(self) -> dict[str, tuple[float, float | None]]:
        """The last value of each `eval/<set>_acc`, and half its 95 % interval (None where no standard error was recorded)."""
        found = {}
        for name, value in self.last.items():
            if name.startswith("eval/") and name.endswith("_acc") and value is not None:
                error = self.last.get(name.removesuffix("_acc") + "_stderr")
                found[name] = (value, None if error is None else Z95 * error)
        return found


def read_samples(file: Path) -> list[dict]:
    """The complete lines of a samples.jsonl, in order; [] where there is none. A line cut off by a crash is left out."""
    rows = (parse_row(line) for line in _text(file).splitlines())
    return [row for row in rows if row and isinstance(row.get("prompt"), str) and isinstance(row.get("reply"), str)]


def label(metric: str, targets: str | None) -> str:
    """A validation metric with what it is over.

    >>> label("val/loss", "all"), label("val/loss", None), label("train/loss", "all")
    ('val/loss (all tokens)', 'val/loss', 'train/loss')
    >>> label("val/loss", "assistant"), label("val/bpb/gsm8k", "assistant")
    ('val/loss (replies)', 'val/bpb/gsm8k (all tokens)')
    """
    words = over(metric, targets)
    return metric if words is None else f"{metric} ({words})"


def over(metric: str, targets: str | None) -> str | None:
    """What a validation metric is over, in words, of a run with these targets; None: not known, or no such metric."""
    if targets is None or not metric.startswith("val/") or metric.startswith("val/loss_all"):
        return None
    if targets == "assistant":
        return TARGETS["replies" if metric.startswith("val/loss") else "all"]
    return TARGETS.get(targets, targets)


def format_accuracy(value: float, half_width: float | None) -> str:
    """
    >>> format_accuracy(0.6625, 0.0464), format_accuracy(0.25, None)
    ('66.2% ± 4.6', '25.0%')
    """
    return f"{value:.1%}" + ("" if half_width is None else f" ± {100 * half_width:.1f}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(text: str) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _yaml(text: str) -> dict:
    try:
        content = load_plain(text)  # interpolations stay text
    except Exception:  # cut off or malformed in any way; a report shows the text itself
        return {}
    return content if isinstance(content, dict) else {}
