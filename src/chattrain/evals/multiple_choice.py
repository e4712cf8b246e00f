"""Accuracy on multiple-choice questions: which letter is likeliest as the answer's first token?

Only the logits of the question's letters at the answer position are compared. Questions of similar length share a forward pass,
which is as wide as its longest question. The prompt is rendered by `chat`, up to and including `<|assistant_start|>`.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from chattrain.chat import render_choices
from chattrain.data.malformed import MalformedRows
from chattrain.data.records import Records
from chattrain.device import varying_shapes
from chattrain.model.causal_lm import CausalLM
from chattrain.parallel.ranks import Ranks
from chattrain.tasks import multiple_choice, record_to_document
from chattrain.tokenizer import AnyTokenizer


class Question(NamedTuple):
    ids: list[int]  # token ids of the prompt
    letter_ids: list[int]  # token id of each choice's letter
    answer: int  # index of the correct choice
    index: int = 0  # of its record in the source
    key: str = ""  # hash of the question and its choices: the same for any tokenizer and in any set
    subject: str = ""  # as MMLU names it; empty where the set names none


def questions(name: str, records: Records, tokenizer: AnyTokenizer, malformed: MalformedRows | None = None) -> list[Question]:
    """The records of a question set as questions.

    Records that are no question are added to `malformed`; None: the first one is refused by a UserError that names it.
    """

    def ask(record: dict) -> Question:
        document = record_to_document(record, "multiple_choice")
        text, choices, letters, answer = multiple_choice.question(record)
        ids, letter_ids = render_choices(document, letters, tokenizer)
        subject = str(record.get("subject") or "")
        return Question(ids, letter_ids, answer, key=_key(text, choices, answer), subject=subject)

    records = Records(records.table, records.indices, f"question set {name}", records.path, "multiple_choice", records.places)
    asked = [question._replace(index=i) for i, question in records.convert(ask, malformed=malformed)]
    if not asked and malformed is not None:
        raise records.nothing_usable(malformed)
    return asked


def _key(text: str, choices: list[str], answer: int) -> str:
    return hashlib.sha256(json.dumps([text, choices, answer]).encode()).hexdigest()[:16]


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
    """Measures of one question set, the same on any number of ranks:

    - eval/<name>_acc: fraction of the questions whose correct letter has the highest logit (ties: the first letter);
    - eval/<name>_stderr: its standard error, sqrt(acc (1 - acc) / n), were other questions drawn from the same source;
    - eval/<name>_n: number of questions;
    - eval/<name>_bpb: bits per byte of the right answer: -log2 of the probability, over the whole vocabulary, of each correct
      letter's token after its prompt, summed and divided by the bytes of these tokens. It moves long before the accuracy does,
      see https://arxiv.org/abs/2406.08446.

    `answers` holds what was answered last. `token_bytes` (V,): bytes of each token. A forward pass holds as many tokens as
    `batch_size` questions of average length.
    """

    def __init__(
        self,
        name: str,
        questions: list[Question],
        batch_size: int,
        pad_id: int,
        device: torch.device,
        ranks: Ranks,
        token_bytes: np.ndarray,
    ):
        self.name, self.pad_id, self.device, self.ranks = name, pad_id, device, ranks
        self.questions = sorted(questions, key=lambda q: -len(q.ids))
        sizes = [len(q.ids) for q in self.questions]
        self.passes = passes(sizes, batch_size * sum(sizes) // len(sizes))
        self.num_bytes = sum(int(token_bytes[q.letter_ids[q.answer]]) for q in self.questions)
        self.answers: list[dict[str, Any]] = []  # in the order of the source: set, index, key, answer, choice, logprobs, subject

    @torch.no_grad()
    def __call__(self, model: CausalLM, autocast: AbstractContextManager) -> dict[str, float]:
        """The measures over all ranks, by name."""
        ranks = self.ranks
        # Every pass gathers sharded weights, so all ranks must run equally many: repeats of the last pass are not counted.
        repeats = [self.passes[-1]] * (-len(self.passes) % ranks.world_size)
        L = max(len(q.letter_ids) for q in self.questions)
        width = max(stop - start for start, stop in self.passes) * (2 + L)
        rows = []  # of each pass of this rank: 1, choice and L log-probabilities a question, then zeros
        with varying_shapes(self.device), autocast:  # around all passes, so that weights are cast once
            for number, (start, stop) in enumerate([*self.passes, *repeats]):
                if number % ranks.world_size == ranks.rank:
                    row = self._answer(model, self.questions[start:stop], L).flatten().tolist()
                    rows.append(row + [0.0] * (width - len(row)))
        answered = self._collect(ranks.all_gather_interleaved(rows), L)
        n, correct = len(self.questions), sum(choice == question.answer for question, choice, _ in answered)
        nats = math.fsum(-logprobs[question.answer] for question, _, logprobs in answered)
        accuracy = correct / n
        return {
            f"eval/{self.name}_acc": accuracy,
            f"eval/{self.name}_stderr": math.sqrt(accuracy * (1 - accuracy) / n),
            f"eval/{self.name}_n": n,
            f"eval/{self.name}_bpb": nats / math.log(2) / max(1, self.num_bytes),
        }

    def _collect(self, table: list[list[float]], L: int) -> list[tuple[Question, int, list[float]]]:
        """(question, choice, log-probability of each choice) of the questions that were answered; sets `answers`."""
        answered = []
        for (start, stop), row in zip(self.passes, table, strict=False):
            for i, question in enumerate(self.questions[start:stop]):
                done, choice, *logprobs = row[i * (2 + L) : (i + 1) * (2 + L)]
                if done:
                    answered.append((question, int(choice), logprobs[: len(question.letter_ids)]))
        self.answers = [
            {"set": self.name, "index": q.index, "key": q.key, "answer": q.answer, "choice": choice, "logprobs": logprobs}
            | ({"subject": q.subject} if q.subject else {})
            for q, choice, logprobs in sorted(answered, key=lambda found: found[0].index)
        ]
        return answered

    def _answer(self, model: CausalLM, batch: list[Question], L: int) -> torch.Tensor:
        """(B, 2 + L) fp64 of B questions with at most L choices: 1, the choice, each letter's log-probability, then zeros."""
        width = max(len(q.ids) for q in batch)
        inputs = torch.tensor([q.ids + [self.pad_id] * (width - len(q.ids)) for q in batch], device=self.device)
        last = torch.tensor([len(q.ids) - 1 for q in batch], device=self.device)
        letters = torch.tensor([q.letter_ids + [0] * (L - len(q.letter_ids)) for q in batch], device=self.device)
        exists = torch.tensor([[i < len(q.letter_ids) for i in range(L)] for q in batch], device=self.device)
        logits, log_sum = model.choice_logits(inputs, last, letters)
        choice = logits.masked_fill(~exists, float("-inf")).argmax(dim=1, keepdim=True)
        logprobs = (logits - log_sum[:, None]).masked_fill(~exists, 0.0)
        return torch.cat([torch.ones_like(choice), choice, logprobs], dim=1).cpu().double()
