"""A run that is begun again goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from chattrain.errors import UserError
from tests.helpers import TINY, command_line, contents, damage, metrics, train, write_talk

STEPS = 60
LONG = [f"train.max_steps={STEPS}", "eval.every=20", "init.from=scratch"]


@pytest.fixture(scope="module")
def whole(place) -> dict:
    """The summary of a run of 60 steps that nothing disturbed."""
    return train("sft", "whole", *LONG)


SHORT = ["train.max_steps=4", "checkpoint.every=1", "checkpoint.keep=9", "init.from=scratch"]
NUMBERS = count(1)


@pytest.fixture
def short(place) -> dict:
    """A fresh finished run of 4 steps with checkpoints of all of them, for one test to do as it likes with."""
    return train("mid", f"short{next(NUMBERS)}", *SHORT)


def again(summary: dict, *overrides: str) -> dict:
    """The command that began the run, once more."""
    return train(summary["stage"], Path(summary["run_dir"]).name, *SHORT, *overrides)


def same_bits(one: dict, two: dict) -> bool:
    pairs = [[load_file(Path(s["checkpoint"]) / f"{file}.safetensors") for s in (one, two)] for file in ("model", "optimizer")]
    return all(a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) for a, b in pairs)


CLOCK_AND_PROCESS = {"time", "train/tokens_per_second", "train/data_wait", "train/peak_memory_gib", "train/compilations"}


def numbers(summary: dict) -> list[dict]:
    """metrics.jsonl without what depends on the clock or on the process."""
    return [{k: v for k, v in row.items() if k not in CLOCK_AND_PROCESS} for row in metrics(summary["run_dir"])]


def checkpoints(summary: dict) -> list[str]:
    return sorted(folder.name for folder in (Path(summary["run_dir"]) / "checkpoints").iterdir())


# --- interrupted -----------------------------------------------------------------------------------------------------


def interrupt(name: str, signum: int, after_step: int = 3) -> tuple[int, str]:
    """Start the run of LONG as a process and signal it once metrics.jsonl shows the step; (exit status, stderr)."""
    running = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "chattrain",
            "stage=sft",
            *TINY,
            *LONG,
            f"run.name={name}",
            "checkpoint.every=1",
        ],  # a checkpoint each step: slower than this process looks
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    file, deadline = Path("runs/sft") / name / "metrics.jsonl", time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline:
        if file.exists() and f'"step": {after_step}' in file.read_text():
            running.send_signal(signum)
            break
        time.sleep(0.005)
    _, err = running.communicate(timeout=120)
    return running.returncode, err


@contextmanager
def hangups(handler):
    """What a process that is started within does with SIGHUP: these tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_terminal_stops_nothing(place):
    with hangups(signal.SIG_IGN):
        status, err = interrupt("nohup", signal.SIGHUP)
    assert status == 0, err
    assert json.loads((place / "runs/sft/nohup/summary.json").read_text())["status"] == "completed"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_run_after_its_step_with_a_checkpoint_and_it_goes_on_to_the_same_bits(whole, place, signum):
    name = signum.name.lower()
    with hangups(signal.SIG_DFL):
        status, err = interrupt(name, signum)
    assert status == 130, err
    assert "Traceback" not in err and "stopping after this step" in err
    stopped = json.loads((place / "runs/sft" / name / "summary.json").read_text())
    assert stopped["status"] == "interrupted" and 3 <= stopped["steps"] < STEPS
    assert Path(stopped["checkpoint"]).name == f"step_{stopped['steps']:06d}"
    assert metrics(stopped["run_dir"])[-1]["step"] == stopped["steps"]

    resumed = train("sft", name, *LONG)
    assert resumed["status"] == "completed" and "resumed" in resumed["init"]
    assert same_bits(resumed, whole)
    assert numbers(resumed) == numbers(whole)  # each step once
    assert (resumed["steps"], resumed["tokens_seen"], resumed["supervised_tokens"], resumed["metrics"]["val/bpb"]) == (
        whole["steps"],
        whole["tokens_seen"],
        whole["supervised_tokens"],
        whole["metrics"]["val/bpb"],
    )


def test_an_interrupted_run_is_not_what_auto_starts_from(whole, place):
    shutil.copytree(whole["run_dir"], place / "cut/mid/halfway")
    file = place / "cut/mid/halfway/summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "interrupted"}))
    with pytest.raises(UserError, match="no finished mid run"):
        train("sft", "after", "run.root=cut", "init.strict=true", "train.max_steps=1")


# --- once more -------------------------------------------------------------------------------------------------------


def test_a_finished_run_begun_again_does_nothing_and_returns_the_same_summary(short, place):
    before = contents(Path(short["run_dir"]))
    assert again(short) == short
    assert again(short, "run.resume=must") == short
    assert contents(Path(short["run_dir"])) == before


def test_more_steps_go_on_from_where_it_ended(short, caplog):
    longer = again(short, "train.max_steps=6")
    assert longer["steps"] == 6 and [r["step"] for r in metrics(longer["run_dir"]) if "train/loss" in r] == [*range(1, 7)]
    assert any("planned for 4 steps, now for 6" in r.message for r in caplog.records if r.levelname == "WARNING")


