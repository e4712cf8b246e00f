"""`chattrain.run` inside a user's program: what it finds is there when it returns."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from chattrain.errors import UserError
from tests.helpers import train, write_talk


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    return workplace


def surroundings() -> dict:
    logger = logging.getLogger("chattrain")
    return {
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)],
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("CHATTRAIN", "HYDRA", "OMP"))},
        "handlers": (list(logging.getLogger().handlers), list(logger.handlers)),
        "threads": {thread.name for thread in threading.enumerate() if not thread.daemon},
        "torch": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
        "rng": torch.random.get_rng_state().tolist(),
        "gc": gc.isenabled(),
        "folder": os.getcwd(),
    }


def test_a_run_leaves_what_it_finds(place):
    before = surroundings()
    train("sft", "one", "init.from=scratch", "train.max_steps=2")
    with pytest.raises(UserError):
        train("sft", "two", "init.from=scratch", "train.max_steps=2", "data.train_path=nowhere.jsonl")
    assert surroundings() == before


def test_the_callers_own_hydra_goes_on(place):
    (place / "conf").mkdir()
    (place / "conf" / "mine.yaml").write_text("lr: 1\n")
    with initialize_config_dir(str(place / "conf"), version_base="1.3"):
        compose("mine")
        train("sft", "one", "init.from=scratch", "train.max_steps=1")
        assert compose("mine", overrides=["lr=2"]).lr == 2
    assert not GlobalHydra.instance().is_initialized()


def test_two_runs_in_one_process_are_two_runs(place):
    one, two = (train("sft", name, "init.from=scratch", "train.max_steps=2") for name in ("one", "two"))
    assert one["metrics"]["train/loss"] == two["metrics"]["train/loss"] and one["run_dir"] != two["run_dir"]
