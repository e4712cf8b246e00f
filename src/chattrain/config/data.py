"""The `data` group: sources, the mixture of each stage, and the user's own data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from chattrain.config.words import OnMalformed, Part, Schema, WeightBy
from chattrain.errors import UserError


@dataclass
class SourceConfig:
    """One source of records. Its key in the mixture is its name in messages and reports."""

    path: str = MISSING  # hub name, file, folder, or generate:<task>
    schema: Schema = Schema.messages
    subset: str | None = None  # the hub's configuration name
    split: str = "train"
    limit: int | None = None  # records at most: the first of a shuffle with a fixed seed
    epochs: float = 1.0  # how often each document appears in one epoch of the mixture
    weight: float | None = None  # share of the documents, relative to the other weights; larger sources are subsampled
    words: str | None = None  # word list of a generated task, one word a line
    part: str | None = None  # `train` or `val`, for a source without a validation split: every 20th record is val


@dataclass
class MixtureConfig:
    train: dict[str, SourceConfig] = field(default_factory=dict)
    val: dict[str, SourceConfig] = field(default_factory=dict)
    test: dict[str, SourceConfig] = field(default_factory=dict)  # for eval.on=test only: neither trained on nor chosen by

    def part(self, part: Part) -> dict[str, SourceConfig]:
        return self.test if part == Part.test else self.val


@dataclass
class DataConfig:
    cache_dir: str | None = None  # null: $CHATTRAIN_CACHE or ~/.cache/chattrain
    on_malformed: OnMalformed = OnMalformed.refuse
    ignore: list[str] = field(default_factory=list)  # fields of messages, or `tools`, to leave out instead of refusing the row
    workers: int | None = None  # processes that tokenise; null: one for each core
    weight_by: WeightBy = WeightBy.documents  # what the weights of sources are shares of: an epoch's documents or its tokens
    replay: float = 0.0  # share of an epoch's tokens, below 1, that comes from base text: the training sources of the base stage
    stages: dict[str, MixtureConfig] = field(default_factory=dict)
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

    def check(self) -> None:
        """Raises UserError for a value out of range, and for a mixture in which only some sources have a weight."""
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
    train_path: Any = None  # file, folder or hub name; or a list of these. Only an evaluation may leave it out
    val_path: Any = None  # null: every 20th record of train_path is held out for validation
    test_path: Any = None  # for eval.on=test; null: none
    schema: Any = "messages"  # one for all paths, or a list with one for each
    weights: Any = None  # a list with one for each training path: shares of an epoch, of documents or (data.weight_by) of tokens
    replay_path: Any = None  # base text for data.replay and eval.also=[base]; every 20th record is for validation

    def mixture(self, stage: str) -> MixtureConfig:
        if stage in self.stages:
            return self.stages[stage]
        train = self._sources(self.train_path, "train", part=None if self.val_path else "train") if self.train_path else {}
        for source, weight in zip(train.values(), self._weights(len(train)), strict=True):
            source.weight = weight
        path, split, part = (self.val_path, "test", None) if self.val_path else (self.train_path, "train", "val")
        val = self._sources(path, split, part) if path else {}
        test = self._sources(self.test_path, "test", part=None) if self.test_path else {}
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
        paths = self.replay_path if isinstance(self.replay_path, list) else [self.replay_path]
        held_out = "train" if part == "train" else "val"
        return {Path(p).name: SourceConfig(path=p, schema=Schema.text, part=held_out) for p in paths}

    def check(self) -> None:
        super().check()
        if self.replay:
            self.base_text("train")
        for name in ("train_path", "val_path", "test_path", "schema"):
            value = getattr(self, name)
            texts = value if isinstance(value, list) else [value]
            if value is None and (name != "train_path" or self.val_path or self.test_path):
                continue
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise UserError(
                    f"data.{name}={value} must be a text or a list of texts: data.train_path=<file, folder or hub "
                    "name>, data.schema=<messages, multiple_choice, gsm8k or text>"
                )

    def check_training(self) -> None:
        if self.train_path is None:
            raise UserError("data.train_path must be given: data.train_path=<file, folder or hub name>")

    def _sources(self, paths: Any, split: str, part: str | None) -> dict[str, SourceConfig]:
        paths = [paths] if isinstance(paths, str) else list(paths)
        schemas = [self.schema] if isinstance(self.schema, str) else list(self.schema)
        if len(schemas) == 1:
            schemas *= len(paths)
        if len(schemas) != len(paths):
            raise UserError(f"data.schema has {len(schemas)} entries for {len(paths)} paths; give one, or one a path")
        unknown = [s for s in schemas if s not in Schema.__members__]
        if unknown:
            raise UserError(f"data.schema={unknown[0]} is not known; choose from {', '.join(Schema.__members__)}")
        names = [Path(p).name for p in paths]
        names = [n if names.count(n) == 1 else p for n, p in zip(names, paths, strict=True)]
        return {
            n: SourceConfig(path=p, schema=Schema[s], split=split, part=part)
            for n, p, s in zip(names, paths, schemas, strict=True)
        }


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
