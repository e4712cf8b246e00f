"""The keys `run.*`, `init.*`, `checkpoint.*` and `log.*`: a run's folder, its start, its checkpoints and logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from chattrain.config.words import Direction, Pick, Resume
from chattrain.errors import UserError

NAME_BYTES = 200  # of a name at most: those made of it (`<name>-reproduced`, `.<name>.lock`) stay below the 255 of a file system


def check_folder_name(name: str, given: str, way_out: str = "") -> None:
    """Raises UserError for what no folder of a run or a sweep is to be called. `given`: the key with its value."""
    if not name or "/" in name or name.startswith(".") or not name.isprintable():
        raise UserError(f"{given} is no name of a folder{way_out}")
    if (length := len(name.encode())) > NAME_BYTES:
        raise UserError(f"{given} is too long for the name of a folder: {length} bytes; give it {NAME_BYTES} at most")


@dataclass
class RunConfig:
    root: str = "runs"  # folder of all runs, relative to the working directory
    # folder of the run below <root>/<stage>; null: the time of the launch, the same for all processes; <stage>/<name> names a run
    # that a command reads
    name: str | None = None
    dir: str | None = None  # folder of the run, wherever it lies; null: <root>/<stage>/<name>
    seed: int = 1337  # of the order of documents and the initial weights
    # auto: go on from the newest valid checkpoint in run.dir, if there is one; must: fail if there is none; never: start anew
    resume: Resume = Resume.auto
    # keys or groups that a resumed run may change, such as optimizer.lr_scale
    allow_change: list[str] = field(default_factory=list)

    def check(self) -> None:
        if self.seed < 0:
            raise UserError(f"run.seed={self.seed} must be 0 or more")
        parts = self.name.split("/") if self.name is not None else []
        if len(parts) > 2:
            raise UserError(f"run.name={self.name} is no name of a folder; use run.dir for a path")
        for part in parts:
            check_folder_name(part, f"run.name={self.name}", "; use run.dir for a path")
        if self.dir is not None and Path(self.dir).expanduser().is_file():
            raise UserError(f"run.dir={self.dir} is a file; name a folder")


def _dataclass_with(name: str, default: str):
    """`@dataclass` with one more field, whose name is a Python keyword. It is a valid key, but cannot be written in a class body
    or be a parameter of __init__."""

    def decorate(cls: type) -> type:
        cls.__annotations__[name] = str
        setattr(cls, name, field(default=default, init=False, repr=False, compare=False))
        return dataclass(cls)

    return decorate


# auto: the newest finished run of the stages in init.after, else random weights with a warning; scratch: random weights; the
# folder of a run, a checkpoint, nanochat or Hugging Face; a run by <name> or <stage>/<name>; commands read the run that it names
@_dataclass_with("from", default="auto")
class InitConfig:
    strict: bool = False  # true: with init.from=auto, fail if there is no finished run of the first stage in `after`
    after: list[str] = field(default_factory=list)  # stages that auto looks for finished runs of, in order of preference
    pick: Pick = Pick.last  # of a run's checkpoints: the last, or the best, which checkpoint.keep_best has kept

    @property
    def source(self) -> str:
        """`init.from`: auto, scratch, or a run or checkpoint folder."""
        return getattr(self, "from")


@dataclass
class CheckpointConfig:
    every: int | None = None  # optimizer steps between two checkpoints; null: by time, and at the end
    minutes: float | None = 10.0  # between saves where `every` is not set; null: only at the end
    keep: int = 2  # number of newest checkpoints to keep
    keep_best: str | None = None  # a metric: the checkpoint of its best value is saved at once and kept besides
    direction: Direction = Direction.auto  # of keep_best; auto: maximize for an accuracy (*_acc), minimize for everything else

    @property
    def maximizes(self) -> bool:
        """Is the largest value of keep_best the best?"""
        if self.direction == Direction.auto:
            return bool(self.keep_best) and str(self.keep_best).endswith("_acc")
        return self.direction == Direction.maximize

    def check(self) -> None:
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"checkpoint.minutes={self.minutes} must be above 0")
        if self.direction != Direction.auto and not self.keep_best:
            raise UserError(f"checkpoint.direction={self.direction.name} has no effect without checkpoint.keep_best=<metric>")
        if self.keep < 1 or (self.every is not None and self.every < 1):
            raise UserError(f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be 1 or more")


@dataclass
class LogConfig:
    every: int = 10  # optimizer steps between two lines of the log and of metrics.jsonl

    def check(self) -> None:
        if self.every < 1:
            raise UserError(f"log.every={self.every} must be 1 or more")
