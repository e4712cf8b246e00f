"""A command imports what it uses, so that it begins at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import TINY, train, write_talk

RUN = """
import json, sys
from chattrain.__main__ import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps(sorted(sys.modules)))
"""
OTHERS = {"transformers", "datasets", "pandas", "pyarrow", "mlflow", "scipy", "sklearn", "matplotlib"}
COMPILER = {"torch._inductor.compile_fx", "torch._inductor.graph"}  # torch's own optimizers import torch._dynamo
OF_TRAINING = {"torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"}
NEW = ["stage=base", *TINY, "data.schema=messages", "init.from=scratch", "train.max_steps=2", "run.name=new"]


def modules(*arguments: str) -> set[str]:
    """The modules that a process has imported when it has done what the command line asks for."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_and_mistakes_load_no_torch(workplace):
    assert not {"torch", "numpy", *OTHERS} & modules("--help")


def test_a_training_without_compilation_and_mlflow_loads_neither(workplace):
    write_talk(workplace)
    assert not (OTHERS | COMPILER) & modules(*NEW)


@pytest.mark.parametrize("command", ["command=chat chat.prompt=[hello]", "command=evaluate"])
def test_reading_a_run_loads_no_part_of_a_training(workplace, command):
    write_talk(workplace)
    train("base", "read", "init.from=scratch", "train.max_steps=2")
    assert not (OTHERS | COMPILER | OF_TRAINING) & modules("stage=base", "run.name=read", "tracking=none", *command.split())
