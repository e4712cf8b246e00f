"""Runs that are killed at random moments, half of them inside a save, and resumed until they are complete."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from chattrain.storage import checkpoint
from chattrain.tracking.metrics import read_metrics
from tests.helpers import TINY

EVERY = 5  # steps between checkpoints
PATIENCE_S = 120.0
OF_THE_PROCESS = ("time", "train/tokens_per_second", "train/data_wait", "train/peak_memory", "train/compilations")


@dataclass
class Kill:
    inside_save: bool
    whole_before: int  # newest step whose checkpoint was whole when the run was killed; 0: none
    resumes_from: int  # newest valid step afterwards
    reached: int  # last step of metrics.jsonl

    @property
    def survived(self) -> bool:
        return self.resumes_from >= self.whole_before


@dataclass
class Story:
    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)  # from the run that nothing disturbed

    @property
    def survived(self) -> bool:
        return all(kill.survived for kill in self.kills) and not self.differences


def kill_and_resume(folder: Path, count: int, steps: int, seed: int = 0, nproc: int = 1) -> Story:
    """Train `steps` steps in folder/whole undisturbed, and in folder/torn killed `count` times (SIGKILL to all processes).
    Compare the two."""
    rng, story = random.Random(seed), Story()
    whole, torn = folder / "whole", folder / "torn"
    assert start(whole, steps, nproc).wait(PATIENCE_S * 5) == 0
    for number in range(count):
        process, inside = start(torn, steps, nproc), number % 2 == 0
        begun = _newest(torn)
        # Spread the kills over the run: this one comes once it has made its share of the steps that are left.
        wanted = begun + max(1, (steps - begun) // (count - number + 1)) * rng.random()
        killed = _kill(process, torn, wanted, inside)
        if killed is None:
            break
        rows = read_metrics(torn / "metrics.jsonl")
        valid = checkpoint.newest_valid(torn)
        step = checkpoint.load_state(valid).step if valid else 0
        story.kills.append(Kill(inside, killed, step, rows[-1]["step"] if rows else 0))
    assert start(torn, steps, nproc).wait(PATIENCE_S * 5) == 0
    story.differences = compare(whole, torn)
    return story


def start(run_dir: Path, steps: int, nproc: int) -> subprocess.Popen:
    arguments = [
        "stage=sft",
        *TINY,
        "init.from=scratch",
        f"run.dir={run_dir}",
        f"train.max_steps={steps}",
        f"checkpoint.every={EVERY}",
        "eval.every=50",
        f"distributed.nproc={nproc}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "chattrain", *arguments], env=environment, start_new_session=True, **quiet)


def _kill(process: subprocess.Popen, run_dir: Path, wanted: float, inside_save: bool) -> int | None:
    """Kill the run after this step; inside a save, as soon as one is being written then. Returns the newest step whose checkpoint
    was there just before; None if the run ended first."""
    deadline, folder = time.monotonic() + PATIENCE_S, run_dir / "checkpoints"
    while process.poll() is None and time.monotonic() < deadline:
        rows = read_metrics(run_dir / "metrics.jsonl")
        far_enough = bool(rows) and rows[-1]["step"] >= wanted
        if far_enough and (not inside_save or any(folder.glob(".step_*"))):
            before = _newest(run_dir)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return before
        if not (far_enough and inside_save):
            time.sleep(0.01)
    return None


def _newest(run_dir: Path) -> int:
    found = checkpoint.all_checkpoints(run_dir)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def compare(whole: Path, torn: Path) -> list[str]:
    """What differs between two runs, in words: tensors of the last checkpoint, lines of metrics.jsonl, counts of the summary."""
    found, (one, two) = [], (checkpoint.resolve(run_dir) for run_dir in (whole, torn))
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(one / file), load_file(two / file)
        found += [
            f"{file}: {name}" for name in a.keys() | b.keys() if name not in a or name not in b or not a[name].equal(b[name])
        ]
    lines = [
        [{k: v for k, v in row.items() if not k.startswith(OF_THE_PROCESS)} for row in read_metrics(run / "metrics.jsonl")]
        for run in (whole, torn)
    ]
    if lines[0] != lines[1]:
        found.append(f"metrics.jsonl: steps {[row['step'] for row in lines[1]]}")
    counts = [json.loads((run / "summary.json").read_text()) for run in (whole, torn)]
    keys = ("status", "steps", "tokens_seen", "supervised_tokens", "loss_weight")
    found += [f"summary.json: {key} {counts[0][key]} {counts[1][key]}" for key in keys if counts[0][key] != counts[1][key]]
    return found


# What else befalls runs: the tests that do it.
OTHER_FAULTS = {
    "a flipped byte, a lost file, a full disk, a failing rename": ["tests/storage/test_checkpoint.py"],
    "a second writer, a killed owner, no locks": ["tests/storage/test_lock.py"],
    "Ctrl-C and SIGTERM; damaged newest checkpoints; other settings": ["tests/setup/test_resume.py"],
    "a rank that raises, hangs, freezes or dies": ["tests/parallel/test_launch.py"],
    "files, rows, command lines and folders of strangers, mutated": ["tests/fuzz", "-m", "slow"],
    "MLflow servers that refuse, hang, fail or go down": ["tests/tracking", "-k", "server or mlflow"],
}


def main() -> None:
    """`python -m tests.kills [kills]`: the table of `make faults`."""
    import tempfile

    from tests.helpers import write_talk

    count, here = int(sys.argv[1]) if len(sys.argv) > 1 else 100, Path.cwd()
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    os.chdir(place)
    write_talk(place)
    failed = False
    _row("fault", "tried", "survived")
    for nproc in (1, 2):
        ranks = f"{nproc} rank{'s' * (nproc > 1)}"
        story = kill_and_resume(place / f"ranks{nproc}", count // 2, 8 * count, seed=nproc, nproc=nproc)
        for inside in (True, False):
            kills = [kill for kill in story.kills if kill.inside_save == inside]
            name = f"SIGKILL {'inside a save' if inside else 'at a random moment'}, {ranks}"
            _row(name, len(kills), sum(kill.survived for kill in kills))
        _row(f"... and in the end equal to the bit, {ranks}", 1, int(not story.differences))
        failed |= not story.survived
        print("\n".join(story.differences), end="")
    os.chdir(here)
    for name, arguments in OTHER_FAULTS.items():
        command = [sys.executable, "-m", "pytest", "-n0", "-q", "-m", "not slow", *arguments]
        said = subprocess.run(command, capture_output=True, text=True).stdout
        passed, broken = (sum(map(int, re.findall(rf"(\d+) {word}", said))) for word in ("passed", "(?:failed|error)"))
        _row(name, passed + broken, passed)
        print(*re.findall(r"^(?:FAILED|ERROR) .*", said, flags=re.M), sep="\n", end="\n" * bool(broken))
        failed |= bool(broken) or not passed
    sys.exit(failed)


def _row(name: str, tried: int | str, survived: int | str) -> None:
    print(f"{name:64s} {tried:>6} {survived:>9}", flush=True)


if __name__ == "__main__":
    main()
