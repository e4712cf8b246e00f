"""Accuracy on multiple-choice questions: which letter is likeliest as the answer's first token?

Only the logits of the question's letters at the answer position are compared, so the head is computed for them only. Questions of
similar length share a forward pass, which is as wide as its longest question. The prompt is rendered by `chat`, up to and
including `<|assistant_start|>`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from chattrain.chat import Malformed, render_choices
from chattrain.data.packing import pad_rows
from chattrain.data.sources import Records
from chattrain.errors import UserError
from chattrain.model.causal_lm import CausalLM
from chattrain.parallel.ranks import Ranks
from chattrain.tasks import multiple_choice
from chattrain.tokenizer import AnyTokenizer


class Question(NamedTuple):
    ids: list[int]  # token ids of the prompt
    letter_ids: list[int]  # token id of each choice's letter
    answer: int  # index of the correct choice


def questions(name: str, records: Records, tokenizer: AnyTokenizer) -> list[Question]:
    """The records of a question set as questions. Raises UserError that names the first record that is no question."""
    out = []
    for number, record in records.read(0, len(records)):
        try:
            _, _, letters, answer = multiple_choice.question(record)
            ids, tokens = render_choices(multiple_choice.conversation(record), letters, tokenizer)
        except (KeyError, ValueError, TypeError, Malformed) as error:
            raise UserError(
                f"question set {name}, row {number}: {error!r}; a row needs question, choices and answer (or answerKey)"
            ) from error
        out.append(Question(ids, tokens, answer))
    return out


def passes(sizes: list[int], capacity: int) -> list[tuple[int, int]]:
    """Split items of descending sizes into passes: (start, stop) of each.

    A pass is as wide as its first item. Its number of items times its width is at most the capacity, unless it is a single item.
    So all passes cost about the same, and ranks get equal work.

    >>> passes([9, 4, 4, 3, 2, 2], 8)
    [(0, 1), (1, 3), (3, 5), (5, 6)]
    """
    starts = [0]
    for i in range(1, len(sizes)):
        if (i - starts[-1] + 1) * sizes[starts[-1]] > capacity:
            starts.append(i)
    return list(pairwise([*starts, len(sizes)]))


class MultipleChoice:
    """eval/<name>_acc: fraction of a set's questions whose correct letter has the highest logit (ties: the first letter).

    A forward pass holds as many tokens as `batch_size` questions of average length.
    """

    def __init__(self, name: str, questions: list[Question], batch_size: int, pad_id: int, device: torch.device, ranks: Ranks):
        self.name, self.pad_id, self.device, self.ranks = name, pad_id, device, ranks
        self.questions = sorted(questions, key=lambda q: -len(q.ids))
        sizes = [len(q.ids) for q in self.questions]
        self.passes = passes(sizes, batch_size * sum(sizes) // len(sizes))

    @torch.no_grad()
    def __call__(self, model: CausalLM, autocast: AbstractContextManager) -> dict[str, float]:
        """Accuracy over all ranks, by the metric's name."""
        correct, ranks = 0, self.ranks
        # Every pass gathers sharded weights, so all ranks must run equally many: repeats of the last pass are not counted.
        repeats = [self.passes[-1]] * (-len(self.passes) % ranks.world_size)
        with autocast:  # around all passes, so that weights are cast once
            for number, (start, stop) in enumerate([*self.passes, *repeats]):
                if number % ranks.world_size == ranks.rank:
                    counted = number < len(self.passes)
                    correct += self._num_correct(model, self.questions[start:stop]) * counted
        (total,) = self.ranks.sum([correct])
        return {f"eval/{self.name}_acc": total / len(self.questions)}

    def _num_correct(self, model: CausalLM, batch: list[Question]) -> int:
        """Number of correct answers in a batch of B questions with at most L choices."""
        width = max(len(q.ids) for q in batch)
        empty = np.empty(0, np.int64)
        inputs, _ = pad_rows([(np.array(q.ids), empty) for q in batch], width, self.pad_id)
        last = torch.tensor([len(q.ids) - 1 for q in batch], device=self.device)
        L = max(len(q.letter_ids) for q in batch)
        letters = torch.tensor([q.letter_ids + [0] * (L - len(q.letter_ids)) for q in batch], device=self.device)
        exists = torch.tensor([[i < len(q.letter_ids) for i in range(L)] for q in batch], device=self.device)
        logits = model.choice_logits(torch.from_numpy(inputs).to(self.device), last, letters)
        logits = logits.masked_fill(~exists, float("-inf"))
        answers = torch.tensor([q.answer for q in batch], device=self.device)
        return int((logits.argmax(dim=1) == answers).sum())
