"""The optimizer step alone: muon_adamw against torch.optim.Muon + torch.optim.AdamW on the same parameters."""

from __future__ import annotations

import torch

from benchmarks.timing import in_turns, row, show
from chattrain.model.gpt import GPT
from chattrain.optim.muon_adamw import build


def measure() -> list[dict]:
    ours, reference = _model(), _model()
    mine = build(ours, lr_scale=1.0, matrix_lr=0.02, embed_lr=0.2, lm_head_lr=0.004, vector_lr=None, momentum=0.95,
                 momentum_start=0.85, momentum_warmup_steps=300, ns_steps=5, betas=[0.8, 0.95], eps=1e-10, weight_decay=0.0)
    matrices = [p for n, p in reference.named_parameters() if n.startswith("transformer.h")]
    rest = [p for n, p in reference.named_parameters() if not n.startswith("transformer.h")]
    theirs = [torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
              torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)]

    def step_theirs() -> None:
        for optimizer in theirs:
            optimizer.step()

    return [row("optimizer step, d6", 1, "steps", *in_turns(mine.step, step_theirs, rounds=5))]


def _model() -> GPT:
    """nanochat's d6 with a vocabulary of 8,192, and gradients."""
    model = GPT(vocab_size=8192, n_layer=6, n_embd=384, n_head=3)
    model.init_weights(torch.Generator().manual_seed(0))
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


if __name__ == "__main__":
    show(measure())
