"""Jobs as calls: in order, side by side, one that fails or dies among others that go on."""

from __future__ import annotations

import math
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chattrain.config.sweep import SweepConfig
from chattrain.config.words import Direction
from chattrain.errors import RunFailed, UserError
from chattrain.sweeps import devices
from chattrain.sweeps.naming import NAME_LENGTH, run_name
from chattrain.sweeps.objective import direction_of, objective_of
from chattrain.sweeps.prune import rungs, survivors
from chattrain.sweeps.schedule import Done, Skipped, Task, run_here, run_side_by_side
from chattrain.sweeps.worker import Pool


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self):
        self.begun: list[int] = []
        self.over: list[int] = []

    def started(self, num: int) -> None:
        self.begun.append(num)

    def ended(self, num: int, done: Done) -> None:
        self.over.append(num)

    def poll(self) -> None: ...


def fail():
    raise ValueError("out of paper")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_process(tasks, notes):
    return run_here(tasks, notes, {})


def in_workers(tasks, notes):
    pool = Pool([{"SLOT": "0"}, {"SLOT": "1"}])
    try:
        return run_side_by_side(tasks, pool, notes, {})
    finally:
        pool.close()


@pytest.mark.parametrize("run", [in_process, in_workers])
def test_a_failed_job_ends_only_those_that_wait_for_it(run):
    notes = Notes()
    tasks = [Task(0, lambda: "a"), Task(1, fail), Task(2, lambda: "c", after=[1]), Task(3, lambda: "d", after=[0])]
    done = run(tasks, notes)
    assert (done[0].result, done[3].result) == ("a", "d")
    assert isinstance(done[1].error, ValueError) and "out of paper" in str(done[1].error)
    assert isinstance(done[2].error, Skipped) and 2 not in notes.begun
    assert sorted(notes.over) == [0, 1, 2, 3]


@pytest.mark.parametrize("run", [in_process, in_workers])
def test_a_job_begins_after_those_it_waits_for(run):
    notes = Notes()
    done = run([Task(0, lambda: 0, after=[2]), Task(1, lambda: 1), Task(2, lambda: 2, after=[1])], notes)
    assert notes.over == [1, 2, 0] and [done[i].result for i in range(3)] == [0, 1, 2]


def test_a_worker_that_dies_is_replaced_and_its_job_has_failed():
    done = in_workers([Task(0, die), Task(1, die), Task(2, os.getpid), Task(3, os.getpid)], Notes())
    for num in (0, 1):
        assert "SIGKILL" in str(done[num].error) and "memory" in str(done[num].error)
    assert all(isinstance(done[num].result, int) for num in (2, 3))


def test_a_worker_that_dies_between_jobs_is_replaced():
    pool = Pool([{}])
    first = run_side_by_side([Task(0, os.getpid)], pool, Notes(), {})[0].result
    os.kill(first, signal.SIGKILL)
    pool.workers[0].process.join()
    second = run_side_by_side([Task(0, os.getpid)], pool, Notes(), {})[0]
    pool.close()
    assert second.error is None and second.result != first


def test_workers_are_reused_and_have_their_own_environment():
    done = in_workers([Task(i, lambda: (os.getpid(), os.environ["SLOT"])) for i in range(6)], Notes())
    assert len({d.result for d in done.values()}) == 2


def test_an_error_that_cannot_be_pickled_comes_back_as_its_text():
    class Stubborn(Exception):
        def __reduce__(self):
            raise TypeError("not me")

    def refuse():
        raise Stubborn("no way")

    (done,) = in_workers([Task(0, refuse)], Notes()).values()
    assert "Stubborn" in str(done.error) and "no way" in str(done.error)


# --- shares of the host ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    def see(names: str):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(names.split(",")) if names else 0)

    return see


def test_one_job_at_a_time_has_the_whole_host(gpus):
    gpus("0,1,2,3")
    assert devices.environments(None, None) is None and devices.environments(1, None) is None
    assert devices.environments(None, 4) is None


