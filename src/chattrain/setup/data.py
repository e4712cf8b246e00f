"""The data of a run, opened: token caches, collators, question sets, the number of steps."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from chattrain.config import Config
from chattrain.config.data import DataConfig, SourceConfig
from chattrain.config.instantiate import instantiate_config
from chattrain.config.targets import recorded_target
from chattrain.config.words import Schema
from chattrain.data.cache import default_cache_dir, load_or_tokenize
from chattrain.data.collators import Collator
from chattrain.data.mixture import Mixture
from chattrain.data.sources import open_records
from chattrain.errors import UserError
from chattrain.evals.multiple_choice import Question, questions
from chattrain.tokenizer import Tokenizer

log = logging.getLogger("chattrain")

VALIDATION_SEED = 0  # the order of validation rows is the same in every run


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
    return RunData(
        tokenizer,
        collator,
        validation,
        rows,
        sets,
        rows_per_step,
        num_steps,
        _fingerprint(cfg, collator, rows_per_step) if collator else "",
    )


def _collator(
    cfg: Config, tokenizer: Tokenizer, sources: dict[str, SourceConfig], part: str, seed: int, last_epoch: int | None = None
) -> Collator:
    if not sources:
        raise UserError(f"data.stages.{cfg.stage}.{part} has no source; name one, or use eval=none for no validation")
    skip = cfg.data.on_malformed.name == "skip"
    sources_opened = [
        load_or_tokenize(name, source, tokenizer, cache_dir(cfg.data), skip, cfg.data.workers) for name, source in sources.items()
    ]
    mixture = Mixture(sources_opened, list(sources.values()), seed, folder=cache_dir(cfg.data) / "rows")
    return instantiate_config(cfg.collator, mixture, cfg.train.seq_len, tokenizer.pad_id, last_epoch=last_epoch)


def _question_sets(cfg: Config, tokenizer: Tokenizer) -> dict[str, list[Question]]:
    sources = dict(cfg.data.multiple_choice)
    choice = {"schema": Schema.multiple_choice, "split": cfg.eval.split}
    if cfg.eval.mmlu_path:
        sources["mmlu"] = SourceConfig(path=cfg.eval.mmlu_path, subset="all", **choice)
    if cfg.eval.arc_path:
        sources["arc_easy"] = SourceConfig(path=cfg.eval.arc_path, subset="ARC-Easy", **choice)
        sources["arc_challenge"] = SourceConfig(path=cfg.eval.arc_path, subset="ARC-Challenge", **choice)
    if not sources:
        log.warning(
            "eval.multiple_choice=true, but this data has no question set and neither eval.mmlu_path nor "
            "eval.arc_path is given: no accuracy is measured. eval=bpb does not ask for it"
        )
    for name, source in sources.items():
        if cfg.eval.max_problems and (source.limit is None or source.limit > cfg.eval.max_problems):
            sources[name] = SourceConfig(**{**source.__dict__, "limit": cfg.eval.max_problems})
    return {name: questions(name, open_records(name, source, cache_dir(cfg.data)), tokenizer) for name, source in sources.items()}


def _fingerprint(cfg: Config, collator: Collator, rows_per_step: int) -> str:
    """Hash of all that decides which batch a step sees."""
    mixture: Mixture = collator.mixture
    decides = [[c.content_hash, s.epochs, s.weight] for c, s in zip(mixture.caches, mixture.sources, strict=True)]
    decides += [cfg.run.seed, recorded_target(cfg.collator._target_), cfg.train.seq_len, rows_per_step]
    if cfg.collator.isolates:
        decides.append("isolated")
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def report_counts(collator: Collator, num_steps: int) -> None:
    """Say what the training data holds and what of it is lost."""
    counts = collator.counts
    log.info("training mixture: %s documents an epoch; %d steps", f"{counts.documents:,}", num_steps)
    for cache in (cache for cache in collator.mixture.caches if cache.skipped):
        log.warning(
            "data source %s: %d of %d rows are malformed and left out", cache.name, cache.skipped, cache.skipped + len(cache)
        )
    if counts.truncated:
        log.warning(
            "%d conversations are longer than train.seq_len and cut (%d tokens lost)", counts.truncated, counts.truncated_tokens
        )
    if counts.left_out:
        log.warning("%d conversations have no supervised token within train.seq_len and are left out", counts.left_out)


def cache_dir(data: DataConfig) -> Path:
    """data.cache_dir, else the default one."""
    return Path(data.cache_dir).expanduser().resolve() if data.cache_dir else default_cache_dir()
