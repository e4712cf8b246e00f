"""Differences between the supported releases of torch. They are detected by names and signatures, not by the version number."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.launcher.api import LaunchConfig

# Where the newer names exist, the older ones are deprecated.
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@cache
def has_amx() -> bool:
    """Does this CPU have AMX, units for products of matrices in bf16 (Intel's, from Sapphire Rapids on)? torch has no public
    name for it in all releases."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """torch's causal attention within documents: q (tokens, H, D), k and v (tokens, H or a divisor of H, D) to (tokens, H, D).

    Documents begin at cu_seqlens (documents + 1,) and have at most `longest` tokens. In a release without grouped-query
    attention, k and v are repeated, which takes memory. The import is here because it takes seconds in some releases.
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if q.size(1) != k.size(1):
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), **grouped)
    return out  # pyright: ignore[reportReturnType]


def launch_config(stop_s: int, **settings: Any) -> LaunchConfig:
    """torch's launch settings. Ranks that are told to stop have stop_s seconds for it; 30 in a release without that setting."""
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in inspect.signature(LaunchConfig).parameters:
        settings["shutdown_timeout"] = stop_s
    return LaunchConfig(**settings)


def make_fsdp_root(module: FSDPModule) -> None:
    """Let `module` be the root of the sharded modules inside it, as its first forward pass would. torch has no public name for
    it."""
    module._get_fsdp_state()._lazy_init()
