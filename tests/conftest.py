"""Shared by all tests: one thread a process, a cache and a working folder of their own, a small tokenizer and runs."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from chattrain.tokenizer import Tokenizer
from tests.helpers import freeze_heap

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

TEXTS = [
    "The quick brown fox jumps over the lazy dog. ",
    "How many r are in strawberry? ",
    "12 + 34 = 46\n",
    "def f(x):\n    return x + 1\n",
    "Grüße aus Köln, 東京 and 🙂🙂. ",
]


def pytest_collection_finish():
    freeze_heap()


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
