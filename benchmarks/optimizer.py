"""The optimizer step alone: muon_adamw against torch.optim.Muon + torch.optim.AdamW on the same parameters."""

from __future__ import annotations

import torch

from benchmarks import roofline
from benchmarks.mid import stock_optimizers
from benchmarks.timing import row, show, time_both
from chattrain.model.gpt import GPT
from chattrain.optim.muon_adamw import build


def measure() -> list[dict]:
    return [_measure(name, n_layer, n_embd, n_head) for name, n_layer, n_embd, n_head in (("d6", 6, 384, 3), ("d12", 12, 768, 6))]


def _measure(name: str, n_layer: int, n_embd: int, n_head: int) -> dict:
    ours, reference = _model(n_layer, n_embd, n_head), _model(n_layer, n_embd, n_head)
    our_optimizer = build(
        ours,
        lr_scale=1.0,
        matrix_lr=0.02,
        embed_lr=0.2,
        lm_head_lr=0.004,
        vector_lr=None,
        momentum=0.95,
        momentum_start=0.85,
        momentum_warmup_steps=300,
        ns_steps=5,
        betas=[0.8, 0.95],
        eps=1e-10,
        weight_decay=0.0,
    )
    stock = stock_optimizers(reference)

    def step_stock() -> None:
        for optimizer in stock:
            optimizer.step()

    seconds = time_both(our_optimizer.step, step_stock, rounds=5 if n_layer < 12 else 3)
    return row(f"optimizer step, {name}", 1, "steps", *seconds, roofline.optimizer_seconds(ours))


def _model(n_layer: int, n_embd: int, n_head: int) -> GPT:
    """nanochat's shapes with a vocabulary of 8,192, and gradients."""
    model = GPT(vocab_size=8192, n_layer=n_layer, n_embd=n_embd, n_head=n_head)
    model.init_weights(torch.Generator().manual_seed(0))
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


if __name__ == "__main__":
    show(measure())
