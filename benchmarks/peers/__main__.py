"""chattrain beside another trainer, on the same rows, from the same weights, in one run.

    python -m benchmarks.peers trl --model smollm2-135m
    python -m benchmarks.peers trl --folder path/to/model --data gsm8k/main/train.parquet --schema gsm8k
    python -m benchmarks.peers nanochat --nanochat path/to/checkout --model d12

Each side has a process of its own and the sides take turns; on a GPU, whose memory they could not share, each turn is a new
process. Keys of the configuration that follow are for our side. A peer that is missing is one sentence, and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.peers import nanochat, ours, trl
from benchmarks.peers.compare import Contest, Result, check_same_targets, show
from benchmarks.peers.folders import SHAPES, model_folder, write_conversations
from benchmarks.peers.rounds import Missing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=["trl", "nanochat"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help=f"trl: {', '.join(SHAPES)}, random weights (default smollm2-135m); nanochat: d12, ...")
    parser.add_argument("--folder", type=Path, help="trl: a Hugging Face folder instead of --model")
    parser.add_argument("--data", type=Path, help="trl: conversations (default: generated, rows of 130 to 450 tokens)")
    parser.add_argument("--schema", default="messages", help="trl: data.schema of --data (default messages)")
    parser.add_argument("--variants", default=None, help=f"trl: which of {', '.join(trl.VARIANTS)}, by commas")
    parser.add_argument("--nanochat", type=Path, help="nanochat: a checkout of December 2025")
    parser.add_argument("--rows", type=int, default=32, help="trl: rows a step (default 32)")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side after its first steps (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration of our side")
    asked = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory(prefix="chattrain-peers-") as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch) / "compiled")  # first steps compile, whatever was run before
        try:
            results = (beside_trl if asked.peer == "trl" else beside_nanochat)(asked, Path(scratch))
        except Missing as error:
            print(f"benchmarks.peers: {error}", file=sys.stderr)
            sys.exit(2)
    device = torch.cuda.get_device_name() if asked.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(f"\n{show(results)}\n\n{device}, torch {torch.__version__}; {asked.rounds} turns of {asked.steps} steps each")
    for result in results:
        print(f"{result.name}: {json.dumps(result.settings)}")
    if asked.out:
        found = {"device": device, "torch": torch.__version__, "results": [result._asdict() for result in results]}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {asked.out}")


def beside_trl(asked: argparse.Namespace, scratch: Path) -> list[Result]:
    """Raises Missing."""
    trl.check()
    named = asked.variants.split(",") if asked.variants else trl.DEFAULT_VARIANTS[asked.device]
    if unknown := [name for name in named if name not in trl.VARIANTS]:
        raise Missing(f"--variants {unknown[0]} is not known; choose from {', '.join(trl.VARIANTS)}")
    folder = (asked.folder or model_folder(scratch, asked.model or "smollm2-135m", asked.device)).resolve()
    overrides = [*([f"data.schema={asked.schema}"] if asked.data else []), *asked.overrides]
    with Contest(asked.rounds, asked.steps, together=asked.device == "cpu") as contest:
        steps = contest.num_steps
        data = asked.data or write_conversations(scratch / "talk.jsonl", steps * asked.rows)
        facts = contest.add("chattrain", ours.sft, folder, data.resolve(), asked.device, asked.rows, steps, scratch, overrides)
        rows = scratch / "rows.jsonl"
        for name in named:
            contest.add(f"TRL, {name}", trl.train, folder, rows, asked.device, facts["bf16"], facts["adamw"], name)
        results = contest.results(facts["tokens"], facts["supervised"])
    check_same_targets(results, facts["supervised"][0])
    return results


def beside_nanochat(asked: argparse.Namespace, scratch: Path) -> list[Result]:
    """Raises Missing."""
    nanochat.check(asked.nanochat)
    with Contest(asked.rounds, asked.steps, together=asked.device == "cpu") as contest:
        facts = contest.add("chattrain", ours.random_tokens, asked.model or "d12", asked.device, asked.overrides)
        contest.add("nanochat", nanochat.train, asked.nanochat.resolve(), asked.device, facts)
        tokens = [facts["tokens"]] * contest.num_steps
        results = contest.results(tokens, tokens)
    check_same_targets(results, facts["tokens"])
    return results


if __name__ == "__main__":
    main()
