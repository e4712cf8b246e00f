"""What others compute on the exported model: bits per byte and accuracies with transformers, and the LM Evaluation Harness.

The others render with the exported chat template, tokenise with the exported tokenizer.json and run NanoChatForCausalLM, so
every part of the export is in the figures. Both sides are fp32 on one CPU: accuracies must be equal, losses to rounding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import chattrain
from chattrain.formats import huggingface
from tests.conftest import SHARED_DATA
from tests.foreign import random_gpt
from tests.helpers import TINY, standing_in, write_talk

transformers = pytest.importorskip("transformers")

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2}
SETTINGS = [*[o for o in TINY if not o.startswith("model.")], *[f"model.{name}={size}" for name, size in SIZES.items()]]
NUM_QUESTIONS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache, tokenizer):
    """A folder with conversations, a text, questions in the hub's layout, and `model/`, an exported model that is random but
    no coin: its letters differ by what is asked."""
    folder = tmp_path_factory.mktemp("parity")
    with standing_in(folder, cache):
        write_talk(folder, "talk.jsonl", count=12)
        (folder / "text.jsonl").write_text(json.dumps({"text": "Once upon a time, 12 + 34 = 46. " * 30}) + "\n")
        write_questions(folder)
        model = random_gpt(tokenizer.vocab_size, seed=1, **SIZES)
        (folder / "model").mkdir()
        huggingface.write(folder / "model", model.shape, model.weights(), tokenizer, seq_len=256)
        yield folder


def write_questions(folder: Path) -> None:
    mmlu = [
        {
            "question": f"Which is number {i}?" * (1 + i % 3),
            "subject": "counting",
            "choices": [f"{i + j}" for j in range(4)],
            "answer": i % 4,
        }
        for i in range(NUM_QUESTIONS)
    ]
    arc = [
        {
            "id": str(i),
            "question": f"What comes after {i}?",
            "answerKey": "ABC"[i % 3] if i % 2 else "123"[i % 3],
            "choices": {"text": [f"{i + 1}", f"{i + 2}", "none"], "label": list("ABC" if i % 2 else "123")},
        }
        for i in range(NUM_QUESTIONS)
    ]
    for name, rows in (("mmlu/test", mmlu), ("arc/ARC-Easy/test", arc), ("arc/ARC-Challenge/test", arc[::-2])):
        (folder / f"{name}.parquet").parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def theirs(place):
    """(model, tokenizer) as anybody would load them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    assert type(model).__name__ == "NanoChatForCausalLM"
    return model, transformers.AutoTokenizer.from_pretrained(place / "model")


def evaluate(stage: str, *overrides: str) -> dict[str, float]:
    return chattrain.run(["command=evaluate", f"stage={stage}", *SETTINGS, "init.from=model", *overrides])["metrics"]


@torch.no_grad()
def nats(model, ids: list[int]) -> list[float]:
    """-log p of every token but the first, in double precision."""
    logp = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return (-logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]).tolist()