@pytest.mark.parametrize(
    "optimizer, key, entry", [("muon_adamw", "momentum_dtype", "momentum_buffer"), ("adamw", "state_dtype", "exp_avg_sq")]
)
def test_state_in_bf16_goes_on_to_the_same_bits_and_another_format_must_be_allowed(place, caplog, optimizer, key, entry):
    def formats(summary: dict) -> set[str]:
        state = load_file(Path(summary["checkpoint"]) / "optimizer.safetensors")
        return {str(t.dtype).removeprefix("torch.") for name, t in state.items() if name.endswith(entry)}

    bf16 = [f"optimizer={optimizer}", f"optimizer.{key}=bf16"]
    whole, parts = (train("mid", f"{optimizer}_{name}", *SHORT, *bf16) for name in ("whole", "parts"))
    (Path(parts["checkpoint"]) / "manifest.json").unlink()  # as if the plug had been pulled after step 3
    assert same_bits(whole, again(parts, *bf16)) and formats(whole) == {"bfloat16"}
    other = [f"optimizer={optimizer}", "train.max_steps=6"]
    with pytest.raises(UserError, match=rf"optimizer\.{key} bf16 -> fp32.*run\.allow_change=\[optimizer\.{key}\]"):
        again(parts, *other)
    changed = again(parts, *other, f"run.allow_change=[optimizer.{key}]")
    assert f"optimizer.{key} bf16 -> fp32" in caplog.text and formats(changed) == {"float32"}


def test_a_setting_that_the_run_did_not_know_yet_is_no_change(place, caplog):
    begun = train("mid", "older", *SHORT, "optimizer=adamw")
    for file in (Path(begun["run_dir"]) / "checkpoints").glob("*/config.yaml"):
        config, manifest = yaml.safe_load(file.read_text()), file.with_name("manifest.json")
        del config["optimizer"]["state_dtype"], config["train"]["device_batch_tokens"]
        file.write_text(yaml.safe_dump(config))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"config.yaml": digest}))
    caplog.clear()
    assert again(begun, "optimizer=adamw", "train.max_steps=6")["steps"] == 6
    assert "train.max_steps 4 -> 6" in caplog.text and "state_dtype" not in caplog.text


def test_an_interrupted_run_is_not_finished_by_asking_for_fewer_steps(short):
    file = Path(short["run_dir"]) / "summary.json"
    file.write_text(json.dumps(short | {"status": "interrupted"}))
    before = contents(Path(short["run_dir"]))
    with pytest.raises(UserError, match="at step 4, beyond the 2 steps asked for"):
        again(short, "train.max_steps=2")
    assert contents(Path(short["run_dir"])) == before


def test_another_start_is_no_start_for_a_run_that_goes_on_and_warned_of(short, caplog):
    again(short, "train.max_steps=6", "init.from=auto")
    assert any("init.from" in r.message and "-> auto" in r.message for r in caplog.records if r.levelname == "WARNING")


@pytest.mark.parametrize(
    "changed",
    [
        "data.train_path=other.jsonl",
        "run.seed=5",
        "train.seq_len=32",
        "train.rows_per_step=8",
        "collator=masked",
        "model.n_layer=3",
        "optimizer=adamw",
    ],
)
def test_a_run_does_not_go_on_with_other_settings_and_stays_as_it_was(short, changed):
    before = contents(Path(short["run_dir"]))
    with pytest.raises(UserError) as refused:
        again(short, changed, "train.max_steps=6")
    assert Path(short["run_dir"]).name in str(refused.value)
    assert contents(Path(short["run_dir"])) == before


@pytest.mark.parametrize(
    "changed, allow",
    [
        ("optimizer.lr_scale=0.5", "optimizer.lr_scale"),
        ("schedule.min_lr_factor=0.1", "schedule"),
        ("train.max_grad_norm=1.0", "train"),
        ("run.seed=5", "run.seed"),
        ("data.train_path=other.jsonl", "data"),
        ("data.val_path=other.jsonl", "data"),
        ("train.rows_per_step=8", "train.rows_per_step"),
        ("loss=assistant", "loss"),
        ("eval.every=2", "eval"),
    ],
)
def test_a_key_that_decides_numbers_must_be_allowed_and_is_then_told(short, place, caplog, changed, allow):
    write_talk(place, "other.jsonl", count=60, factor=5)
    key, _, value = changed.partition("=")
    before = contents(Path(short["run_dir"]))
    with pytest.raises(UserError, match=r"began with other settings.*run\.allow_change=\[") as refused:
        again(short, changed, "train.max_steps=6")
    if key != "loss":  # a group
        assert key in str(refused.value) and value in str(refused.value)
    assert contents(Path(short["run_dir"])) == before
    on = again(short, changed, "train.max_steps=6", f"run.allow_change=[{allow}]")
    assert on["steps"] == 6 and key.partition(".")[0] in on["changes"]
    assert any(key in r.message for r in caplog.records if r.levelname == "WARNING")
    assert again(short, changed, "train.max_steps=7")["steps"] == 7  # it now goes with them: no second permission


