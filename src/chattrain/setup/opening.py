"""Opens what a configuration names: mixtures of documents as rows, and question sets."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from chattrain.config import Config
from chattrain.config.compose import key_of
from chattrain.config.data import DataConfig, SourceConfig
from chattrain.config.instantiate import instantiate_config
from chattrain.config.words import OnMalformed, Part, Schema, WeightBy
from chattrain.data.cache import default_cache_dir, load_or_tokenize
from chattrain.data.collators import Collator
from chattrain.data.loss_weights import MEASURED, LossWeights
from chattrain.data.malformed import MalformedRows
from chattrain.data.mixture import Mixture
from chattrain.data.shares import Shares
from chattrain.data.sources import GENERATE, open_records, with_schema
from chattrain.errors import UserError
from chattrain.evals.multiple_choice import Question, questions
from chattrain.setup.job import current_job
from chattrain.tokenizer import AnyTokenizer

VALIDATION_SEED = 0  # the order of validation rows is the same in every run


class Opening:
    """Opens parts of a configuration's data with one tokenizer. `notes`: (level, message) of what was found on the way.

    All methods raise UserError for sources that are missing, empty or malformed.
    """

    def __init__(self, cfg: Config, tokenizer: AnyTokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.notes: list[tuple[int, str]] = []
        self.asked: dict[str, dict[str, int | None]] = {}  # of each question set: how many are asked, `of` how many

    def training(self) -> Collator:
        """The training sources as rows, base text last."""
        cfg = self.cfg
        sources = dict(cfg.data.mixture(cfg.stage).train)
        if cfg.data.weight_by == WeightBy.tokens and not any(source.weight for source in sources.values()):
            raise UserError(
                "data.weight_by=tokens has no effect: no source has a weight; give each one a weight in the data's YAML file "
                "(with data=local: data.weights=[...])"
            )
        base = {}
        if cfg.data.replay:
            base = {f"base/{name}": source for name, source in cfg.data.base_text("train").items()}
        shares = Shares(cfg.data.weight_by, cfg.data.replay, len(base))
        loss = LossWeights(cfg.loss.supervise, cfg.loss.prompt_weight)
        mixture = self._mixture(f"data.stages.{cfg.stage}.train", sources | base, cfg.run.seed, loss, shares)
        return instantiate_config(cfg.collator, mixture, cfg.train.seq_len, self.tokenizer.pad_id, last_epoch=None)

    def validation(self) -> tuple[Collator, int]:
        """The validation sources of the stage as rows, and the number of these that are measured."""
        cfg = self.cfg
        return self._measured(f"data.stages.{cfg.stage}.{cfg.eval.on.name}", cfg.data.mixture(cfg.stage).part(cfg.eval.on))

    def also(self) -> dict[str, tuple[Collator, int]]:
        """The same of the other stages that eval.also names."""
        return {stage: self._measured(f"data.stages.{stage}", self._sources_of(stage)) for stage in self.cfg.eval.also}

    def _sources_of(self, stage: str) -> dict[str, SourceConfig]:
        data, on = self.cfg.data, self.cfg.eval.on
        if stage == "base":
            return data.base_text(on.name)
        if stage not in data.stages:
            known = ", ".join(data.stages) or "base"
            raise UserError(f"eval.also={self.cfg.eval.also}: this data has no stage {stage}, only {known}")
        return data.stages[stage].part(on)

    def _measured(self, key: str, sources: dict[str, SourceConfig]) -> tuple[Collator, int]:
        cfg = self.cfg
        mixture = self._mixture(key, sources, VALIDATION_SEED, MEASURED)
        validation = instantiate_config(cfg.collator, mixture, cfg.train.seq_len, self.tokenizer.pad_id, last_epoch=0)
        rows = validation.rows_in(1)
        if cfg.eval.max_tokens:
            rows = min(rows, max(1, cfg.eval.max_tokens // cfg.train.seq_len))
        return validation, rows

    def _mixture(
        self, key: str, sources: dict[str, SourceConfig], seed: int, loss: LossWeights, shares: Shares = Shares()
    ) -> Mixture:
        """The sources of a configuration key as one mixture of documents; `seed` decides their order, `loss` what their tokens
        weigh, `shares` how many of each there are."""
        if not sources:
            if key.endswith(".test"):
                raise UserError(f"this data has no test part: give {key} in its YAML file, or data.test_path with data=local")
            raise UserError(f"{key} has no source; name one, or use eval=none for no validation")
        data, cache = self.cfg.data, cache_dir(self.cfg.data)
        skip = data.on_malformed == OnMalformed.skip
        tokenized, settled = [], []
        for name, given in sources.items():
            source = with_schema(name, given, cache, data.limits)
            tokenized.append(load_or_tokenize(name, source, self.tokenizer, cache, skip, data.workers, data.ignore, data.limits))
            settled.append(source)
            if source.schema != given.schema:
                self._note(logging.INFO, f"data source {name}: its columns are those of data.schema={source.schema.name}")
            self.note_malformed(name, len(tokenized[-1]), tokenized[-1].malformed)
        unused = [name for name in data.ignore if not any(name in source.left_out for source in tokenized)]
        if unused and key.endswith(".train"):
            names = ",".join(unused)
            self._note(logging.WARNING, f"data.ignore=[{names}] has no effect: no message of the training data has content there")
        return Mixture(tokenized, settled, seed, folder=cache / "rows", loss=loss, shares=shares)

    def question_sets(self) -> dict[str, list[Question]]:
        """The data's own question sets, and MMLU and ARC where their paths are given, by name."""
        data, config, cache = self.cfg.data, self.cfg.eval, cache_dir(self.cfg.data)

        def from_hub(path: str, subset: str) -> SourceConfig:
            return SourceConfig(path=path, subset=subset, schema=Schema.multiple_choice, split=config.split)

        sources = dict(data.multiple_choice_test if config.on == Part.test else data.multiple_choice)
        if config.on == Part.test:
            config = replace(config, mmlu_path=None, arc_path=None)  # the questions that trainings and sweeps are measured on
        if config.mmlu_path:
            sources["mmlu"] = from_hub(config.mmlu_path, "all")
        if config.arc_path:
            sources["arc_easy"] = from_hub(config.arc_path, "ARC-Easy")
            sources["arc_challenge"] = from_hub(config.arc_path, "ARC-Challenge")
        if not sources:
            self.note("multiple_choice", "this data has no question set, and neither eval.mmlu_path nor eval.arc_path is given")
        asked = {}
        for name, source in sources.items():
            if config.max_problems and (source.limit is None or source.limit > config.max_problems):
                source = replace(source, limit=config.max_problems)
            malformed = MalformedRows() if data.on_malformed == OnMalformed.skip else None
            records = open_records(name, source, cache, data.limits)
            asked[name] = questions(name, records, self.tokenizer, malformed)
            self.say_limit(name, len(asked[name]), None if source.path.startswith(GENERATE) else len(records.table))
            if malformed:
                self.note_malformed(name, len(asked[name]), malformed)
        return asked

    def say_limit(self, name: str, asked: int, of: int | None) -> None:
        """Record how many questions of a set are asked. `of`: all that there are; None: they are generated."""
        self.asked[name] = {"asked": asked, "of": of}

    def note(self, suite: str, reason: str) -> None:
        """Say that the accuracy of a suite is not measured: with a warning, where the command line asks for it."""
        asked_for = {"eval", f"eval.{suite}"} & {key_of(override) for override in current_job().overrides}
        what = "no accuracy is" if suite == "multiple_choice" else f"{suite} is not"
        self._note(logging.WARNING if asked_for else logging.INFO, f"{what} measured: {reason}")

    def _note(self, level: int, message: str) -> None:
        self.notes.append((level, message))

    def note_malformed(self, name: str, used: int, malformed: MalformedRows) -> None:
        if malformed.count:
            total = used + malformed.count
            self._note(logging.WARNING, f"data source {name}: {malformed.count:,} of {total:,} rows left out: {malformed}")


def cache_dir(data: DataConfig) -> Path:
    """data.cache_dir, else the default cache folder."""
    return Path(data.cache_dir).expanduser().resolve() if data.cache_dir else default_cache_dir()
