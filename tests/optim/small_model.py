"""A small model, gradients for it, and settings of the optimizers."""

from __future__ import annotations

import torch
from torch import nn

from chattrain.model.gpt import GPT

MUON = {
    "lr_scale": 1.0,
    "matrix_lr": 0.02,
    "embed_lr": 0.2,
    "lm_head_lr": 0.004,
    "vector_lr": None,
    "momentum": 0.95,
    "momentum_start": 0.85,
    "momentum_warmup_steps": 300,
    "ns_steps": 5,
    "betas": [0.8, 0.95],
    "eps": 1e-10,
    "weight_decay": 0.0,
}
ADAMW = {"lr": 1e-3, "lr_scale": 1.0, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def small_gpt() -> GPT:
    model = GPT(vocab_size=300, n_layer=2, n_embd=32, n_head=2, n_kv_head=1)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
