"""Wheel and sdist hold all that a run needs, outside of a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers import write_talk

ROOT = Path(__file__).parents[1]
SMALL = [
    "model=tiny", "data=local", "data.train_path=talk.jsonl", "train.seq_len=64", "train.device_batch_size=4",
    "train.rows_per_step=4", "train.total_batch_size=null", "train.max_steps=2", "train.num_epochs=null",
    "train.compile=false", "train.device=cpu", "tokenizer.vocab_size=320", "tracking=none", "eval=bpb", "run.name=first",
]  # fmt: skip


def shell(*command: str | Path, **settings) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    shell(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.mark.slow
def test_the_wheel_installs_and_trains_in_an_empty_folder(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    shell(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    empty.mkdir()
    write_talk(empty)
    env = os.environ | {"PYTHONPATH": str(site), "CHATTRAIN_CACHE": str(tmp_path / "cache")}
    found = shell(sys.executable, "-c", "import chattrain; print(chattrain.__file__)", cwd=empty, env=env)
    assert Path(found.strip()).is_relative_to(site)
    shell(site / "bin" / "chattrain", "stage=mid", *SMALL, cwd=empty, env=env)
    summary = json.loads((empty / "runs" / "mid" / "first" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 2)


@pytest.mark.slow
def test_the_sdist_holds_what_a_developer_needs(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    wanted = ["conf/config.yaml", "src/chattrain/py.typed", "tests/golden.json", "tests/old_runs/mid/packed/config.yaml"]
    wanted += ["benchmarks/__main__.py", "docs/data.md", "Makefile", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"]
    assert not [name for name in wanted if name not in inside]
