"""command=export: write a trained model as a folder for other programs.

format=hf: for Hugging Face transformers. format=mlflow: an MLflow model that chats.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from chattrain.config import Config
from chattrain.config.plain_yaml import read_yaml, section
from chattrain.config.trusted import check_section
from chattrain.config.words import Format
from chattrain.errors import UserError
from chattrain.formats import huggingface, mlflow_model
from chattrain.setup.job import current_job
from chattrain.setup.start import find_checkpoint
from chattrain.storage import checkpoint
from chattrain.storage.files import read_json, replace_folder
from chattrain.storage.tensors import read_tensors
from chattrain.tokenizer import AnyTokenizer, Tokenizer

log = logging.getLogger("chattrain")

EXPORT_FILE = "chattrain_export.json"  # marks the folder as an export, which a later export may replace


def main(cfg: Config) -> dict:
    """Write the model of the run or checkpoint that is named (none: of the newest finished run of this stage) to export.dir.

    Returns {"folder", "checkpoint"}. Raises UserError where the folder holds anything but an earlier export.
    """
    source = find_checkpoint(cfg)
    folder = _target(cfg, source)
    if folder.is_file():
        raise UserError(f"export.dir={folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / EXPORT_FILE).is_file():
        raise UserError(f"export.dir={folder} is in use and holds no earlier export; name another folder")
    replace_folder(folder, lambda scratch: _write(scratch, source, cfg.format))
    kind = checkpoint.load_state(source).model.get("model_type", huggingface.MODEL_TYPE)
    log.info("exported %s (model type %s) to", source, kind)
    if cfg.format == Format.mlflow:
        log.info("serve it: mlflow models serve -m %s --env-manager local", folder)
    print(folder)
    return {"folder": str(folder), "checkpoint": str(source)}


def _target(cfg: Config, source: Path) -> Path:
    """export.dir, else <run>/<format>/<step>."""
    if cfg.export.dir:
        return Path(cfg.export.dir).expanduser().resolve()
    if source.parent.name != "checkpoints":
        raise UserError(f"{source} is in no run folder; name the folder to write with export.dir=<folder>")
    return source.parents[1] / cfg.format.name / source.name


def _write(folder: Path, source: Path, format: Format) -> None:
    state = checkpoint.load_state(source)
    if format == Format.mlflow:  # it builds the model by config.yaml where it is served
        file = source / "config.yaml"
        check_section("model", section(read_yaml(file.read_text(), file), "model", file), file, current_job().config_dirs)
        mlflow_model.write(folder, source)
    else:
        _write_hf(folder, source, state)
    (folder / EXPORT_FILE).write_text(json.dumps({"checkpoint": str(source), "stage": state.stage, "step": state.step}, indent=1))


def _write_hf(folder: Path, source: Path, state: checkpoint.CheckpointState) -> None:
    weights = read_tensors(source / "model.safetensors")
    tokenizer = Tokenizer.load(source)
    if "model_type" in state.model:
        _write_hf_model(folder, source, weights, tokenizer)
    else:
        seq_len = section(read_yaml((source / "config.yaml").read_text()), "train")["seq_len"]
        if not isinstance(tokenizer, Tokenizer):
            raise UserError(
                f"{source} was trained with a Hugging Face tokenizer that no tiktoken encoding expresses, so its model cannot be "
                "exported with a tokenizer of the nanochat architecture; train with chattrain's own or nanochat's tokenizer"
            )
        huggingface.write(folder, state.model, weights, tokenizer, seq_len)


def _write_hf_model(folder: Path, source: Path, weights: dict[str, torch.Tensor], tokenizer: AnyTokenizer) -> None:
    """A model trained with model=hf: the files that it came with, and weights in the number format that its config.json names."""
    if isinstance(tokenizer, Tokenizer):  # the nanochat architecture, trained as model=hf
        huggingface.write_tokenizer(folder, tokenizer, read_json(source / "config.json")["max_position_embeddings"])
    else:
        tokenizer.save(folder)
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    save_file(
        {name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
