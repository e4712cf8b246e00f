"""What becomes of a run of many processes: its logs, a rank that fails or hangs, signals, several nodes, Slurm."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from chattrain.errors import OtherRankFailed, RunFailed, UserError
from chattrain.parallel import slurm
from chattrain.parallel.failures import Arrival, Watch, describe_timeout
from tests.helpers import TINY, metrics, write_talk

GUARD_S = 120  # seconds after which a test gives up
RUN = [o for o in TINY if not o.startswith(("distributed.", "train.device_batch"))] + [
    "stage=mid",
    "run.name=it",
    "train.device_batch_size=2",
    "train.max_steps=6",
    "init.from=scratch",
]
FAULTY = [*RUN, "schedule._target_=tests.faults.schedule"]
OWN = [sys.executable, "-m", "chattrain"]
ONE_HOST = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "chattrain"]


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    return workplace


class Running:
    """A command as a shell starts it, in a process group of its own; what it says is in a file, so that no pipe fills."""

    def __init__(self, *command: str, **environment: str):
        where = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self.file = Path(f"said_{time.monotonic_ns()}.txt")
        with self.file.open("w") as said:
            self.process = subprocess.Popen(
                command,
                stdout=said,
                stderr=said,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(where), **environment},
            )

    def status(self) -> int:
        try:
            return self.process.wait(GUARD_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        return self.file.read_text()

    @property
    def signed(self) -> list[str]:
        """The lines in which chattrain says what went wrong."""
        return [line.removeprefix("chattrain: ") for line in self.said.splitlines() if line.startswith("chattrain: ")]

    def until(self, file: Path, text: str) -> None:
        deadline = time.monotonic() + GUARD_S
        while not (file.exists() and text in file.read_text()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """Process ids of the ranks of our own launch, in their order."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (OSError, ValueError):
                continue
        return sorted(found)


def run_dir(place: Path) -> Path:
    (found,) = (place / "runs").glob("*/*/config.yaml")  # one run, whatever started it
    return found.parent


def summary(place: Path) -> dict:
    return json.loads((run_dir(place) / "summary.json").read_text())


def nodes(*arguments: str, **environment: str) -> list[Running]:
    """torchrun on two nodes of one process each, which are both this host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=test",
        "-m",
        "chattrain",
        *arguments,
    ]
    return [Running(*command, **environment) for _ in range(2)]


def tasks(count: int, *arguments: str) -> list[Running]:
    """What srun starts with one task a node, where all nodes are this host."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_NNODES": str(count),
        "SLURM_NTASKS": str(count),
        "SLURM_JOB_NODELIST": "localhost",
    }
    return [Running(*OWN, *arguments, **job, SLURM_PROCID=str(task)) for task in range(count)]


def test_the_first_failing_rank_is_named_alone_and_ends_one_that_computes_on(place):
    run = Running(*OWN, *FAULTY, "distributed.nproc=2", FAULT="raise", FAULT_RANK="1", FAULT_OF_OTHERS="compute")
    assert run.status() == 1
    message = "rank 1 failed at step 4: ValueError: the wheel came off; rank_1.log has the traceback"
    assert run.signed == [message] and "Traceback" not in run.said
    assert summary(place)["status"] == "failed" and summary(place)["error"] == f"RunFailed: {message}"
    logs = sorted(file.name for file in run_dir(place).glob("*.log"))
    assert logs == ["rank_1.log", "train.log"]
    assert "wheel came off" in (run_dir(place) / "rank_1.log").read_text().partition("Traceback")[2]
    assert "in happen" in (run_dir(place) / "train.log").read_text()  # where rank 0 stood


@pytest.mark.parametrize("key, part", [("train_path", "training"), ("val_path", "validation")])
def test_a_source_that_gives_each_process_other_records_is_refused(place, key, part):
    talk = '{"messages": [{"role": "user", "content": str(os.getpid())}, {"role": "assistant", "content": "Hello"}]}'
    (place / "unseeded.py").write_text(f"import os\n\n\ndef talk(split):\n    return [{talk}] * 60\n")
    run = Running(*OWN, *RUN, "distributed.nproc=2", f"data.{key}=python:unseeded.talk", "eval=bpb")
    assert run.status() == 2 and len(run.signed) == 1
    assert f"the {part} data is not the same in each process" in run.signed[0] and "seed what is random" in run.signed[0]


