"""provenance.json: how and on what a run was made. One entry for its beginning, and one for each time that it resumed."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from chattrain import device as devices
from chattrain.config import Config
from chattrain.data.collators import Collator
from chattrain.parallel.cores import cores
from chattrain.redact import redact
from chattrain.setup.data import RunData
from chattrain.setup.identity import read_identity, weights_hash
from chattrain.setup.job import current_job
from chattrain.setup.plan import RunSetup
from chattrain.storage.files import replace_text
from chattrain.tracking.repository import packages, repositories

FILE = "provenance.json"


def write_provenance(cfg: Config, setup: RunSetup, data: RunData, world_size: int, step: int) -> None:
    """Add the entry of this process, which goes on at `step`, to the file in the run folder; step 0 begins it."""
    entries = read_provenance(setup.run_dir) if step else []
    entries.append(entry(cfg, setup, data, world_size, step))
    replace_text(setup.run_dir / FILE, json.dumps(entries, indent=1) + "\n")


def read_provenance(run_dir: Path) -> list[dict[str, Any]]:
    """The entries, oldest first; [] where there is no readable file, as earlier versions wrote none."""
    try:
        entries = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []


def begun_elsewhere(entries: list[dict[str, Any]]) -> str:
    """For the end of a message about a path that is not there: the folder that the run was started in, where it is another."""
    folder = entries[-1].get("folder") if entries else None
    return f". The run was started in {folder}" if folder not in (None, str(Path.cwd())) else ""


def entry(cfg: Config, setup: RunSetup, data: RunData, world_size: int, step: int) -> dict[str, Any]:
    device, job = devices.pick_device(cfg.train.device), current_job()
    bf16 = devices.use_bf16(cfg.train.dtype, device)
    return {
        "step": step,  # that it begins at or resumes from
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": typed_command(),
        "overrides": [redact(override) for override in job.overrides],
        "folder": str(Path.cwd()),
        "config_dirs": job.config_dirs,
        "git": repositories(),
        **surroundings(device, world_size),
        "dtype": "bf16" if bf16 else "fp32",
        "compile": setup.compilation.on,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seed": cfg.run.seed,
        "num_steps": data.num_steps,
        "start": _start(setup),
        "tokenizer": data.tokenizer.fingerprint(),
        "data": {"fingerprint": data.fingerprint, "training": sources_of(data.train), "validation": sources_of(data.validation)},
    }


def typed_command() -> str:
    """The command as it was typed, without its secrets; `chattrain.run(...)` from Python."""
    job = current_job()
    call = f"chattrain.run({job.overrides})" if job.typed is None else f"chattrain {shlex.join(job.typed)}"
    return redact(call.rstrip())


def surroundings(device: torch.device, world_size: int) -> dict[str, Any]:
    """What numbers may depend on besides configuration, data and start: versions and hardware."""
    return {
        "versions": {"python": platform.python_version(), **packages(), "cuda": torch.version.cuda},
        "hardware": {
            "device": device.type,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "cpu": _cpu(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices.GIB, 1),
            "platform": platform.platform(),
            "processes": world_size,
        },
    }


@cache
def _cpu() -> str:
    """The name of the processor."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _start(setup: RunSetup) -> dict[str, Any]:
    """Where the weights at step 0 come from; of a run that resumes, as its beginning recorded it."""
    if setup.resume:
        began = read_identity(setup.run_dir, setup.resume)
        return {"description": began.start, "weights": began.weights}
    folder = setup.start.checkpoint
    return {
        "description": setup.start.description,
        "checkpoint": str(folder) if folder else None,
        "weights": weights_hash(folder),
    }


def sources_of(collator: Collator | None) -> dict[str, dict[str, Any]]:
    """Path and fingerprint of the tokens of each source."""
    if collator is None:
        return {}
    pairs = zip(collator.mixture.caches, collator.mixture.sources, strict=True)
    return {c.name: {"path": s.path, "documents": len(c), "fingerprint": c.content_hash} for c, s in pairs}
