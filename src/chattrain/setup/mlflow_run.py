"""What MLflow is told of a run: its name, the parameters that were chosen, tags, and its data sets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from chattrain.config import Config
from chattrain.config.changes import flatten
from chattrain.config.compose import key_of
from chattrain.config.data import SourceConfig
from chattrain.data.collators import Collator
from chattrain.data.files import local_path
from chattrain.data.sources import GENERATE
from chattrain.evals.validation import metric_names
from chattrain.setup.data import EvalData, RunData
from chattrain.setup.job import Job
from chattrain.tracking.mlflow_models import DataSet
from chattrain.tracking.mlflow_state import PARENT_TAG
from chattrain.tracking.mlflow_store import Param
from chattrain.tracking.provenance import command_text, source_tags

# Keys and groups that choose nothing of what a run computes; config.yaml has them.
NOT_CHOSEN = {
    "command",
    "format",
    "runs",
    "run",
    "tracking",
    "chat",
    "inspect",
    "plan",
    "export",
    "serve",
    "verify",
    "sweep",
    "hydra",
}
DIGEST = 12  # characters of a data set's hash, few enough for MLflow's table to show what stands behind it
NUMBERED = "run.seed"  # the one key of `run` that is a choice


def run_name(stage: str, folder_name: str, job: Job) -> str:
    """What differs between runs comes first, as MLflow's table shows about 12 characters of a nested run: of several swept keys,
    their values.

    >>> from chattrain.setup.job import SweepMember
    >>> values = {"optimizer.lr_scale": "0.3", "run.seed": "1", "stage": "sft"}
    >>> run_name("sft", "try-lr_scale_0.3-seed_1", Job(sweep=SweepMember("/runs/sweeps/try", 0, values)))
    '0.3, 1 (lr_scale, seed) sft'
    >>> run_name("sft", "try-lr_scale_0.3", Job(sweep=SweepMember("/runs/sweeps/try", 0, {"optimizer.lr_scale": "0.3"})))
    'lr_scale=0.3 sft'
    >>> run_name("sft", "try", Job())
    'sft try'
    """
    swept = {k.rpartition(".")[2]: value for k, value in job.sweep.values.items() if k != "stage"} if job.sweep else {}
    if not swept:
        return f"{stage} {folder_name}"
    keys, values = ", ".join(swept), ", ".join(swept.values())
    return f"{keys}={values} {stage}" if len(swept) == 1 else f"{values} ({keys}) {stage}"


def chosen_params(cfg: Config, job: Job) -> dict[str, Param]:
    """Groups and keys of the command line with their values, and the stage. All others are in config.yaml."""
    flat = flatten(asdict(cfg))
    groups = {group: choice for group, choice in job.choices.items() if choice not in ("null", None)}
    chosen: dict[str, Param] = {"stage": cfg.stage, **{group: c for group, c in groups.items() if _is_choice(group)}}
    for override in job.overrides:
        key, value = key_of(override), override.partition("=")[2]
        if key not in job.choices and _is_choice(key):
            chosen[key] = _param(flat.get(key, value))
    return chosen


def _is_choice(key: str) -> bool:
    return key == NUMBERED or key.replace("/", ".").partition(".")[0] not in NOT_CHOSEN


def derived_params(cfg: Config, data: RunData, world_size: int) -> dict[str, Param]:
    """What follows from the configuration and is known before step 0."""
    return {
        "num_steps": data.num_steps,
        "rows_per_step": data.rows_per_step,
        "tokens_per_step": data.rows_per_step * cfg.train.seq_len,
        "world_size": world_size,
    }


def model_params(model: nn.Module, learning_rates: dict[str, float]) -> dict[str, Param]:
    """What is known once the model is built: the number of its parameters, and the peak learning rate of each group of them."""
    rates = {f"peak_lr/{group}": rate for group, rate in learning_rates.items()}
    return {"num_parameters": sum(p.numel() for p in model.parameters()), **rates}


def run_tags(cfg: Config, run_dir: Path, job: Job) -> dict[str, str]:
    """Who, what, where. The user's own tags win."""
    tags = {**source_tags(job.overrides), "stage": cfg.stage, "run_dir": str(run_dir)}
    if job.sweep:
        tags["sweep"] = job.sweep.name
        if job.sweep.mlflow_run_id:
            tags[PARENT_TAG] = job.sweep.mlflow_run_id
    return {**tags, **cfg.tracking.tags}


