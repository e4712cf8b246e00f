"""What differs between the releases of torch that serve. torch is asked, by name and by signature; its version is not."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

# The older names are deprecated where there are newer ones.
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """torch's causal attention of q (tokens, H, D) within documents that begin at cu_seqlens, each of up to `longest` tokens.
    k and v have as many heads or a divisor of them.

    A release that knows no grouped heads gets them repeated, which takes memory. The import is here as it takes seconds in some.
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if q.size(1) != k.size(1):
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), **grouped)


def launch_config(stop_s: int, **settings: Any) -> LaunchConfig:
    """torch's settings of a launch. Ranks that are told to end have stop_s seconds, and 30 in a release that takes no number."""
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in inspect.signature(LaunchConfig).parameters:
        settings["shutdown_timeout"] = stop_s
    return LaunchConfig(**settings)
