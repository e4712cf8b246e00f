"""command=reproduce: repeat a run with its recorded configuration, from its recorded start, and compare the two."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from chattrain import runner
from chattrain.commands.exit import print_for_programs
from chattrain.config import Config
from chattrain.errors import RunFailed, UserError
from chattrain.setup.compare_runs import compare_numbers, compare_tensors
from chattrain.setup.job import as_job, current_job
from chattrain.setup.provenance import read_provenance
from chattrain.setup.repeat import Original, check_same_inputs, configuration_of, read_original
from chattrain.setup.runs import NEWEST, run_to_read
from chattrain.storage import checkpoint
from chattrain.storage.files import read_json, replace_text

log = logging.getLogger("chattrain")

RESULT = "reproduction.json"  # in the folder of a repetition that was compared
LOOSE = 0.01  # relative deviation of a loss that versions and hardware may make
LOSSES = ("train/loss", "val/loss", "val/loss_all", "val/bpb")
IRRELEVANT = ("hardware.memory_gib", "hardware.platform", "hardware.cores")  # to the numbers of a run


def main(cfg: Config) -> dict:
    """Repeat the run that is named, else the newest finished one of the stage, into a folder of its own; print what is equal and
    what is not. Its numbers are compared up to the newest checkpoint of the original.

    The folder is <name>-reproduced. Where init.from names the run, run.name or run.dir name the folder. One that a repetition
    left unfinished goes on. Returns what was found. Raises RunFailed where the two differ by more than the tolerance, UserError
    where start or data are gone or others.
    """
    named = cfg.init.source not in NEWEST
    name, folder = (cfg.run.name, cfg.run.dir) if named else (None, None)
    read = replace(cfg, run=replace(cfg.run, name=None, dir=None) if named else cfg.run)
    original = read_original(run_to_read(read))
    new = configuration_of(original, read, current_job())
    new.run.dir = str(_folder_for(Path(cfg.run.root) / new.stage, original.run_dir, name, folder))
    check_same_inputs(original, new)
    with as_job(replace(current_job(), overrides=[])):  # those of this command are no settings of the run
        summary = runner.train(new)
    if summary["steps"] < original.step:
        raise KeyboardInterrupt
    return _report(original, Path(summary["run_dir"]))


def _folder_for(runs: Path, original: Path, name: str | None, folder: str | None) -> Path:
    """The folder of the repetition. Raises UserError for a given one that holds a complete run."""
    if name and "/" in name:
        raise UserError(f"run.name={name} is no name of a folder; use run.dir for a path")
    if name or folder:
        given = Path(folder).expanduser().resolve() if folder else (runs / str(name)).resolve()
        if _is_complete(given):
            raise UserError(f"{given} holds a complete run; choose another run.name for the repetition")
        return given
    number, base = 1, f"{original.name}-reproduced"
    while _is_complete(candidate := (runs / (base if number == 1 else f"{base}{number}")).resolve()):
        number += 1
    return candidate


def _is_complete(folder: Path) -> bool:
    summary = folder / "summary.json"
    return (folder / RESULT).is_file() or (summary.is_file() and read_json(summary).get("status") == "completed")


def _report(original: Original, new_dir: Path) -> dict:
    """Compare, print and keep what was found."""
    one, two = original.checkpoint, checkpoint.resolve(new_dir)
    surroundings = changed_surroundings(original.entries, read_provenance(new_dir)[-1])
    numbers = compare_numbers(original.run_dir, new_dir, original.step)
    tensors = compare_tensors(one, two, ("model.safetensors",))
    equal = not tensors["different_tensors"] and not numbers["largest_relative"]
    tolerance, why = _tolerance(original, surroundings, read_provenance(new_dir)[-1])
    worst = max((value for name, value in numbers["largest_relative"].items() if name in LOSSES), default=0.0)
    found = {
        "original": str(original.run_dir),
        "reproduction": str(new_dir),
        "step": original.step,
        "equal": equal,
        "tolerance": tolerance,
        "largest_loss_deviation": worst,
        "passed": equal or (tolerance > 0 and worst <= tolerance),
        "surroundings": surroundings,
        **numbers,
        **tensors,
    }
    replace_text(new_dir / RESULT, json.dumps(found, indent=1) + "\n")
    for line in _describe(found, why):
        print(line)
    print_for_programs(found)
    if not found["passed"]:
        raise RunFailed(
            f"{new_dir} does not repeat {original.run_dir}: the largest relative deviation of a loss is {worst:.3g}, of "
            f"{found['tensors']} tensors of the weights {found['different_tensors']} differ; tolerance: {why}"
            + _extended(original.entries)
        )
    return found


def _extended(entries: list[dict]) -> str:
    """Why no one run repeats a run that was given more steps, for the end of a message; nothing where it was not."""
    steps = list(dict.fromkeys(entry["num_steps"] for entry in entries if "num_steps" in entry))
    if len(steps) < 2:
        return ""
    return f". It was planned with {', then '.join(map(str, steps))} steps, and its learning rates followed these plans"


def changed_surroundings(entries: list[dict], now: dict) -> list[str]:
    """What differs in versions, hardware and code between the parts of the original and the repetition, in words."""
    if not entries:
        return ["not recorded: an earlier version of chattrain made the run"]
    found = []
    for entry in entries:
        for part in ("versions", "hardware"):
            before, after = entry.get(part) or {}, now[part]
            keys = [key for key in [*before, *(k for k in after if k not in before)] if before.get(key) != after.get(key)]
            found += [f"{part}.{key}: {before.get(key)} -> {after.get(key)}" for key in keys]
        before, after = ({repo.get("of"): repo for repo in each.get("git") or []} for each in (entry, now))
        for of in ("chattrain", *(["current folder"] if entry.get("config_dirs") else [])):  # where the user's own parts may lie
            was, is_ = before.get(of) or {}, after.get(of) or {}
            if was.get("commit") != is_.get("commit"):
                found.append(f"commit ({of}): {was.get('commit')} -> {is_.get('commit')}")
            elif was.get("diff") != is_.get("diff"):
                found.append(f"uncommitted changes ({of})")
        found += [f"{key}: {entry.get(key)} -> {now[key]}" for key in ("dtype", "compile") if entry.get(key) != now[key]]
    return list(dict.fromkeys(found))


def _tolerance(original: Original, surroundings: list[str], now: dict) -> tuple[float, str]:
    """The relative deviation of losses up to which the repetition passes, and why."""
    others = [text for text in surroundings if not text.startswith(IRRELEVANT)]
    repeatable = now["hardware"]["device"] == "cpu" or (now["deterministic"] and original.is_deterministic)
    if others:
        return LOOSE, f"{LOOSE:.0%} of a loss, as surroundings differ"
    if not repeatable:
        return LOOSE, f"{LOOSE:.0%} of a loss, as kernels of a GPU sum in varying order; train.deterministic=true prevents it"
    return 0.0, "none, as code, versions and hardware are the same"


def _describe(found: dict, why: str) -> list[str]:
    lines = [f"{found['original']}, repeated in {found['reproduction']} up to step {found['step']}"]
    lines += [f"  differs: {text}" for text in found["surroundings"]] or ["  code, versions and hardware are the same"]
    if found["first_difference"]:
        step, name, a, b = found["first_difference"]
        lines.append(f"  numbers: of {found['compared_numbers']} the first that differs is {name} at step {step}: {a} and {b}")
        lines += [f"    largest relative deviation of {n}: {value:.3g}" for n, value in sorted(found["largest_relative"].items())]
    else:
        lines.append(f"  numbers: all {found['compared_numbers']} are equal to the bit")
    if found["different_tensors"]:
        counts = f"{found['different_tensors']} of {found['tensors']} tensors differ"
        lines.append(f"  weights: {counts}, largest deviation {found['largest_deviation']:.3g}")
    else:
        lines.append(f"  weights: all {found['tensors']} tensors are equal to the bit")
    verdict = "equal to the bit" if found["equal"] else "within tolerance" if found["passed"] else "NOT within tolerance"
    return [*lines, f"{verdict} (tolerance: {why})"]
