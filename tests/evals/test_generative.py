"""Accuracy on problems whose solution the model writes: how replies are judged, and what is reported."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chattrain.chat import chat_format, render_prompt
from chattrain.chat.tools import tool_of
from chattrain.data.records import Records
from chattrain.errors import UserError
from chattrain.evals.generative import Generative, problems
from chattrain.evals.replies import Reply, Writer, repeats
from chattrain.model.gpt import GPT
from chattrain.parallel.ranks import Ranks
from chattrain.tasks import gsm8k

GSM8K = [
    {"question": "Weng earns $12 an hour. How much in 50 minutes?", "answer": "She earns <<12/60=0.2>>0.2 a minute.\n#### 10"},
    {"question": "2 x 600?", "answer": "<<2*600=1200>>1,200 it is.\n#### 1,200"},
    {"question": "3 - 8?", "answer": "#### -5"},
]


def written(replies: list[str], tokenizer):
    """A writer that says these replies, whatever is asked; a reply that ends in `...` is cut off."""
    return lambda prompts: [Reply(tokenizer.encode(text), not text.endswith("...")) for text in replies]


def measure(suite: str, records: list[dict], replies: list[str], tokenizer) -> tuple[dict, list[dict]]:
    measured = Generative(suite, problems(suite, Records(records), tokenizer), written(replies, tokenizer), tokenizer, Ranks())
    return measured(), measured.answers


@pytest.mark.parametrize(
    "reply, right, flexible",
    [
        ("0.2 x 50 = 10.\n#### 10", True, True),
        ("#### 10\nor\n#### 11", True, False),  # the first mark counts, and the last number
        ("So she earns $10.", False, True),
        ("The answer is 10", False, True),
        ("####10", False, True),
        ("#### 10.", False, True),  # as in nanochat, whose answer here is `10.`
        ("#### 1,0", True, True),
        ("ten", False, False),
        ("", False, False),
    ],
)
def test_a_solution_is_right_by_the_number_behind_the_mark_or_flexibly_by_its_last(tokenizer, reply, right, flexible):
    metrics, (answer,) = measure("gsm8k", GSM8K[:1], [reply], tokenizer)
    assert (answer["right"], answer["flexible"]) == (right, flexible)
    assert (metrics["eval/gsm8k_acc"], metrics["eval/gsm8k_flexible_acc"]) == (right, flexible)


def test_a_call_is_kept_as_people_read_it(tokenizer):
    text = "She earns <|python_start|>12/60<|python_end|><|output_start|>0.2<|output_end|>0.2.<|bos|>\n#### 10"
    ids = tokenizer.encoding.encode(text, allowed_special="all")
    asked = problems("gsm8k", Records(GSM8K[:1]), tokenizer)
    measured = Generative("gsm8k", asked, lambda prompts: [Reply(ids, True)], tokenizer, Ranks())
    assert measured()["eval/gsm8k_acc"] == 1
    assert measured.answers[0]["reply"] == "She earns <<12/60=0.2>>0.2.\n#### 10"


def test_numbers_are_compared_without_commas_and_with_their_sign(tokenizer):
    _, answers = measure("gsm8k", GSM8K, ["#### 10", "#### 1200", "#### 5"], tokenizer)
    assert [answer["right"] for answer in answers] == [True, True, False]
    assert [answer["expected"] for answer in answers] == ["10", "1200", "-5"]


def test_the_mark_is_found_as_nanochat_finds_it(tokenizer):
    """nanochat's own pattern and normalisation, written out again."""
    import re

    texts = ["#### 1,2.5", "x #### -7 y", "### 5", "####  5", "#### $5", "#### 18 eggs #### 19", "#### ."]
    for text in texts:
        match = re.compile(r"#### (\-?[0-9\.\,]+)").search(text)
        assert gsm8k.marked_answer(text) == (match.group(1).strip().replace(",", "") if match else None)


def test_an_accuracy_has_its_error_its_count_and_the_share_of_replies_that_end(tokenizer):
    metrics, answers = measure("gsm8k", GSM8K, ["#### 10", "I do not know and ...", "#### -5"], tokenizer)
    assert metrics["eval/gsm8k_acc"] == pytest.approx(2 / 3) and metrics["eval/gsm8k_n"] == 3
    assert metrics["eval/gsm8k_stderr"] == pytest.approx(math.sqrt(2 / 9 / 3))
    assert metrics["eval/gsm8k_ended"] == pytest.approx(2 / 3)
    assert [answer["ended"] for answer in answers] == [True, False, True]
    assert answers[0]["question"] == GSM8K[0]["question"] and answers[0]["reply"] == "#### 10"
    assert [answer["index"] for answer in answers] == [0, 1, 2]


