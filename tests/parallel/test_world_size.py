"""A run is the same run on any number of ranks: batches, losses, checkpoints, measurements. Real processes, gloo."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import chattrain
from chattrain import loop, runner
from chattrain.commands.evaluate import evaluate
from chattrain.config.compose import compose
from chattrain.config.words import Command
from chattrain.parallel import launch, layout
from chattrain.parallel.ranks import Ranks, join
from chattrain.setup.data import open_data
from chattrain.setup.plan import setup_run
from tests.helpers import freeze_heap, standing_in
from tests.test_equivalence import SETTINGS, conversation, losses
from tests.tiny_hf import write_model

ROWS, STEPS = 8, 5  # rows a step
NORMS = ["train/grad_norm", *(f"train/grad_norm/{group}" for group in ("matrix", "embed", "lm_head"))]
RUNS = list(itertools.product(["packed", "masked", "best_fit"], ["muon_adamw", "adamw"]))


@pytest.fixture(scope="module")
def talk(tmp_path_factory, cache):
    with standing_in(tmp_path_factory.mktemp("talk"), cache) as folder:
        (folder / "talk.jsonl").write_text("\n".join(json.dumps(conversation(i)) for i in range(200)) + "\n")
        yield folder


def overrides(collator: str, optimizer: str, rows: int, *more: str) -> list[str]:
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
        f"train.rows_per_step={ROWS}",
        *more,
    ]


@dataclass(frozen=True)
class Job:
    """A run, or an evaluation. `until`: the step after which a signal to stop arrives. `sharing`: ranks of a group, as of
    hundreds of ranks."""

    name: str
    overrides: list[str]
    until: int | None = None
    sharing: int | None = None

    @property
    def key(self) -> str:
        return f"{self.name}-until-{self.until}" if self.until else self.name


def together(jobs: list[Job], nproc: int) -> dict[str, dict]:
    """What these jobs return by their keys, one after the other in the same processes: starting some for each takes minutes."""
    planned = []
    for job in jobs:
        named = [] if "command=evaluate" in job.overrides else [f"run.name={job.name}"]  # an evaluation reads init.from
        cfg = compose([*job.overrides, *named, f"distributed.nproc={nproc}"])
        planned.append((job, cfg, setup_run(cfg, nproc)[0] if cfg.command is Command.train else None))
    returned = _work(planned, Ranks()) if nproc == 1 else launch.start(nproc, None, _as_rank, planned)
    return dict(zip([job.key for job in jobs], returned, strict=True))


def _as_rank(planned):
    torch.set_num_threads(1)
    freeze_heap()
    ranks = join(120, cuda=False)
    try:
        return _work(planned, ranks)
    finally:
        ranks.close()


def _work(planned, ranks):
    return [_train(job, cfg, plan, ranks) if plan else evaluate(cfg, ranks) for job, cfg, plan in planned]


def _train(job, cfg, plan, ranks, fit=loop.fit):
    def stopped(parts, state, cadence):
        read = parts.loader.step
        now = [0]
        parts.loader.step = lambda step: now.__setitem__(0, step) or read(step)
        parts.stop_asked = lambda: job.until is not None and now[0] + 1 >= job.until
        return fit(parts, state, cadence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fit", stopped)
        if job.sharing:
            patch.setattr(layout, "shard_group_size", lambda items, world_size: job.sharing)
        return runner.train_on_rank(cfg, plan, ranks, open_data(cfg, plan.tokenizer_dir, ranks.world_size))


# --- the jobs ----------------------------------------------------------------------------------------------------------

LEGS = {  # ranks, strategy, the step after which it is stopped
    "muon_adamw": [(4, "ddp", 1), (2, "fsdp", 2), (4, "fsdp", 3), (2, "ddp", 4), (1, "ddp", None)],
    "adamw": [(4, "ddp", 2), (2, "fsdp", 3), (1, "ddp", None)],
}
UNEVEN = [(3, None, "ddp", "muon_adamw"), (3, None, "fsdp", "muon_adamw"), (3, None, "fsdp", "adamw")]
IN_GROUPS = [(4, 2, "ddp", "muon_adamw"), (4, 2, "ddp", "adamw")]
KINDS = ["llama", "qwen"] if find_spec("transformers") else []  # qwen: the head is the embedding, and there are biases


def splits(nproc: int) -> list[tuple[Job, str]]:
    """Jobs on so many ranks, with the name of the one on one rank that each must be equal to."""
    return [
        (
            Job("-".join([f"{nproc}x{rows}", strategy, *run]), overrides(*run, rows, f"distributed.strategy={strategy}")),
            "-".join([f"1x{ROWS}", "ddp", *run]),
        )
        for run in RUNS
        for rows, strategy in [(ROWS // nproc, "ddp"), (1, "ddp"), (1, "fsdp")][: 3 if nproc > 1 else 2]
    ]


def leg(optimizer: str, number: int) -> Job:
    _, strategy, until = LEGS[optimizer][number]
    settings = overrides("masked", optimizer, 1, "checkpoint.every=1", f"distributed.strategy={strategy}")
    return Job(f"moved-{optimizer}", settings, until)


def of_twelve_rows(nproc: int, sharing: int | None, strategy: str, optimizer: str) -> Job:
    more = ["train.rows_per_step=12", "train.max_grad_norm=0.5", f"distributed.strategy={strategy}"]
    settings = overrides("masked", optimizer, 1 if nproc > 1 else 12, *more)
    return Job("-".join(["twelve", str(nproc), strategy, optimizer]), settings, sharing=sharing)


def hugging_face(kind: str, strategy: str = "ddp", name: str = "") -> Job:
    kept = ("train.compile", "train.dtype", "train.device=", "tracking", "log", "eval", "data")
    settings = [
        "stage=sft",
        "schedule.init_lr_frac=1.0",
        "model=hf",
        f"init.from={kind}",
        "train.seq_len=128",
        "train.device_batch_size=2",
        "train.rows_per_step=8",
        f"train.max_steps={STEPS}",
        "optimizer=muon_adamw",
        "optimizer.vector_lr=0.01",
        *[o for o in SETTINGS if o.startswith(kept)],
        f"distributed.strategy={strategy}",
    ]
    return Job(name or f"{kind}-{strategy}", settings)


def writing(name: str, strategy: str = "ddp", kind: str | None = None) -> Job:
    """Nothing is measured before replies are written."""
    model = ["model=hf", f"init.from={kind}", "optimizer=adamw", "train.seq_len=128"] if kind else ["train.seq_len=128"]
    settings = [
        "stage=sft",
        *[o for o in SETTINGS if not o.startswith(("eval", "train.seq_len", *(("model.", "tokenizer", "init") if kind else ())))],
        *model,
        "eval=spelling",
        "eval.every=1",
        "eval.generative_every=1",
        "eval.max_problems=5",
        "eval.max_reply_tokens=8",
        "eval.prompts=[Hello,'What is it?','Why?']",
        "train.rows_per_step=8",
        "train.device_batch_size=4",
        "train.num_epochs=null",
        "train.max_steps=2",
        f"distributed.strategy={strategy}",
    ]
    return Job(name, settings)


def asking(name: str, strategy: str = "ddp") -> Job:
    settings = [
        "stage=sft",
        *[o for o in SETTINGS if not o.startswith(("data", "eval", "train.seq_len"))],
        "data=demo",
        "eval=full",
        "eval.max_problems=37",
        "eval.max_tokens=2048",
        "eval.max_reply_tokens=24",
        "train.seq_len=256",
        "train.rows_per_step=8",
        "train.device_batch_size=4",
        "train.num_epochs=null",
        "train.max_steps=3",
        "eval.batch_size=4",
        "schedule.init_lr_frac=1.0",
        f"distributed.strategy={strategy}",
    ]
    return Job(name, settings)


def evaluation(nproc: int, trained: dict) -> Job:
    settings = overrides("masked", "adamw", 2, "command=evaluate", f"init.from={trained['checkpoint']}")
    return Job(f"evaluated-{nproc}", settings)


@pytest.fixture(scope="module")
def ran(talk) -> dict[str, dict]:
    """What all jobs of this file return, by their names; each number of ranks is started as seldom as can be."""
    for kind in KINDS:
        write_model(talk / kind, kind)
    found = together(
        [
            *(job for job, _ in splits(1)),
            *(of_twelve_rows(1, None, "ddp", optimizer) for optimizer in LEGS),
            *(hugging_face(kind, name=kind) for kind in KINDS),
            asking("asked"),
            writing("wrote"),
            *(writing(f"wrote-{kind}", kind=kind) for kind in KINDS),
        ],
        1,
    )
    trained = found[f"1x{ROWS}-ddp-masked-adamw"]
    found |= together([evaluation(1, trained)], 1)
    found |= together([*(job for job, _ in splits(4)), evaluation(4, trained), *(leg(o, 0) for o in LEGS)], 4)
    found |= together(
        [
            *(job for job, _ in splits(2)),
            *(hugging_face(kind, strategy) for kind in KINDS for strategy in ("ddp", "fsdp")),
            *(asking(f"asked-{strategy}", strategy) for strategy in ("ddp", "fsdp")),
            writing("wrote-fsdp", "fsdp"),
            *(writing(f"wrote-{kind}-fsdp", "fsdp", kind) for kind in KINDS),
            *(leg(o, 1) for o in LEGS),
        ],
        2,
    )
    found |= together([leg("muon_adamw", 2), *(of_twelve_rows(*job) for job in IN_GROUPS)], 4)
    found |= together([leg("muon_adamw", 3)], 2)
    found |= together([of_twelve_rows(*job) for job in UNEVEN], 3)
    return found | together([leg(o, -1) for o in LEGS], 1)


# --- what they must return ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_ranks_and_accumulation_change_no_loss_in_fp32(ran, nproc):
    """Within 1e-6, and 1e-7 on average, from one rank with all rows at once; accumulation goes from 1 to 8."""
    for job, equal_to in splits(nproc):
        run, reference = ran[job.key], ran[equal_to]
        ours, theirs = (torch.tensor(losses(r), dtype=torch.float64) for r in (run, reference))
        residual = (ours - theirs) / theirs
        assert len(ours) == STEPS and residual.abs().max() < 1e-6 and residual.mean().abs() < 1e-7, run["run_dir"]
        assert losses(run, "val/bpb") == pytest.approx(losses(reference, "val/bpb"), rel=1e-6)
        for norm in NORMS:
            assert len(losses(run, norm)) == STEPS and losses(run, norm) == pytest.approx(losses(reference, norm), rel=2e-5)
        for exact in ("tokens_seen", "supervised_tokens"):
            assert run[exact] == reference[exact]


@pytest.mark.parametrize("optimizer", LEGS)
def test_a_run_begun_on_four_ranks_goes_on_on_two_and_on_one(ran, optimizer):
    """From the same checkpoint, with the same batches, and from one strategy to the other."""
    whole = ran[f"1x{ROWS}-ddp-masked-{optimizer}"]
    for number, (_, _, until) in enumerate(LEGS[optimizer]):
        run = ran[leg(optimizer, number).key]
        assert run["status"] == ("interrupted" if until else "completed") and run["steps"] == (until or STEPS)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert run["supervised_tokens"] == whole["supervised_tokens"]
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(Path(r["checkpoint"]) / file) for r in (run, whole))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.shape == theirs[name].shape and tensor.dtype == theirs[name].dtype
            assert (tensor - theirs[name]).norm() <= 2e-3 * theirs[name].norm(), name


def test_an_evaluation_gives_the_same_numbers_on_any_number_of_ranks(ran, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = evaluation(2, ran[f"1x{ROWS}-ddp-masked-adamw"])
    found = [ran[f"evaluated-{nproc}"]["metrics"] for nproc in (1, 4)]
    found.append(chattrain.run([*job.overrides, "distributed.nproc=2"])["metrics"])
    assert found[0] == found[1] == found[2] and found[0]["val/bpb"] > 0
    assert "OMP_NUM_THREADS" not in os.environ  # the threads of two ranks are not those of the next job of a sweep


def test_uneven_ranks_and_groups_of_ranks_train_the_same_run(ran):
    """Three ranks, whose rows of a matrix are not equal in number; two groups of two ranks, which do the same."""
    for job in (*UNEVEN, *IN_GROUPS):
        run, alone = ran[of_twelve_rows(*job).key], ran[of_twelve_rows(1, None, "ddp", job[-1]).key]
        assert losses(run) == pytest.approx(losses(alone), rel=1e-6)
        for norm in NORMS:
            assert losses(run, norm) == pytest.approx(losses(alone, norm), rel=2e-5)
        assert losses(run, "val/bpb") == pytest.approx(losses(alone, "val/bpb"), rel=1e-6)


def test_metrics_tell_what_a_step_has_sent(ran):
    run = ran[f"2x{ROWS // 2}-ddp-packed-muon_adamw"]
    params = sum(t.numel() for t in load_file(Path(run["checkpoint"]) / "model.safetensors").values())
    assert losses(run, "train/sent_gib") == pytest.approx([2 * (1 / 2) * 4 * params / 2**30] * STEPS, rel=1e-3)


@pytest.mark.skipif(not KINDS, reason="needs transformers")
def test_a_hugging_face_model_is_the_same_on_two_ranks(ran):
    for kind, strategy in itertools.product(KINDS, ("ddp", "fsdp")):
        run, reference = ran[hugging_face(kind, strategy).key], ran[kind]
        assert losses(run) == pytest.approx(losses(reference), rel=1e-6)
        ours, theirs = (load_file(Path(r["checkpoint"]) / "model.safetensors") for r in (run, reference))
        assert ours.keys() == theirs.keys()


def test_questions_get_the_same_answers_from_weights_that_are_sharded(ran):
    alone = ran["asked"]
    for run in (ran["asked-ddp"], ran["asked-fsdp"]):
        assert losses(run, "eval/demo_acc")[0] == losses(alone, "eval/demo_acc")[0] > 0  # before the first step
        assert abs(losses(run, "eval/demo_acc")[1] - losses(alone, "eval/demo_acc")[1]) < 2 / 37


def samples_at_0(run: dict) -> list[str]:
    rows = [json.loads(line) for line in (Path(run["run_dir"]) / "samples.jsonl").read_text().splitlines()]
    return [row["reply"] for row in rows if row["step"] == 0]


def test_replies_are_the_same_from_weights_that_are_sharded(ran):
    """Of the questions of suites, and to eval.prompts. Ranks write replies of different lengths, with as many passes."""
    for name in ("wrote", *(f"wrote-{kind}" for kind in KINDS)):
        one, two = (samples_at_0(ran[run]) for run in (name, f"{name}-fsdp"))
        assert one == two and len(one) == 3
    first = {}
    for name in ("asked", "asked-ddp", "asked-fsdp"):
        folder = Path(ran[name]["run_dir"])
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert {row["step"] for row in rows} == {0, 3} and len(rows) == 8
        first[name] = [row["reply"] for row in rows if row["step"] == 0]
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        written = [answer for answer in answers if "reply" in answer]
        assert {answer["set"] for answer in written} == {"arithmetic", "spelling"} and len(written) == 2 * 37
        for suite in ("arithmetic", "spelling"):
            of_suite = [answer for answer in written if answer["set"] == suite]
            (accuracy,) = losses(ran[name], f"eval/{suite}_acc")
            assert accuracy == sum(answer["right"] for answer in of_suite) / 37
    assert first["asked"] == first["asked-ddp"] == first["asked-fsdp"]
