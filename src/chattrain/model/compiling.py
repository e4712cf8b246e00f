"""torch.compile, a block at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def compile_each(blocks: Iterable[nn.Module], dynamic: bool) -> None:
    """Compile the forward of each module, in place. The modules are alike, so one compilation serves all."""
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic)
