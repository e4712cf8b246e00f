"""The evaluations of a run: validation loss, accuracy on question sets, replies to eval.prompts."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from chattrain.chat import chat_format
from chattrain.chat.tools import tool_of
from chattrain.config.eval import EvalConfig
from chattrain.data.passes import PassLimits
from chattrain.errors import UserError
from chattrain.evals.generative import Generative
from chattrain.evals.multiple_choice import MultipleChoice
from chattrain.evals.own import OwnMeasures
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


class Evaluation:
    """Called with the number of completed steps; returns the metrics measured then, by name.

    `limits`: of the forward passes of validation. `num_steps`: steps of the run, after which everything is measured. `run_dir`:
    rank 0 writes answers.jsonl of the last step there, and the replies to eval.prompts, which are answered in a run alone;
    `start_step`: from which it resumes. What a validation loss was measured on is kept in `data.measured`.
    """

    def __init__(
        self,
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
    ):
        self.config, self.data, self.num_steps, self.run_dir = config, data, num_steps, run_dir
        self.model, self.autocast, self.ranks, self.strategy = model, autocast, ranks, strategy
        tokenizer, token_bytes = data.tokenizer, data.tokenizer.token_bytes()
        self.validation = None
        if data.validation:
            self.validation = Validation(
                data.validation, data.validation_rows, limits, token_bytes, device, ranks, list(data.also)
            )
        self.also = {
            stage: Validation(collator, rows, limits, token_bytes, device, ranks) for stage, (collator, rows) in data.also.items()
        }
        self.choices = [
            MultipleChoice(name, questions, config.batch_size, tokenizer.pad_id, device, ranks, token_bytes)
            for name, questions in data.question_sets.items()
        ]
        self.written, self.samples = [], None
        if data.problem_sets:
            write = self._writer(chat_format(tokenizer).stop_ids)
            self.written = [Generative(name, problems, write, tokenizer, ranks) for name, problems in data.problem_sets.items()]
        if run_dir and data.prompts:
            self.samples = Samples(data.prompts, self._writer(data.prompts.stop_ids), tokenizer, ranks, run_dir, start_step)
        if taken := sorted(config.own.keys() & {*data.question_sets, *data.problem_sets}):
            raise UserError(f"eval.own.{taken[0]}: the metrics of another measure begin with this name; give yours another one")
        self.own = OwnMeasures(config.own, tokenizer, ranks)

    def __call__(self, step: int) -> dict[str, float]:
        self.ranks.at(f"the evaluation at step {step}")
        self.strategy.wait_for_weights()
        self.model.eval()
        metrics = self._losses()
        if self._due(self.config.multiple_choice_every or 1, step):
            for choice in self.choices:
                metrics |= choice(self.model, self.autocast)
                self._keep_answers(choice.name, choice.answers)
        metrics |= self._replies(step)
        metrics |= chatcore(metrics)
        if self.run_dir and step == self.num_steps and self.ranks.is_main and self.data.answers:
            write_answers(self.run_dir / ANSWERS, self.data.answers)
        self.model.train()
        return metrics

    def _due(self, every: int | None, step: int) -> bool:
        return step == self.num_steps or (every is not None and step % every == 0)

    def _losses(self) -> dict[str, float]:
        """val/*, and of the stages of eval.also val/*/<stage>."""
        metrics = {}
        if self.validation:
            with self.autocast:
                metrics = self.validation(self.model.losses)
            if self.data.measured is None and self.validation.measured:
                log.info("validation: %s", self.validation.measured.label)
            self.data.measured = self.validation.measured
        for stage, other in self.also.items():
            with self.autocast:
                found = other(self.model.losses)
            metrics |= {f"{name}/{stage}": value for name, value in found.items() if name.count("/") == 1}
        return metrics

    def _replies(self, step: int) -> dict[str, float]:
        """What is measured of text that the model writes, and the user's own measures, for which each rank needs all weights."""
        due = self.written if self._due(self.config.generative_every, step) else []
        metrics: dict[str, float] = {}
        if not due and not self.samples and not self.own.measures:
            return metrics
        with self.strategy.whole_weights(), self.autocast:
            for suite in due:
                metrics |= suite()
                self._keep_answers(suite.name, suite.answers)
                self.data.speed[suite.name] = suite.speed
            metrics |= self.samples(step) if self.samples else {}
            metrics |= self.own(self.model)
        return metrics

    def _writer(self, stop_ids: set[int]) -> Writer:
        tool, config = tool_of(self.data.tokenizer), self.config
        return Writer(self.model, config.max_reply_tokens, stop_ids, tool, config.reply_batch_size, self.ranks)

    def _keep_answers(self, name: str, answers: list[dict]) -> None:
        """Replace the answers to the questions of one set."""
        self.data.answers = [kept for kept in self.data.answers if kept["set"] != name] + answers


def write_answers(file: Path, answers: list[dict]) -> None:
    """Write one line a question, whole or not at all."""
    replace_text(file, "".join(json.dumps(answer) + "\n" for answer in answers))
