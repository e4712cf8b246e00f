"""The data of a run, opened: token caches, collators, question sets, the number of steps."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chattrain.config import Config
from chattrain.config.collator import CollatorConfig
from chattrain.config.compose import key_of
from chattrain.config.data import DataConfig, SourceConfig
from chattrain.config.eval import EvalConfig
from chattrain.config.instantiate import instantiate_config
from chattrain.config.targets import recorded_target
from chattrain.config.train import TrainConfig
from chattrain.config.words import OnMalformed, Part, Schema
from chattrain.data.cache import default_cache_dir, load_or_tokenize
from chattrain.data.collators import Collator
from chattrain.data.malformed import MalformedRows
from chattrain.data.mixture import Mixture
from chattrain.data.overlap import VERSION as OVERLAP_VERSION
from chattrain.data.overlap import Overlap, overlap
from chattrain.data.passes import PassLimits
from chattrain.data.sources import open_records, with_schema
from chattrain.errors import UserError
from chattrain.evals.multiple_choice import Question, questions
from chattrain.evals.validation import Measured
from chattrain.setup.job import current_job
from chattrain.storage.files import make_folder, replace_text
from chattrain.tokenizer import AnyTokenizer, Tokenizer

log = logging.getLogger("chattrain")

VALIDATION_SEED = 0  # the order of validation rows is the same in every run


@dataclass
class EvalData:
    """What evaluations read; the same in every process."""

    tokenizer: AnyTokenizer
    validation: Collator | None  # None: eval.validation=false
    validation_rows: int
    question_sets: dict[str, list[Question]]
    notes: list[tuple[int, str]]  # (level, message) of what was found when it was opened; `report_data` logs them
    measured: Measured | None = field(default=None, init=False)  # what the validation loss was measured on; None: not yet
    answers: list[dict] = field(default_factory=list, init=False)  # to the questions, when they were last asked


@dataclass(kw_only=True)
class RunData(EvalData):
    """What a training reads; the same in every process."""

    train: Collator
    rows_per_step: int  # over all ranks
    num_steps: int  # optimizer steps of the whole run
    fingerprint: str
    overlap: Overlap | None  # of the validation with the training data; None: no validation
    learning_rates: dict[str, float] = field(default_factory=dict, init=False)  # highest of each parameter group; set once known


def open_data(cfg: Config, tokenizer_dir: Path, world_size: int) -> RunData:
    """Open the training data and that of evaluations. Token caches that are missing are made.

    Raises UserError for sources that are missing, empty or malformed, and where the batch does not divide over world_size ranks.
    """
    tokenizer, notes = Tokenizer.load(tokenizer_dir), []
    rows_per_step = cfg.train.rows_a_step(world_size, padded=cfg.collator.has_varying_shapes)
    key = f"data.stages.{cfg.stage}.train"
    mixture = _open_mixture(key, cfg.data.mixture(cfg.stage).train, cfg.data, tokenizer, cfg.run.seed, notes)
    train = instantiate_config(cfg.collator, mixture, cfg.train.seq_len, tokenizer.pad_id, last_epoch=None)
    num_steps = cfg.train.max_steps or train.steps_in(cfg.train.num_epochs, rows_per_step)
    evals = _eval_data(cfg, tokenizer, notes)
    fingerprint = _fingerprint(mixture, cfg.collator, cfg.run.seed, cfg.train.seq_len, rows_per_step)
    shared = {name: value for name, value in vars(evals).items() if name not in ("measured", "answers")}
    copies = _overlap(mixture, evals.validation.mixture, tokenizer, cache_dir(cfg.data)) if evals.validation else None
    return RunData(
        **shared, train=train, rows_per_step=rows_per_step, num_steps=num_steps, fingerprint=fingerprint, overlap=copies
    )


def open_eval_data(cfg: Config, tokenizer_dir: Path) -> EvalData:
    """Open the validation data and the question sets. Token caches that are missing are made; raises as `open_data`."""
    return _eval_data(cfg, Tokenizer.load(tokenizer_dir), [])


def _eval_data(cfg: Config, tokenizer: AnyTokenizer, notes: list[tuple[int, str]]) -> EvalData:
    validation, rows = None, 0
    if cfg.eval.validation:
        key, sources = f"data.stages.{cfg.stage}.{cfg.eval.on.name}", cfg.data.mixture(cfg.stage).part(cfg.eval.on)
        mixture = _open_mixture(key, sources, cfg.data, tokenizer, VALIDATION_SEED, notes)
        validation = instantiate_config(cfg.collator, mixture, cfg.train.seq_len, tokenizer.pad_id, last_epoch=0)
        rows = validation.rows_in(1)
        if cfg.eval.max_tokens:
            rows = min(rows, max(1, cfg.eval.max_tokens // cfg.train.seq_len))
    question_sets = _question_sets(cfg.data, cfg.eval, tokenizer, notes) if cfg.eval.multiple_choice else {}
    return EvalData(tokenizer, validation, rows, question_sets, notes)


def _open_mixture(
    key: str,
    sources: dict[str, SourceConfig],
    data: DataConfig,
    tokenizer: AnyTokenizer,
    seed: int,
    notes: list[tuple[int, str]],
) -> Mixture:
    """The sources of a configuration key as one mixture of documents; `seed` decides their order."""
    if not sources:
        if key.endswith(".test"):
            raise UserError(f"this data has no test part: give {key} in its YAML file, or data.test_path with data=local")
        raise UserError(f"{key} has no source; name one, or use eval=none for no validation")
    cache, skip = cache_dir(data), data.on_malformed == OnMalformed.skip
    tokenized, settled = [], []
    for name, given in sources.items():
        source = with_schema(name, given, cache)
        tokenized.append(load_or_tokenize(name, source, tokenizer, cache, skip, data.workers))
        settled.append(source)
        if source.schema != given.schema:
            notes.append((logging.INFO, f"data source {name}: its columns are those of data.schema={source.schema.name}"))
        if tokenized[-1].skipped:
            notes.append((logging.WARNING, _malformed(name, len(tokenized[-1]), tokenized[-1].malformed)))
    return Mixture(tokenized, settled, seed, folder=cache / "rows")


def _malformed(name: str, used: int, malformed: MalformedRows) -> str:
    return f"data source {name}: {malformed.count:,} of {used + malformed.count:,} rows left out: {malformed}"


def _overlap(train: Mixture, val: Mixture, tokenizer: AnyTokenizer, cache: Path) -> Overlap:
    """How much of the validation data is in the training data, from the cache where it was counted before."""
    inputs = [OVERLAP_VERSION, *([source.content_hash for source in mixture.caches] for mixture in (train, val))]
    folder = cache / "overlap" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]
    if not folder.is_dir():
        counts = json.dumps(overlap(train.caches, val.caches, tokenizer.decode))
        make_folder(folder, lambda scratch: replace_text(scratch / "overlap.json", counts))
    return Overlap(*json.loads((folder / "overlap.json").read_text()))


def _question_sets(
    data: DataConfig, config: EvalConfig, tokenizer: AnyTokenizer, notes: list[tuple[int, str]]
) -> dict[str, list[Question]]:
    """The data's own question sets, and MMLU and ARC where their paths are given, by name."""

    def from_hub(path: str, subset: str) -> SourceConfig:
        return SourceConfig(path=path, subset=subset, schema=Schema.multiple_choice, split=config.split)

    sources = dict(data.multiple_choice_test if config.on == Part.test else data.multiple_choice)
    if config.on == Part.test:
        config = replace(config, mmlu_path=None, arc_path=None)  # the questions that trainings and sweeps are measured on
    if config.mmlu_path:
        sources["mmlu"] = from_hub(config.mmlu_path, "all")
    if config.arc_path:
        sources["arc_easy"] = from_hub(config.arc_path, "ARC-Easy")
        sources["arc_challenge"] = from_hub(config.arc_path, "ARC-Challenge")
    if not sources:
        asked_for = {"eval", "eval.multiple_choice"} & {key_of(override) for override in current_job().overrides}
        notes.append(
            (
                logging.WARNING if asked_for else logging.INFO,
                "no accuracy is measured: this data has no question set, and neither eval.mmlu_path nor eval.arc_path is given",
            )
        )
    for name, source in sources.items():
        if config.max_problems and (source.limit is None or source.limit > config.max_problems):
            sources[name] = replace(source, limit=config.max_problems)
    asked = {}
    for name, source in sources.items():
        malformed = MalformedRows() if data.on_malformed == OnMalformed.skip else None
        asked[name] = questions(name, open_records(name, source, cache_dir(data)), tokenizer, malformed)
        if malformed and malformed.count:
            notes.append((logging.WARNING, _malformed(name, len(asked[name]), malformed)))
    return asked


