"""Programs that a model wrote run in bubblewrap only, and can do nothing there but compute."""

from __future__ import annotations

import time

import pytest

from chattrain.data.records import Records
from chattrain.errors import UserError
from chattrain.evals import sandbox
from chattrain.evals.generative import Generative, problems
from chattrain.evals.replies import Reply
from chattrain.parallel.ranks import Ranks

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """The sum."""\n',
    "canonical_solution": "    return sum(numbers)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2, 3]) == 6\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
RIGHT = "def total(numbers: List[int]) -> int:\n    return sum(numbers)"


def works() -> bool:
    try:
        sandbox.check()
    except UserError:
        return False
    return True


def test_without_bubblewrap_nothing_is_run_and_the_way_out_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"eval\.humaneval=true .*bubblewrap.*not installed.*eval\.humaneval=false"):
        sandbox.check()


def test_a_bubblewrap_that_cannot_start_is_refused_with_its_reason(monkeypatch, tmp_path):
    stand_in = tmp_path / "bwrap"
    stand_in.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"cannot start here \(bwrap: No permissions to create new namespace\)"):
        sandbox.check()


needs_bubblewrap = pytest.mark.skipif(not works(), reason="bubblewrap is not here, or cannot start")


@needs_bubblewrap
@pytest.mark.parametrize(
    "reply, passes",
    [
        (f"Here it is:\n```python\n{RIGHT}\n```\nIt sums.", True),
        (RIGHT, True),
        ("```python\ndef total(numbers):\n    return 6\n```", False),
        ("```python\nimport sys\nsys.exit(0)\n```", False),
        ("```python\nimport os\nos._exit(0)\n```", False),
        ("def total(", False),
        ("", False),
    ],
)
def test_a_program_is_right_where_it_passes_its_tests_to_the_end(tokenizer, reply, passes):
    asked = problems("humaneval", Records([PROBLEM]), tokenizer)
    measured = Generative("humaneval", asked, lambda prompts: [Reply(tokenizer.encode(reply), True)], tokenizer, Ranks())
    assert measured()["eval/humaneval_acc"] == passes
    assert measured.answers[0]["right"] is passes


@needs_bubblewrap
@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
        "open('/tmp/written', 'w')",
        "open('/written', 'w')",
        "open('/etc/passwd')",
        "open({file!r})",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import ctypes\nassert ctypes.CDLL(None).fork() >= 0",
        "x = bytearray(1 << 30)",
        "print('x' * (1 << 21))",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "import os\nassert os.environ.get('SECRET')",
    ],
)
def test_a_program_reaches_nothing_outside(program, monkeypatch, tmp_path):
    import socket

    monkeypatch.setenv("SECRET", "hidden")
    (tmp_path / "file").write_text("hidden")
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {"port": server.getsockname()[1], "file": str(tmp_path / "file")}
        for name, value in values.items():
            program = program.replace(f"{{{name}}}", str(value)).replace(f"{{{name}!r}}", repr(value))
        assert not sandbox.passes(program)


@needs_bubblewrap
def test_a_program_may_start_threads_and_import_what_python_has():
    threads = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()"
    assert sandbox.passes(f"import math, re, collections, hashlib, random, itertools\n{threads}")


@needs_bubblewrap
@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_a_program_that_does_not_end_is_ended(program, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    began = time.monotonic()
    assert not sandbox.passes(program)
    assert time.monotonic() - began < 30
