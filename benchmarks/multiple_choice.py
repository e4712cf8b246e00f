"""Questions a second of the multiple-choice evaluation, against a plain loop: batches of 32 questions in the order of the file,
padded to the longest, logits of all tokens at all positions, the likeliest letter at the answer position.

d6, in the dtype that training would use on this device. If BENCHMARK_DATA names a folder with mmlu/ and arc/ (the hub's layout),
the questions are MMLU's and ARC's, otherwise generated ones, which are short and of similar length, so that little can be gained.
Of the real ones, evenly spaced runs of 32 are used, so that the loop's batches are those of whole files; BENCHMARK_QUESTIONS sets
the number of questions (14089 is all: half an hour on two cores). Prompts are rendered before timing. Both must give the same
accuracy: exactly in fp32, within one question in a hundred in bf16, because the loop's head rounds some letters to a tie.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import row, show
from chattrain.config.data import SourceConfig
from chattrain.config.eval import EvalConfig
from chattrain.config.words import Device, DType, Schema
from chattrain.data.records import Records
from chattrain.data.sources import open_records
from chattrain.device import autocast, pick_device, use_bf16
from chattrain.evals.multiple_choice import MultipleChoice, Question, questions
from chattrain.model.gpt import GPT
from chattrain.parallel.ranks import Ranks
from chattrain.tasks import generated, multiple_choice
from chattrain.tokenizer import Tokenizer

BATCH, QUESTIONS, VOCABULARY = 32, 512, 8192
SETS = (("mmlu", "all"), ("arc", "ARC-Easy"), ("arc", "ARC-Challenge"))


def measure() -> list[dict]:
    asked, pad_id = _asked()
    device = pick_device(Device.auto)
    model = random_model(device)
    model.compile_blocks(dynamic=True)  # as a run does
    as_trained = autocast(use_bf16(DType.auto, device), device)
    sizes = np.ones(VOCABULARY, dtype=np.int32)  # bytes of each token, which only bits per byte depend on
    whole, first = (
        MultipleChoice("all", part, EvalConfig.batch_size, pad_id, device, Ranks(), sizes) for part in (asked, asked[:BATCH])
    )
    _agree(first(model, nullcontext()), plain(model, asked[:BATCH], nullcontext(), device), 0.0)
    first(model, as_trained), plain(model, asked[:BATCH], as_trained, device)  # warm up
    begun = time.perf_counter()
    found = whole(model, as_trained)
    middle = time.perf_counter()
    expected = plain(model, asked, as_trained, device)
    ended = time.perf_counter()
    _agree(found, expected, 0.01)
    return [row(f"multiple choice, d6, {len(asked):,} questions", len(asked), "questions", middle - begun, ended - middle)]


def random_model(device: torch.device) -> GPT:
    """d6 without zero weights, so that the logits of letters differ."""
    model, generator = GPT(VOCABULARY, n_layer=6, n_embd=384, n_head=3), torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    return model.to(device).eval()


@torch.no_grad()
def plain(model: GPT, asked: list[Question], number_format: AbstractContextManager, device: torch.device) -> float:
    """Accuracy as a careful user would first write it."""
    right = 0
    with number_format:
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            inputs = torch.zeros(len(batch), max(len(q.ids) for q in batch), dtype=torch.long)
            for b, question in enumerate(batch):
                inputs[b, : len(question.ids)] = torch.tensor(question.ids)
            logits = model(inputs.to(device))
            for b, question in enumerate(batch):
                right += int(logits[b, len(question.ids) - 1, question.letter_ids].argmax()) == question.answer
    return right / len(asked)


def _agree(found: dict[str, float], expected: float, tolerance: float) -> None:
    accuracy = found["eval/all_acc"]
    if abs(accuracy - expected) > tolerance:
        raise RuntimeError(f"accuracy {accuracy:.4f}, but {expected:.4f} by the plain loop")


def _asked() -> tuple[list[Question], int]:
    """Runs of questions in the order of the files, and the padding token."""
    with tempfile.TemporaryDirectory() as cache:
        sets = _sets(Path(cache))
        texts = [multiple_choice.tokenizer_text(r) for rows in sets for _, r in rows.read(0, len(rows))]
        tokenizer = Tokenizer.train(texts, VOCABULARY)
        asked = [question for rows in sets for question in questions("all", rows, tokenizer)]
    starts = list(range(0, len(asked), BATCH))
    count = min(-(-int(os.environ.get("BENCHMARK_QUESTIONS", QUESTIONS)) // BATCH), len(starts))
    chosen = (starts[(2 * i + 1) * len(starts) // (2 * count)] for i in range(count))
    return [question for start in chosen for question in asked[start : start + BATCH]], tokenizer.pad_id


def _sets(cache: Path) -> list[Records]:
    folder = os.environ.get("BENCHMARK_DATA")
    if folder is None:
        return [Records(generated.records("demo_choice", "val", QUESTIONS))]
    return [
        open_records(
            name, SourceConfig(str(Path(folder).resolve() / name), Schema.multiple_choice, subset=subset, split="test"), cache
        )
        for name, subset in SETS
    ]


if __name__ == "__main__":
    show(measure())
