"""The data of a run, opened: token caches, collators, question sets, the number of steps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chattrain.config import Config
from chattrain.config.collator import CollatorConfig
from chattrain.config.targets import recorded_target
from chattrain.config.train import TrainConfig
from chattrain.data.collators import Collator
from chattrain.data.loss_weights import LossWeights
from chattrain.data.mixture import Mixture
from chattrain.data.overlap import VERSION as OVERLAP_VERSION
from chattrain.data.overlap import Overlap, overlap
from chattrain.data.passes import PassLimits
from chattrain.data.question_overlap import VERSION as QUESTIONS_VERSION
from chattrain.data.question_overlap import QuestionOverlap, question_overlap
from chattrain.evals.generative import Problem
from chattrain.evals.multiple_choice import Question
from chattrain.evals.validation import Measured
from chattrain.setup.audit import AuditReport, audit
from chattrain.setup.opening import Opening, cache_dir
from chattrain.setup.suites import Prompts, open_prompts, open_suites
from chattrain.storage.files import make_folder, replace_text
from chattrain.tokenizer import AnyTokenizer, Tokenizer


@dataclass
class EvalData:
    """What evaluations read; the same in every process."""

    tokenizer: AnyTokenizer
    validation: Collator | None  # None: eval.validation=false
    validation_rows: int
    also: dict[str, tuple[Collator, int]]  # eval.also: stage -> its validation data, rows
    question_sets: dict[str, list[Question]]
    problem_sets: dict[str, list[Problem]]  # the same, of suites whose answers the model writes
    prompts: Prompts | None  # eval.prompts of a training; None: there are none
    asked: dict[str, dict[str, int | None]]  # of each set: how many questions are asked, `of` how many
    notes: list[tuple[int, str]]  # (level, message) of what was found when it was opened; `report_data` logs them
    measured: Measured | None = field(default=None, init=False)  # what the validation loss was measured on; None: not yet
    answers: list[dict] = field(default_factory=list, init=False)  # to the questions, when they were last asked
    speed: dict[str, dict[str, float]] = field(default_factory=dict, init=False)  # seconds and tokens of the replies of a suite


@dataclass(kw_only=True)
class RunData(EvalData):
    """What a training reads; the same in every process."""

    train: Collator
    rows_per_step: int  # over all ranks
    num_steps: int  # optimizer steps of the whole run
    fingerprint: str
    overlap: Overlap | None  # of the validation with the training data; None: no validation
    audit: AuditReport
    learning_rates: dict[str, float] = field(default_factory=dict, init=False)  # highest of each parameter group; set once known


def open_data(cfg: Config, tokenizer_dir: Path, world_size: int) -> RunData:
    """Open the training data and that of evaluations. Token caches that are missing are made.

    Raises UserError for sources that are missing, empty or malformed, and where the batch does not divide over world_size ranks.
    """
    opening = Opening(cfg, Tokenizer.load(tokenizer_dir))
    rows_per_step = cfg.train.rows_a_step(world_size, padded=cfg.collator.has_varying_shapes)
    train = opening.training()
    evals = _eval_data(opening, open_prompts(cfg, opening.tokenizer))
    shared = {name: value for name, value in vars(evals).items() if name not in ("measured", "answers", "speed")}
    num_steps, overlap = _num_steps(cfg.train, train, rows_per_step), _overlap(train.mixture, evals, cache_dir(cfg.data))
    loss, limits = LossWeights(cfg.loss.supervise, cfg.loss.prompt_weight), pass_limits(cfg.train, "cpu")
    trained_on = _questions_trained_on(train.mixture, evals, cache_dir(cfg.data))
    return RunData(
        **shared,
        train=train,
        rows_per_step=rows_per_step,
        num_steps=num_steps,
        fingerprint=_fingerprint(train, cfg.collator, cfg.run.seed, cfg.train.seq_len, rows_per_step),
        overlap=overlap,
        audit=audit(train, loss, evals.tokenizer, rows_per_step, num_steps, limits, overlap, trained_on),
    )


def open_eval_data(cfg: Config, tokenizer_dir: Path) -> EvalData:
    """Open the validation data and the question sets. Token caches that are missing are made; raises as `open_data`."""
    return _eval_data(Opening(cfg, Tokenizer.load(tokenizer_dir)), None)


def _eval_data(opening: Opening, prompts: Prompts | None) -> EvalData:
    config = opening.cfg.eval
    validation, rows = opening.validation() if config.validation else (None, 0)
    also = opening.also()
    question_sets = opening.question_sets() if config.multiple_choice else {}
    problem_sets = open_suites(opening) if config.generates else {}
    return EvalData(opening.tokenizer, validation, rows, also, question_sets, problem_sets, prompts, opening.asked, opening.notes)


def _num_steps(config: TrainConfig, train: Collator, rows_per_step: int) -> int:
    """Optimizer steps of the whole run, from whichever of the four keys is set."""
    if config.max_steps is not None:
        return config.max_steps
    if config.num_epochs is not None:
        return train.steps_in(config.num_epochs, rows_per_step)
    return train.steps_within(rows_per_step, config.max_tokens, config.max_supervised_tokens)


def _overlap(train: Mixture, evals: EvalData, cache: Path) -> Overlap | None:
    """How much of the validation data is in the training data, from the cache where it was counted before."""
    if evals.validation is None:
        return None
    val = evals.validation.mixture
    inputs = [OVERLAP_VERSION, *([source.content_hash for source in mixture.caches] for mixture in (train, val))]
    folder = cache / "overlap" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]
    if not folder.is_dir():
        counts = json.dumps(overlap(train.caches, val.caches, evals.tokenizer.decode))
        make_folder(folder, lambda scratch: replace_text(scratch / "overlap.json", counts))
    return Overlap(*json.loads((folder / "overlap.json").read_text()))


def _questions_trained_on(train: Mixture, evals: EvalData, cache: Path) -> dict[str, QuestionOverlap]:
    """The same for each set of questions, also of those whose answers the model writes."""
    found = {}
    for name, questions in {**evals.question_sets, **evals.problem_sets}.items():
        prompts = [question.ids for question in questions]
        inputs = [QUESTIONS_VERSION, [source.content_hash for source in train.caches], prompts]
        folder = cache / "overlap" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]
        if not folder.is_dir():
            counts = json.dumps(question_overlap(train.caches, prompts, evals.tokenizer.decode))
            make_folder(folder, lambda scratch, counts=counts: replace_text(scratch / "questions.json", counts))
        found[name] = QuestionOverlap(*json.loads((folder / "questions.json").read_text()))
    return found


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