def test_a_rank_that_stands_still_is_named_with_its_step(place):
    run = Running(*OWN, *FAULTY, "distributed.nproc=2", "distributed.timeout_s=4", FAULT="freeze", FAULT_RANK="1")
    assert run.status() == 1
    (message,) = run.signed
    assert message.startswith("rank 1 did not arrive at step 4 within 4 s (its last was step 3); see rank_1.log")
    assert summary(place)["error"] == f"RunFailed: {message}"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [OWN, ONE_HOST], ids=["own", "torchrun"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_hangs_leaves_its_stacks_in_its_log(place, launcher, rank):
    nproc = ["distributed.nproc=2"] if launcher is OWN else []
    run = Running(*launcher, *FAULTY, *nproc, "distributed.timeout_s=4", FAULT="sleep", FAULT_RANK=rank)
    assert run.status() == 1
    assert [f"rank {rank} did not arrive at step 4" in line for line in run.signed] == [True]
    log = run_dir(place) / ("train.log" if rank == "0" else "rank_1.log")
    assert "in happen" in log.read_text() and summary(place)["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_is_named(place, rank):
    run = Running(*OWN, *FAULTY, "distributed.nproc=2", FAULT="die", FAULT_RANK=rank)
    assert run.status() == 1
    assert [line.startswith(f"rank {rank} was killed") for line in run.signed] == [True]
    assert f"rank {rank} was killed" in summary(place)["error"] and summary(place)["steps"] >= 2
    assert (run_dir(place) / "report.html").is_file()


def test_a_signal_to_one_rank_stops_all_after_a_checkpoint_and_the_same_command_goes_on(place):
    command = [*OWN, *RUN, "distributed.nproc=2", "train.max_steps=40"]
    run = Running(*command)
    run.until(place / "runs/mid/it/metrics.jsonl", '"step": 5,')
    os.kill(run.ranks()[1], signal.SIGTERM)
    assert run.status() == 130
    stopped = summary(place)
    assert stopped["status"] == "interrupted" and stopped["checkpoint"].endswith(f"step_{stopped['steps']:06d}")
    assert Running(*command).status() == 0
    assert summary(place)["status"] == "completed"
    trained = [line["step"] for line in metrics(run_dir(place)) if "train/loss" in line]
    assert trained == list(range(1, 41))
    assert (run_dir(place) / "rank_1.log").read_text().count("starting from") == 2  # appended, as train.log is


def test_a_signal_before_the_first_step_ends_the_launch_and_its_ranks(place):
    run = Running(*OWN, *RUN, "distributed.nproc=2")
    while len(started := run.ranks()) < 2:
        time.sleep(0.02)
    run.process.terminate()
    assert run.status() == 130 and run.said.endswith("chattrain: interrupted\n") and "Traceback" not in run.said
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_the_launch_stops_all_after_a_checkpoint(place, number):
    run = Running(*OWN, *RUN, "distributed.nproc=2", "train.max_steps=100000")
    run.until(place / "runs/mid/it/metrics.jsonl", '"step": 5,')
    os.kill(run.process.pid, number)
    assert run.status() == 130
    assert summary(place)["status"] == "interrupted" and os.path.isdir(summary(place)["checkpoint"])


@pytest.mark.slow
def test_a_second_signal_ends_ranks_that_cannot_finish_their_step(place):
    run = Running(*OWN, *FAULTY, "distributed.nproc=2", FAULT="sleep", FAULT_RANK="0")
    run.until(place / "runs/mid/it/metrics.jsonl", '"step": 3,')
    run.process.terminate()
    time.sleep(3)  # more than what makes two signals one
    run.process.terminate()
    assert run.status() == 130 and summary(place)["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_all_after_a_checkpoint(place, number):
    run = Running(*ONE_HOST, *RUN, "train.max_steps=100000")
    run.until(place / "runs/mid/it/metrics.jsonl", '"step": 5,')
    os.kill(run.process.pid, number)
    assert run.status() != 0  # torchrun's own
    assert summary(place)["status"] == "interrupted" and os.path.isdir(summary(place)["checkpoint"])


def test_a_failing_rank_of_one_node_ends_the_other_and_is_said_once(place):
    both = nodes(*FAULTY, FAULT="raise", FAULT_RANK="1")
    assert [node.status() for node in both] == [1, 1]
    message = "rank 1 failed at step 4: ValueError: the wheel came off; rank_1.log has the traceback"
    assert [line for node in both for line in node.signed] == [message]
    assert summary(place)["error"] == f"RunFailed: {message}"


@pytest.mark.slow
def test_torchrun_on_two_nodes_is_one_run(place):
    assert [node.status() for node in nodes(*RUN)] == [0, 0]
    assert summary(place)["status"] == "completed"


def test_tasks_of_slurm_on_two_nodes_are_one_run(place):
    both = tasks(2, *RUN, "distributed.nproc=1")
    assert [task.status() for task in both] == [0, 0], both[0].said + both[1].said
    assert summary(place)["status"] == "completed" and summary(place)["steps"] == 6
    assert sorted(file.name for file in run_dir(place).glob("*.log")) == ["rank_1.log", "train.log"]
    assert sum(task.said.count("starting from") for task in both) == 1


def test_tasks_that_would_each_train_alone_are_refused():
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    for count, ntasks in (("1", "8"), ("2", "16")):
        with pytest.raises(UserError, match=f"srun started {ntasks} tasks on {count} .*--ntasks-per-node=1"):
            slurm.nodes({**task, "SLURM_NNODES": count, "SLURM_NTASKS": ntasks})
    with pytest.raises(UserError, match=r"2 nodes, but .*no task of srun"):
        slurm.nodes({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"})


def test_one_task_and_no_slurm_train_as_ever():
    assert slurm.nodes({}) is None
    assert slurm.nodes({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}) is None


def test_jobs_of_a_launcher_are_a_run_each_and_one_that_fails_is_named(place):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run = Running(
        *OWN,
        "-m",
        *(o for o in RUN if not o.startswith("run.name")),
        "distributed.nproc=2",
        "optimizer.lr_scale=1,1e39",
        "hydra/launcher=submitit_local",
    )
    assert run.status() == 1
    (message,) = run.signed
    assert message.startswith("job 2 (optimizer.lr_scale=1e+39): step 2: non-finite loss (nan)")
    found = [json.loads(file.read_text()) for file in (place / "runs/mid").glob("*/summary.json")]
    assert sorted(s["status"] for s in found) == ["completed", "failed"]
    launches = {Path(s["run_dir"]).name.rpartition("-lr_scale_")[0] for s in found}
    assert len(launches) == 1  # named once, by the launch
    assert "failed: step 2: non-finite loss" in run.said  # in the table, beside what came back


@pytest.mark.slow
def test_jobs_of_slurm_on_two_nodes_are_a_run_each(place):
    """With Slurm's three commands played by slurm_stand_in.py."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name in ("bin", "states"):
        (place / name).mkdir()
    for name in ("sbatch", "srun", "sacct"):
        script = place / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("slurm_stand_in.py")} {name} "$@"\n')
        script.chmod(0o755)
    run = Running(
        *OWN,
        "-m",
        *(o for o in RUN if not o.startswith("run.name")),
        "distributed.nproc=1",
        "optimizer.lr_scale=1,0.5",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.nodes=2",
        PATH=f"{place / 'bin'}:{os.environ['PATH']}",
        SLURM_STAND_IN=str(place / "states"),
    )
    assert run.status() == 0, run.said
    found = [file.parent for file in (place / "runs/mid").glob("*/summary.json")]
    assert len(found) == 2 and run.said.count(" completed ") == 2, run.said
    assert all(sorted(file.name for file in folder.glob("*.log")) == ["rank_1.log", "train.log"] for folder in found)


def test_the_message_of_a_hang_names_every_missing_rank():
    def at(place: str, count: int, waited: bool) -> Arrival:
        return Arrival(place, count, waited, "host", 1)

    seen = {0: at("step 12", 14, True), 1: at("step 11", 13, False), 2: at("step 12", 14, False)}
    said = describe_timeout(seen, 4, 60)
    assert "rank 1 did not arrive at step 12 within 60 s (its last was step 11); see rank_1.log" in said
    assert "rank 2 did not get through step 12 within 60 s; see rank_2.log" in said
    assert "rank 3 did not arrive at step 12 within 60 s (it never started)" in said
    assert "rank 0" not in said


def test_of_several_errors_the_first_is_everybodys():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9))
    watches = [Watch(store, rank, 2, timeout_s=9) for rank in range(2)]
    try:
        first = watches[1].report_failure(RunFailed("step 7: non-finite loss"))
        second = watches[0].report_failure(ValueError("a consequence"))
    finally:
        for watch in watches:
            watch.close()
    assert type(first) is RunFailed and first.reported_here
    assert type(second) is OtherRankFailed and str(second) == str(first) and not second.reported_here


@pytest.mark.parametrize(
    "said",
    [
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 4000ms for recv operation to complete",
        "Application timeout caused pair closure",
    ],
)  # of two collectives on their way, either's may be the one that is heard of
def test_whatever_gloo_says_of_a_time_that_is_out_the_missing_rank_is_named(said):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9))
    watches = [Watch(store, rank, 2, timeout_s=4) for rank in range(2)]
    try:
        watches[0].at("step 3")
        error = watches[0].report_failure(RuntimeError(said))
    finally:
        for watch in watches:
            watch.close()
    assert str(error).startswith("rank 1 did not arrive at step 3 within 4 s (its last was the start); see rank_1.log")
