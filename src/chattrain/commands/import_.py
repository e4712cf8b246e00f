"""command=import: make a finished run of another program's model (init.from), from which later stages start."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path

from chattrain.config import Config
from chattrain.config.model import GPTConfig
from chattrain.config.schema import to_yaml
from chattrain.errors import UserError
from chattrain.formats import convert
from chattrain.formats.folder import hint, locate
from chattrain.formats.imported import ModelFolder
from chattrain.storage.files import replace_folder, replace_text

log = logging.getLogger("chattrain")


def main(cfg: Config) -> dict:
    """Write <run.root>/<stage>/<name> with the model as its checkpoint; returns its summary.

    Raises UserError for a folder that holds no model of the GPT's architecture, one of another stage, and a run folder
    that is not empty.
    """
    if cfg.init.source in ("auto", "scratch"):
        raise UserError(
            "command=import needs a model to import: init.from=<nanochat's folder, a Hugging Face folder, or a hub name>"
        )
    source = locate(cfg.init.source)
    folder = source.path
    if not source.is_foreign:
        raise UserError(
            f"init.from={cfg.init.source} is no model of nanochat (model_NNNNNN.pt) or Hugging Face "
            f"(config.json, model.safetensors){hint(folder)}"
        )
    if source.stage not in (None, cfg.stage):
        raise UserError(
            f"{folder} holds a {source.stage} model, but stage={cfg.stage} asks for another; write stage={source.stage}"
        )
    name = cfg.run.name or Path(cfg.init.source).name
    run_dir = Path(cfg.run.dir or Path(cfg.run.root) / cfg.stage / name).expanduser().resolve()
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is in use; choose another run.name, or remove the folder")
    return _write_run(cfg, source, run_dir)


def _write_run(cfg: Config, source: ModelFolder, run_dir: Path) -> dict:
    """Convert the model, write the run folder, whole or not at all, and return the summary."""
    model = convert.read(source, cfg.tokenizer.path)
    sizes = {name: size for name, size in model.sizes.items() if name != "vocab_size"}
    cfg.model, cfg.train.seq_len = replace(GPTConfig(), **sizes), model.seq_len or cfg.train.seq_len
    saved = run_dir / "checkpoints" / f"step_{model.step:06d}"
    summary = {
        "status": "completed",
        "stage": cfg.stage,
        "run_dir": str(run_dir),
        "steps": model.step,
        "num_steps": model.step,
        "tokens_seen": 0,
        "supervised_tokens": 0,
        "tokens_per_second": None,
        "metrics": {},
        "checkpoint": str(saved),
        "init": f"imported from {source.path}",
        "mlflow_run_id": None,
        "finished_at": time.time(),
        "data": {},
    }

    def fill(scratch: Path) -> None:
        convert.write(scratch / saved.relative_to(run_dir), model, cfg.stage, to_yaml(cfg), source)
        replace_text(scratch / "config.yaml", to_yaml(cfg))
        replace_text(scratch / "summary.json", json.dumps(summary, indent=1) + "\n")

    replace_folder(run_dir, fill)
    shape = " ".join(f"model.{name}={size}" for name, size in sizes.items())
    log.info("%s is now the %s run %s (%s)", source.path, cfg.stage, run_dir, shape)
    return summary
