"""The `data` group: sources, the mixture of each stage, and the user's own data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING

from chattrain.config.quoting import as_argument
from chattrain.config.words import Audit, OnMalformed, Part, Schema, WeightBy
from chattrain.errors import UserError

MAX_ROW_MB, MAX_UNPACKED = 64.0, 100.0


class Limits(NamedTuple):
    """How large data may be."""

    row_mb: float = MAX_ROW_MB
    unpacked: float = MAX_UNPACKED


@dataclass
class SourceConfig:
    """One source of records. Its key in the mixture is its name in messages and reports."""

    path: str = MISSING  # hub name, file, folder, generate:<task>, or python:<module>.<function>
    schema: Schema = Schema.messages  # what the columns of a record are; auto: told by them
    subset: str | None = None  # the hub's configuration name
    split: str = "train"  # of a hub name or folder; of a generated task train, val or test
    limit: int | None = None  # records at most: the first of a shuffle with a fixed seed
    epochs: float = 1.0  # how often each document appears in one epoch of the mixture
    weight: float | None = None  # share of the documents, relative to the other weights; larger sources are subsampled
    words: str | None = None  # word list of a generated task, one word a line
    part: str | None = None  # `train` or `val`, for a source without a validation split: every 20th record is val


@dataclass
class MixtureConfig:
    train: dict[str, SourceConfig] = field(default_factory=dict)  # sources that are trained on, by name
    val: dict[str, SourceConfig] = field(default_factory=dict)  # sources that are measured while a run trains; keys as in train
    test: dict[str, SourceConfig] = field(default_factory=dict)  # of eval.on=test alone; keys as in train
    prompts: list[str] = field(default_factory=list)  # of eval.prompts, where it is null

    def part(self, part: Part) -> dict[str, SourceConfig]:
        return self.test if part == Part.test else self.val


@dataclass
class DataConfig:
    cache_dir: str | None = None  # folder of tokenised data; null: $CHATTRAIN_CACHE or ~/.cache/chattrain
    on_malformed: OnMalformed = OnMalformed.refuse  # a malformed row; refuse: name it and end; skip: leave it out and count it
    max_row_mb: float = MAX_ROW_MB  # MiB of a row, unpacked; larger ones are malformed
    max_unpacked: float = MAX_UNPACKED  # times its size that a compressed file may unpack to; 1 GiB is always allowed
    ignore: list[str] = field(default_factory=list)  # fields of messages, or `tools`, to leave out instead of refusing the row
    audit: Audit = Audit.warn  # what to do about documents that are cut, left out or validated on too; mask faults always refuse
    workers: int | None = None  # processes that tokenise; null: one for each core
    weight_by: WeightBy = WeightBy.documents  # what the weights of sources are shares of: an epoch's documents or its tokens
    replay: float = 0.0  # share of an epoch's tokens, below 1, that comes from base text: the training sources of the base stage
    stages: dict[str, MixtureConfig] = field(default_factory=dict)  # the mixture of each stage
    tokenizer_stages: list[str] = field(default_factory=list)  # stages whose texts train a new tokenizer; []: this stage
    multiple_choice: dict[str, SourceConfig] = field(default_factory=dict)  # question sets of this data, for evaluation
    multiple_choice_test: dict[str, SourceConfig] = field(default_factory=dict)  # the same, for eval.on=test

    def mixture(self, stage: str) -> MixtureConfig:
        """The mixture of a stage. Raises UserError if there is none."""
        if stage not in self.stages:
            raise UserError(
                f"this data has no mixture for stage={stage}, only for {', '.join(self.stages)}; "
                f"add data.stages.{stage} in its YAML file"
            )
        return self.stages[stage]

    def base_text(self, part: str) -> dict[str, SourceConfig]:
        """The base text of data.replay and eval.also=[base]; `part`: train, val or test. Raises UserError if there is none."""
        if "base" not in self.stages:
            raise UserError("this data has no base text for data.replay or eval.also; add data.stages.base in its YAML file")
        return getattr(self.stages["base"], part)

    @property
    def limits(self) -> Limits:
        return Limits(self.max_row_mb, self.max_unpacked)

    def check(self) -> None:
        """Raises UserError for a value out of range, and for a mixture in which only some sources have a weight."""
        for key, limit in (("max_row_mb", self.max_row_mb), ("max_unpacked", self.max_unpacked)):
            if not limit > 0:
                raise UserError(f"data.{key}={limit} must be above 0")
        if not 0 <= self.replay < 1:
            raise UserError(f"data.replay={self.replay} must be a share of the tokens, from 0 to below 1")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"data.workers={self.workers} must be 1 or more")
        needed = [name for name in self.ignore if name in ("messages", "role", "content")]
        if needed:
            raise UserError(
                f"data.ignore={self.ignore}: a conversation needs {needed[0]}; name other fields of messages, or tools"
            )
        for stage, mixture in self.stages.items():
            _check_sources(f"data.stages.{stage}.train", mixture.train)
            _check_sources(f"data.stages.{stage}.val", mixture.val)
            _check_sources(f"data.stages.{stage}.test", mixture.test)

    def check_training(self) -> None:
        """Raises UserError where there is nothing to train on."""


@dataclass
class NanochatDataConfig(DataConfig):
    identity_path: str = MISSING  # JSON Lines file, one conversation a line
    words_path: str = MISSING  # word list for the spelling tasks, one word a line


@dataclass
class LocalDataConfig(DataConfig):
    train_path: Any = None  # file, folder, hub name or python:<module>.<function>, or a list; only an evaluation may leave it out
    val_path: Any = None  # what is measured, as train_path; null: every 20th record of train_path is held out for validation
    test_path: Any = None  # the same for eval.on=test; null: none
    schema: Any = "auto"  # what the columns are: one for all paths, or a list with one for each; auto: told by the columns
    val_schema: Any = None  # the same for val_path and test_path; null: as schema
    weights: Any = None  # a list with one for each training path: shares of an epoch, of documents or (data.weight_by) of tokens
    replay_path: Any = None  # base text for data.replay and eval.also=[base]; every 20th record is for validation

    def mixture(self, stage: str) -> MixtureConfig:
        if stage in self.stages:
            return self.stages[stage]
        train = self._sources("train_path", "schema", "train", None if self.val_path else "train")
        for source, weight in zip(train.values(), self._weights(len(train)), strict=True):
            source.weight = weight
        measured = "schema" if self.val_schema is None else "val_schema"
        val = self._sources("val_path", measured, "test", None) or self._sources("train_path", "schema", "train", "val")
        test = self._sources("test_path", measured, "test", None)
        return MixtureConfig(train=train, val=val, test=test)

    def _weights(self, count: int) -> list[float | None]:
        """The weight of each training source."""
        if self.weights is None or not count:
            return [None] * count
        weights = self.weights if isinstance(self.weights, list) else [self.weights]
        if len(weights) != count or not all(isinstance(w, int | float) and w > 0 for w in weights):
            raise UserError(f"data.weights={self.weights} must be a list of {count} numbers above 0, one for each path")
        return [float(weight) for weight in weights]

    def base_text(self, part: str) -> dict[str, SourceConfig]:
        if self.replay_path is None:
            raise UserError("data.replay_path must be given: data.replay and eval.also=[base] take their text from it")
        paths, held_out = _as_list(self.replay_path), "train" if part == "train" else "val"
        return {n: SourceConfig(path=p, schema=Schema.text, part=held_out) for n, p in zip(_names(paths), paths, strict=True)}

    def check(self) -> None:
        super().check()
        if self.replay:
            self.base_text("train")
        for name in ("train_path", "val_path", "test_path", "schema", "val_schema", "replay_path"):
            value = getattr(self, name)
            texts = value if isinstance(value, list) else [value]
            if value is None and (name != "train_path" or self.val_path or self.test_path):
                continue
            if value is None:
                raise UserError("data=local needs data.train_path=<file, folder or hub name>")
            if not texts or not all(isinstance(text, str) and text for text in texts):
                way_out = f"; if it is the name of a file: {as_argument(f'data.{name}', str(value))}" if "path" in name else ""
                raise UserError(
                    f"data.{name}={value} must be a text or a list of texts: data.train_path=<file, folder or hub "
                    f"name>, data.schema=<{', '.join(Schema.__members__)}>{way_out}"
                )
        if self.val_schema is not None and self.val_path is None and self.test_path is None:
            raise UserError(f"data.val_schema={self.val_schema} is of data.val_path or data.test_path; give one, or leave it out")

    def check_training(self) -> None:
        if self.train_path is None:
            raise UserError("data.train_path must be given: data.train_path=<file, folder or hub name>")

    def _sources(self, path_key: str, schema_key: str, split: str, part: str | None) -> dict[str, SourceConfig]:
        """The sources of the paths under a key, each under a name of its own; a path that is listed twice is two sources."""
        paths, schemas = (_as_list(getattr(self, key)) for key in (path_key, schema_key))
        if len(schemas) == 1:
            schemas *= len(paths)
        if paths and len(schemas) != len(paths):
            more = "" if path_key == "train_path" else f", or data.val_schema for data.{path_key}"
            raise UserError(
                f"data.{schema_key} has {len(schemas)} entries for {len(paths)} paths of data.{path_key}; "
                f"give one, or one a path{more}"
            )
        unknown = [s for s in schemas if s not in Schema.__members__]
        if unknown:
            raise UserError(f"data.{schema_key}={unknown[0]} is not known; choose from {', '.join(Schema.__members__)}")
        return {
            name: SourceConfig(path=p, schema=Schema[s], split=split, part=part)
            for name, p, s in zip(_names(paths), paths, schemas, strict=bool(paths))
        }


def _as_list(value: Any) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _names(paths: list[str]) -> list[str]:
    """A name for each path: that of the file, the whole path where files share a name, with a number where a path comes again.

    >>> _names(["a/x.jsonl", "b/x.jsonl", "y.jsonl", "y.jsonl"])
    ['a/x.jsonl', 'b/x.jsonl', 'y.jsonl', 'y.jsonl-2']
    """
    last = [Path(p).name or p for p in paths]
    names: list[str] = []
    for path, name in zip(paths, last, strict=True):
        same = {p for p, other in zip(paths, last, strict=True) if other == name}
        wanted = name if len(same) == 1 else path
        again = sum(p == path for p in paths[: len(names)])
        names.append(f"{wanted}-{again + 1}" if again else wanted)
    return names


def _check_sources(key: str, sources: dict[str, SourceConfig]) -> None:
    for name, source in sources.items():
        if source.limit is not None and source.limit <= 0:
            raise UserError(f"{key}.{name}.limit={source.limit} must be above 0")
        if source.epochs <= 0:
            raise UserError(f"{key}.{name}.epochs={source.epochs} must be above 0")
    weighted = [name for name, source in sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        rest = sorted(set(sources) - set(weighted))
        raise UserError(
            f"{key}: {', '.join(weighted)} have a weight and {', '.join(rest)} have none; give one to every source or to none"
        )
    if any(source.weight is not None and source.weight <= 0 for source in sources.values()):
        raise UserError(f"{key}: every weight must be above 0")