@pytest.mark.parametrize(
    "changed",
    [
        "log.every=3",
        "train.device_batch_size=2",
        "checkpoint.keep=3",
        "eval.batch_size=4",
        "distributed.nproc=1",
        "data.workers=1",
    ],
)
def test_a_key_that_decides_no_number_may_change_without_a_word(short, caplog, changed):
    assert again(short, changed, "train.max_steps=6")["steps"] == 6
    told = [r.message for r in caplog.records if r.levelname == "WARNING" and "other settings" in r.message]
    assert all(changed.partition("=")[0] not in message for message in told)


def test_a_file_moved_elsewhere_is_the_same_data_and_an_edited_one_is_not(short, place):
    shutil.copy("talk.jsonl", "moved.jsonl")
    assert again(short, "data.train_path=moved.jsonl", "train.max_steps=5")["steps"] == 5
    with Path("moved.jsonl").open("a") as file:
        file.write(Path("talk.jsonl").read_text().splitlines()[0].replace("What", "Which") + "\n")
    with pytest.raises(UserError, match="data"):
        again(short, "data.train_path=moved.jsonl", "train.max_steps=6")


def test_leave_for_another_key_is_no_leave_for_edited_data(short):
    shutil.copy("talk.jsonl", "kept.jsonl")
    try:
        with Path("talk.jsonl").open("a") as file:
            file.write(Path("kept.jsonl").read_text().splitlines()[0].replace("What", "Which") + "\n")
        for changed in ("eval.every=2", "train.max_grad_norm=1.0"):
            with pytest.raises(UserError, match=r"the contents of the data: training.*run\.allow_change=\[data\]"):
                again(short, changed, "train.max_steps=6", "run.allow_change=[eval,train]")
    finally:
        shutil.move("kept.jsonl", "talk.jsonl")


def test_resume_never_moves_the_old_run_aside_and_starts_anew(short, place, caplog):
    before = contents(Path(short["run_dir"]))
    for number in (1, 2):
        anew = again(short, "run.resume=never")
        assert anew["status"] == "completed" and "resumed" not in anew["init"]
        aside = Path(f"{short['run_dir']}.old{number}")
        assert aside.is_dir() and any(str(aside) in r.message for r in caplog.records if r.levelname == "WARNING")
    assert contents(Path(f"{short['run_dir']}.old1")) == before


def test_resume_must_goes_on_where_there_is_a_checkpoint(short):
    assert again(short, "run.resume=must", "train.max_steps=5")["steps"] == 5


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "tokenizer/ranks.tiktoken"]
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(short, caplog, file):
    newest = Path(short["checkpoint"])
    rows = numbers(short)
    kept = newest.rename(newest.with_name("kept"))
    shutil.copytree(kept, newest)
    damage(newest / file)
    mended = again(short)
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "step_000004" in warning and file in warning and "passed over" in warning
    assert "step_000003" in mended["init"] and mended["steps"] == 4
    assert same_bits(mended, {"checkpoint": kept})
    assert numbers(mended) == rows


def test_a_checkpoint_that_lost_a_file_is_passed_over(short, caplog):
    (Path(short["checkpoint"]) / "optimizer.safetensors").unlink()
    assert "step_000003" in again(short)["init"]
    assert "optimizer.safetensors is missing" in caplog.text


def test_a_new_checkpoint_is_kept_though_a_damaged_one_of_a_later_step_lies_there(short):
    """`keep` counts what the run may go on from: a torn checkpoint of step 4 must not push out the one of step 3."""
    for step in (2, 3, 4):
        damage(Path(short["run_dir"]) / f"checkpoints/step_00000{step}/model.safetensors")
    shorter = again(short, "train.max_steps=3", "checkpoint.keep=1", "checkpoint.every=2")
    assert (shorter["status"], shorter["steps"]) == ("completed", 3)
    assert Path(shorter["checkpoint"]).name == "step_000003"
    assert again(short, "train.max_steps=3", "checkpoint.keep=1", "checkpoint.every=2") == shorter


def test_keep_counts_from_the_newest(short):
    again(short, "train.max_steps=7", "checkpoint.keep=2")
    assert checkpoints(short) == ["step_000006", "step_000007"]


def test_two_jobs_of_one_sweep_are_resumed_each_in_its_own_folder(place, capsys):
    sweep = ["-m", "stage=mid", "optimizer.lr_scale=0.5,1", *TINY, "init.from=scratch", "run.name=pair"]
    assert command_line(capsys, *sweep, "train.max_steps=2").status == 0
    assert command_line(capsys, *sweep, "train.max_steps=3").status == 0
    runs = [json.loads((run / "summary.json").read_text()) for run in sorted((place / "runs/mid").glob("pair*"))]
    assert [(r["steps"], "resumed" in r["init"]) for r in runs] == [(3, True), (3, True)]
