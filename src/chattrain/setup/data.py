"""The data of a run, opened: token caches, collators, question sets, the number of steps."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chattrain.chat.format import DROPPED_THOUGHTS
from chattrain.config import Config
from chattrain.config.collator import CollatorConfig
from chattrain.config.data import DataConfig, SourceConfig
from chattrain.config.eval import EvalConfig
from chattrain.config.instantiate import instantiate_config
from chattrain.config.targets import recorded_target
from chattrain.config.train import TrainConfig
from chattrain.config.words import OnMalformed, Part, Schema, WeightBy
from chattrain.data.cache import default_cache_dir, load_or_tokenize
from chattrain.data.collators import Collator
from chattrain.data.loss_weights import MEASURED, LossWeights
from chattrain.data.mixture import Mixture
from chattrain.data.passes import PassLimits
from chattrain.data.shares import Shares
from chattrain.data.sources import open_records
from chattrain.errors import UserError
from chattrain.evals.multiple_choice import Question, questions
from chattrain.evals.validation import Measured
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
    also: dict[str, tuple[Collator, int]] = field(default_factory=dict)  # eval.also: stage -> its validation data, rows
    measured: Measured | None = field(default=None, init=False)  # what the validation loss was measured on; None: not yet
    answers: list[dict] = field(default_factory=list, init=False)  # to the questions, when they were last asked


@dataclass(kw_only=True)
class RunData(EvalData):
    """What a training reads; the same in every process."""

    train: Collator
    rows_per_step: int  # over all ranks
    num_steps: int  # optimizer steps of the whole run
    fingerprint: str
    learning_rates: dict[str, float] = field(default_factory=dict, init=False)  # highest of each parameter group; set once known


def open_data(cfg: Config, tokenizer_dir: Path, world_size: int) -> RunData:
    """Open the training data and that of evaluations. Token caches that are missing are made.

    Raises UserError for sources that are missing, empty or malformed, and where the batch does not divide over world_size ranks.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    rows_per_step = cfg.train.rows_a_step(world_size, padded=cfg.collator.has_varying_shapes)
    loss = LossWeights(cfg.loss.supervise, cfg.loss.prompt_weight)
    sources, shares = _training_sources(cfg)
    key = f"data.stages.{cfg.stage}.train"
    mixture = _open_mixture(key, sources, cfg.data, tokenizer, cfg.run.seed, loss, shares)
    train = instantiate_config(cfg.collator, mixture, cfg.train.seq_len, tokenizer.pad_id, last_epoch=None)
    num_steps = _num_steps(cfg.train, train, rows_per_step)
    evals = _eval_data(cfg, tokenizer)
    fingerprint = _fingerprint(train, cfg.collator, cfg.run.seed, cfg.train.seq_len, rows_per_step)
    shared = {name: value for name, value in vars(evals).items() if name not in ("measured", "answers")}
    return RunData(**shared, train=train, rows_per_step=rows_per_step, num_steps=num_steps, fingerprint=fingerprint)


def _training_sources(cfg: Config) -> tuple[dict[str, SourceConfig], Shares]:
    """The sources of a training, base text last, and what share of an epoch each has."""
    sources = dict(cfg.data.mixture(cfg.stage).train)
    if cfg.data.weight_by == WeightBy.tokens and not any(source.weight for source in sources.values()):
        raise UserError(
            "data.weight_by=tokens has no effect: no source has a weight; give each one a weight in the data's YAML file "
            "(with data=local: data.weights=[...])"
        )
    if not cfg.data.replay:
        return sources, Shares(cfg.data.weight_by)
    base = {f"base/{name}": source for name, source in cfg.data.base_text("train").items()}
    return sources | base, Shares(cfg.data.weight_by, cfg.data.replay, len(base))


def _num_steps(config: TrainConfig, train: Collator, rows_per_step: int) -> int:
    """Optimizer steps of the whole run, from whichever of the four keys is set."""
    if config.max_steps is not None:
        return config.max_steps
    if config.num_epochs is not None:
        return train.steps_in(config.num_epochs, rows_per_step)
    return train.steps_within(rows_per_step, config.max_tokens, config.max_supervised_tokens)


def open_eval_data(cfg: Config, tokenizer_dir: Path) -> EvalData:
    """Open the validation data and the question sets. Token caches that are missing are made; raises as `open_data`."""
    return _eval_data(cfg, Tokenizer.load(tokenizer_dir))


def _eval_data(cfg: Config, tokenizer: AnyTokenizer) -> EvalData:
    validation, rows = None, 0
    if cfg.eval.validation:
        key, sources = f"data.stages.{cfg.stage}.{cfg.eval.on.name}", cfg.data.mixture(cfg.stage).part(cfg.eval.on)
        validation, rows = _open_validation(cfg, key, sources, tokenizer)
    also = {stage: _open_validation(cfg, f"data.stages.{stage}", _sources_of(cfg, stage), tokenizer) for stage in cfg.eval.also}
    question_sets = _question_sets(cfg.data, cfg.eval, tokenizer) if cfg.eval.multiple_choice else {}
    return EvalData(tokenizer, validation, rows, question_sets, also)


def _sources_of(cfg: Config, stage: str) -> dict[str, SourceConfig]:
    """The validation sources of another stage of the data."""
    if stage == "base":
        return cfg.data.base_text(cfg.eval.on.name)
    if stage not in cfg.data.stages:
        raise UserError(f"eval.also={cfg.eval.also}: this data has no stage {stage}, only {', '.join(cfg.data.stages) or 'base'}")
    return cfg.data.stages[stage].part(cfg.eval.on)


