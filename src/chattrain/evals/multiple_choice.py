"""Accuracy on lettered questions: which letter does the model find likeliest at the answer's place?

Only the letters of the question compete, and only at the answer position, so the head is computed for them alone. Questions
of like length share a pass, which is as wide as its longest. The prompt is `chat.py`'s, up to and with `<|assistant_start|>`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from chattrain.chat import Malformed, render_choices
from chattrain.data.packing import pad_rows
from chattrain.data.sources import Records
from chattrain.errors import UserError
from chattrain.parallel.ranks import Ranks
from chattrain.tasks import multiple_choice
from chattrain.tokenizer import Tokenizer


class Question(NamedTuple):
    ids: list[int]  # the prompt
    letter_ids: list[int]  # token of each choice's letter
    answer: int  # index of the right choice


def questions(name: str, rows: Records, tokenizer: Tokenizer) -> list[Question]:
    """The rows as questions. Raises UserError with the row where one does not fit."""
    out = []
    for number, row in rows.read(0, len(rows)):
        try:
            _, _, letters, answer = multiple_choice.question(row)
            ids, tokens = render_choices(multiple_choice.conversation(row), letters, tokenizer)
        except (KeyError, ValueError, TypeError, Malformed) as error:
            raise UserError(
                f"question set {name}, row {number}: {error!r}; a row needs question, choices and answer (or answerKey)"
            ) from error
        out.append(Question(ids, tokens, answer))
    return out


def passes(sizes: list[int], capacity: int) -> list[tuple[int, int]]:
    """(start, stop) of the items of each pass. `sizes` fall; a pass is as wide as its first item, and its items times its
    width are at most the capacity, or it is one item. So passes cost about the same, which shares them evenly among ranks.

    >>> passes([9, 4, 4, 3, 2, 2], 8)
    [(0, 1), (1, 3), (3, 5), (5, 6)]
    """
    starts = [0]
    for i in range(1, len(sizes)):
        if (i - starts[-1] + 1) * sizes[starts[-1]] > capacity:
            starts.append(i)
    return list(pairwise([*starts, len(sizes)]))


class MultipleChoice:
    """eval/<name>_acc: share of questions of one set whose right letter has the highest logit (ties: the first).

    A pass holds as many tokens as `batch_size` questions of average length.
    """

    def __init__(self, name: str, asked: list[Question], batch_size: int, pad_id: int, device: torch.device, ranks: Ranks):
        self.name, self.pad_id, self.device, self.ranks = name, pad_id, device, ranks
        self.questions = sorted(asked, key=lambda q: -len(q.ids))
        sizes = [len(q.ids) for q in self.questions]
        self.passes = passes(sizes, batch_size * sum(sizes) // len(sizes))

    @torch.no_grad()
    def __call__(self, model: nn.Module, autocast: AbstractContextManager) -> dict[str, float]:
        right, ranks = 0, self.ranks
        # Weights that are sharded over ranks come together in every pass, so all ranks have as many.
        idle = [self.passes[-1]] * (-len(self.passes) % ranks.world_size)
        with autocast:  # around all passes, so that weights are cast once
            for number, (start, stop) in enumerate([*self.passes, *idle]):
                if number % ranks.world_size == ranks.rank:
                    counts = number < len(self.passes)
                    right += self._right(model, self.questions[start:stop]) * counts
        (right,) = self.ranks.sum([right])
        return {f"eval/{self.name}_acc": right / len(self.questions)}

    def _right(self, model: nn.Module, batch: list[Question]) -> int:
        """Right answers in a batch of B questions, of at most L choices."""
        width = max(len(q.ids) for q in batch)
        empty = np.empty(0, np.int64)
        inputs, _ = pad_rows([(np.array(q.ids), empty) for q in batch], width, self.pad_id)
        last = torch.tensor([len(q.ids) - 1 for q in batch], device=self.device)
        L = max(len(q.letter_ids) for q in batch)
        letters = torch.tensor([q.letter_ids + [0] * (L - len(q.letter_ids)) for q in batch], device=self.device)
        there = torch.tensor([[i < len(q.letter_ids) for i in range(L)] for q in batch], device=self.device)
        logits = model.choice_logits(torch.from_numpy(inputs).to(self.device), last, letters)
        logits = logits.masked_fill(~there, float("-inf"))
        answers = torch.tensor([q.answer for q in batch], device=self.device)
        return int((logits.argmax(dim=1) == answers).sum())
