"""make gpu-check, rehearsed on a CPU: its table, its JSON and its exit status whatever happens to a part."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import answers, forecast, parts, tuning
from benchmarks.gpu_check.context import Context, own_shape
from benchmarks.gpu_check.goals import METRICS, Outcome
from benchmarks.gpu_check.parts import Part
from benchmarks.peers.folders import model_folder
from chattrain.config.compose import compose
from chattrain.planning.hardware import DEVICES

ROOT = Path(__file__).parents[1]


def check(monkeypatch, tmp_path, capsys, *arguments: str) -> tuple[int, dict[str, dict], str]:
    """Exit status, the parts in the JSON by name, and what was printed."""
    out = tmp_path / "check.json"
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--device", "cpu", "--out", str(out), *arguments])
    found = {part["part"]: part for part in json.loads(out.read_text())["parts"]}
    return ended.value.code, found, capsys.readouterr().out


@pytest.mark.slow
def test_a_rehearsal_measures_each_part_and_says_so(monkeypatch, tmp_path, capsys):
    status, found, out = check(monkeypatch, tmp_path, capsys, "--only", "versions,own")
    assert status == 0 and [found[name]["status"] for name in found] == ["done"] * 2
    measured = found["own"]["measured"]
    assert measured["tokens_per_second"] > 0 and measured["start_to_first_step_cold"] > measured["first_step_cold"] > 0
    assert found["own"]["goals"]["tokens_per_second"]["goal"] == "n/a"
    assert sum(share for name, share in measured.items() if name.startswith("kernels/")) == pytest.approx(1.0)
    assert "tokens per second" in out and "torch" in out and "products" in out


def test_questions_are_answered_by_the_model_of_a_run(tmp_path):
    context = Context("questions", "cpu", tmp_path, None)
    answers.questions(context)
    assert context.details["questions"] == 40 and context.measured["seconds"] > 0


def test_one_pass_of_a_model_of_transformers_is_timed(tmp_path):
    pytest.importorskip("transformers")
    context = Context("hf", "cpu", tmp_path, None)
    seconds, peak = tuning.one_pass(context, model_folder(tmp_path, "tiny", "cpu"))
    assert seconds > 0 and peak > 0


def test_what_the_plan_expects_of_a_known_gpu_is_what_command_plan_says(tmp_path):
    keys = own_shape(Context("forecast", "cpu", tmp_path, None))
    cfg = compose(["stage=base", "eval=none", "tracking=none", "model=tiny", *keys])
    found = forecast.times(cfg, cfg.train.rows_a_step(1), "h100")
    assert found["mfu"] == DEVICES["h100"].mfu and found["tokens"] == cfg.train.total_batch_size
    assert found["step_s"] > found["optimizer_s"] > 0


def failing(name: str, code: str):
    """Stands in for the process of a part."""
    start = subprocess.Popen

    def popen(command, **settings):
        return start([sys.executable, "-c", code] if name in command else command, **settings)

    return popen


def test_a_part_that_fails_stops_no_other_and_the_status_is_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parts.subprocess, "Popen", failing("own", "print('a reason'); raise SystemExit(3)"))
    status, found, out = check(monkeypatch, tmp_path, capsys, "--only", "own,fp8")
    assert status == 1
    assert (found["own"]["status"], found["own"]["note"]) == ("failed", "a reason")
    assert (found["fp8"]["status"], found["fp8"]["note"]) == ("skipped", "fp8 needs a GPU")
    assert "FAILED: a reason" in out


def test_a_part_that_takes_too_long_is_ended_with_what_it_has_started_and_keeps_what_it_measured(monkeypatch, tmp_path, capsys):
    code = f"""
import subprocess, sys, time
from pathlib import Path
from benchmarks.gpu_check.context import Context
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
scratch = max(Path({str(tmp_path)!r}).glob("scratch*"))
Context("own", "cpu", scratch, None).add("first_step_cold", 1.5)
time.sleep(60)
"""
    monkeypatch.setattr(parts.subprocess, "Popen", failing("own", code))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    outcome = parts.run(Part("own", "own", 60), "cpu", scratch, None, limit_s=6)
    assert outcome.status == "timed out" and outcome.measured == {"first_step_cold": 1.5} and outcome.seconds < 30
    deadline = time.monotonic() + 10
    while alive(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid: int) -> bool:
    """A zombie, whose parent is the container's first process, is not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_parts_for_which_no_time_is_left_are_named_and_the_status_is_1(monkeypatch, tmp_path, capsys):
    status, found, out = check(monkeypatch, tmp_path, capsys, "--only", "own,fp8", "--budget", "0.5")
    assert status == 1 and [part["status"] for part in found.values()] == ["not run"] * 2
    assert "--only own runs it" in out


def test_ctrl_c_ends_with_the_table_so_far(tmp_path):
    out = tmp_path / "check.json"
    running = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--only", "own,fp8", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "TMPDIR": str(tmp_path)},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("chattrain-gpu-check-*/own.json")) and time.monotonic() < deadline:
        time.sleep(0.05)  # until the part runs
    os.killpg(running.pid, signal.SIGINT)
    said, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err
    assert [part["status"] for part in json.loads(out.read_text())["parts"]] == ["interrupted"]
    assert "INTERRUPTED" in said and "fp8" not in said


def test_a_missed_goal_is_shown_and_is_no_failure(tmp_path, monkeypatch, capsys):
    missed = Outcome("own", "done", 1.0, {"mfu": 0.4, "peak_memory": 40.0})
    monkeypatch.setattr(gpu_check, "run", lambda *arguments: missed)
    out = tmp_path / "check.json"
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--device", "cuda", "--only", "own", "--out", str(out)])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "NOT MET" in printed and "<= 50.0 GiB" in printed
    goals = json.loads(out.read_text())["parts"][0]["goals"]
    assert (goals["mfu"]["met"], goals["peak_memory"]["met"]) == ("NOT MET", "met")


def test_every_metric_belongs_to_a_part():
    assert {name.partition("/")[0] for name in METRICS} <= {part.name for part in parts.PARTS}