def test_bits_per_byte_and_loss_of_answers_are_those_of_transformers(place, theirs):
    model, tokenizer = theirs
    total = tokens = total_all = tokens_all = counted = size = 0
    for line in (place / "talk.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        seen = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        losses = nats(model, list(seen["input_ids"]))
        for token, loss, supervised in zip(seen["input_ids"][1:], losses, seen["assistant_masks"][1:], strict=True):
            total, tokens = total + loss * supervised, tokens + supervised
            total_all, tokens_all = total_all + loss, tokens_all + 1
            counted += loss * (token not in tokenizer.added_tokens_decoder)
        size += len(tokenizer.decode([i for i in seen["input_ids"] if i not in tokenizer.added_tokens_decoder]).encode())
    measured = evaluate("sft", "data.val_path=talk.jsonl")
    assert measured["val/loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert measured["val/loss_all"] == pytest.approx(total_all / tokens_all, rel=1e-6)
    assert measured["val/bpb"] == pytest.approx(counted / math.log(2) / size, rel=1e-6)


def test_bits_per_byte_of_a_packed_text_are_those_of_transformers(place, theirs):
    model, tokenizer = theirs
    text = json.loads((place / "text.jsonl").read_text())["text"]
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    rows = [ids[start : start + 65] for start in range(0, len(ids) - 1, 64)]
    bits = sum(sum(nats(model, row)) for row in rows) / math.log(2)
    measured = evaluate("base", "data.train_path=text.jsonl", "data.val_path=text.jsonl", "data.schema=text")
    assert measured["val/bpb"] == pytest.approx(bits / len(text.encode()), rel=1e-6)


def asked(question: str, choices: list[str], letters: list[str]) -> str:
    lines = "\n".join(f"- {choice}={letter}" for choice, letter in zip(choices, letters, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\n\nRespond only with the letter of the correct answer."


def read(file: str | Path) -> list[tuple[str, list[str], int]]:
    """(prompt, letters, index of the right one) of each row of an MMLU or ARC file."""
    out = []
    for row in pq.read_table(file).to_pylist():
        choices, letters = row["choices"], list("ABCD")
        if isinstance(choices, dict):
            choices, letters = choices["text"], choices["label"]
        right = row["answer"] if "answer" in row else letters.index(row["answerKey"])
        out.append((asked(row["question"], choices, letters), letters, right))
    return out


@torch.no_grad()
def accuracy(model, tokenizer, rows) -> float:
    right = 0
    for prompt, letters, answer in rows:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        logits = model(torch.tensor([ids])).logits[0, -1]
        right += int(logits[tokenizer.convert_tokens_to_ids(letters)].argmax()) == answer
    return right / len(rows)


def test_accuracies_are_those_of_one_question_at_a_time_with_transformers(place, theirs):
    measured = evaluate("sft", "eval=mmlu_arc", "eval.mmlu_path=mmlu", "eval.arc_path=arc", "data.val_path=talk.jsonl")
    for name, file in (("mmlu", "mmlu"), ("arc_easy", "arc/ARC-Easy"), ("arc_challenge", "arc/ARC-Challenge")):
        expected = accuracy(*theirs, read(place / file / "test.parquet"))
        assert measured[f"eval/{name}_acc"] == expected
        assert 0.05 < expected < 0.95  # a model that always says one letter would prove little


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
def test_accuracies_on_real_questions_are_those_of_transformers(place, theirs):
    measured = evaluate("sft", "eval=full", f"eval.arc_path={SHARED_DATA}/arc", "data.val_path=talk.jsonl")
    assert measured["eval/arc_challenge_acc"] == accuracy(*theirs, read(SHARED_DATA / "arc/ARC-Challenge/test.parquet"))


def test_accuracies_are_those_of_the_lm_evaluation_harness(place, theirs):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    def task(name: str, file: str) -> dict:
        """A task of the harness on a local file: the same words, scored by the log-likelihood of each letter."""
        digits = {"task": name, "dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": f"{file}/test.parquet"}}}
        return digits | {
            "test_split": "test",
            "output_type": "multiple_choice",
            "target_delimiter": "",
            "doc_to_text": lambda row: asked(row["question"], *choices(row)),
            "doc_to_choice": lambda row: choices(row)[1],
            "doc_to_target": right,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }

    def choices(row) -> tuple[list[str], list[str]]:
        held = row["choices"]
        return (held["text"], held["label"]) if isinstance(held, dict) else (held, list("ABCD"))

    def right(row) -> int:
        return row["answer"] if "answer" in row else row["choices"]["label"].index(row["answerKey"])

    files = {"mmlu": "mmlu", "arc_easy": "arc/ARC-Easy", "arc_challenge": "arc/ARC-Challenge"}
    harness = simple_evaluate(
        HFLM(pretrained=theirs[0], tokenizer=theirs[1], device="cpu", batch_size=8),
        tasks=[task(f"local_{name}", file) for name, file in files.items()],
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=False,
    )
    measured = evaluate("sft", "eval=mmlu_arc", "eval.mmlu_path=mmlu", "eval.arc_path=arc", "data.val_path=talk.jsonl")
    for name in files:
        assert measured[f"eval/{name}_acc"] == pytest.approx(harness["results"][f"local_{name}"]["acc,none"], abs=1e-12)
