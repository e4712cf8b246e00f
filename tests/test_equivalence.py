"""Runs that must give the same numbers, through the real step: batch splits, ranks, interruption; and the golden losses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

import chattrain

CLOSE = 1e-6  # relative, of the losses of runs in fp32 that differ in nothing but how a step is split
GOLDEN = Path(__file__).parent / "golden.json"
SETTINGS = [
    "model.n_layer=2",
    "model.n_embd=64",
    "model.n_head=2",
    "train.seq_len=64",
    "train.compile=false",
    "train.dtype=fp32",
    "train.device=cpu",
    "tokenizer.vocab_size=400",
    "tracking=none",
    "log.every=1",
    "eval=bpb",
    "data=local",
    "data.train_path=talk.jsonl",
    "init.from=scratch",
]
STAGES = {
    "mid": ["stage=mid", "train.total_batch_size=512"],
    "sft": ["stage=sft", "schedule.init_lr_frac=1.0", "train.rows_per_step=8"],
}


def conversation(i: int) -> dict:
    """Fixed conversations of very different lengths, some with tool calls."""
    rng = random.Random(i)
    messages = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        asked = rng.choice(["What is {} + {}?", "Please add {} to {}.", "{} + {} ="]).format(a, b)
        reply = f"{a} + {b} = {a + b}. " * rng.choice([1, 1, 3])
        parts = [
            {"type": "text", "text": reply},
            {"type": "python", "text": f"{a}+{b}"},
            {"type": "python_output", "text": str(a + b)},
        ]
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": parts if rng.random() < 0.3 else reply}]
    return {"messages": messages}


@pytest.fixture
def talk(workplace):
    lines = [json.dumps(conversation(i)) for i in range(200)]
    (workplace / "talk.jsonl").write_text("\n".join(lines) + "\n")
    return workplace


def train(name: str, stage: str, *overrides: str) -> dict:
    return chattrain.run([*STAGES[stage], *SETTINGS, f"run.name={name}", *overrides])


def losses(summary: dict, metric: str = "train/loss") -> list[float]:
    lines = (Path(summary["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [row[metric] for row in map(json.loads, lines) if metric in row]


@pytest.mark.parametrize("stage", ["mid", "sft"])
@pytest.mark.parametrize("optimizer", ["muon_adamw", "adamw"])
def test_eight_rows_at_once_equal_eight_times_one_row(talk, stage, optimizer):
    runs = [
        train(f"rows{rows}", stage, f"train.device_batch_size={rows}", f"optimizer={optimizer}", "train.max_steps=4")
        for rows in (8, 4, 1)
    ]
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=CLOSE)
        assert losses(run, "val/bpb") == pytest.approx(losses(runs[0], "val/bpb"), rel=CLOSE)
        assert run["tokens_seen"] == runs[0]["tokens_seen"]
        assert run["supervised_tokens"] == runs[0]["supervised_tokens"]


def test_a_step_of_padded_rows_is_the_same_however_many_tokens_its_passes_hold(talk):
    rows = ["train.rows_per_step=6", "train.device_batch_size=4", "train.max_steps=3"]  # 4 rows a pass would not divide 6
    runs = [train(f"tokens{tokens}", "sft", f"train.device_batch_tokens={tokens}", *rows) for tokens in (64, 150, 1000)]
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=CLOSE)
        assert losses(run, "val/bpb") == pytest.approx(losses(runs[0], "val/bpb"), rel=CLOSE)


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_an_interrupted_run_goes_on_to_the_same_bits(talk, stage, monkeypatch):
    whole = train("whole", stage, "train.device_batch_size=4", "train.max_steps=6")

    def pull_the_plug(parts, state, cadence, fit=chattrain_fit()):
        def track(step, metrics, inner=parts.track):
            if step == 5:
                raise MemoryError("the plug was pulled")
            inner(step, metrics)

        parts.track = track
        return fit(parts, state, cadence)

    monkeypatch.setattr("chattrain.loop.fit", pull_the_plug)
    with pytest.raises(MemoryError):
        train("torn", stage, "train.device_batch_size=4", "train.max_steps=6", "checkpoint.every=3")
    monkeypatch.undo()
    monkeypatch.chdir(talk)
    summary = json.loads((talk / "runs" / stage / "torn" / "summary.json").read_text())
    assert summary["status"] == "failed" and "plug" in summary["error"]

    resumed = train("torn", stage, "train.device_batch_size=4", "train.max_steps=6", "checkpoint.every=3")
    assert losses(resumed) == losses(whole)
    assert resumed["tokens_seen"] == whole["tokens_seen"]
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(Path(run["checkpoint"]) / file) for run in (whole, resumed))
        assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


def chattrain_fit():
    from chattrain import loop

    return loop.fit


def test_a_run_twice_gives_the_same_bits(talk):
    one, two = (train(name, "mid", "train.device_batch_size=4", "train.max_steps=3") for name in ("one", "two"))
    assert losses(one) == losses(two)


def test_another_seed_gives_another_run(talk):
    one, two = (train(f"seed{s}", "mid", "train.device_batch_size=4", "train.max_steps=3", f"run.seed={s}") for s in (1, 2))
    assert losses(one) != losses(two)


def test_one_divisor_weighs_tokens_and_not_micro_batches(talk):
    """The loss of a step is the token-weighted mean of its rows' losses, however unequal the rows are."""
    single = train("single", "sft", "train.device_batch_size=1", "train.max_steps=1")
    evaluated = chattrain.run(
        [
            *STAGES["sft"],
            *SETTINGS,
            "run.name=all",
            "train.device_batch_size=1",
            "train.rows_per_step=8",
            "train.max_steps=1",
            "optimizer.lr_scale=1e-9",
        ]
    )
    assert losses(single)[0] == pytest.approx(losses(evaluated)[0], rel=1e-6)


