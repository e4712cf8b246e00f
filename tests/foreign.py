"""A nanochat model folder as its scripts leave it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

from chattrain.model.gpt import GPT
from chattrain.tokenizer import Tokenizer


def random_gpt(vocab_size: int, seed: int = 0, **sizes: int) -> GPT:
    """All weights random, also those that a new model begins with at zero."""
    model = GPT(vocab_size, **sizes)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=1.0 if p.shape[0] == vocab_size else 0.2, generator=generator)
    return model


def write_nanochat(
    folder: Path, model: GPT, tokenizer: Tokenizer, step: int = 650, tokenizer_dir: Path | None = None, seq_len: int = 64
) -> Path:
    """`model_000650.pt`, `meta_000650.json` and the tokenizer's two files (in the folder itself: None)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"sequence_len": seq_len, **model.shape}
    torch.save(model.state_dict(), folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "val_bpb": 1.0, "model_config": config}))
    place = tokenizer_dir or folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
    special = set(tokenizer.encoding._special_tokens.values())
    sizes = [0 if i in special else len(tokenizer.decode([i]).encode()) for i in range(tokenizer.vocab_size)]
    torch.save(torch.tensor(sizes, dtype=torch.int32), place / "token_bytes.pt")
    return folder
