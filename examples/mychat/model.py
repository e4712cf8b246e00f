"""A model: chattrain's GPT with another MLP. `start` is a checkpoint to take weights from; None: new ones, by the seed."""

from pathlib import Path

import torch
from torch import nn

from chattrain.model.gpt import GPT
from chattrain.storage.tensors import fill_model


class SwiGLU(nn.Module):
    """https://arxiv.org/abs/2002.05202"""

    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.c_proj = nn.Linear(2 * n_embd, n_embd, bias=False)

    def forward(self, x):
        gate, value = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(nn.functional.silu(gate) * value)


def swiglu(vocab_size: int, start: Path | None, seed: int, n_layer: int = 4, n_embd: int = 128, n_head: int = 4) -> GPT:
    model = GPT(vocab_size, n_layer, n_embd, n_head)
    for block in model.blocks:
        block.mlp = SwiGLU(n_embd)
    if start is None:
        model.init_weights(torch.Generator().manual_seed(seed))
    else:
        fill_model(start / "model.safetensors", model)
    return model
