"""TRL's SFTTrainer on conversations of a question and an answer, completion only: what it trains on, and its first loss.

    python -m tests.real.trl_loss MODEL_FOLDER CONVERSATIONS.jsonl OUT.json

TRL prepares the rows itself. It also trains the line break behind ChatML's end token; that target is left out for the loss.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path


def main(folder: str, conversations: str, out: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, line_break = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.encode("\n", add_special_tokens=False)[0]
    rows = [json.loads(line)["messages"] for line in Path(conversations).read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows])
    found: dict = {}

    class Measured(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids, labels = inputs["input_ids"], inputs["labels"]
            found["prepared"] = [
                [(ids[r, t].item(), labels[r, t].item()) for t in range(ids.shape[1]) if inputs["attention_mask"][r, t]]
                for r in range(ids.shape[0])
            ]
            labels[:, 1:][(ids[:, :-1] == end) & (labels[:, 1:] == line_break)] = -100
            found["targets"] = (labels[:, 1:] != -100).sum().item()
            loss = super().compute_loss(model, inputs, return_outputs, (labels[:, 1:] != -100).sum())
            found["loss"] = (loss[0] if return_outputs else loss).item()
            return loss

    with tempfile.TemporaryDirectory() as scratch:
        settings = {"max_steps": 1, "per_device_train_batch_size": len(rows), "max_length": None, "completion_only_loss": True}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        trainer = Measured(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            args=SFTConfig(output_dir=scratch, **settings, **quiet),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
