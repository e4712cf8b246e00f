"""Record the golden losses anew: python -m tests.record_golden. Say in CHANGELOG.md why the numbers change."""

import json
import os
import tempfile
from pathlib import Path

import torch

from tests import test_equivalence as runs


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CHATTRAIN_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        lines = [json.dumps(runs.conversation(i)) for i in range(200)]
        Path("talk.jsonl").write_text("\n".join(lines) + "\n")
        golden = {}
        for stage in runs.STAGES:
            summary = runs.train("golden", stage, "train.device_batch_size=4", "train.max_steps=8")
            golden[stage] = {name: runs.losses(summary, name) for name in ("train/loss", "val/bpb")}
    runs.GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
