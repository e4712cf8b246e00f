"""SmolLM2-135M-Instruct: the loss is TRL's, training lowers it, and the model answers. For make real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import chattrain
from chattrain.chat import render
from chattrain.tokenizer import Tokenizer
from tests.conftest import SHARED_DATA
from tests.helpers import metrics
from tests.real import fetch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.environ.get("CHATTRAIN_REAL"), reason="for make real")]

ROWS = 8
SFT = [
    "stage=sft",
    "model=hf",
    "optimizer=adamw",
    "optimizer.lr=1e-4",
    "schedule=constant_then_linear",
    "schedule.init_lr_frac=1",
    f"train.rows_per_step={ROWS}",
    "train.seq_len=512",
    "train.dtype=fp32",
    "train.device=cpu",
    "train.compile=false",
    "tracking=none",
    "eval=none",
    "log.every=1",
    "distributed.nproc=1",
    "data=local",
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("gguf", reason="pip install 'chattrain[real]'")
    try:
        return fetch.smollm2_folder()
    except fetch.Unreachable as error:
        pytest.skip(f"no real model: {error}")


def train(folder: Path, file: Path, steps: int, *overrides: str) -> list[float]:
    """The loss of each step."""
    paths = [f"init.from={folder}", f"data.train_path={file}", f"data.val_path={file}", f"train.max_steps={steps}"]
    summary = chattrain.run([*SFT, *paths, *overrides])
    run_dir = Path(summary["checkpoint"]).parents[1]
    return [row["train/loss"] for row in metrics(run_dir) if "train/loss" in row]


def write(file: Path, conversations: list[list[dict]]) -> Path:
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations) + "\n")
    return file


def test_the_first_loss_is_that_of_trl_on_the_same_targets(smollm2, workplace):
    """TRL also trains the line break behind the end token, which the template writes and not the model."""
    try:
        trl = fetch.trl_folder()
    except fetch.Unreachable as error:
        pytest.skip(f"no TRL: {error}")
    talks = [
        [{"role": "user", "content": f"What is {i} + {3 * i}?"}, {"role": "assistant", "content": f"It is {4 * i}.\n"}]
        for i in range(ROWS - 1)
    ]
    code = "```python\nfor i in range(3):\n    print(i)\n```\n\nGrüße 🙂"
    talks += [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "A loop?"},
            {"role": "assistant", "content": code},
        ]
    ]
    file, out = write(workplace / "talk.jsonl", talks), workplace / "trl.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(trl)]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.real.trl_loss", str(smollm2), str(file), str(out)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    theirs = json.loads(out.read_text())

    tokenizer = Tokenizer.load(smollm2)
    prepared = {tuple(token for token, _ in row): [label for _, label in row] for row in theirs["prepared"]}
    for talk in talks:
        ids, mask = render({"messages": talk}, tokenizer, None)
        more = [token for token, m, label in zip(ids, mask, prepared[tuple(ids)], strict=True) if m != (label != -100)]
        assert tokenizer.decode(more) == "\n"
    losses = train(smollm2, file, 1, "data.schema=messages")
    print(f"\nloss of the first step: {losses[0]:.6f}, TRL's {theirs['loss']:.6f}, over {theirs['targets']} targets")
    assert losses[0] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
def test_four_steps_on_gsm8k_lower_the_loss_and_the_model_answers(smollm2, workplace):
    from datasets import load_dataset

    questions = load_dataset("parquet", data_files=str(next((SHARED_DATA / "gsm8k").rglob("train*.parquet"))), split="train")
    file = workplace / "gsm8k.jsonl"
    file.write_text("\n".join(json.dumps(questions[i]) for i in range(ROWS)) + "\n")
    losses = train(smollm2, file, 4, "data.schema=gsm8k", "run.dir=run")
    print(f"\nlosses on GSM8K: {losses}")
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)

    asked = ["command=chat", "init.from=run", "chat.max_tokens=24", "chat.temperature=0"]
    (reply,) = chattrain.run([*asked, "chat.prompt=What is the capital of France?"])["replies"]
    print(f"reply: {reply!r}")
    assert "Paris" in reply
