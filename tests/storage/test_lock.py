"""One writer a run folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import time
from contextlib import contextmanager, suppress

import pytest

from chattrain.errors import UserError
from chattrain.storage import lock
from chattrain.storage.lock import RunLock
from tests.helpers import TINY, command_line, process, train, write_talk

context = multiprocessing.get_context("spawn")


def hold(folder, ours):
    with RunLock(folder) as held:
        held.take()
        ours.send("taken")
        with suppress(EOFError):
            ours.recv()


@contextmanager
def held_by_another(folder):
    """A process that holds the lock of the folder. By a pipe, whose end is told also where the process was killed."""
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(folder, theirs))
    holder.start()
    theirs.close()
    try:
        assert ours.poll(60) and ours.recv() == "taken"
        yield holder
    finally:
        ours.close()
        holder.join()


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    with held_by_another(tmp_path / "run") as holder:
        yield holder


def test_a_second_process_is_refused_with_pid_and_host(tmp_path, other):
    words = f"process {other.pid} on {socket.gethostname()}"
    with RunLock(tmp_path / "run") as mine:
        for act in (mine.check, mine.take):
            with pytest.raises(UserError, match=words):
                act()
    assert (tmp_path / ".run.lock").exists()  # refused, it has removed nothing


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with RunLock(tmp_path / "run") as mine:
        mine.check()
        mine.take()


def test_checking_writes_nothing_and_the_end_leaves_nothing(tmp_path):
    with RunLock(tmp_path / "runs" / "run") as mine:
        mine.check()
        assert not list(tmp_path.iterdir())
        mine.take()
        with pytest.raises(UserError):
            RunLock(tmp_path / "runs" / "run").take()  # this process is as much a second writer
    assert not list((tmp_path / "runs").iterdir())
    with RunLock(tmp_path / "runs" / "run") as again:
        again.take()


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


def test_without_locks_an_owner_on_another_host_is_told_by_the_time_of_its_file(tmp_path, no_flock, caplog):
    file = tmp_path / ".run.lock"
    file.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": time.time()}))
    with RunLock(tmp_path / "run") as mine, pytest.raises(UserError, match="process 7 on elsewhere"):
        mine.take()
    os.utime(file, (time.time() - 2 * lock.STALE_S,) * 2)
    with RunLock(tmp_path / "run") as mine:
        mine.take()
    assert "without locks" in caplog.text


def test_without_locks_a_dead_owner_on_this_host_is_dead_at_once(tmp_path, no_flock):
    ended = context.Process(target=print)
    ended.start()
    ended.join()
    (tmp_path / ".run.lock").write_text(json.dumps({"pid": ended.pid, "host": socket.gethostname(), "since": time.time()}))
    with RunLock(tmp_path / "run") as mine:
        mine.take()


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_live_run_is_neither_resumed_nor_moved_aside(workplace, capsys, resume):
    write_talk(workplace)
    first = train("sft", "live", "init.from=scratch", "train.max_steps=2")
    before = {file: file.stat().st_mtime_ns for file in (workplace / "runs").rglob("*")}
    with held_by_another(workplace / "runs" / "sft" / "live") as holder:
        arguments = ["stage=sft", *TINY, "init.from=scratch", "run.name=live", "train.max_steps=4", f"run.resume={resume}"]
        outcome = command_line(capsys, *arguments)
        assert outcome.status == 2 and f"is being trained by process {holder.pid}" in outcome.message
    after = {file: file.stat().st_mtime_ns for file in (workplace / "runs").rglob("*")}
    assert {file: before.get(file) for file in after if file.is_file()} == {f: t for f, t in after.items() if f.is_file()}
    assert first["status"] == "completed"


def test_a_launcher_holds_the_lock_for_its_ranks(workplace):
    write_talk(workplace)
    outcome = process("stage=sft", *TINY, "init.from=scratch", "run.name=two", "train.max_steps=2", "distributed.nproc=2")
    assert outcome.status == 0, outcome.err
    assert not (workplace / "runs" / "sft" / ".two.lock").exists()
