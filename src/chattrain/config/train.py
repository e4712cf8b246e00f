"""The keys `train.*` and `distributed.*`: batches, steps, number formats, processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chattrain.config.words import ActivationCheckpointing, Compile, Device, DType, OnNonfinite, Strategy
from chattrain.errors import UserError


@dataclass
class TrainConfig:
    max_steps: int | None = None  # optimizer steps of the run; its length is given by this or by one of the next three keys
    num_epochs: float | None = None  # epochs of the training mixture, in place of max_steps
    max_tokens: int | None = None  # the run ends with the first step in which tokens_seen reaches this
    max_supervised_tokens: int | None = None  # the run ends with the first step in which supervised_tokens reaches this
    stop_after: float | None = None  # fraction of the steps after which the run stops, measured and saved; it resumes without it
    seq_len: int = 256  # tokens a row; longer documents are cut, or go on in the next row (collator=packed)
    device_batch_size: int = 16  # rows a process a forward pass, where rows are full
    # tokens of a padded forward pass (collator=masked) at most, padding counted; null: device_batch_size x seq_len
    device_batch_tokens: int | None = None
    total_batch_size: int | None = None  # tokens an optimizer step, all ranks (rows x seq_len)
    rows_per_step: int | None = None  # rows an optimizer step, all ranks; give total_batch_size or rows_per_step
    max_grad_norm: float | None = None  # gradients are scaled down to this norm, over all weights; null: they are not clipped
    # a step whose loss or gradient is not finite never changes the weights; stop: the run fails; skip: it goes on without it
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    max_skipped: int = 20  # with on_nonfinite=skip: the run fails once it has skipped more steps than these
    dtype: DType = DType.auto  # of the matrix products, auto: bf16 where the device is fast in it; weights stay fp32
    fp8: bool = False  # linear layers of the blocks in fp8, through torchao
    # what backward recomputes; none: nothing; block: whole blocks; selective: all of them but attention and narrow products
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    compile: bool | str = Compile.auto.value  # auto, true or false; auto: where the planned steps gain more than it costs
    deterministic: bool = False  # only kernels that give the same bits each time; slower on a GPU
    device: Device = Device.auto  # auto: cuda, else mps, else cpu

    def check(self) -> None:
        for name in (
            "max_steps",
            "num_epochs",
            "max_tokens",
            "max_supervised_tokens",
            "seq_len",
            "device_batch_size",
            "device_batch_tokens",
            "total_batch_size",
            "rows_per_step",
            "max_grad_norm",
            "max_skipped",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"train.{name}={value} must be above 0")
        if self.device_batch_tokens is not None and self.device_batch_tokens < self.seq_len:
            raise UserError(
                f"train.device_batch_tokens={self.device_batch_tokens} is less than one row of train.seq_len={self.seq_len}; "
                f"try {self.seq_len}"
            )
        if self.compile not in [word.value for word in Compile]:
            raise UserError(f"train.compile={self.compile!r} is none of {', '.join(word.name for word in Compile)}")
        if self.stop_after is not None and not 0 < self.stop_after < 1:
            raise UserError(f"train.stop_after={self.stop_after} must be a fraction of the steps, between 0 and 1")
        for keys in ALTERNATIVES:
            values = {key: getattr(self, key.removeprefix("train.")) for key in keys}
            given = [f"{key}={value}" for key, value in values.items() if value is not None]
            if len(given) > 1:
                other = given[-1].partition("=")[0]
                raise UserError(
                    f"{' and '.join(given)} set the same thing; keep one, and write {other}=null for the other (in a YAML file "
                    f"{other.partition('.')[2]}: null)"
                )
            if not given:
                raise UserError(f"none of {', '.join(keys)} is set; give one of them")
        if self.fp8 and self.dtype == DType.fp32:
            raise UserError("train.fp8=true with train.dtype=fp32: all but the linear layers would be fp32; use bf16 or auto")
        if self.fp8 and self.seq_len % FP8_MULTIPLE:
            raise UserError(
                f"train.fp8=true, but train.seq_len={self.seq_len} is not a multiple of {FP8_MULTIPLE}, as fp8 "
                f"products want; try {_nearest_multiple(self.seq_len, FP8_MULTIPLE)}"
            )

    def last_step(self, num_steps: int) -> int:
        """The step after which this process stops, of a run of num_steps.

        >>> TrainConfig(stop_after=0.25).last_step(10), TrainConfig().last_step(10)
        (3, 10)
        """
        return num_steps if self.stop_after is None else math.ceil(self.stop_after * num_steps)

    @property
    def tokens_a_pass(self) -> int:
        """Tokens of a padded forward pass at most."""
        return self.device_batch_tokens or self.device_batch_size * self.seq_len

    def rows_a_step(self, world_size: int, padded: bool = False) -> int:
        """Rows an optimizer step over all ranks. Raises UserError if that is not a multiple of world_size x device_batch_size;
        of world_size where rows are `padded`, as passes then hold any number of them.

        >>> TrainConfig(num_epochs=1, seq_len=1024, device_batch_size=1, total_batch_size=8192).rows_a_step(4)
        8
        """
        B, T = 1 if padded else self.device_batch_size, self.seq_len
        unit = f"{world_size} rank{'s' * (world_size > 1)} x {B} row{'s' * (B > 1)}"
        if self.rows_per_step is not None:
            if self.rows_per_step % (B * world_size):
                near = _nearest_multiple(self.rows_per_step, B * world_size)
                raise UserError(
                    f"train.rows_per_step={self.rows_per_step} rows is not a multiple of {B * world_size} "
                    f"({unit}); try {near}" + self._smaller_batch(B, self.rows_per_step, world_size)
                )
            return self.rows_per_step
        assert self.total_batch_size is not None  # else `check` raises
        tokens = B * T * world_size
        if self.total_batch_size % tokens:
            near = _nearest_multiple(self.total_batch_size, tokens)
            raise UserError(
                f"train.total_batch_size={self.total_batch_size} tokens is not a multiple of {tokens} "
                f"({unit} x {T} tokens); try {near}" + self._smaller_batch(B, self.total_batch_size / T, world_size)
            )
        return self.total_batch_size // T

    def _smaller_batch(self, batch_size: int, rows: float, world_size: int) -> str:
        """`, or train.device_batch_size=...` with the largest smaller batch that divides these rows; empty if there is none."""
        fits = [b for b in range(1, batch_size) if rows % (b * world_size) == 0]
        return f", or train.device_batch_size={fits[-1]}" if fits else ""


FP8_MULTIPLE = 16  # fp8 matrix products need multiples of 16: tokens, inputs and outputs of a layer
# Keys that set the same thing: if the command line sets one, the others become null.
ALTERNATIVES = (
    ("train.max_steps", "train.num_epochs", "train.max_tokens", "train.max_supervised_tokens"),
    ("train.total_batch_size", "train.rows_per_step"),
)


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, value // unit) * unit


@dataclass
class DistributedConfig:
    nproc: str = "auto"  # processes on this host: auto (visible GPUs, else 1) or a number
    strategy: Strategy = Strategy.ddp  # ddp: full weights on every rank; fsdp: sharded. Both shard the optimizer state
    timeout_s: int = 1800  # seconds that a collective may wait before the run fails as hung

    def check(self) -> None:
        if self.nproc != "auto" and (not self.nproc.isdigit() or int(self.nproc) < 1):
            raise UserError(f"distributed.nproc={self.nproc} is neither auto nor a number of processes")
        if self.timeout_s < 1:
            raise UserError(f"distributed.timeout_s={self.timeout_s} must be 1 second or more")
