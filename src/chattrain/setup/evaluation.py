"""The evaluations of a run as one function: validation loss, and accuracy on question sets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from chattrain.config.eval import EvalConfig
from chattrain.evals.multiple_choice import MultipleChoice
from chattrain.evals.validation import Validation
from chattrain.model.causal_lm import CausalLM
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy
from chattrain.setup.data import EvalData


def build_evaluation(
    config: EvalConfig,
    device_batch_size: int,
    data: EvalData,
    num_steps: int,
    model: CausalLM,
    losses_of: Callable,
    autocast: AbstractContextManager,
    device: torch.device,
    ranks: Ranks,
    strategy: ParallelStrategy,
) -> Callable[[int], dict[str, float]]:
    """A function from the number of completed steps to the metrics measured then, by name.

    `device_batch_size`: rows a process a forward pass of validation. `num_steps`: steps of the run, after which everything is
    measured. `losses_of`: the model under autocast, compiled or not, as `Validation` calls it.
    """
    validation = None
    if data.validation:
        token_bytes = data.tokenizer.token_bytes()
        validation = Validation(data.validation, data.validation_rows, device_batch_size, token_bytes, device, ranks)
    choices = [
        MultipleChoice(name, questions, config.batch_size, data.tokenizer.pad_id, device, ranks)
        for name, questions in data.question_sets.items()
    ]
    choices_every = config.multiple_choice_every

    def evaluate(step: int) -> dict[str, float]:
        ranks.at(f"the evaluation at step {step}")
        strategy.wait_for_weights()
        model.eval()
        metrics = validation(losses_of) if validation else {}
        if choices_every is None or step % choices_every == 0 or step == num_steps:
            for choice in choices:
                metrics |= choice(model, autocast)
        model.train()
        return metrics

    return evaluate