@pytest.mark.parametrize(
    "jobs, each, shares", [(None, 2, ["4,5", "6,7"]), (2, None, ["4,5", "6,7"]), (3, 1, ["4", "5", "6"]), (2, 1, ["4", "5"])]
)
def test_each_job_has_gpus_of_its_own(gpus, jobs, each, shares):
    gpus("4,5,6,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in devices.environments(jobs, each) or []] == shares


@pytest.mark.parametrize("jobs, each", [(3, 2), (5, None), (None, 8)])
def test_more_gpus_than_there_are_is_refused(gpus, jobs, each):
    gpus("0,1,2,3")
    with pytest.raises(UserError, match=r"4 (GPUs )?are visible"):
        devices.environments(jobs, each)


def test_on_a_cpu_the_cores_are_divided(gpus, monkeypatch):
    gpus("")
    monkeypatch.setenv("CHATTRAIN_CORES", "8")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    slots = devices.environments(4, None)
    assert slots is not None and [slot["OMP_NUM_THREADS"] for slot in slots] == ["2"] * 4


# --- names -----------------------------------------------------------------------------------------------------------

KEYS = ["optimizer.lr", "schedule.lr", "run.seed", "data.train_path", "optimizer"]
VALUE = st.text(min_size=1, max_size=200)


@given(st.dictionaries(st.sampled_from(KEYS), st.tuples(VALUE, VALUE)))
def test_different_values_have_different_names_that_need_no_quoting(values):
    """Of two jobs of a sweep, which have the same keys."""
    one, two = ({key: pair[job] for key, pair in values.items()} for job in (0, 1))
    names = [run_name("night", values) for values in (one, two)]
    assert (names[0] == names[1]) == (one == two)
    for name in names:
        assert len(f".{name}-reproduced.lock".encode()) <= 255
        assert len(name) <= NAME_LENGTH and not set(name) & set(" =/'\"\\$&;*?()[]{}|<>~#!`\n")


def test_the_order_of_keys_does_not_matter():
    assert run_name("x", {"b": "1", "a": "2"}) == run_name("x", {"a": "2", "b": "1"})


def test_keys_with_the_same_last_part_are_told_apart():
    assert run_name("x", {"optimizer.lr": "1", "schedule.lr": "2"}) == "x-optimizer.lr_1-schedule.lr_2"


# --- objectives ------------------------------------------------------------------------------------------------------


def test_accuracies_are_to_be_large_and_losses_small_unless_told_otherwise():
    assert direction_of("eval/mmlu_acc", Direction.auto) == "maximize"
    assert direction_of("val/bpb", Direction.auto) == "minimize"
    assert direction_of("eval/mmlu_acc", Direction.minimize) == "minimize"


def test_an_objective_that_is_not_finite_is_a_failure():
    sweep = SweepConfig(objective="val/loss")
    assert objective_of(sweep, {"val/loss": 2.5}, required=True) == 2.5
    with pytest.raises(RunFailed, match="not finite"):
        objective_of(sweep, {"val/loss": None}, required=False)


def test_an_objective_that_was_not_measured_is_a_failure_where_the_sweeper_needs_it():
    sweep = SweepConfig(objective="val/loss")
    assert objective_of(sweep, {"train/loss": 2.5}, required=False) is None
    with pytest.raises(RunFailed, match=r"val/loss was not measured.*train/loss"):
        objective_of(sweep, {"train/loss": 2.5}, required=True)


@given(st.integers(1, 200), st.integers(2, 5), st.randoms())
def test_halving_ends_with_the_best_job_and_never_with_none(count, keep, random):
    objectives = {num: random.random() for num in range(count)}
    alive = dict(objectives)
    for fraction in rungs(count, keep)[:-1]:
        assert 0 < fraction < 1
        best = survivors(alive, keep, "minimize")
        assert len(best) == math.ceil(len(alive) / keep)
        alive = {num: alive[num] for num in best}
    assert alive and min(objectives, key=objectives.__getitem__) in alive
    assert len(alive) < keep * keep
