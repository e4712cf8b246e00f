"""A trained model, ready to talk: what command=chat and command=serve begin with."""

from __future__ import annotations

from pathlib import Path

from chattrain import device
from chattrain.config import Config
from chattrain.config.instantiate import instantiate_config
from chattrain.serving.speaker import Speaker
from chattrain.setup.runs import run_folder
from chattrain.setup.start import find_checkpoint, with_own_settings
from chattrain.tokenizer import Tokenizer


def open_speaker(cfg: Config) -> tuple[Speaker, Path]:
    """The model that the command line names, and its checkpoint. Raises UserError where there is none."""
    folder = find_checkpoint(cfg)
    cfg = with_own_settings(cfg, folder)
    tokenizer = Tokenizer.load(folder)
    model = instantiate_config(cfg.model, vocab_size=tokenizer.vocab_size, start=folder, seed=cfg.run.seed)
    target = device.pick_device(cfg.train.device)
    model.to(target).eval()
    context = model.max_positions or cfg.train.seq_len  # our own have learnt rows of train.seq_len tokens
    return Speaker(_name(folder), model, tokenizer, context, device.use_bf16(cfg.train.dtype, target)), folder


def _name(folder: Path) -> str:
    """`<stage>/<run>` of a checkpoint, the folder's name of any other model."""
    run = run_folder(folder)
    return folder.name if run == folder else f"{run.parent.name}/{run.name}"
