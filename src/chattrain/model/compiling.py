"""torch.compile, a block at a time."""

from __future__ import annotations

import torch
from torch import nn


def compile_each(blocks: list[nn.Module], dynamic: bool) -> None:
    """From now on these modules run compiled; they are alike, so that one compilation serves all."""
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic)
