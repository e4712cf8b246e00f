"""The typed configuration. Dataclasses declare (and are the Hydra schema), YAML in conf/ chooses, the command line tweaks.

Without these dataclasses a misspelt key or a wrong type would compose silently; with them Hydra refuses it. Checks that
compare several fields run in `Config.check`, which `schema.from_hydra` calls first thing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from chattrain.choices import choices
from chattrain.data.config import DataConfig
from chattrain.errors import UserError
from chattrain.model.config import ModelConfig
from chattrain.optim.config import OptimizerConfig, ScheduleConfig
from chattrain.planning.config import PlanConfig

Command = choices("Command", "train", "evaluate", "chat", "inspect", "plan", "report", "import", "export", module=__name__)
Format = choices("Format", "hf", module=__name__)
Resume = choices("Resume", "auto", "never", "must", module=__name__)
DType = choices("DType", "auto", "bf16", "fp32", module=__name__)
Device = choices("Device", "auto", "cuda", "mps", "cpu", module=__name__)
Strategy = choices("Strategy", "ddp", "fsdp", module=__name__)
ActivationCheckpointing = choices("ActivationCheckpointing", "none", "block", "selective", module=__name__)


@dataclass
class RunConfig:
    root: str = "runs"  # folder of all runs, relative to where the command is typed
    name: str | None = None  # null: the time of the launch, chosen once
    dir: str | None = None  # null: <root>/<stage>/<name>
    seed: int = 1337  # order of the samples and initial weights
    resume: Resume = Resume.auto

    def check(self) -> None:
        if self.seed < 0:
            raise UserError(f"run.seed={self.seed} must be 0 or more")
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            raise UserError(f"run.name={self.name} is no name of a folder; use run.dir for a path")
        if self.dir is not None and Path(self.dir).expanduser().is_file():
            raise UserError(f"run.dir={self.dir} is a file; name a folder")


def _dataclass_with(name: str, default: str):
    """`@dataclass` with one more field whose name is a Python keyword: legal as a key, not in a signature."""
    def decorate(cls: type) -> type:
        cls.__annotations__[name] = str
        setattr(cls, name, field(default=default, init=False, repr=False, compare=False))
        return dataclass(cls)
    return decorate


@_dataclass_with("from", default="auto")
class InitConfig:
    strict: bool = False  # true: auto may not fall back
    after: list[str] = field(default_factory=list)  # stages whose newest finished run auto takes, best first

    @property
    def source(self) -> str:
        """`init.from`: auto, scratch, or a run or checkpoint folder."""
        return getattr(self, "from")


@dataclass
class TrainConfig:
    max_steps: int | None = None  # optimizer steps; one of max_steps and num_epochs
    num_epochs: float | None = None  # times over the training mixture
    seq_len: int = 256  # tokens a row
    device_batch_size: int = 16  # rows a process a forward pass; of masked rows, at most
    total_batch_size: int | None = None  # tokens an optimizer step, all ranks (rows x seq_len)
    rows_per_step: int | None = None  # the same in rows; one of the two
    max_grad_norm: float | None = None  # null: gradients are not clipped
    dtype: DType = DType.auto  # of the matmuls; weights stay fp32
    fp8: bool = False  # linear layers of the blocks through torchao
    # What backward computes again instead of keeping it: nothing, blocks, or of blocks what is no matrix product or attention.
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    compile: bool = True
    device: Device = Device.auto

    def check(self) -> None:
        for name in ("max_steps", "num_epochs", "seq_len", "device_batch_size", "total_batch_size", "rows_per_step",
                     "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"train.{name}={value} must be above 0")
        for one, other in ALTERNATIVES.items():
            names = [key.removeprefix("train.") for key in (one, other)]
            given = [n for n in names if getattr(self, n) is not None]
            if len(given) == 2:
                raise UserError(f"{one}={getattr(self, names[0])} and {other}={getattr(self, names[1])} set the same "
                                f"thing; keep one and write {one}=null or {other}=null")
            if not given:
                raise UserError(f"neither {one} nor {other} is set; give one of them")
        if self.fp8 and self.dtype == DType.fp32:
            raise UserError("train.fp8=true with train.dtype=fp32: all but the linear layers would be fp32; use bf16 or auto")
        if self.fp8 and self.seq_len % FP8_MULTIPLE:
            raise UserError(f"train.fp8=true, but train.seq_len={self.seq_len} is not a multiple of {FP8_MULTIPLE}, as fp8 "
                            f"products want; try {_nearest_multiple(self.seq_len, FP8_MULTIPLE)}")

    def rows_a_step(self, world_size: int) -> int:
        """Rows an optimizer step over all ranks. Raises UserError where the batch does not divide.

        >>> TrainConfig(num_epochs=1, seq_len=1024, device_batch_size=1, total_batch_size=8192).rows_a_step(4)
        8
        """
        B, T = self.device_batch_size, self.seq_len
        unit = f"{world_size} rank{'s' * (world_size > 1)} x {B} row{'s' * (B > 1)}"
        if self.rows_per_step is not None:
            if self.rows_per_step % (B * world_size):
                near = _nearest_multiple(self.rows_per_step, B * world_size)
                raise UserError(f"train.rows_per_step={self.rows_per_step} rows is not a multiple of {B * world_size} "
                                f"({unit}); try {near}" + self._smaller_batch(self.rows_per_step, world_size))
            return self.rows_per_step
        tokens = B * T * world_size
        if self.total_batch_size % tokens:
            near = _nearest_multiple(self.total_batch_size, tokens)
            raise UserError(f"train.total_batch_size={self.total_batch_size} tokens is not a multiple of {tokens} "
                            f"({unit} x {T} tokens); try {near}" + self._smaller_batch(self.total_batch_size / T, world_size))
        return self.total_batch_size // T

    def _smaller_batch(self, rows: float, world_size: int) -> str:
        """The largest device_batch_size that divides these rows, as a way out; empty where there is none."""
        fits = [b for b in range(1, self.device_batch_size) if rows % (b * world_size) == 0]
        return f", or train.device_batch_size={fits[-1]}" if fits else ""


FP8_MULTIPLE = 16  # of the sides of every fp8 product: tokens, inputs and outputs of a layer
# Pairs of which a value for one replaces the other: the command line that sets one clears its partner.
ALTERNATIVES = {"train.max_steps": "train.num_epochs", "train.total_batch_size": "train.rows_per_step"}


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, value // unit) * unit


@dataclass
class TokenizerConfig:
    path: str | None = None  # folder of a saved tokenizer; null: the checkpoint's, or trained on the data
    vocab_size: int = 2048  # tokens when one is trained, special tokens included
    train_chars: int = 4_000_000  # characters of the training data it is trained on, at most


@dataclass
class CollatorConfig:
    _target_: str = MISSING

    @property
    def isolates(self) -> bool:
        """Do documents share rows without seeing each other?"""
        return False

    @property
    def varies(self) -> bool:
        """Do its batches differ in shape?"""
        return True


@dataclass
class JoiningCollatorConfig(CollatorConfig):
    isolate_documents: bool = False  # attention stays within a document, positions restart

    @property
    def varies(self) -> bool:
        return False

    @property
    def isolates(self) -> bool:
        return self.isolate_documents


@dataclass
class EvalConfig:
    every: int | None = 100  # optimizer steps; also before the first and after the last; null: only those two
    validation: bool = True  # val/loss and val/bpb of the validation mixture
    multiple_choice: bool = False  # accuracy on the question sets of the data, MMLU and ARC
    multiple_choice_every: int | None = None  # optimizer steps, a multiple of every; null: as often as all else
    max_tokens: int | None = None  # of the validation mixture, at most; null: all
    max_problems: int | None = None  # of each question set, at most; null: all
    batch_size: int = 16  # questions of average length a forward pass; of longer ones fewer, of shorter ones more
    mmlu_path: str | None = None  # hub name, or a folder in the hub's file layout
    arc_path: str | None = None  # likewise; holds ARC-Easy and ARC-Challenge
    split: str = "test"  # of MMLU and ARC

    def check(self) -> None:
        for name in ("every", "multiple_choice_every", "max_tokens", "max_problems", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"eval.{name}={value} must be 1 or more")
        rarer = self.multiple_choice_every
        if rarer is not None and (self.every is None or rarer % self.every):
            raise UserError(f"eval.multiple_choice_every={rarer} steps is not a multiple of eval.every={self.every}: "
                            "questions are asked at some of the evaluations, not between them")


@dataclass
class TrackingConfig:
    mlflow: bool = MISSING
    uri: str | None = None  # null: SQLite file mlflow.db in run.root
    experiment: str = "chattrain"


@dataclass
class CheckpointConfig:
    every: int | None = None  # optimizer steps; null: only at the end
    keep: int = 2  # newest ones kept

    def check(self) -> None:
        if self.keep < 1 or (self.every is not None and self.every < 1):
            raise UserError(f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be 1 or more")


@dataclass
class LogConfig:
    every: int = 10  # optimizer steps

    def check(self) -> None:
        if self.every < 1:
            raise UserError(f"log.every={self.every} must be 1 or more")


@dataclass
class DistributedConfig:
    nproc: str = "auto"  # processes on this host: auto (visible GPUs, else 1) or a number
    strategy: Strategy = Strategy.ddp  # weights on every rank, or sharded over ranks; optimizer state is sharded either way
    timeout_s: int = 1800  # seconds a collective may wait before the run is declared hung

    def check(self) -> None:
        if self.nproc != "auto" and (not self.nproc.isdigit() or int(self.nproc) < 1):
            raise UserError(f"distributed.nproc={self.nproc} is neither auto nor a number of processes")
        if self.timeout_s < 1:
            raise UserError(f"distributed.timeout_s={self.timeout_s} must be 1 second or more")


@dataclass
class ChatConfig:
    prompt: Any = None  # text or list of texts; null: read from the terminal, turn by turn
    max_tokens: int = 256  # of a reply
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = 50  # drawn from the likeliest so many; null: from all

    def check(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise UserError(f"chat.max_tokens={self.max_tokens} and chat.top_k={self.top_k} must be 1 or more, "
                            f"chat.temperature={self.temperature} 0 or more")


@dataclass
class InspectConfig:
    rows: int = 3  # rows of the first step shown

    def check(self) -> None:
        if self.rows < 1:
            raise UserError(f"inspect.rows={self.rows} must be 1 or more")


@dataclass
class ExportConfig:
    dir: str | None = None  # folder to write; null: <run>/hf/<step>


@dataclass
class Config:
    command: Command = Command.train
    format: Format = Format.hf  # of command=export
    stage: str = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = MISSING
    collator: CollatorConfig = field(default_factory=CollatorConfig)
    optimizer: OptimizerConfig = MISSING
    schedule: ScheduleConfig = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def check(self) -> None:
        """Raises UserError for values that are wrong alone or together."""
        for part in (self.run, self.train, self.model, self.data, self.optimizer, self.schedule, self.eval, self.checkpoint,
                     self.log, self.distributed, self.chat, self.inspect, self.plan):
            part.check()
