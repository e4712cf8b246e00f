"""A run is the same run on any number of ranks: batches, losses, checkpoints, measurements. Real processes, gloo."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import chattrain
from chattrain import loop, runner
from chattrain.config.compose import compose
from chattrain.parallel import launch, layout
from chattrain.parallel.ranks import Ranks, join
from chattrain.setup.data import open_data
from chattrain.setup.plan import setup_run
from tests.test_equivalence import SETTINGS, conversation, losses
from tests.tiny_hf import write_model

ROWS, STEPS = 8, 5  # rows a step
RUNS = list(itertools.product(["packed", "masked", "best_fit"], ["muon_adamw", "adamw"]))


@pytest.fixture
def talk(workplace):
    (workplace / "talk.jsonl").write_text("\n".join(json.dumps(conversation(i)) for i in range(200)) + "\n")
    return workplace


def overrides(collator: str, optimizer: str, name: str, rows: int, *more: str) -> list[str]:
    stage = (
        ["stage=sft", "schedule.init_lr_frac=1.0"]
        if collator == "masked"
        else ["stage=mid", "train.total_batch_size=null", f"train.rows_per_step={ROWS}"]
    )
    return [
        *stage,
        *SETTINGS,
        f"collator={collator}",
        f"optimizer={optimizer}",
        f"train.device_batch_size={rows}",
        f"train.max_steps={STEPS}",
        f"run.name={name}",
        f"train.rows_per_step={ROWS}",
        *more,
    ]


def together(jobs: list[list[str]], nproc: int, until: int | None = None, sharing: int | None = None) -> list[dict]:
    """The summaries of these runs, one after the other in the same nproc processes: starting some for each would take minutes.
    `until`: the step after which a signal to stop arrives. `sharing`: ranks of a group, as of hundreds of ranks."""
    planned = []
    for job in jobs:
        cfg = compose([*job, f"distributed.nproc={nproc}"])
        planned.append((cfg, setup_run(cfg, nproc)[0]))
    if nproc == 1:
        return _work(planned, Ranks(), until)
    return launch.start(nproc, None, _as_rank, planned, until, sharing)


def _as_rank(planned, until, sharing):
    torch.set_num_threads(1)
    if sharing:
        layout.shard_group_size = lambda items, world_size: sharing
    ranks = join(120, cuda=False)
    try:
        return _work(planned, ranks, until)
    finally:
        ranks.close()


def _work(planned, ranks, until):
    summaries = []
    fit = loop.fit

    def stopped(parts, state, cadence):
        read = parts.loader.step
        now = [0]
        parts.loader.step = lambda step: now.__setitem__(0, step) or read(step)
        parts.stop_asked = lambda: until is not None and now[0] + 1 >= until
        return fit(parts, state, cadence)

    loop.fit = stopped
    try:
        for cfg, plan in planned:
            summaries.append(runner.train_on_rank(cfg, plan, ranks, open_data(cfg, plan.tokenizer_dir, ranks.world_size)))
    finally:
        loop.fit = fit
    return summaries


@pytest.mark.parametrize("nproc", [2, 4])
def test_ranks_and_accumulation_change_no_loss_in_fp32(talk, nproc):
    """Within 1e-6, and 1e-7 on average, from one rank with all rows at once; accumulation goes from 1 to 8."""
    alone = together([overrides(*run, "-".join(["alone", *run]), ROWS) for run in RUNS], 1)
    many, of = [], []
    for (run, reference), (rows, strategy) in itertools.product(
        zip(RUNS, alone, strict=True), [(ROWS // nproc, "ddp"), (1, "ddp"), (1, "fsdp")]
    ):
        many.append(overrides(*run, "-".join([f"{nproc}x{rows}", strategy, *run]), rows, f"distributed.strategy={strategy}"))
        of.append(reference)
    many = together(many, nproc)
    ones = together([overrides(*run, "-".join(["ones", *run]), 1) for run in RUNS], 1) if nproc == 2 else []
    for run, reference in zip([*many, *ones], [*of, *alone], strict=False):
        ours, theirs = (torch.tensor(losses(r), dtype=torch.float64) for r in (run, reference))
        residual = (ours - theirs) / theirs
        assert len(ours) == STEPS and residual.abs().max() < 1e-6 and residual.mean().abs() < 1e-7, run["run_dir"]
        assert losses(run, "val/bpb") == pytest.approx(losses(reference, "val/bpb"), rel=1e-6)
        assert losses(run, "train/grad_norm") == pytest.approx(losses(reference, "train/grad_norm"), rel=2e-5)
        for exact in ("tokens_seen", "supervised_tokens"):
            assert run[exact] == reference[exact]


@pytest.mark.parametrize(
    "optimizer, legs",
    [
        ("muon_adamw", [(4, "ddp", 1), (2, "fsdp", 2), (4, "fsdp", 3), (2, "ddp", 4), (1, "ddp", None)]),
        ("adamw", [(4, "ddp", 2), (2, "fsdp", 3), (1, "ddp", None)]),
    ],
    ids=["muon_adamw", "adamw"],
)
def test_a_run_begun_on_four_ranks_goes_on_on_two_and_on_one(talk, optimizer, legs):
    """From the same checkpoint, with the same batches, and from one strategy to the other."""
    (whole,) = together([overrides("masked", optimizer, "whole", ROWS)], 1)
    begun = overrides("masked", optimizer, "moved", 1, "checkpoint.every=1")
    for nproc, strategy, until in legs:
        (run,) = together([[*begun, f"distributed.strategy={strategy}"]], nproc, until)
        assert run["status"] == ("interrupted" if until else "completed") and run["steps"] == (until or STEPS)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert run["supervised_tokens"] == whole["supervised_tokens"]
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(Path(r["checkpoint"]) / file) for r in (run, whole))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.shape == theirs[name].shape and tensor.dtype == theirs[name].dtype
            assert (tensor - theirs[name]).norm() <= 2e-3 * theirs[name].norm(), name


def test_an_evaluation_gives_the_same_numbers_on_any_number_of_ranks(talk):
    (trained,) = together([overrides("masked", "adamw", "trained", ROWS)], 1)
    found = [
        chattrain.run(
            [
                *overrides("masked", "adamw", "unused", 2),
                "command=evaluate",
                f"init.from={trained['checkpoint']}",
                f"distributed.nproc={nproc}",
            ]
        )["metrics"]
        for nproc in (1, 2, 4)
    ]
    assert found[0] == found[1] == found[2] and found[0]["val/bpb"] > 0


def test_uneven_ranks_and_groups_of_ranks_train_the_same_run(talk):
    """Three ranks, whose rows of a matrix are not equal in number; two groups of two ranks, which do the same."""
    for nproc, sharing, jobs in [
        (3, None, [("ddp", "muon_adamw"), ("fsdp", "muon_adamw"), ("fsdp", "adamw")]),
        (4, 2, [("ddp", "muon_adamw"), ("ddp", "adamw")]),
    ]:
        more = ["train.rows_per_step=12", "train.max_grad_norm=0.5"]
        names = ["-".join([str(nproc), *job]) for job in jobs]
        many = together(
            [
                [*overrides("masked", optimizer, name, 1, *more), f"distributed.strategy={strategy}"]
                for name, (strategy, optimizer) in zip(names, jobs, strict=True)
            ],
            nproc,
            sharing=sharing,
        )
        for run, name, (_, optimizer) in zip(many, names, jobs, strict=True):
            (alone,) = together([overrides("masked", optimizer, f"alone-{name}", 12, *more)], 1)
            assert losses(run) == pytest.approx(losses(alone), rel=1e-6)
            assert losses(run, "train/grad_norm") == pytest.approx(losses(alone, "train/grad_norm"), rel=2e-5)
            assert losses(run, "val/bpb") == pytest.approx(losses(alone, "val/bpb"), rel=1e-6)


def test_metrics_tell_what_a_step_has_sent(talk, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (run,) = together([overrides("packed", "muon_adamw", "sent", 4)], 2)
    params = sum(t.numel() for t in load_file(Path(run["checkpoint"]) / "model.safetensors").values())
    assert losses(run, "train/sent_gib") == pytest.approx([2 * (1 / 2) * 4 * params / 2**30] * STEPS, rel=1e-3)
    assert "OMP_NUM_THREADS" not in os.environ  # the threads of two ranks are not those of the next job of a sweep


def test_a_hugging_face_model_is_the_same_on_two_ranks(talk):
    pytest.importorskip("transformers")
    jobs, of = [], []
    for kind in ("llama", "qwen"):  # qwen: the head is the embedding, and there are biases
        folder = write_model(talk / kind, kind)
        settings = [
            "stage=sft",
            "schedule.init_lr_frac=1.0",
            "model=hf",
            f"init.from={folder}",
            "train.seq_len=128",
            "train.device_batch_size=2",
            "train.rows_per_step=8",
            f"train.max_steps={STEPS}",
            "optimizer=muon_adamw",
            "optimizer.vector_lr=0.01",
            *[
                o
                for o in SETTINGS
                if o.startswith(("train.compile", "train.dtype", "train.device=", "tracking", "log", "eval", "data"))
            ],
        ]
        (reference,) = together([[*settings, f"run.name={kind}"]], 1)
        for strategy in ("ddp", "fsdp"):
            jobs.append([*settings, f"run.name={kind}-{strategy}", f"distributed.strategy={strategy}"])
            of.append(reference)
    for run, reference in zip(together(jobs, 2), of, strict=True):
        assert losses(run) == pytest.approx(losses(reference), rel=1e-6)
        ours, theirs = (load_file(Path(r["checkpoint"]) / "model.safetensors") for r in (run, reference))
        assert ours.keys() == theirs.keys()


def test_questions_get_the_same_answers_from_weights_that_are_sharded(talk):
    settings = [
        "stage=sft",
        *[o for o in SETTINGS if not o.startswith(("data", "eval", "train.seq_len"))],
        "data=demo",
        "eval=full",
        "eval.max_problems=37",
        "eval.max_tokens=2048",
        "train.seq_len=256",
        "train.rows_per_step=8",
        "train.device_batch_size=4",
        "train.num_epochs=null",
        "train.max_steps=3",
        "eval.batch_size=4",
        "schedule.init_lr_frac=1.0",
    ]
    (alone,) = together([[*settings, "run.name=alone"]], 1)
    jobs = [[*settings, f"run.name={strategy}", f"distributed.strategy={strategy}"] for strategy in ("ddp", "fsdp")]
    for run in together(jobs, 2):
        assert losses(run, "eval/demo_acc")[0] == losses(alone, "eval/demo_acc")[0] > 0  # before the first step
        assert abs(losses(run, "eval/demo_acc")[1] - losses(alone, "eval/demo_acc")[1]) < 2 / 37