def _fingerprint(mixture: Mixture, collator: CollatorConfig, seed: int, seq_len: int, rows_per_step: int) -> str:
    """Hash of everything that decides which batch a step sees."""
    inputs: list[Any] = [[c.content_hash, s.epochs, s.weight] for c, s in zip(mixture.caches, mixture.sources, strict=True)]
    inputs += [seed, recorded_target(collator._target_), seq_len, rows_per_step]
    if collator.isolates:
        inputs.append("isolated")
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def pass_limits(config: TrainConfig, device: str) -> PassLimits:
    """What a forward pass of a process holds at most, on this type of device."""
    return PassLimits(config.device_batch_size, config.tokens_a_pass, device)


def report_notes(data: EvalData) -> None:
    """Log what was found when the data was opened."""
    for level, note in dict.fromkeys(data.notes):  # a source of both training and validation gives each note twice
        log.log(level, note)


def report_data(data: RunData) -> None:
    """Log what the data is, how much of it is cut or left out, and how much of the validation data is trained on."""
    counts = data.train.counts
    report_notes(data)
    log.info("training mixture: %s documents an epoch; %d steps", f"{counts.documents:,}", data.num_steps)
    if data.overlap is not None:
        documents, exact, near = data.overlap
        log.info("validation: %s documents", f"{documents:,}")
        if exact or near:
            log.warning(
                "%s of %s validation documents are in the training data too: %s copies but for case and punctuation, %s near "
                "copies (70 %% of their runs of 8 words); val/loss is lower for it",
                f"{exact + near:,}",
                f"{documents:,}",
                f"{exact:,}",
                f"{near:,}",
            )
    if counts.truncated:
        log.warning(
            "%d conversations are longer than train.seq_len and cut (%d tokens lost)", counts.truncated, counts.truncated_tokens
        )
    if counts.left_out:
        log.warning("%d conversations have no supervised token within train.seq_len and are left out", counts.left_out)


def cache_dir(data: DataConfig) -> Path:
    """data.cache_dir, else the default cache folder."""
    return Path(data.cache_dir).expanduser().resolve() if data.cache_dir else default_cache_dir()
