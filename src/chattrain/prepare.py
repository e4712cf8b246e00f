"""All that is decided and made once, before any process trains: run folder, start, tokenizer, token caches, step count.

Whatever can be wrong in what the user asked for is found here, before the run folder exists.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from chattrain import checkpoint, init, launch
from chattrain.config import Config, Resume
from chattrain.data.cache import default_cache_dir, prepare
from chattrain.data.collators import Collator
from chattrain.data.config import Schema, SourceConfig
from chattrain.data.mixture import Mixture
from chattrain.data.sources import identity, open_rows
from chattrain.device import pick_device
from chattrain.errors import UserError
from chattrain.evals.multiple_choice import Question, questions
from chattrain.files import make_folder, replace_text
from chattrain.model import fp8
from chattrain.names import launch_name
from chattrain.schema import to_yaml
from chattrain.tasks import document, multiple_choice
from chattrain.tokenizer import FORMAT_VERSION, Tokenizer

log = logging.getLogger("chattrain")

VALIDATION_SEED = 0  # the order of validation rows is the same in every run


@dataclass(frozen=True)
class Plan:
    """Decided once, then handed to every process."""

    run_dir: Path
    start: init.Start
    resume: Path | None  # checkpoint to go on from
    tokenizer_dir: Path
    finished: dict | None = None  # summary of a run that has nothing left to do


@dataclass
class RunData:
    """The data of a run, opened; the same in every process."""

    tokenizer: Tokenizer
    train: Collator | None
    validation: Collator | None
    validation_rows: int
    question_sets: dict[str, list[Question]]
    rows_per_step: int
    num_steps: int
    fingerprint: str


def make_plan(cfg: Config, world_size: int) -> tuple[Plan, RunData]:
    """Raises UserError before anything is written for this run, except caches."""
    cfg.train.rows_a_step(world_size)
    where = pick_device(cfg.train.device)
    launch.check_devices(where, world_size)
    if cfg.train.fp8:
        fp8.check(where)
    run_dir = choose_run_dir(cfg)
    resume = _find_resume(cfg, run_dir)
    start = init.Start(resume, f"{resume} (resumed)") if resume else find_start(cfg)
    cfg.model.check_start(start.checkpoint, cfg.train.seq_len)
    tokenizer_dir = choose_tokenizer(cfg, start.checkpoint)
    data = open_data(cfg, tokenizer_dir, world_size)
    plan = Plan(run_dir, start, resume, tokenizer_dir)
    if resume:
        plan = _resumed_plan(cfg, plan, data)
    elif cfg.run.resume == Resume.never:
        _move_aside(run_dir)
    if plan.finished is None:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir / "config.yaml", to_yaml(cfg))
        (run_dir / "summary.json").unlink(missing_ok=True)  # of an earlier part of the run: it is true no longer
    return plan, data


def find_start(cfg: Config, any_model: bool = False) -> init.Start:
    """What init.from means. Raises UserError where it is nothing, or (without any_model) another model than cfg.model."""
    return init.resolve(cfg.init, Path(cfg.run.root), None if any_model else cfg.model, cfg.tokenizer.path, cache_dir(cfg))


def choose_run_dir(cfg: Config) -> Path:
    """run.dir, or <root>/<stage>/<name>; a name that is not given is the time of the launch."""
    if cfg.run.dir:
        return Path(cfg.run.dir).expanduser().resolve()
    name = cfg.run.name or launch_name()
    return (Path(cfg.run.root) / cfg.stage / name).resolve()


def _find_resume(cfg: Config, run_dir: Path) -> Path | None:
    found = checkpoint.newest_valid(run_dir) if cfg.run.resume != Resume.never else None
    damaged = checkpoint.all_checkpoints(run_dir)
    if found is None and damaged and cfg.run.resume != Resume.never:
        raise UserError(f"none of the {len(damaged)} checkpoints of {run_dir} is whole; restore one, or begin anew with "
                        "run.resume=never, which moves the folder aside")
    if cfg.run.resume == Resume.must and found is None:
        raise UserError(f"run.resume=must, but {run_dir} has no valid checkpoint; name the run with run.name or "
                        "run.dir, or use run.resume=auto")
    return found


def _resumed_plan(cfg: Config, plan: Plan, data: RunData) -> Plan:
    """Check that the run goes on as it began; a finished one is marked so."""
    state = checkpoint.load_state(plan.resume)
    misfit = init.shape_misfit(plan.resume, cfg.model)
    if misfit or state.data_fingerprint != data.fingerprint:
        raise UserError(f"{plan.run_dir} was begun with {misfit or 'other data, seed, seq_len or batch size'}, so it "
                        "cannot go on as the same run; use another run.name, or run.resume=never to start anew")
    before, now = (yaml.safe_load(text) for text in ((plan.resume / "config.yaml").read_text(), to_yaml(cfg)))
    if before["optimizer"]["_target_"] != now["optimizer"]["_target_"]:
        raise UserError(f"{plan.run_dir} was begun with the optimizer {before['optimizer']['_target_']}, so it cannot go on "
                        f"with {cfg.optimizer._target_}; use another run.name, or run.resume=never to start anew")
    changed = [f"{group}.{key} {before[group].get(key)} -> {value}" for group in ("init", "optimizer", "schedule", "train")
               for key, value in now[group].items() if before[group].get(key) != value and (group != "init" or key == "from")]
    if changed:
        log.warning("the run goes on with other settings than it began with: %s", ", ".join(changed))
    if state.num_steps != data.num_steps:
        log.warning("the run was planned for %d steps, now for %d: the schedule is another one from here on",
                    state.num_steps, data.num_steps)
    summary = plan.run_dir / "summary.json"
    if state.step >= data.num_steps and summary.is_file():
        finished = json.loads(summary.read_text())
        if finished.get("status") == "completed":
            log.info("%s is complete (step %d of %d): nothing to do. run.resume=never starts anew",
                     plan.run_dir, state.step, data.num_steps)
            return Plan(**{**plan.__dict__, "finished": finished})
    if state.step > data.num_steps:
        raise UserError(f"{plan.run_dir} is at step {state.step}, beyond the {data.num_steps} steps asked for; ask for more "
                        "(train.max_steps, train.num_epochs), or use another run.name")
    log.info("going on from %s (step %d of %d)", plan.resume, state.step, data.num_steps)
    return plan


def _move_aside(run_dir: Path) -> None:
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    number = 1
    while (old := run_dir.with_name(f"{run_dir.name}.old{number}")).exists():
        number += 1
    run_dir.rename(old)
    log.warning("run.resume=never: what %s held is now in %s", run_dir, old)


def open_data(cfg: Config, tokenizer_dir: Path, world_size: int, train: bool = True) -> RunData:
    """Open token caches (made where they are missing), collators and question sets. `train` False: those of evals only."""
    tokenizer = Tokenizer.load(tokenizer_dir)
    mixture = cfg.data.mixture(cfg.stage)
    rows_per_step = cfg.train.rows_a_step(world_size) if train else 0
    collator = _collator(cfg, tokenizer, mixture.train, "train", cfg.run.seed) if train else None
    num_steps = 0
    if collator:
        num_steps = cfg.train.max_steps or collator.steps_in(cfg.train.num_epochs, rows_per_step)
    validation, rows = None, 0
    if cfg.eval.validation:
        validation = _collator(cfg, tokenizer, mixture.val, "val", VALIDATION_SEED, last_epoch=0)
        rows = validation.rows_in(1)
        if cfg.eval.max_tokens:
            rows = min(rows, max(1, cfg.eval.max_tokens // cfg.train.seq_len))
    sets = _question_sets(cfg, tokenizer) if cfg.eval.multiple_choice else {}
    return RunData(tokenizer, collator, validation, rows, sets, rows_per_step, num_steps,
                   _fingerprint(cfg, collator, rows_per_step) if collator else "")


def _collator(cfg: Config, tokenizer: Tokenizer, sources: dict[str, SourceConfig], part: str, seed: int,
              last_epoch: int | None = None) -> Collator:
    if not sources:
        raise UserError(f"data.stages.{cfg.stage}.{part} has no source; name one, or use eval=none for no validation")
    skip = cfg.data.on_malformed.name == "skip"
    caches = [prepare(name, source, tokenizer, cache_dir(cfg), skip, cfg.data.workers)
              for name, source in sources.items()]
    documents = Mixture(caches, list(sources.values()), seed, folder=cache_dir(cfg) / "rows")
    return build_part(cfg.collator, documents, cfg.train.seq_len, tokenizer.pad_id, last_epoch=last_epoch)


def build_part(part: Any, *arguments: Any, **named: Any) -> Any:
    """Hydra's instantiate; a UserError from inside comes out as itself."""
    try:
        return instantiate(part, *arguments, **named)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def report_counts(collator: Collator, num_steps: int) -> None:
    """Say what the training data holds and what of it is lost."""
    counts = collator.counts
    log.info("training mixture: %s documents an epoch; %d steps", f"{counts.documents:,}", num_steps)
    for cache in (cache for cache in collator.documents.caches if cache.skipped):
        log.warning("data source %s: %d of %d rows are malformed and left out", cache.name, cache.skipped,
                    cache.skipped + len(cache))
    if counts.truncated:
        log.warning("%d conversations are longer than train.seq_len and cut (%d tokens lost)", counts.truncated,
                    counts.truncated_tokens)
    if counts.left_out:
        log.warning("%d conversations have no supervised token within train.seq_len and are left out", counts.left_out)


