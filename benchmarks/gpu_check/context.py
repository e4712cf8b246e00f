"""What a part of `make gpu-check` gets, and where it leaves what it measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_check.goals import METRICS

ROOT = Path(__file__).parents[2]


class Skipped(Exception):
    """The part cannot run here, which is no failure; the message is a sentence."""


@dataclass
class Context:
    part: str
    device: str  # cuda; or cpu, a rehearsal with tiny shapes
    scratch: Path  # a folder for all parts of this check: model folders, compiled kernels, what parts have measured
    nanochat: Path | None  # a checkout
    measured: dict[str, float] = field(default_factory=dict)
    details: dict = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def add(self, name: str, value: float) -> None:
        """Keep a measured value, in a file at once: a part that is ended loses nothing."""
        assert f"{self.part}/{name}" in METRICS, name
        self.measured[name] = value
        self.save()

    def save(self, skipped: str | None = None) -> None:
        found = {"measured": self.measured, "details": self.details, "skipped": skipped}
        replacement = self.scratch / f"{self.part}.json.new"
        replacement.write_text(json.dumps(found), encoding="utf-8")
        replacement.replace(result_file(self.scratch, self.part))

    def earlier(self, part: str, name: str) -> float | None:
        """What an earlier part of this check has measured; None: nothing."""
        return self.read(part)["measured"].get(name)

    def read(self, part: str) -> dict:
        """`measured` and `details` of an earlier part, as far as it came."""
        return read_result(self.scratch, part)

    def folder(self, name: str) -> Path:
        """A folder of this name for all parts."""
        folder = self.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def result_file(scratch: Path, part: str) -> Path:
    return scratch / f"{part}.json"


def read_result(scratch: Path, part: str) -> dict:
    """`measured`, `details` and `skipped` of a part, as far as it came."""
    file = result_file(scratch, part)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"measured": {}, "details": {}, "skipped": None}


def python(*arguments: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
    """Run this Python with the arguments; its output goes to the part's. Raises RuntimeError for a status other than 0."""
    command = [sys.executable, *map(str, arguments)]
    status = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}).returncode
    if status:
        raise RuntimeError(f"`python {' '.join(map(str, arguments))}` ended with status {status}")


def benchmark_gpu(context: Context, name: str, *arguments: str, env: dict[str, str] | None = None) -> dict:
    """What `python -m benchmarks.gpu` finds of our own model's shape; kept in the details under `name`."""
    out = context.scratch / f"{context.part}-{name}.json"
    python("-m", "benchmarks.gpu", "--device", context.device, "--model", own_model(context), "--out", out, *arguments, env=env)
    found = json.loads(out.read_text(encoding="utf-8"))
    context.details[name] = found
    return found


def own_model(context: Context) -> str:
    return "tiny" if context.tiny else "d20"


def own_shape(context: Context, rows: int | None = None, compiled: bool = True) -> list[str]:
    """Keys of our own model's shape: d20, 32 (or `rows`) rows of 2,048 tokens a pass, 4 passes a step; small and
    uncompiled in a rehearsal."""
    seq_len, rows = (256, rows or 4) if context.tiny else (2048, rows or 32)
    small = ["model.n_layer=2", "tokenizer.vocab_size=512"] if context.tiny else []
    return [
        *small,
        f"train.device_batch_size={rows}",
        f"train.total_batch_size={4 * rows * seq_len}",
        f"train.compile={str(compiled and not context.tiny).lower()}",
    ]
