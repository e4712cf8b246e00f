"""Checkpoints as MLflow's LoggedModels, and the data that their metrics are measured on.

A LoggedModel copies no bytes: it names the checkpoint's folder. MLflow's tab Models ranks those of all runs of an experiment by a
metric, and a run that starts from a checkpoint has its model as an input, so that stages can be walked back to the first.
All calls here wait for the store: the sink makes them on its own thread.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chattrain.redact import redact, redact_tree
from chattrain.tracking.mlflow_store import Param, param_text, valid_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

DIGEST_TAG = "chattrain.checkpoint"  # SHA-256 of manifest.json, which holds those of all files: it is found wherever it lies
FOLDER_TAG = "chattrain.folder"


@dataclass(frozen=True)
class DataSet:
    """One source of data, as MLflow shows it."""

    name: str
    digest: str  # 36 characters at most
    source: dict[str, str]  # where it comes from: uri of a file or folder, or path of a hub name
    context: str  # training, validation or evaluation
    source_type: str = "local"  # or hugging_face
    profile: dict[str, int] = field(default_factory=dict)  # counts

    def without_credentials(self) -> DataSet:
        return replace(self, name=redact(self.name), source=redact_tree(self.source))


def log_data_sets(client: MlflowClient, run_id: str, data_sets: list[DataSet]) -> None:
    """The run's inputs. Logging one again changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(d.name, d.digest, d.source_type, json.dumps(d.source), profile=json.dumps(d.profile)),
            [InputTag("mlflow.data.context", d.context)],
        )
        for d in data_sets
    ]
    if inputs:
        client.log_inputs(run_id, datasets=inputs)


def log_start(client: MlflowClient, experiment_id: str, run_id: str, checkpoint: Path) -> None:
    """The LoggedModel of the checkpoint that the run starts from becomes its input, where the store has one."""
    from mlflow.entities import LoggedModelInput

    digest = checkpoint_digest(checkpoint)
    model = _find(client, experiment_id, digest) if digest else None
    inputs = client.get_run(run_id).inputs
    if model and model.model_id not in [i.model_id for i in (inputs.model_inputs if inputs else [])]:
        client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])


def checkpoint_digest(checkpoint: Path) -> str | None:
    """SHA-256 of its manifest; None for a folder without one, such as another program's."""
    manifest = checkpoint / "manifest.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None


def _find(client: MlflowClient, experiment_id: str, digest: str) -> LoggedModel | None:
    """The newest LoggedModel of this checkpoint: of the experiment, else of any."""
    others = [e.experiment_id for e in client.search_experiments() if e.experiment_id != experiment_id]
    for ids in ([experiment_id], others):
        if ids and (found := client.search_logged_models(ids, f"tags.`{DIGEST_TAG}` = '{digest}'", max_results=1)):
            return found[0]
    return None


class CheckpointModels:
    """The LoggedModels of one run's checkpoints."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str):
        self._client, self._experiment_id, self._run_id = client, experiment_id, run_id
        found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
        self._models = {m.tags[DIGEST_TAG]: m for m in found if DIGEST_TAG in m.tags}  # those that the store has

    def add(self, step: int, folder: Path, name: str, params: dict[str, Param], tags: dict[str, str]) -> str:
        """The id of the LoggedModel of the checkpoint of this step, which is made unless the store has it."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        digest = checkpoint_digest(folder) or ""
        model = self._models.get(digest) or self._client.create_logged_model(
            self._experiment_id,
            re.sub(r"[/:.%\"']", "_", name),  # what MLflow refuses in names of models
            self._run_id,
            tags={**tags, DIGEST_TAG: digest, FOLDER_TAG: str(folder), "step": str(step)},
            params={valid_name(key): param_text(value) for key, value in params.items()},
            model_type="checkpoint",
        )
        self._models[digest] = model
        if model.status != LoggedModelStatus.READY:
            self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        outputs = self._client.get_run(self._run_id).outputs
        if model.model_id not in [o.model_id for o in (outputs.model_outputs if outputs else [])]:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step)])
        return model.model_id

    def keep(self, digests: set[str]) -> None:
        """Delete the models of checkpoints that are gone: all but those of these digests."""
        for digest in self._models.keys() - digests:
            self._client.delete_logged_model(self._models.pop(digest).model_id)