def _question_sets(cfg: Config, tokenizer: Tokenizer) -> dict[str, list[Question]]:
    sources = dict(cfg.data.multiple_choice)
    choice = {"schema": Schema.multiple_choice, "split": cfg.eval.split}
    if cfg.eval.mmlu_path:
        sources["mmlu"] = SourceConfig(path=cfg.eval.mmlu_path, subset="all", **choice)
    if cfg.eval.arc_path:
        sources["arc_easy"] = SourceConfig(path=cfg.eval.arc_path, subset="ARC-Easy", **choice)
        sources["arc_challenge"] = SourceConfig(path=cfg.eval.arc_path, subset="ARC-Challenge", **choice)
    if not sources:
        log.warning("eval.multiple_choice=true, but this data has no question set and neither eval.mmlu_path nor "
                    "eval.arc_path is given: no accuracy is measured. eval=bpb does not ask for it")
    for name, source in sources.items():
        if cfg.eval.max_problems and (source.limit is None or source.limit > cfg.eval.max_problems):
            sources[name] = SourceConfig(**{**source.__dict__, "limit": cfg.eval.max_problems})
    return {name: questions(name, open_rows(name, source, cache_dir(cfg)), tokenizer)
            for name, source in sources.items()}


def _fingerprint(cfg: Config, collator: Collator, rows_per_step: int) -> str:
    """Hash of all that decides which batch a step sees."""
    documents: Mixture = collator.documents
    decides = [[c.content_hash, s.epochs, s.weight] for c, s in zip(documents.caches, documents.sources, strict=True)]
    decides += [cfg.run.seed, cfg.collator._target_, cfg.train.seq_len, rows_per_step]
    if cfg.collator.isolates:
        decides.append("isolated")
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def cache_dir(cfg: Config) -> Path:
    return Path(cfg.data.cache_dir).expanduser().resolve() if cfg.data.cache_dir else default_cache_dir()


