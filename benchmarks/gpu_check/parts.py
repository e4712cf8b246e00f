"""The parts of `make gpu-check`, the most important first, and how one runs: in a process of its own, with a limit in seconds.

    python -m benchmarks.gpu_check.parts PART DEVICE SCRATCH [NANOCHAT]

is that process.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_check.context import ROOT, Context, Skipped, read_result
from benchmarks.gpu_check.goals import Outcome

SKIPPED = 77  # exit status of a part that cannot run here
ENDING_S = 5  # seconds that a part has to end
TAIL = 60  # lines of a failed part's output that are kept


class Part(NamedTuple):
    name: str
    module: str  # of benchmarks.gpu_check; its function has the part's name
    limit_s: int


PARTS = [
    Part("versions", "machine", 60),
    Part("own", "own", 180),
    Part("hf", "tuning", 120),
    Part("sft", "tuning", 90),
    Part("talk_d12", "answers", 60),
    Part("talk_hf", "answers", 100),
    Part("questions", "answers", 60),
    Part("tests", "machine", 120),
    Part("trl", "tuning", 120),
    Part("fp8", "own", 90),
    Part("forecast", "own", 120),
    Part("quickstart", "machine", 120),
    Part("nanochat", "tuning", 150),
]


def run(part: Part, device: str, scratch: Path, nanochat: Path | None, limit_s: float) -> Outcome:
    """Run the part for at most `limit_s` seconds. It is ended, with all that it has started, at the limit and on Ctrl-C."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.parts", part.name, device, str(scratch)]
    command += [str(nanochat)] if nanochat else []
    log, begun, process = scratch / f"{part.name}.log", time.perf_counter(), None
    status, note = "failed", ""
    try:
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(scratch), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        status = {0: "done", SKIPPED: "skipped"}.get(process.wait(limit_s), "failed")
    except subprocess.TimeoutExpired:
        status, note = "timed out", f"after {limit_s:.0f} s"
    except KeyboardInterrupt:
        status, note = "interrupted", "by Ctrl-C"
    finally:
        if process:
            end(process)
    found = read_result(scratch, part.name)
    lines = log.read_text(errors="replace").splitlines()
    if status == "failed":
        note = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    details = found["details"] | ({"output": lines[-TAIL:]} if status in ("failed", "timed out") else {})
    return Outcome(part.name, status, time.perf_counter() - begun, found["measured"], found["skipped"] or note, details)


def environment(scratch: Path) -> dict[str, str]:
    """Of a part: it finds this checkout from any folder, asks no network, and shares the compiled kernels of this check."""
    given = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    compiled = scratch / "compiled"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *given]),
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(compiled),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
    }


def end(process: subprocess.Popen) -> None:
    """End the session of a part: it and all processes that it has started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            break
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def main(name: str, device: str, scratch: str, nanochat: str | None = None) -> None:
    context = Context(name, device, Path(scratch), Path(nanochat) if nanochat else None)
    context.save()
    (part,) = [part for part in PARTS if part.name == name]
    try:
        getattr(importlib.import_module(f"benchmarks.gpu_check.{part.module}"), name)(context)
    except Skipped as error:
        context.save(skipped=str(error))
        sys.exit(SKIPPED)
    context.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