@pytest.mark.parametrize("stage", ["mid", "sft"])
@pytest.mark.parametrize("asked, steps", [("train.max_steps=14", 14), ("train.max_steps=1", 1)])
def test_max_steps_counts_optimizer_steps_whatever_the_accumulation(talk, stage, asked, steps):
    summary = train("counted", stage, "train.device_batch_size=2", asked, "eval=none")
    factors = losses(summary, "lr_factor")
    assert summary["steps"] == steps == len(factors)
    assert all(factor > 0 for factor in factors)
    decay = {"mid": 0.2, "sft": 1.0}[stage]  # share of the run that decays: the last step is one step before 0
    assert factors[-1] == pytest.approx(min(1.0, 1 / (decay * steps)))


def test_epochs_are_counted_in_steps_before_the_first(talk):
    summary = train("epochs", "sft", "train.device_batch_size=4", "train.num_epochs=2", "eval=none")
    documents = summary["data"]["documents"]
    assert documents == 190  # every 20th of 200 is kept for validation
    assert summary["steps"] == summary["num_steps"] == -(-2 * documents // 8)


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_a_budget_of_supervised_tokens_ends_the_run_and_its_schedule(talk, stage):
    rows = ["train.device_batch_size=4", "eval=none"]
    summary = train("budget", stage, *rows, "train.max_supervised_tokens=3000")
    counted = losses(summary, "train/supervised_tokens")
    assert counted[-1] == summary["supervised_tokens"] >= 3000 > counted[-2]
    same = train("steps", stage, *rows, f"train.max_steps={summary['steps']}")
    assert losses(same, "lr_factor") == losses(summary, "lr_factor") and losses(same) == losses(summary)


@pytest.mark.parametrize("collator", ["packed", "masked", "best_fit"])
def test_what_is_supervised_does_not_change_what_validation_measures(talk, collator):
    runs = [
        train(f"{supervise}{weight}", "sft", f"collator={collator}", f"loss={supervise}", f"loss.prompt_weight={weight}", *LITTLE)
        for supervise, weight in (("all", 0), ("assistant", 0), ("last_assistant", 0.5))
    ]
    for run in runs:
        for metric in ("val/loss", "val/loss_all", "val/bpb"):
            assert losses(run, metric)[0] == losses(runs[0], metric)[0]
    assert len({run["supervised_tokens"] for run in runs}) == 3 and len({losses(run)[-1] for run in runs}) == 3
    assert runs[2]["supervised_tokens"] < runs[2]["loss_weight"] < runs[0]["loss_weight"] == runs[0]["supervised_tokens"]


LITTLE = ["train.device_batch_size=8", "train.max_steps=2"]


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_golden_losses_are_as_recorded(talk, stage):
    """Re-record with `python -m tests.record_golden` when a change of numbers is meant, and say why in CHANGELOG.md."""
    summary = train("golden", stage, "train.device_batch_size=4", "train.max_steps=8")
    golden = json.loads(GOLDEN.read_text())[stage]
    assert losses(summary) == pytest.approx(golden["train/loss"], rel=1e-5)
    assert losses(summary, "val/bpb") == pytest.approx(golden["val/bpb"], rel=1e-5)
