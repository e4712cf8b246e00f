"""The Workload of a configuration and its data: the numbers that cost.py computes with."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chattrain.config import Config
from chattrain.config.optimizer import AdamWConfig, MuonAdamWConfig
from chattrain.config.words import ActivationCheckpointing, StateDType, Strategy
from chattrain.optim import newton_schulz
from chattrain.optim.groups import parameter_groups
from chattrain.parallel.layout import Item, shard_group_size
from chattrain.planning.cost import BF16, BF16_UPDATE_BYTES, FP32, SCALES, UPDATE_BYTES, Workload
from chattrain.planning.data import Counts
from chattrain.planning.model import fake_model
from chattrain.setup.data import RunData


def workload(cfg: Config, data: RunData, start: Path | None, counts: Counts) -> tuple[Workload, dict[str, int]]:
    """The work of a run on plan.world_size devices, and the number of its weights by parameter group."""
    with FakeTensorMode():
        model = fake_model(cfg, data.tokenizer.vocab_size, start)
        groups = {name: [p for _, p in members] for name, members in parameter_groups(model).items()}
        flops = model.flops_per_token(cfg.train.seq_len)
        head = 6 * model.lm_head.weight.numel()
    muon = cfg.optimizer if isinstance(cfg.optimizer, MuonAdamWConfig) else None
    in_bf16 = isinstance(cfg.optimizer, AdamWConfig) and cfg.optimizer.state_dtype == StateDType.bf16
    sizes = {name: sum(p.numel() for p in members) for name, members in groups.items()}
    return Workload(
        weights=sum(sizes.values()),
        matrices=tuple((p.size(0), p.size(1)) for p in groups["matrix"]) if muon else (),
        ns_steps=muon.ns_steps if muon else 0,
        update_bytes=BF16_UPDATE_BYTES if in_bf16 else UPDATE_BYTES,
        flops_a_token=flops,
        block_share=(flops - head) / flops,
        recomputed=cfg.train.activation_checkpointing == ActivationCheckpointing.block,
        compute_bytes=FP32 if cfg.train.dtype.name == "fp32" else BF16,
        num_tokens=counts.padded,
        rows=data.num_steps * data.rows_per_step,
        rows_a_step=data.rows_per_step,
        device_batch_size=counts.rows_a_pass,
        padded=cfg.collator.has_varying_shapes,
        strategy=cfg.distributed.strategy.name,
        sharing={
            world_size: _num_shards(cfg, groups, muon is not None, world_size) for world_size in (*SCALES, cfg.plan.world_size)
        },
    ), sizes


def _num_shards(cfg: Config, groups: dict[str, list[nn.Parameter]], muon: bool, world_size: int) -> int:
    """Number of ranks that the update is sharded over: all under fsdp; under ddp as many as can get shards of even cost."""
    if cfg.distributed.strategy == Strategy.fsdp:
        return world_size
    items = [
        Item(f"{name}{i}", p.numel(), newton_schulz.cost((p.size(0), p.size(1))) if muon and name == "matrix" else None)
        for name, members in groups.items()
        for i, p in enumerate(members)
    ]
    return shard_group_size(items, world_size)
