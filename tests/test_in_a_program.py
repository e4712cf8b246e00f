"""`chattrain.run` inside a user's program: what it finds is there when it returns."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import chattrain
from chattrain.config.compose import compose as compose_settings
from chattrain.config.quoting import as_overrides
from chattrain.config.words import Device
from chattrain.device import deterministic
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


def test_a_deterministic_run_tells_torch_and_leaves_it_as_it_was(place):
    """The schedule is a part of one's own, which sees what torch was told while the run goes on."""
    (place / "watching.py").write_text(
        "import torch\n\nseen = []\n\n\ndef factor(step, num_steps):\n"
        "    seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))\n    return 1.0\n"
    )
    (place / "conf/schedule").mkdir(parents=True)
    (place / "conf/schedule/watching.yaml").write_text("_target_: watching.factor\n")
    own = [f"hydra.searchpath=[file://{place}/conf]", "schedule=watching", "init.from=scratch", "train.max_steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        import watching  # type: ignore

        before = surroundings(), dict(os.environ)
        one = train("sft", "one", *own, "train.deterministic=true")
        assert set(watching.seen) == {(True, True)}
        assert (surroundings(), dict(os.environ)) == before and not torch.are_deterministic_algorithms_enabled()
        watching.seen.clear()
        two = train("sft", "two", *own)
        assert set(watching.seen) == {(False, False)}
    assert one["metrics"]["train/loss"] == two["metrics"]["train/loss"]


def test_deterministic_runs_need_cublas_variable_before_cuda_starts(monkeypatch):
    """Without a GPU: what torch says of CUDA is stood in for."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"), deterministic(True, Device.cuda):
        pass
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for _ in range(2):  # once it was set in time, CUDA may have started by the next run
        with deterministic(True, Device.cuda):
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


def test_a_dict_says_what_the_command_line_says(place):
    """Texts that Hydra would read as something else stay texts, and a text with spaces or brackets needs no quotes."""
    (place / "my [talk], true.jsonl").write_text((place / "talk.jsonl").read_text())
    settings = {
        "stage": "sft",
        "command": "inspect",
        "data": "local",
        "data.train_path": place / "my [talk], true.jsonl",
        "data.val_path": None,
        "train": {"seq_len": 64, "max_steps": 2, "compile": False},
        "run": {"name": "null"},
        "optimizer.lr_scale": np.float64(1e-3),
    }
    cfg = compose_settings(as_overrides(settings))
    assert (cfg.run.name, cfg.optimizer.lr_scale, cfg.train.seq_len, cfg.data.val_path) == ("null", 0.001, 64, None)
    assert cfg.data.train_path == str(place / "my [talk], true.jsonl")
    assert chattrain.run({**settings, "init": {"from": "scratch"}})["num_steps"] == 2
    for wrong, message in (
        ({"train": {"seq_lenn": 1}}, "seq_len"),
        ({"train": {"seq_len": object()}}, "train.seq_len is a object"),
    ):
        with pytest.raises(UserError, match=message):
            chattrain.run({**settings, **wrong})


def test_a_second_thread_is_refused_while_a_run_goes_on(place):
    """The schedule is a part of one's own: it calls run from another thread, and from the run's own."""
    (place / "threads.py").write_text(
        "import threading\nimport chattrain\nfrom chattrain.errors import UserError\n\nseen = []\n\n\n"
        "def ask():\n    try:\n        chattrain.run(['command=report', 'stage=sft'])\n"
        "    except UserError as error:\n        seen.append(str(error))\n\n\n"
        "def factor(step, num_steps):\n    if not seen:\n        thread = threading.Thread(target=ask)\n"
        "        thread.start()\n        thread.join()\n    return 1.0\n"
    )
    (place / "conf/schedule").mkdir(parents=True)
    (place / "conf/schedule/threads.yaml").write_text("_target_: threads.factor\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        train(
            "sft", "one", f"hydra.searchpath=[file://{place}/conf]", "schedule=threads", "init.from=scratch", "train.max_steps=1"
        )
        import threads  # type: ignore

        assert "another thread of this process" in threads.seen[0]


def test_a_run_in_a_thread_of_its_own_is_a_run(place):
    done = []
    thread = threading.Thread(target=lambda: done.append(train("sft", "one", "init.from=scratch", "train.max_steps=1")))
    thread.start()
    thread.join()
    assert done[0]["status"] == "completed"
