"""The evaluations of a run as one function: validation loss, accuracy on question sets, replies to eval.prompts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from chattrain.chat import chat_format
from chattrain.chat.tools import tool_of
from chattrain.config.eval import EvalConfig
from chattrain.data.passes import PassLimits
from chattrain.evals.generative import Generative
from chattrain.evals.multiple_choice import MultipleChoice
from chattrain.evals.replies import Writer
from chattrain.evals.validation import Validation
from chattrain.model.causal_lm import CausalLM
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy
from chattrain.setup.data import EvalData
from chattrain.setup.samples import Samples
from chattrain.storage.files import replace_text
from chattrain.tracking.chatcore import chatcore

log = logging.getLogger("chattrain")

# A line a question: set, index, key; of multiple choice answer, choice, logprobs, subject; else question, reply, expected,
# extracted, right, ended, tokens.
ANSWERS = "answers.jsonl"


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
    start_step: int = 0,
) -> Callable[[int], dict[str, float]]:
    """A function from the number of completed steps to the metrics measured then, by name.

    `limits`: of the forward passes of validation. `num_steps`: steps of the run, after which everything is measured. `run_dir`:
    rank 0 writes answers.jsonl of the last step there, and the replies to eval.prompts, which are answered in a run alone;
    `start_step`: from which it resumes. What a validation loss was measured on is kept in `data.measured`.
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
    written = build_written(config, data, model, ranks)
    samples = build_samples(config, data, model, ranks, run_dir, start_step)

    def due(every: int | None, step: int) -> bool:
        return step == num_steps or (every is not None and step % every == 0)

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
        if due(config.multiple_choice_every or 1, step):
            for choice in choices:
                metrics |= choice(model, autocast)
                keep_answers(data, choice.name, choice.answers)
        now = written if due(config.generative_every, step) else []
        if now or samples:
            with strategy.whole_weights(), autocast:
                for suite in now:
                    metrics |= suite()
                    keep_answers(data, suite.name, suite.answers)
                    data.speed[suite.name] = suite.speed
                metrics |= samples(step) if samples else {}
        metrics |= chatcore(metrics)
        if run_dir and step == num_steps and ranks.is_main and data.answers:
            write_answers(run_dir / ANSWERS, data.answers)
        model.train()
        return metrics

    return evaluate


def build_written(config: EvalConfig, data: EvalData, model: CausalLM, ranks: Ranks) -> list[Generative]:
    """The suites whose answers the model writes."""
    if not data.problem_sets:
        return []
    write = _writer(config, data, model, chat_format(data.tokenizer).stop_ids, ranks)
    return [Generative(name, problems, write, data.tokenizer, ranks) for name, problems in data.problem_sets.items()]


def build_samples(
    config: EvalConfig, data: EvalData, model: CausalLM, ranks: Ranks, run_dir: Path | None, start_step: int
) -> Samples | None:
    """What answers eval.prompts; None where there are none, and in command=evaluate, which has no run folder."""
    if run_dir is None or data.prompts is None:
        return None
    return Samples(
        data.prompts, _writer(config, data, model, data.prompts.stop_ids, ranks), data.tokenizer, ranks, run_dir, start_step
    )


def _writer(config: EvalConfig, data: EvalData, model: CausalLM, stop_ids: set[int], ranks: Ranks) -> Writer:
    return Writer(model, config.max_reply_tokens, stop_ids, tool_of(data.tokenizer), config.reply_batch_size, ranks)


def keep_answers(data: EvalData, name: str, answers: list[dict]) -> None:
    """Replace the answers to the questions of one set."""
    data.answers = [kept for kept in data.answers if kept["set"] != name] + answers


def write_answers(file: Path, answers: list[dict]) -> None:
    """Write one line a question, whole or not at all."""
    replace_text(file, "".join(json.dumps(answer) + "\n" for answer in answers))
