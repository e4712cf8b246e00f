"""TRL's SFTTrainer on the rows that chattrain trains on: the same token ids, targets, steps and AdamW.

Settings at their best for speed: no gradient checkpointing, no clipping, the rows of a step sorted by length (little padding).
`variant` adds to that: `padding_free` (rows of a pass in one, by FlashAttention where it is installed), `compiled`.
"""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import STARTED
from benchmarks.peers.rounds import Missing, Step, Turn, Turns

VARIANTS = ("padded", "padding_free", "padded+compiled", "padding_free+compiled")
DEFAULT_VARIANTS = {"cpu": ["padded", "padding_free"], "cuda": ["padded+compiled", "padding_free+compiled"]}
BATCH = {"cpu": 8, "cuda": 16}  # rows a pass: logits of more than 16 rows and a large vocabulary take tens of GiB


def check() -> None:
    """Raises Missing."""
    if find_spec("trl") is None:
        raise Missing("TRL is not installed here: pip install 'chattrain[trl]'")


def train(turns: Turns, folder: Path, rows_file: Path, device: str, bf16: bool, adamw: dict[str, Any], variant: str) -> None:
    """The side of TRL. `adamw`: lr, betas, eps."""
    check()
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "TOKENIZERS_PARALLELISM": "false"}
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    per_step = read_steps(rows_file)
    settings = config(device, bf16, adamw, variant, len(per_step), len(per_step[0]))
    flash = variant.startswith("padding_free") and device == "cuda" and find_spec("flash_attn") is not None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="flash_attention_2" if flash else "sdpa", local_files_only=True
    )
    trainer = in_turns(turns, per_step, settings, model, AutoTokenizer.from_pretrained(folder), rows_file.parent)
    attention = model.config._attn_implementation
    turns.built({"settings": {**settings, "attention": attention, "rows_sorted_within_a_step": True}})
    trainer.train()


def read_steps(file: Path) -> list[list[dict]]:
    """The rows of each step, the longest last."""
    steps: list[list[dict]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["step"] == len(steps):
            steps.append([])
        steps[-1].append({"input_ids": row["ids"], "labels": row["labels"]})
    return [sorted(rows, key=lambda row: len(row["input_ids"])) for rows in steps]


def config(device: str, bf16: bool, adamw: dict[str, Any], variant: str, steps: int, rows: int) -> dict[str, Any]:
    """The settings of SFTConfig."""
    batch = next(size for size in range(min(BATCH[device], rows), 0, -1) if rows % size == 0)
    return {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": rows // batch,
        "max_steps": steps,
        "learning_rate": adamw["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": adamw["betas"][0],
        "adam_beta2": adamw["betas"][1],
        "adam_epsilon": adamw["eps"],
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch_fused",
        "bf16": bf16,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "packing": False,
        "padding_free": variant.startswith("padding_free"),
        "torch_compile": variant.endswith("compiled"),
        "max_length": None,
        "train_sampling_strategy": "sequential",
    }


def in_turns(
    turns: Turns, per_step: list[list[dict]], settings: dict[str, Any], model: Any, tokenizer: Any, scratch: Path
) -> Any:
    """An SFTTrainer whose `train` makes the steps of a turn and then waits for the next."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from chattrain.config.words import Device
    from chattrain.device import peak_memory, pick_device

    cuda = not settings["use_cpu"]
    peak = peak_memory(pick_device(Device.cuda if cuda else Device.cpu))

    class Counting(SFTTrainer):
        """Keeps the loss and the number of targets of each step, on the device."""

        losses: dict[int, Any] = {}  # noqa: RUF012
        targets: dict[int, Any] = {}  # noqa: RUF012

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            step, found = self.state.global_step, (inputs["labels"][:, 1:] != -100).sum()
            self.targets[step] = self.targets.get(step, 0) + found
            out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = (out[0] if return_outputs else out).detach()
            self.losses[step] = self.losses.get(step, 0) + loss
            return out

    class InTurns(TrainerCallback):
        left, begun, first = 0, 0.0, 0

        def on_train_begin(self, args, state, control, **unused):
            self.wait(state, control)

        def wait(self, state, control) -> None:
            self.first, self.left = state.global_step, turns.next()
            control.should_training_stop = not self.left
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **unused):
            self.left -= 1
            if not self.left:
                if cuda:
                    torch.cuda.synchronize()
                ended = time.perf_counter()
                numbers = range(self.first, state.global_step)
                steps = [Step(float(trainer.losses[i]), int(trainer.targets[i])) for i in numbers]
                turns.done(Turn(ended - self.begun, steps, peak(), ended - STARTED))
                self.wait(state, control)

    trainer = Counting(
        model=model,
        args=SFTConfig(
            output_dir=str(scratch / "trl"),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            **settings,
        ),
        train_dataset=Dataset.from_list([row for rows in per_step for row in rows]),
        processing_class=tokenizer,
        callbacks=[InTurns()],
    )
    return trainer
