"""Descriptions of a model folder and of a model that was read from one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chattrain.model.gpt import GPT
from chattrain.storage.tensors import require_shapes
from chattrain.tokenizer import Tokenizer

if TYPE_CHECKING:
    from chattrain.tokenizer.huggingface import HFTokenizer


class FolderFormat(Enum):
    """The program that wrote the model in a folder."""

    chattrain = "chattrain"  # a run or a checkpoint
    nanochat = "nanochat"
    huggingface = "huggingface"
    unknown = "unknown"


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose format was recognised."""

    path: Path
    format: FolderFormat
    model_files: tuple[Path, ...] = ()  # weights; with nanochat one file a step, oldest first
    tokenizer: Path | None = None  # folder of the tokenizer; None: not found
    stage: str | None = None  # base, mid or sft, if the folder's name says so

    @property
    def is_foreign(self) -> bool:
        """Was it written by another program?"""
        return self.format in (FolderFormat.nanochat, FolderFormat.huggingface)


@dataclass
class ImportedModel:
    """A model of the GPT's architecture, read from another program's folder."""

    sizes: dict[str, int]  # the GPT's arguments: vocab_size, n_layer, n_embd, n_head, n_kv_head
    weights: dict[str, Tensor]  # fp32, under the GPT's parameter names
    tokenizer: Tokenizer | HFTokenizer
    step: int  # optimizer steps of its training; 0: unknown
    seq_len: int | None  # tokens a row in training

    def check(self, source: str) -> None:
        """Raises UserError that names `source` and the tensors that are missing, unknown or of the wrong shape for the sizes."""
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in GPT(**self.sizes).state_dict().items()}
        require_shapes(source, self.weights, expected)
