"""Shared by all tests: one thread a process, a cache and a working folder of their own, a small tokenizer and runs."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes for it that import torch first
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from chattrain.tokenizer import Tokenizer
from tests.helpers import freeze_heap, standing_in, write_talk

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

TEXTS = [
    "The quick brown fox jumps over the lazy dog. ",
    "How many r are in strawberry? ",
    "12 + 34 = 46\n",
    "def f(x):\n    return x + 1\n",
    "Grüße aus Köln, 東京 and 🙂🙂. ",
]


# Files, and tests of other files, that start processes, compile, or train through chattrain.run. `make test-fast` leaves them
# out, and where all tests run, these files begin first, the longest before the others, so that no core is left alone at the end.
INTEGRATION = [
    "test_docs_are_done.py",
    "parallel/test_world_size.py",
    "parallel/test_launch.py",
    "sweeps/test_hydra_suite.py",
    "sweeps/test_sweeps.py",
    "sweeps/test_resumed_sweeps.py",
    "model/test_recompute.py::test_compiled_",
    "model/test_recompute.py::test_a_run_",
    "parallel/test_ranks.py",
    "data/test_shares.py",
    "commands/test_verify_resume.py",
    "commands/test_reproduce.py",
    "commands/test_lineage.py",
    "config/test_trusted.py",
    "setup/test_provenance.py",
    "setup/test_saving.py",
    "setup/test_samples.py",
    "storage/test_kills.py",
    "storage/test_lock.py",
    "test_device.py",
    "test_gpu.py",
    "test_gpu_check.py",
    "planning/test_plan.py",
    "planning/test_compiled.py",
    "model/test_attention.py",
    "commands/test_command_line.py",
    "commands/test_evaluate.py",
    "commands/test_evaluate_written.py",
    "evals/test_lm_eval.py",
    "setup/test_resume.py",
    "setup/test_compilation.py",
    "test_imports.py",
    "setup/test_runs.py",
    "test_runner.py",
    "test_docs.py",
    "commands/test_help.py",
    "commands/test_import_export.py",
    "formats/test_parity.py",
    "data/test_best_fit.py::test_a_run_",
    "model/test_hf.py",
    "serving/test_chat.py",
    "serving/test_serve.py",
    "serving/test_api.py",
    "serving/test_page.py",
    "model/test_hf_parts.py",
    "test_equivalence.py",
    "storage/test_checkpoint.py",
    "tracking/test_tracker.py",
    "tracking/test_mlflow_faults.py",
    "tracking/test_mlflow_run.py",
    "tracking/test_mlflow_sink.py",
    "formats/test_mlflow_model.py",
    "test_old_runs.py",
    "test_shared_data.py",
    "data/test_own_data.py",
    "setup/test_audit.py",
    "commands/test_inspect.py",
    "data/test_cache.py::test_two_processes_",
    "data/test_cache.py::test_what_is_killed_",
    "model/test_fp8.py::test_a_run_",
    "model/test_head.py::test_loss_and_gradients_are_those_of_all_logits_at_once[True",
    "config/test_config.py::test_config_yaml_of_a_run_",
    "config/test_own.py::test_an_own_part_",
    "tasks/test_generated.py::test_rows_are_the_same_in_every_process",
    "test_torch_compat.py::test_compiling_",
    "real/test_smollm2.py",
    "fuzz/test_folders.py",
    "fuzz/test_command_lines.py",
    "test_offline.py",
    "test_examples.py",
]


def pytest_collection_modifyitems(items):
    def rank(item) -> int:
        return next((i for i, begin in enumerate(INTEGRATION) if item.nodeid.startswith(f"tests/{begin}")), len(INTEGRATION))

    first: dict[Path, int] = {}
    for item in items:
        first[item.path] = min(rank(item), first.get(item.path, len(INTEGRATION)))
        if rank(item) < len(INTEGRATION):
            item.add_marker("integration")
    items.sort(key=lambda item: first[item.path])


def pytest_collection_finish():
    freeze_heap()


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """A current folder with conversations in talk.jsonl and others in other.jsonl; files that need more have their own."""
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        write_talk(folder)
        write_talk(folder, "other.jsonl", factor=4)
        yield folder


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache for all tests of a process: tokenising the demo once is enough."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workplace(tmp_path, monkeypatch, cache) -> Path:
    """An empty current folder."""
    monkeypatch.setenv("CHATTRAIN_CACHE", str(cache))
    monkeypatch.delenv("CHATTRAIN_LAUNCH", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 50, 400)