def test_sums_are_right_by_their_last_number_and_spelling_by_the_mark(tokenizer):
    asked = {"messages": [{"role": "user", "content": "7 + 5?"}, {"role": "assistant", "content": "7 + 5 = 12"}]}
    _, answers = measure("arithmetic", [asked] * 3, ["7 + 5 = 12", "It is 13", "12."], tokenizer)
    assert [answer["right"] for answer in answers] == [True, False, True]
    counted = {"messages": [asked["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "So.\n\n#### 3"}]}]}
    _, answers = measure("spelling", [counted] * 2, ["r,r,r\n#### 3", "There are 3"], tokenizer)
    assert [answer["right"] for answer in answers] == [True, False]


def test_a_problem_has_the_same_key_in_any_set_and_order_and_another_with_another_answer(tokenizer):
    keys = [p.key for p in problems("gsm8k", Records(GSM8K), tokenizer)]
    assert [p.key for p in problems("gsm8k", Records(GSM8K[::-1]), tokenizer)] == keys[::-1] and len(set(keys)) == 3
    (other,) = problems("gsm8k", Records([{**GSM8K[0], "answer": "#### 11"}]), tokenizer)
    assert other.key != keys[0]


def test_a_row_without_an_answer_is_refused_with_its_number(tokenizer):
    with pytest.raises(UserError, match=r"suite gsm8k, row 2 .*no answer that can be compared"):
        problems("gsm8k", Records([*GSM8K[:2], {"question": "?", "answer": "I do not know"}]), tokenizer)


def test_a_problem_is_asked_as_a_chat_asks(tokenizer):
    for record, problem in zip(GSM8K, problems("gsm8k", Records(GSM8K), tokenizer), strict=True):
        asked = {"messages": [{"role": "user", "content": record["question"]}]}
        assert problem.ids == render_prompt(asked, tokenizer)


# --- replies ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    model = GPT(tokenizer.vocab_size, n_layer=2, n_embd=32, n_head=2)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def writer(model: GPT, tokenizer, rows: int = 4, ranks: Ranks | None = None, stop: set[int] | None = None) -> Writer:
    stop = chat_format(tokenizer).stop_ids if stop is None else stop
    return Writer(model, 24, stop, tool_of(tokenizer), rows, ranks or Ranks())


PROMPTS = [[5 + i, *range(7, 7 + 3 * i % 11), 9] for i in range(13)]


def test_replies_do_not_depend_on_how_many_are_written_at_once(model, tokenizer):
    alone = [writer(model, tokenizer)([prompt])[0] for prompt in PROMPTS]
    assert len({tuple(reply.ids) for reply in alone}) > 5  # the comparison can fail
    for rows in (1, 3, 32):
        assert writer(model, tokenizer, rows)(PROMPTS) == alone


class Together(Ranks):
    """Ranks in threads of this process, whose sums wait for each other."""

    def __init__(self, rank: int, barrier: threading.Barrier, tables: dict[int, list[float]]):
        super().__init__(rank, rank, barrier.parties)
        self.barrier, self.tables = barrier, tables

    def sum(self, values):
        self.tables[self.rank] = list(values)
        self.barrier.wait()
        total = [sum(column) for column in zip(*self.tables.values(), strict=True)]
        self.barrier.wait()
        return total


def on_ranks(world_size: int, do) -> list:
    """What `do(ranks)` returns on each rank."""
    barrier, tables = threading.Barrier(world_size), {}
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: do(Together(rank, barrier, tables)), range(world_size)))


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_ranks_write_together_what_one_writes(model, tokenizer, world_size):
    alone = writer(model, tokenizer)(PROMPTS)
    for found in on_ranks(world_size, lambda ranks: writer(model, tokenizer, ranks=ranks)(PROMPTS)):
        assert found == alone


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_measure_together_what_one_measures(model, tokenizer, world_size):
    asked = problems("gsm8k", Records(GSM8K), tokenizer)

    def measured(ranks: Ranks) -> tuple[dict, list[dict]]:
        suite = Generative("gsm8k", asked, writer(model, tokenizer, ranks=ranks), tokenizer, ranks)
        return suite(), suite.answers

    assert on_ranks(world_size, measured) == [measured(Ranks())] * world_size


def test_a_reply_ends_by_its_stop_token_or_is_cut_off(model, tokenizer):
    whole = writer(model, tokenizer, stop=set())(PROMPTS)
    assert all(len(reply.ids) == 24 and not reply.ended for reply in whole)
    stop = whole[0].ids[10]
    for reply, uncut in zip(writer(model, tokenizer, stop={stop})(PROMPTS), whole, strict=True):
        assert reply.ended == (stop in uncut.ids)
        assert reply.ids == (uncut.ids[: uncut.ids.index(stop)] if reply.ended else uncut.ids)


def test_a_reply_is_no_longer_than_the_positions_of_the_model(model, tokenizer):
    model.max_positions = 20
    try:
        for prompt, reply in zip(PROMPTS, writer(model, tokenizer, stop=set())(PROMPTS), strict=True):
            assert len(prompt) + len(reply.ids) == 20 and not reply.ended
    finally:
        model.max_positions = None


def test_a_loop_is_a_piece_three_times_and_twelve_tokens_together():
    assert repeats([1, 2, 3, 9, 9, *[4, 5] * 6]) and repeats([7] * 12) and repeats(list(range(20)) * 3)
    assert not repeats([7] * 11) and not repeats(list(range(20)) * 2) and not repeats([]) and not repeats([*[7] * 12, 8])