def choose_tokenizer(cfg: Config, start: Path | None) -> Path:
    """Where the tokenizer is loaded from: the checkpoint, else tokenizer.path, else one trained on this data and kept.

    Raises UserError where a checkpoint is given a tokenizer.path whose ids differ.
    """
    given = Path(cfg.tokenizer.path).expanduser() if cfg.tokenizer.path else None
    if start is not None:
        saved = Tokenizer.load(start)
        if given is not None:
            other = Tokenizer.load(given)
            if other.fingerprint() != saved.fingerprint():
                raise UserError(f"tokenizer.path={given} (vocabulary of {other.vocab_size}) is not the tokenizer that "
                                f"{start} was trained with (vocabulary of {saved.vocab_size}); leave tokenizer.path out")
        return start
    if given is not None:
        Tokenizer.load(given)
        return given
    return _trained_tokenizer(cfg)


def _trained_tokenizer(cfg: Config) -> Path:
    """Byte-pair encoding of training texts: this stage's, or those of data.tokenizer_stages."""
    mixtures = [cfg.data.mixture(stage) for stage in cfg.data.tokenizer_stages or [cfg.stage]]
    sources = {json.dumps([s.path, s.subset, s.split, s.part, s.words]): (name, s)
               for mixture in mixtures for name, s in mixture.train.items()}
    identities = [identity(name, source, cache_dir(cfg)) for name, source in sources.values()]
    decides = [FORMAT_VERSION, identities, list(sources), cfg.tokenizer.vocab_size, cfg.tokenizer.train_chars]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]
    folder = cache_dir(cfg) / "tokenizers" / key
    if not (folder / "encoding.json").is_file():
        log.info("training a tokenizer of %d tokens on this data", cfg.tokenizer.vocab_size)
        opened = [(source, open_rows(name, source, cache_dir(cfg))) for name, source in sources.values()]
        trained = Tokenizer.train(_texts(opened, cfg.tokenizer.train_chars), cfg.tokenizer.vocab_size)
        if trained.vocab_size < cfg.tokenizer.vocab_size:
            log.warning("the data gives only %d tokens, not tokenizer.vocab_size", trained.vocab_size)
        make_folder(folder, trained.save)
    return folder


def _texts(opened: list, max_chars: int) -> Iterator[str]:
    """Texts of all sources, each with the same share of max_chars."""
    for source, rows in opened:
        left = max_chars // len(opened)
        for _, row in rows.read(0, len(rows)):
            try:
                if source.schema == Schema.multiple_choice:
                    texts = [multiple_choice.tokenizer_text(row)]
                else:
                    texts = [piece.text for piece in document(row, source.schema.name) if not piece.special]
            except (ValueError, KeyError, TypeError):  # malformed: reported when the row is tokenised
                continue
            yield from texts
            left -= sum(len(text) for text in texts)
            if left < 0:
                break
