"""chattrain's own side: sft of a Hugging Face folder on conversations, or training on rows of random tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu
from benchmarks.peers.rounds import Step, Turns, train_in_turns
from chattrain import loop
from chattrain.config import Config
from chattrain.config.compose import compose
from chattrain.device import keep_freed_memory, pick_device, use_bf16
from chattrain.errors import UserError
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.signals import Signals
from chattrain.setup.build import build_components
from chattrain.setup.data import RunData
from chattrain.setup.plan import setup_run
from chattrain.tracking.tracker import NullTracker


def sft(turns: Turns, folder: Path, data: Path, device: str, rows: int, steps: int, scratch: Path, overrides: list[str]) -> None:
    """sft of the model in `folder` on the conversations of `data`, `rows` a step. Writes the rows of all steps to
    scratch/rows.jsonl, for other sides, and says how many tokens and targets each step has."""
    cfg = compose(
        [
            "stage=sft",
            "model=hf",
            f"init.from={folder}",
            "data=local",
            f"data.train_path={data}",
            "data.workers=1",
            "eval=none",
            "tracking=none",
            "optimizer=adamw",
            "optimizer.lr=2e-5",
            "optimizer.weight_decay=0",
            f"run.root={scratch / 'runs'}",
            f"train.device={device}",
            f"train.device_batch_size={rows}",
            f"train.rows_per_step={rows}",
            "train.seq_len=512",
            f"train.max_steps={steps}",
            *overrides,
        ]
    )
    setup, run_data = setup_run(cfg, world_size=1)
    sizes = write_rows(scratch / "rows.jsonl", run_data, cfg, steps)
    chosen = pick_device(cfg.train.device)
    keep_freed_memory(chosen)  # as the runner does
    components, _ = build_components(cfg, setup, Ranks(), run_data, NullTracker(), Signals(), None)
    adamw = {"lr": cfg.optimizer.lr, "betas": list(cfg.optimizer.betas), "eps": cfg.optimizer.eps}
    turns.built({"settings": settings(cfg), "adamw": adamw, "bf16": use_bf16(cfg.train.dtype, chosen), **sizes})
    train_in_turns(turns, stepper(components), chosen.type == "cuda")
    components.loader.close()


def write_rows(file: Path, data: RunData, cfg: Config, steps: int) -> dict[str, list[int]]:
    """Write the token ids and labels (-100: no loss) of each row, in the order in which a run takes them. Returns the tokens and
    the supervised tokens of each step. Raises UserError where there are not enough rows for so many steps."""
    mixture, tokens, supervised = data.train.mixture, [], []
    order, rows = mixture.order(0), data.rows_per_step
    if len(order) < steps * rows:
        raise UserError(f"{steps} steps of {rows} rows, but the data has {len(order)} rows; use fewer steps or rounds")
    with file.open("w", encoding="utf-8") as out:
        for step in range(steps):
            tokens.append(0)
            supervised.append(0)
            for document in order[step * rows : (step + 1) * rows]:
                ids, mask = (x[: cfg.train.seq_len + 1] for x in mixture.document(int(document)))
                labels = [int(i) if m else -100 for i, m in zip(ids, mask, strict=True)]
                out.write(json.dumps({"step": step, "ids": [int(i) for i in ids], "labels": labels}) + "\n")
                tokens[-1] += len(ids) - 1  # the last one is a target only
                supervised[-1] += sum(label != -100 for label in labels[1:])
    return {"tokens": tokens, "supervised": supervised}


def random_tokens(turns: Turns, model: str, device: str, overrides: list[str]) -> None:
    """Training on full rows of random tokens, as benchmarks.gpu does it."""
    cfg = compose([f"model={model}", "stage=base", "eval=none", "tracking=none", f"train.device={device}", *overrides])
    chosen = pick_device(cfg.train.device)
    keep_freed_memory(chosen)
    components = gpu.build_components(cfg, lambda step, values: None, Ranks())
    turns.built({"settings": settings(cfg), **shape_facts(cfg)})
    train_in_turns(turns, stepper(components), chosen.type == "cuda")


def shape_facts(cfg: Config) -> dict[str, Any]:
    """The sizes of the model and of a step, for another side to have the same."""
    rows, passes = cfg.train.device_batch_size, cfg.train.rows_a_step(1) // cfg.train.device_batch_size
    return {
        "sizes": vars(cfg.model) | {"vocab_size": cfg.tokenizer.vocab_size},
        "rows": rows,
        "seq_len": cfg.train.seq_len,
        "passes": passes,
        "tokens": passes * rows * cfg.train.seq_len,
    }


def stepper(components: loop.TrainerComponents) -> Callable[[int], Callable[[], Step]]:
    def step(number: int) -> Callable[[], Step]:
        result = loop.train_step(components, components.loader.step(number), number)
        return lambda: Step(float(result.loss), result.num_supervised)

    return step


def settings(cfg: Config) -> dict[str, Any]:
    """What of the configuration bears on speed."""
    train = {key: getattr(value, "name", value) for key, value in vars(cfg.train).items() if value is not None}
    return {"train": train, "optimizer": {key: getattr(value, "name", value) for key, value in vars(cfg.optimizer).items()}}
