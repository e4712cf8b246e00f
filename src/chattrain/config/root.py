"""The whole configuration. Dataclasses declare the keys, the YAML files in conf/ set them, the command line overrides them.

The dataclasses are Hydra's schema: it refuses an unknown key or a value of the wrong type. Checks of ranges and of keys
that depend on each other are in the `check` methods, which `schema.from_hydra` calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from chattrain.config.collator import CollatorConfig
from chattrain.config.commands import ChatConfig, ExportConfig, InspectConfig, VerifyConfig
from chattrain.config.data import DataConfig
from chattrain.config.eval import EvalConfig
from chattrain.config.loss import LossConfig
from chattrain.config.model import ModelConfig
from chattrain.config.optimizer import OptimizerConfig
from chattrain.config.plan import PlanConfig
from chattrain.config.run import CheckpointConfig, InitConfig, LogConfig, RunConfig
from chattrain.config.schedule import ScheduleConfig
from chattrain.config.serve import ServeConfig
from chattrain.config.sweep import SweepConfig
from chattrain.config.tokenizer import TokenizerConfig
from chattrain.config.tracking import TrackingConfig
from chattrain.config.train import DistributedConfig, TrainConfig
from chattrain.config.words import READING, Command, Format, Part
from chattrain.errors import UserError


@dataclass
class Config:
    command: Command = Command.train  # what is done with the configuration
    format: Format = Format.hf  # of command=export: hf for Hugging Face transformers, mlflow for an MLflow model that chats
    stage: str = MISSING  # what is trained: the start, the rows, the targets, the schedule and the measures that go with it
    runs: list[str] = field(default_factory=list)  # of command=report and evaluate: folders or names of runs to compare
    run: RunConfig = field(default_factory=RunConfig)  # the folder of a run, its seed, whether it resumes
    init: InitConfig = field(default_factory=InitConfig)  # what a run starts from; the run that a command reads
    train: TrainConfig = field(default_factory=TrainConfig)  # length, rows, batches, number formats, compilation, device
    model: ModelConfig = field(default_factory=ModelConfig)  # our GPT in a size, with rows and batch; or a Hugging Face model
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # a saved tokenizer, or the size of a new one
    data: DataConfig = MISSING  # what is trained on and measured, for each stage
    collator: CollatorConfig = field(default_factory=CollatorConfig)  # how documents become rows
    loss: LossConfig = field(default_factory=LossConfig)  # what of a row carries loss
    optimizer: OptimizerConfig = MISSING  # how weights step, with the learning rates
    schedule: ScheduleConfig = MISSING  # how the learning rate changes over the steps
    eval: EvalConfig = field(default_factory=EvalConfig)  # what is measured, and when
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # where metrics go besides the run folder
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # when checkpoints are saved, and which are kept
    log: LogConfig = field(default_factory=LogConfig)  # how often metrics are logged
    distributed: DistributedConfig = field(default_factory=DistributedConfig)  # processes and what they shard
    sweep: SweepConfig = field(default_factory=SweepConfig)  # several jobs from one command line (-m), and which is best
    chat: ChatConfig = field(default_factory=ChatConfig)  # what command=chat asks, and how it samples replies
    serve: ServeConfig = field(default_factory=ServeConfig)  # address, key and limits of command=serve
    inspect: InspectConfig = field(default_factory=InspectConfig)  # which rows command=inspect shows
    plan: PlanConfig = field(default_factory=PlanConfig)  # the devices that command=plan plans for
    verify: VerifyConfig = field(default_factory=VerifyConfig)  # how long command=verify_resume trains
    export: ExportConfig = field(default_factory=ExportConfig)  # where command=export writes

    def check(self) -> None:
        """Raises UserError for a value out of range and for values that contradict each other."""
        for part in (
            self.run,
            self.train,
            self.model,
            self.data,
            self.loss,
            self.optimizer,
            self.schedule,
            self.eval,
            self.checkpoint,
            self.log,
            self.distributed,
            self.sweep,
            self.chat,
            self.serve,
            self.inspect,
            self.plan,
            self.verify,
        ):
            part.check()
        if self.stage == "base" and self.data.replay:
            raise UserError(f"data.replay={self.data.replay} has no effect with stage=base, which trains on base text alone")
        if self.stage in self.eval.also:
            raise UserError(f"eval.also={self.eval.also}: the data of stage={self.stage} is measured anyway; leave it out")
        if "/" in (self.run.name or "") and self.command not in READING:
            raise UserError(f"run.name={self.run.name} is no name of a folder; use run.dir for a path")
        if self.command != Command.evaluate:
            self.data.check_training()
            if self.train.device_batch_tokens is not None and not self.collator.has_varying_shapes:
                raise UserError(
                    f"train.device_batch_tokens={self.train.device_batch_tokens} has no effect on rows that are always full; use "
                    "train.device_batch_size, or collator=masked, whose rows are padded"
                )
            if self.eval.on == Part.test:
                raise UserError(
                    "eval.on=test is for command=evaluate: a training that looks at its test data leaves none to judge it by"
                )