def note(run_dir: Path, job: Job) -> str:
    """The run's description in Markdown: command and folder."""
    return f"```\n{command_text(job.overrides)}\n```\n\nRun folder: `{run_dir}`"


def data_sets(cfg: Config, data: RunData) -> tuple[list[DataSet], dict[str, DataSet]]:
    """(The data sets of a run, beginning of metrics' names -> the data set that they are measured on)."""
    training = _of_collator(data.train, "training")
    validation = _of_collator(data.validation, "validation") if data.validation else []
    measured_on = {}
    if validation:
        whole = validation[0] if len(validation) == 1 else _combined(validation)
        by_source = zip(metric_names([d.name for d in validation]), validation, strict=True)
        measured_on = {"val/": whole}
        measured_on |= {f"val/{metric}/{name}": d for name, d in by_source for metric in ("loss", "loss_all", "bpb")}
        for stage, (collator, _) in data.also.items():
            other = _combined(_of_collator(collator, "validation"))
            measured_on |= {f"val/{metric}/{stage}": other for metric in ("loss", "loss_all", "bpb")}
            validation.append(other)
        validation = list({d.digest: d for d in [*validation, whole]}.values())
    questions = _of_questions(cfg, data)
    measured_on |= {f"eval/{d.name}": d for d in questions}
    return [*training, *validation, *questions], measured_on


def _of_collator(collator: Collator, context: str) -> list[DataSet]:
    """One data set a source, with what the run uses and loses of it."""
    mixture, found = collator.mixture, []
    for i, (cache, source) in enumerate(zip(mixture.caches, mixture.sources, strict=True)):
        used = mixture.lengths[mixture.kept[i]]
        profile = {
            "documents": len(cache),
            "documents_an_epoch": mixture.counts.get(i, 0),
            "tokens": int(cache.offsets[-1]),
            "supervised_tokens": int(cache.num_assistant.sum()),
            "truncated": int((used > collator.seq_len + 1).sum()) if collator.counts.truncated else 0,
            "left_out": len(cache) - len(used),
            "malformed": cache.skipped,
        }
        found.append(_of_source(cache.name, source, cache.content_hash[:DIGEST], context, profile))
    return found


def _of_source(name: str, source: SourceConfig | None, digest: str, context: str, profile: dict[str, int]) -> DataSet:
    if source is None:
        return DataSet(name, digest, {"uri": name}, context, profile=profile)
    if source.path.startswith(GENERATE) or local_path(source.path).exists():
        return DataSet(name, digest, {"uri": source.path}, context, profile=profile)
    hub = {"path": source.path, "config_name": source.subset, "split": source.split}
    return DataSet(name, digest, {k: v for k, v in hub.items() if v}, context, "hugging_face", profile)


def _combined(parts: list[DataSet]) -> DataSet:
    """All sources of the validation as the one data set that val/loss and val/bpb are measured on."""
    digest = hashlib.sha256(json.dumps([d.digest for d in parts]).encode()).hexdigest()[:DIGEST]
    names = " + ".join(d.name for d in parts)
    profile = {key: sum(d.profile[key] for d in parts) for key in parts[0].profile}
    return DataSet(names[:500], digest, {"uri": names}, parts[0].context, profile=profile)


def _of_questions(cfg: Config, data: EvalData) -> list[DataSet]:
    """The question sets. Their digest is that of the rendered questions and answers."""
    paths = {"mmlu": cfg.eval.mmlu_path, "arc_easy": cfg.eval.arc_path, "arc_challenge": cfg.eval.arc_path}
    found = []
    for name, questions in data.question_sets.items():
        source = cfg.data.multiple_choice.get(name)
        if source is None and (path := paths.get(name)):
            source = SourceConfig(path=path, split=cfg.eval.split)
        digest = hashlib.sha256()
        for question in questions:
            digest.update(np.array([*question.ids, -1, question.answer], dtype=np.int32).tobytes())
        found.append(_of_source(name, source, digest.hexdigest()[:DIGEST], "evaluation", {"questions": len(questions)}))
    return found


def _param(value: Any) -> Param:
    """A value of the configuration as MLflow shows it: an enum as its name, a list as text."""
    return value if isinstance(value, str | int | float | bool | None) else getattr(value, "name", str(value))
