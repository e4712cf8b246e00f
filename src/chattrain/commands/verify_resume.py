"""command=verify_resume: does a killed and resumed run of this configuration end as one that nothing disturbed?"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chattrain.commands.exit import print_for_programs
from chattrain.config import Config
from chattrain.config.compose import key_of
from chattrain.errors import RunFailed
from chattrain.setup.compare_runs import compare_tensors, read_numbers
from chattrain.setup.job import JOB_VARIABLE, current_job
from chattrain.storage import checkpoint
from chattrain.tracking.metrics import read_metrics

log = logging.getLogger("chattrain")

OWN_KEYS = ("command", "verify", "run", "tracking", "checkpoint", "sweep")  # this command gives the runs its own
POLL_S = 0.02


def main(cfg: Config) -> dict:
    """Make verify.steps steps twice, in a temporary folder in run.root: undisturbed; and killed (SIGKILL) after a random step,
    then resumed. Compare all tensors of the last checkpoints to the bit, and all numbers of metrics.jsonl.

    Returns what was seen. Raises RunFailed where the two differ, or a run fails.
    """
    steps = cfg.verify.steps
    killed_at = random.randint(1, steps - 1)
    Path(cfg.run.root).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".verify_resume-", dir=cfg.run.root))
    try:
        whole, torn = folder / "whole", folder / "torn"
        log.info("%d steps undisturbed", steps)
        _finish(_start(cfg, whole), whole)
        log.info("the same again, killed after step %d or a few later, once it has a checkpoint", killed_at)
        killed_at = _kill(_start(cfg, torn), torn, killed_at)
        log.info("resumed")
        _finish(_start(cfg, torn), torn)
        found = {"steps": steps, "killed_after": killed_at, "resumed_from": _resumed_from(torn), **_compare(whole, torn)}
        print_for_programs(found)
        if not found["equal"]:
            raise RunFailed(
                f"the resumed run differs: largest deviation of a tensor {found['largest_deviation']:.3g}, of {found['tensors']} "
                f"tensors {found['different_tensors']} differ, of {found['metric_lines']} lines of metrics.jsonl "
                f"{found['different_lines']}. train.device={cfg.train.device.name}: on a CPU this is a bug"
            )
        log.info("equal to the bit: %d tensors, %d lines of metrics.jsonl", found["tensors"], found["metric_lines"])
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(cfg: Config, run_dir: Path) -> subprocess.Popen:
    """Start the user's own training, for verify.steps steps, as a process group of its own."""
    own = [override for override in current_job().overrides if key_of(override).partition(".")[0] not in OWN_KEYS]
    own = [override for override in own if key_of(override) not in ("train.max_steps", "log.every")]
    given = [
        f"run.seed={cfg.run.seed}",
        f"run.root='{cfg.run.root}'",  # where init.from=auto looks for runs
        f"run.dir='{run_dir.resolve()}'",
        f"train.max_steps={cfg.verify.steps}",
        f"checkpoint.every={max(1, cfg.verify.steps // 4)}",
        "log.every=1",
        "tracking=none",
    ]
    command = [sys.executable, "-m", "chattrain", *_config_dir(sys.argv[1:]), *own, *given]
    environment = {name: value for name, value in os.environ.items() if name != JOB_VARIABLE}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _config_dir(arguments: list[str]) -> list[str]:
    """
    >>> _config_dir(["--config-dir", "mine", "stage=sft"]), _config_dir(["-cd=mine"]), _config_dir(["stage=sft"])
    (['--config-dir', 'mine'], ['-cd=mine'], [])
    """
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, _ = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            return [argument] if equals else [argument, following]
    return []


def _finish(process: subprocess.Popen, run_dir: Path) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise RunFailed(f"a run of this configuration ended with status {process.returncode}: {said.strip().splitlines()[-1:]}")
    assert (run_dir / "summary.json").is_file()


def _kill(process: subprocess.Popen, run_dir: Path, step: int) -> int:
    """SIGKILL the processes once metrics.jsonl shows the step and a checkpoint is there to resume from; returns the step."""
    while process.poll() is None:
        rows = read_metrics(run_dir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step and checkpoint.all_checkpoints(run_dir):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return rows[-1]["step"]
        time.sleep(POLL_S)
    _finish(process, run_dir)
    log.warning("it ended before it could be killed; give a larger verify.steps")
    return read_metrics(run_dir / "metrics.jsonl")[-1]["step"]


def _resumed_from(run_dir: Path) -> str:
    return json.loads((run_dir / "summary.json").read_text())["init"]


def _compare(whole: Path, torn: Path) -> dict:
    one, two = (checkpoint.resolve(run_dir) for run_dir in (whole, torn))
    tensors = compare_tensors(one, two, ("model.safetensors", "optimizer.safetensors"))
    lines = [read_numbers(run_dir) for run_dir in (whole, torn)]
    unequal = sum(a != b for a, b in zip(*lines, strict=False)) + abs(len(lines[0]) - len(lines[1]))
    equal = not tensors["different_tensors"] and not unequal
    return {"equal": equal, **tensors, "metric_lines": len(lines[0]), "different_lines": unequal}
