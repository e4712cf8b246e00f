"""The evaluations of a run as one function: validation loss, and accuracy on question sets."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from chattrain.config.eval import EvalConfig
from chattrain.data.passes import PassLimits
from chattrain.evals.multiple_choice import MultipleChoice
from chattrain.evals.validation import Validation
from chattrain.model.causal_lm import CausalLM
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy
from chattrain.setup.data import EvalData
from chattrain.storage.files import replace_text

log = logging.getLogger("chattrain")

ANSWERS = "answers.jsonl"  # a line a question: set, index, key, answer, choice, logprobs


def build_evaluation(
    config: EvalConfig,
    limits: PassLimits,
    data: EvalData,
    num_steps: int,
    model: CausalLM,
    autocast: AbstractContextManager,
    device: torch.device,
    ranks: Ranks,
    strategy: ParallelStrategy,
    run_dir: Path | None = None,
) -> Callable[[int], dict[str, float]]:
    """A function from the number of completed steps to the metrics measured then, by name.

    `limits`: of the forward passes of validation. `num_steps`: steps of the run, after which everything is measured. `run_dir`:
    rank 0 writes answers.jsonl of the last step there. What a validation loss was measured on is kept in `data.measured`.
    """
    validation, token_bytes = None, data.tokenizer.token_bytes()
    if data.validation:
        validation = Validation(data.validation, data.validation_rows, limits, token_bytes, device, ranks, list(data.also))
    also = {
        stage: Validation(collator, rows, limits, token_bytes, device, ranks) for stage, (collator, rows) in data.also.items()
    }
    choices = [
        MultipleChoice(name, questions, config.batch_size, data.tokenizer.pad_id, device, ranks, token_bytes)
        for name, questions in data.question_sets.items()
    ]
    choices_every = config.multiple_choice_every

    def evaluate(step: int) -> dict[str, float]:
        ranks.at(f"the evaluation at step {step}")
        strategy.wait_for_weights()
        model.eval()
        metrics = {}
        if validation:
            with autocast:
                metrics = validation(model.losses)
            if data.measured is None and validation.measured:
                log.info("validation: %s", validation.measured.label)
            data.measured = validation.measured
        for stage, other in also.items():
            with autocast:
                found = other(model.losses)
            metrics |= {f"{name}/{stage}": value for name, value in found.items() if name.count("/") == 1}
        if choices_every is None or step % choices_every == 0 or step == num_steps:
            for choice in choices:
                metrics |= choice(model, autocast)
                data.answers = [kept for kept in data.answers if kept["set"] != choice.name] + choice.answers
            if run_dir and step == num_steps and ranks.is_main and data.answers:
                write_answers(run_dir / ANSWERS, data.answers)
        model.train()
        return metrics

    return evaluate


def write_answers(file: Path, answers: list[dict]) -> None:
    """Write one line a question, whole or not at all."""
    replace_text(file, "".join(json.dumps(answer) + "\n" for answer in answers))
