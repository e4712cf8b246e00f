"""Accuracy on lettered questions: which letter does the model find likeliest at the answer's place?

Only the letters of the question compete, and only at the answer position, so the head is computed for them alone. Rows are
batched by length. The prompt is `chat.py`'s, up to and with `<|assistant_start|>`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from chattrain.chat import Malformed, render_choices
from chattrain.data.packing import pad_rows, padded_width
from chattrain.data.sources import Rows
from chattrain.distributed import Ranks
from chattrain.errors import UserError
from chattrain.tasks import multiple_choice
from chattrain.tokenizer import Tokenizer


class Question(NamedTuple):
    ids: list[int]  # the prompt
    letter_ids: list[int]  # token of each choice's letter
    answer: int  # index of the right choice


def questions(name: str, rows: Rows, tokenizer: Tokenizer) -> list[Question]:
    """The rows as questions. Raises UserError with the row where one does not fit."""
    out = []
    for number, row in rows.read(0, len(rows)):
        try:
            _, _, letters, answer = multiple_choice.question(row)
            ids, tokens = render_choices(multiple_choice.conversation(row), letters, tokenizer)
        except (KeyError, ValueError, TypeError, Malformed) as error:
            raise UserError(f"question set {name}, row {number}: {error!r}; a row needs question, choices and "
                            "answer (or answerKey)") from error
        out.append(Question(ids, tokens, answer))
    return out


class MultipleChoice:
    """eval/<name>_acc: share of questions of one set whose right letter has the highest logit (ties: the first)."""

    def __init__(self, name: str, asked: list[Question], batch_size: int, pad_id: int, seq_len: int,
                 device: torch.device, ranks: Ranks):
        self.name, self.batch_size, self.pad_id, self.device, self.ranks = name, batch_size, pad_id, device, ranks
        self.questions = sorted(asked, key=lambda q: len(q.ids))
        self.seq_len = max(seq_len, max(len(q.ids) for q in asked))

    @torch.no_grad()
    def __call__(self, model: nn.Module, autocast: AbstractContextManager) -> dict[str, float]:
        right = 0
        starts = range(0, len(self.questions), self.batch_size)
        for start in starts[self.ranks.rank :: self.ranks.world_size]:
            right += self._right(model, self.questions[start : start + self.batch_size], autocast)
        (right,) = self.ranks.sum([right])
        return {f"eval/{self.name}_acc": right / len(self.questions)}

    def _right(self, model: nn.Module, batch: list[Question], autocast: AbstractContextManager) -> int:
        """Right answers in a batch of B questions, of at most L choices."""
        width = padded_width(max(len(q.ids) for q in batch), self.seq_len)
        empty = np.empty(0, np.int64)
        inputs, _ = pad_rows([(np.array(q.ids), empty) for q in batch], width, self.pad_id)
        last = torch.tensor([len(q.ids) - 1 for q in batch], device=self.device)
        L = max(len(q.letter_ids) for q in batch)
        letters = torch.tensor([q.letter_ids + [0] * (L - len(q.letter_ids)) for q in batch], device=self.device)
        there = torch.tensor([[i < len(q.letter_ids) for i in range(L)] for q in batch], device=self.device)
        with autocast:
            logits = model.choice_logits(torch.from_numpy(inputs).to(self.device), last, letters)
        logits = logits.masked_fill(~there, float("-inf"))
        answers = torch.tensor([q.answer for q in batch], device=self.device)
        return int((logits.argmax(dim=1) == answers).sum())
