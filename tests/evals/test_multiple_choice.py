"""Accuracy on lettered questions, against one question at a time with the logits of the whole vocabulary."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from chattrain.chat import render_prompt
from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.records import Records
from chattrain.data.sources import open_records
from chattrain.errors import UserError
from chattrain.evals.multiple_choice import MultipleChoice, Question, questions
from chattrain.model.gpt import GPT
from chattrain.parallel.ranks import Ranks
from chattrain.tasks import multiple_choice
from tests.conftest import SHARED_DATA

CPU = torch.device("cpu")
VOCAB = 1_000  # of any tokenizer here, at most


def row(i: int) -> dict:
    """Questions of 3, 4 and 5 choices and of many lengths, in MMLU's columns and in ARC's, with letters and digits."""
    n = 3 + i % 3
    texts = [f"thing {i * 7 + j}" * (1 + (i + j) % 3) for j in range(n)]
    text = f"Which of these is number {i}? " * (1 + i % 5)
    if i % 2:
        return {"question": text, "choices": texts, "answer": i % n}
    labels = list("12345" if i % 4 else "ABCDE")[:n]
    return {"question": text, "choices": {"text": texts, "label": labels}, "answerKey": labels[i % n]}


ROWS = [row(i) for i in range(60)]


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    """Random weights whose letters differ by what is asked; token 0, which is no letter, is always the likeliest."""
    model = GPT(tokenizer.vocab_size, n_layer=2, n_embd=32, n_head=2)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3, generator=generator)
        prompts = [render_prompt(multiple_choice.conversation(r), tokenizer) for r in ROWS]
        mean = torch.stack([model.features(torch.tensor([ids]))[0, -1] for ids in prompts]).mean(0)
        head = model.lm_head.weight  # without what all prompts have in common, so that none has one letter for all
        head.copy_(5 * (head - torch.outer(head @ mean, mean) / mean.square().sum()))
        head[0] = mean
    return model


def asked(rows: list[dict], tokenizer) -> list[Question]:
    return questions("mine", Records(rows), tokenizer)


def labels_of(r: dict) -> list[str]:
    return r["choices"]["label"] if "answerKey" in r else list("ABCDE")[: len(r["choices"])]


def answer_of(r: dict) -> int:
    return labels_of(r).index(r["answerKey"]) if "answerKey" in r else r["answer"]


@torch.no_grad()
def slow_picks(model: GPT, rows: list[dict], tokenizer) -> list[int]:
    """The index of the choice that the model finds likeliest, a question at a time."""
    picks = []
    for r in rows:
        labels = labels_of(r)
        ids = render_prompt(multiple_choice.conversation(r), tokenizer)
        logits = model(torch.tensor([ids]))[0, -1].tolist()
        likeliest = max(labels, key=lambda label: logits[tokenizer.encode(label)[0]])
        picks.append(labels.index(likeliest))
    return picks


def accuracy(model: GPT, found: list[Question], batch_size: int = 8, ranks: Ranks | None = None) -> float:
    return measure(model, found, batch_size, ranks)[0]["eval/mine_acc"]


def measure(model: GPT, found: list[Question], batch_size: int = 8, ranks: Ranks | None = None) -> tuple[dict, list[dict]]:
    """The metrics and the answers."""
    measured = MultipleChoice("mine", found, batch_size, 1, CPU, ranks or Ranks(), np.ones(VOCAB, np.int32))
    return measured(model, nullcontext()), measured.answers


def test_accuracy_equals_one_question_at_a_time_with_all_logits(model, tokenizer):
    picks = slow_picks(model, ROWS, tokenizer)
    right = sum(pick == answer_of(r) for pick, r in zip(picks, ROWS, strict=True))
    assert 0 < right < len(ROWS) and len(set(picks)) >= 4  # the comparison can fail
    assert accuracy(model, asked(ROWS, tokenizer)) == right / len(ROWS)


def test_every_single_question_is_judged_as_alone(model, tokenizer):
    for r, pick in zip(ROWS, slow_picks(model, ROWS, tokenizer), strict=True):
        assert accuracy(model, asked([r], tokenizer)) == (pick == answer_of(r))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 60, 100])
def test_accuracy_does_not_depend_on_batch_size_or_order(model, tokenizer, batch_size):
    found = asked(ROWS, tokenizer)
    expected = accuracy(model, found)
    assert accuracy(model, found, batch_size) == expected
    assert accuracy(model, found[::-1], batch_size) == expected


def with_answer(r: dict, answer: int) -> dict:
    return {**r, "answerKey": r["choices"]["label"][answer]} if "answerKey" in r else {**r, "answer": answer}


def test_only_the_letters_of_the_question_compete(model, tokenizer):
    """Not token 0, which fills up the shorter lists of letters here and is the likeliest of the whole vocabulary."""
    with torch.no_grad():
        assert all(int(model(torch.tensor([q.ids]))[0, -1].argmax()) == 0 for q in asked(ROWS, tokenizer))
    picks = slow_picks(model, ROWS, tokenizer)
    as_picked = [with_answer(r, pick) for r, pick in zip(ROWS, picks, strict=True)]
    others = [with_answer(r, (pick + 1) % len(labels_of(r))) for r, pick in zip(ROWS, picks, strict=True)]
    assert accuracy(model, asked(as_picked, tokenizer)) == 1
    assert accuracy(model, asked(others, tokenizer)) == 0


@torch.no_grad()
def test_answers_hold_the_log_probability_of_each_letter_over_the_whole_vocabulary(model, tokenizer):
    found = asked(ROWS, tokenizer)
    metrics, answers = measure(model, found)
    assert [a["index"] for a in answers] == list(range(len(ROWS)))
    right = []
    for question, answer in zip(found, answers, strict=True):
        logprobs = model(torch.tensor([question.ids]))[0, -1].log_softmax(0)[question.letter_ids]
        assert answer["logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert (answer["answer"], answer["choice"]) == (question.answer, int(logprobs.argmax()))
        right.append(-float(logprobs[question.answer]) / math.log(2))
    assert metrics["eval/mine_bpb"] == pytest.approx(sum(right) / len(right), rel=1e-5)  # a letter is one byte here
    p, n = metrics["eval/mine_acc"], metrics["eval/mine_n"]
    assert n == len(ROWS) and metrics["eval/mine_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / n))


def test_a_question_has_the_same_key_in_any_set_and_order_and_another_with_other_choices(tokenizer):
    keys = [q.key for q in asked(ROWS, tokenizer)]
    assert len(set(keys)) == len(ROWS) and [q.key for q in asked(ROWS[::-1], tokenizer)] == keys[::-1]
    assert asked([with_answer(ROWS[0], 1)], tokenizer)[0].key != keys[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_together_measure_what_one_does_to_the_bit(model, tokenizer, world_size):
    found = asked(ROWS, tokenizer)
    tables = []

    class Gathered(Ranks):
        def sum(self, values):
            tables.append(values)
            return values if len(tables) < world_size else [sum(column) for column in zip(*tables, strict=True)]

    metrics = [measure(model, found, 7, Gathered(rank, rank, world_size)) for rank in range(world_size)]
    assert metrics[-1] == measure(model, found, 7)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_judge_parts_whose_sum_is_the_whole(model, tokenizer, world_size):
    class Alone(Ranks):
        def sum(self, values):
            return values

    found = asked(ROWS, tokenizer)
    parts = [accuracy(model, found, 7, Alone(rank, rank, world_size)) for rank in range(world_size)]
    assert sum(parts) == pytest.approx(accuracy(model, found))


class Recorder:
    """A model that notes the shape of its inputs."""

    def __init__(self):
        self.shapes: list[tuple[int, int]] = []

    def choice_logits(self, inputs, positions, choices):
        self.shapes.append(tuple(inputs.shape))
        return torch.zeros(choices.shape), torch.zeros(len(choices))

    @property
    def tokens(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


def recorded(found: list[Question], batch_size: int, ranks: Ranks) -> Recorder:
    model = Recorder()
    MultipleChoice("mine", found, batch_size, 1, CPU, ranks, np.ones(VOCAB, np.int32))(model, nullcontext())
    return model


LENGTHS = [20 + i * 7 % 61 for i in range(300)] + [400, 900]
OF_LENGTHS = [Question([5] * length, [2, 3], 0) for length in LENGTHS]


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_a_pass_holds_no_more_tokens_than_so_many_average_questions(batch_size):
    model = recorded(OF_LENGTHS, batch_size, Ranks())
    assert sum(rows for rows, _ in model.shapes) == len(LENGTHS)
    assert all(rows * width <= batch_size * sum(LENGTHS) / len(LENGTHS) or rows == 1 for rows, width in model.shapes)


def test_little_is_padding():
    assert recorded(OF_LENGTHS, 8, Ranks()).tokens < 1.05 * sum(LENGTHS)


def test_ranks_get_about_the_same_number_of_tokens():
    class Alone(Ranks):
        def sum(self, values):
            return values

    parts = [recorded(OF_LENGTHS[:-2], 8, Alone(rank, rank, 3)).tokens for rank in range(3)]
    assert max(parts) < 1.1 * min(parts)


def test_a_question_is_the_prompt_up_to_where_the_assistant_answers(tokenizer):
    for r, question in zip(ROWS, asked(ROWS, tokenizer), strict=True):
        assert question.ids == render_prompt(multiple_choice.conversation(r), tokenizer)
        assert question.ids[-1] == tokenizer.special("<|assistant_start|>")
        assert question.answer == answer_of(r)
        assert len(question.letter_ids) == 3 + ROWS.index(r) % 3


def test_a_letter_of_several_tokens_is_refused_with_its_row(tokenizer):
    bad = {"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "(B)"]}, "answerKey": "A"}
    with pytest.raises(UserError, match=r"question set mine, row 1 .*\(B\).* one token"):
        asked([ROWS[0], bad], tokenizer)


@pytest.mark.parametrize(
    "bad",
    [
        {"question": "?"},
        {"text": "x"},
        {"question": "?", "choices": ["a", "b"], "answer": 2},
        {"question": "?", "choices": ["a", "b"], "answer": None},
        {"question": None, "choices": ["a", "b"], "answer": 0},
    ],
)
def test_a_row_that_is_no_question_is_refused_with_its_number(tokenizer, bad):
    with pytest.raises(UserError, match=r"question set mine, row 2 .*question, choices"):
        asked([*ROWS[:2], bad], tokenizer)


@pytest.mark.parametrize("path, subset", [("mmlu", "all"), ("arc", "ARC-Easy"), ("arc", "ARC-Challenge")])
def test_real_questions_are_judged_as_one_at_a_time(model, tokenizer, cache, path, subset):
    if not (SHARED_DATA / path).is_dir():
        pytest.skip(f"shared/data/{path} is not here")
    source = SourceConfig(str(SHARED_DATA / path), Schema.multiple_choice, subset=subset, split="test", limit=40)
    opened = open_records(path, source, cache)
    rows = [r for _, r in opened.read(0, 40)]
    right = sum(pick == answer_of(r) for pick, r in zip(slow_picks(model, rows, tokenizer), rows, strict=True))
    assert accuracy(model, questions(path, opened, tokenizer)) == right / 40
