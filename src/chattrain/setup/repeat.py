"""A run as it was recorded, to be repeated: its settings, its start and its data, or why it cannot be."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chattrain.config import Config
from chattrain.config.saved import repeated
from chattrain.config.words import Command, DType, Resume
from chattrain.errors import UserError
from chattrain.parallel import launch
from chattrain.setup.data import RunData, open_data
from chattrain.setup.identity import Identity, differences, identify, read_identity, weights_hash
from chattrain.setup.job import Job
from chattrain.setup.provenance import begun_elsewhere, read_provenance, sources_of
from chattrain.setup.start import find_start, start_at
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.storage import checkpoint
from chattrain.storage.files import read_json

log = logging.getLogger("chattrain")

AS_DECIDED = ("train.dtype", "tokenizer.path")  # a repetition has what was decided then
RANDOM = "random weights"  # begins what the identity of a run says that did


@dataclass(frozen=True)
class Original:
    """A run to repeat, up to its newest valid checkpoint."""

    run_dir: Path
    checkpoint: Path
    state: checkpoint.CheckpointState
    identity: Identity
    entries: list[dict[str, Any]]  # of provenance.json; []: of an earlier version

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def is_deterministic(self) -> bool:
        return all(entry.get("deterministic") for entry in self.entries)

    def recorded_sources(self, part: str) -> dict[str, dict[str, Any]]:
        """Of the training or validation data, by name; {} where they are not recorded."""
        recorded = (self.last.get("data") or {}).get(part)
        return recorded if isinstance(recorded, dict) else {}

    @property
    def last(self) -> dict[str, Any]:
        return self.entries[-1] if self.entries else {}


def read_original(run_dir: Path) -> Original:
    """Raises UserError for a run without a valid checkpoint, and for one that another program made."""
    newest = checkpoint.newest_valid(run_dir)
    if newest is None:
        raise UserError(f"{run_dir} has no valid checkpoint, so there is nothing to compare a repetition with")
    state, identity = checkpoint.load_state(newest), read_identity(run_dir, newest)
    if not state.data_fingerprint:
        raise UserError(f"{run_dir} was imported, not trained here, so it cannot be repeated")
    entries = read_provenance(run_dir)
    planned = list(dict.fromkeys(entry.get("num_steps") for entry in entries))
    if len(planned) > 1:
        shown = ", then ".join(map(str, planned))
        log.warning("%s was planned for %s steps: its schedule moved, which a repetition does not do", run_dir, shown)
    return Original(run_dir, newest, state, identity, entries)


def configuration_of(original: Original, cfg: Config, job: Job) -> Config:
    """The configuration of a repetition: as recorded, with the number format and the compilation that were decided then, from the
    start that was found then, ending at the original's checkpoint."""
    new = repeated(cfg, original.checkpoint / "config.yaml", job.overrides, job.config_dirs)
    new.run = replace(new.run, resume=Resume.auto, name=None, dir=None)
    new.tracking = replace(cfg.tracking, mlflow=False)
    if (dtype := str(original.last.get("dtype"))) in DType.__members__:
        new.train.dtype = DType[dtype]
    if original.identity.compiled is not None:
        new.train.compile = original.identity.compiled
    num_steps, step = original.state.num_steps, original.step
    new.train.stop_after = (step - 0.5) / num_steps if step < num_steps else None  # rounded up to that step
    new.init = start_at(cfg.init, _start_of(original))
    if new.init.source == "scratch":  # the tokenizer that the run trained, or was given
        new.tokenizer = replace(new.tokenizer, path=str(original.checkpoint))
    new.command = Command.train
    new.check()
    return new


def _start_of(original: Original) -> str:
    """The init.from of a repetition. Raises UserError where the start is gone or another, or not known."""
    run_dir, identity = original.run_dir, original.identity
    said = identity.start
    if said is None and (run_dir / "summary.json").is_file():
        said = re.sub(r" \(resumed\)$", "", str(read_json(run_dir / "summary.json").get("init", "")))
    if not said or run_dir in Path(said).parents:
        raise UserError(f"{run_dir} does not say what it started from, as an earlier version of chattrain made it")
    if said.startswith(RANDOM):
        return "scratch"
    start = Path(said)
    if said.startswith("/") and not start.is_dir():
        raise UserError(f"{run_dir} started from {said}, which is gone; put it back where it was")
    if (start / "manifest.json").is_file():
        if damage := checkpoint.find_damage(start):
            raise UserError(f"{run_dir} started from {said}, which is damaged: {damage}")
        if identity.weights and weights_hash(start) != identity.weights:
            raise UserError(f"{run_dir} started from {said}, where other weights or another tokenizer lie now; put them back")
    return said


def check_same_inputs(original: Original, new: Config) -> None:
    """Raises UserError, which names the source, where the data or the tokenizer are others than the original's, and where
    settings changed while the original ran: no one run repeats that."""
    try:
        start = find_start(new)
        world_size = launch.processes_here(new.distributed.nproc, new.train.device)
        data = open_data(new, choose_tokenizer(new, start.checkpoint), world_size)
    except UserError as error:
        elsewhere = begun_elsewhere(original.entries)
        raise UserError(f"{original.run_dir} cannot be repeated: {error}{elsewhere}") from error
    found = _changed_sources(original, data)
    settings = {key: value for key, value in original.identity.settings.items() if key not in AS_DECIDED}
    begun = replace(original.identity, settings=settings, weights=None)  # the start was compared before
    found = found or differences(begun, identify(new, data, start, bool(original.identity.compiled)))
    if found:
        raise UserError(f"{original.run_dir} cannot be repeated, as something else would be trained: {'; '.join(found)}")


def _changed_sources(original: Original, data: RunData) -> list[str]:
    """Sources whose tokens are others than recorded, in words; the tokenizer, where that is why."""
    recorded = original.last.get("tokenizer")
    if recorded and recorded != data.tokenizer.fingerprint():
        return [f"the tokenizer ({recorded} -> {data.tokenizer.fingerprint()})"]
    found = []
    for part, collator in (("training", data.train), ("validation", data.validation)):
        now = sources_of(collator)
        for name, source in original.recorded_sources(part).items():
            if name in now and now[name]["fingerprint"] != source.get("fingerprint"):
                counts = f"{source.get('documents')} documents then, {now[name]['documents']} now"
                found.append(f"the {part} data of {name} ({now[name]['path']}) has other contents ({counts})")
    return found
