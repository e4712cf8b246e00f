"""nanochat's mixtures on real rows: the hub's folders replaced by local ones of the same schema and layout."""

from __future__ import annotations

import json

import pytest

import chattrain
from tests.conftest import SHARED_DATA
from tests.helpers import TINY

pytestmark = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")

SETTINGS = [o for o in TINY if not o.startswith(("data", "eval=", "train.rows_per_step"))]


@pytest.fixture
def place(workplace):
    identity = [
        [{"role": "user", "content": f"Who are you, number {i}?"}, {"role": "assistant", "content": "A model."}]
        for i in range(20)
    ]
    (workplace / "identity.jsonl").write_text("\n".join(json.dumps(row) for row in identity) + "\n")
    (workplace / "words.txt").write_text("\n".join(a + b + c for a in "bcdfg" for b in "aeiou" for c in "lmnrst"))
    return workplace


def nanochat(stage: str, *overrides: str) -> dict:
    train, val = f"data.stages.{stage}.train", f"data.stages.{stage}.val"
    local = [
        "data=nanochat",
        "data.identity_path=identity.jsonl",
        "data.words_path=words.txt",
        f"{train}.smoltalk.path={SHARED_DATA}/sgd",
        f"{train}.smoltalk.limit=100",
        f"{train}.gsm8k.path={SHARED_DATA}/gsm8k",
        f"{train}.gsm8k.limit=100",
        f"{train}.spelling.limit=50",
        f"{train}.spelling_bee.limit=50",
        f"{val}.smoltalk.path={SHARED_DATA}/sgd",
        f"{val}.smoltalk.limit=20",
    ]
    return chattrain.run(
        [f"stage={stage}", *SETTINGS, *local, "init.from=scratch", "train.max_steps=2", "eval.every=null", *overrides]
    )


def test_sft_on_nanochats_mixture_measures_mmlu_and_arc(place):
    train = "data.stages.sft.train"
    arc = [
        f"{train}.{name}.{key}"
        for name in ("arc_easy", "arc_challenge")
        for key in (f"path={SHARED_DATA}/arc", "split=test", "limit=50")
    ]
    summary = nanochat(
        "sft",
        *arc,
        f"eval.mmlu_path={SHARED_DATA}/mmlu",
        f"eval.arc_path={SHARED_DATA}/arc",
        "eval.max_problems=40",
        "train.rows_per_step=8",
        "train.seq_len=256",
    )
    assert summary["status"] == "completed"
    assert {"val/loss", "eval/mmlu_acc", "eval/arc_easy_acc", "eval/arc_challenge_acc"} <= summary["metrics"].keys()
    assert all(0 <= summary["metrics"][f"eval/{name}_acc"] <= 1 for name in ("mmlu", "arc_easy", "arc_challenge"))


def test_mid_on_nanochats_mixture_counts_identity_twice(place):
    train, val = "data.stages.mid.train", "data.stages.mid.val"
    local = [
        f"{train}.mmlu.path={SHARED_DATA}/mmlu",
        f"{train}.mmlu.subset=all",
        f"{train}.mmlu.split=test",
        f"{train}.mmlu.limit=100",
        f"{val}.mmlu.path={SHARED_DATA}/mmlu",
        f"{val}.mmlu.limit=20",
        f"{val}.gsm8k.path={SHARED_DATA}/gsm8k",
        f"{val}.gsm8k.limit=20",
    ]
    summary = nanochat("mid", *local, "train.total_batch_size=512")
    assert summary["data"]["documents"] == 100 + 100 + 100 + 2 * 20 + 50 + 50
    assert summary["metrics"]["val/bpb"] > 0
