"""What several test files need: the settings of a run of a tenth of a second, small data, the command line."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import chattrain

# Two layers, short rows, four of them a step, no compilation, no MLflow; the data is `write_talk`'s.
TINY = [
    "model.n_layer=2",
    "model.n_embd=64",
    "model.n_head=2",
    "train.seq_len=64",
    "train.device_batch_size=4",
    "train.rows_per_step=4",
    "train.compile=false",
    "train.dtype=fp32",
    "train.device=cpu",
    "tokenizer.vocab_size=320",
    "tracking=none",
    "eval=bpb",
    "log.every=1",
    "distributed.nproc=1",
    "data=local",
    "data.train_path=talk.jsonl",
]


def write_talk(folder: Path, name: str = "talk.jsonl", count: int = 60, factor: int = 3) -> Path:
    """Conversations of one question and one answer, about 25 tokens each with the tokenizer of TINY."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {i} + {factor * i}?"},
                    {"role": "assistant", "content": f"{i} + {factor * i} = {(factor + 1) * i}."},
                ]
            }
        )
        for i in range(count)
    ]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def freeze_heap() -> None:
    """Leave what this process holds out of garbage collection for good. A run collects all of it twice and gives back what it
    froze; in a process of tests, which holds every library, that is half the time of a run of TINY."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


@contextmanager
def standing_in(folder: Path, cache: Path):
    """The current folder and the cache for fixtures that outlive one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATTRAIN_CACHE", str(cache))
        patch.delenv("CHATTRAIN_LAUNCH", raising=False)
        patch.chdir(folder)
        yield folder


def train(stage: str, name: str, *overrides: str) -> dict:
    """The summary of a tiny run in the current folder."""
    return chattrain.run([f"stage={stage}", *TINY, f"run.name={name}", *overrides])


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one message of a refusal: the last line of stderr, and the only one that chattrain signs."""
        assert "Traceback" not in self.err, self.err
        signed = [line for line in self.err.splitlines() if line.startswith("chattrain: ")]
        assert signed == self.err.splitlines()[-1:], self.err
        return signed[0].removeprefix("chattrain: ")


def command_line(capsys, *arguments: str) -> Outcome:
    """`python -m chattrain <arguments>` in this process: the same entry, without seconds of imports."""
    from chattrain.__main__ import main

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHATTRAIN_LAUNCH", "CHATTRAIN_JOB", "HYDRA_FULL_ERROR"):  # main sets them
            patch.setenv(name, "")
        patch.setattr(sys, "argv", ["chattrain", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return Outcome(ended.value.code, *capsys.readouterr())


def process(*arguments: str) -> Outcome:
    """`python -m chattrain <arguments>` as the user's shell would start it."""
    done = subprocess.run(
        [sys.executable, "-m", "chattrain", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def metrics(run_dir: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, to see that nothing was written."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def damage(file: Path) -> None:
    """Flip one byte in the middle."""
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 0xFF
    file.write_bytes(held)