def _open_validation(cfg: Config, key: str, sources: dict[str, SourceConfig], tokenizer: AnyTokenizer) -> tuple[Collator, int]:
    """Validation sources as rows, and the number of these that are measured."""
    mixture = _open_mixture(key, sources, cfg.data, tokenizer, VALIDATION_SEED, MEASURED)
    validation = instantiate_config(cfg.collator, mixture, cfg.train.seq_len, tokenizer.pad_id, last_epoch=0)
    rows = validation.rows_in(1)
    if cfg.eval.max_tokens:
        rows = min(rows, max(1, cfg.eval.max_tokens // cfg.train.seq_len))
    return validation, rows


def _open_mixture(
    key: str,
    sources: dict[str, SourceConfig],
    data: DataConfig,
    tokenizer: AnyTokenizer,
    seed: int,
    loss: LossWeights,
    shares: Shares = Shares(),
) -> Mixture:
    """The sources of a configuration key as one mixture of documents; `seed` decides their order, `loss` what their tokens weigh,
    `shares` how many of each there are."""
    if not sources:
        if key.endswith(".test"):
            raise UserError(f"this data has no test part: give {key} in its YAML file, or data.test_path with data=local")
        raise UserError(f"{key} has no source; name one, or use eval=none for no validation")
    cache, skip = cache_dir(data), data.on_malformed == OnMalformed.skip
    tokenized = [
        load_or_tokenize(name, source, tokenizer, cache, skip, data.workers, data.ignore) for name, source in sources.items()
    ]
    unused = [name for name in data.ignore if not any(name in source.left_out for source in tokenized)]
    if unused and key.endswith(".train"):
        log.warning("data.ignore=[%s] has no effect: no message of the training data has content there", ",".join(unused))
    return Mixture(tokenized, list(sources.values()), seed, folder=cache / "rows", loss=loss, shares=shares)


def _question_sets(data: DataConfig, config: EvalConfig, tokenizer: AnyTokenizer) -> dict[str, list[Question]]:
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
        log.warning(
            "eval.multiple_choice=true, but this data has no question set and neither eval.mmlu_path nor "
            "eval.arc_path is given: no accuracy is measured. eval=bpb turns this off"
        )
    for name, source in sources.items():
        if config.max_problems and (source.limit is None or source.limit > config.max_problems):
            sources[name] = replace(source, limit=config.max_problems)
    return {name: questions(name, open_records(name, source, cache_dir(data)), tokenizer) for name, source in sources.items()}


def _fingerprint(train: Collator, collator: CollatorConfig, seed: int, seq_len: int, rows_per_step: int) -> str:
    """Hash of everything that decides which batch a step sees."""
    mixture = train.mixture
    inputs: list[Any] = mixture.identity()
    inputs += [seed, recorded_target(collator._target_), seq_len, rows_per_step]
    if collator.isolates:
        inputs.append("isolated")
    if mixture.weights != LossWeights(train.supervises):
        inputs.append([mixture.weights.supervise.name, mixture.weights.prompt_weight])
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def pass_limits(config: TrainConfig, device: str) -> PassLimits:
    """What a forward pass of a process holds at most, on this type of device."""
    return PassLimits(config.device_batch_size, config.tokens_a_pass, device)


def report_counts(collator: Collator, num_steps: int) -> None:
    """Log how much the training data holds, and how much of it is cut or left out."""
    counts = collator.counts
    log.info("training mixture: %s documents an epoch; %d steps", f"{counts.documents:,}", num_steps)
    for line in describe_sources(collator):
        log.info("  %s", line)
    for cache in (cache for cache in collator.mixture.caches if cache.skipped):
        log.warning(
            "data source %s: %d of %d rows are malformed and left out", cache.name, cache.skipped, cache.skipped + len(cache)
        )
    for line in describe_left_out(collator):
        log.info("%s", line)
    if counts.truncated:
        log.warning(
            "%d documents are longer than train.seq_len and cut (%d tokens lost)", counts.truncated, counts.truncated_tokens
        )
    if counts.left_out:
        log.warning("%d documents have no token that carries loss within train.seq_len and are left out", counts.left_out)


def describe_left_out(collator: Collator) -> list[str]:
    """A line for each kind of content that the user or a chat template leaves out of a source's conversations."""
    lines = []
    for cache in collator.mixture.caches:
        for what, times in cache.left_out.items():
            by_template = f"{times:,} {what} left out, as the chat template does"
            lines.append(
                f"data source {cache.name}: "
                + (by_template if what == DROPPED_THOUGHTS else f"`{what}` left out {times:,} times (data.ignore)")
            )
    return lines


def describe_sources(collator: Collator) -> list[str]:
    """A line a source: what an epoch holds of it."""
    found = collator.by_source()
    tokens = sum(source.tokens for source in found.values())
    width = max(len(name) for name in found)
    return [
        f"{name:{width}s}  {source.documents:,} documents, {source.tokens:,} tokens ({source.tokens / max(1, tokens):.1%}), "
        f"{source.supervised_tokens:,} supervised"
        for name, source in found.items()
    ]


def cache_dir(data: DataConfig) -> Path:
    """data.cache_dir, else the default cache folder."""
    return Path(data.cache_dir).expanduser().resolve() if data.cache_dir else default_cache_dir()
