"""What a folder of another program was recognised as, and the model that was read from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from chattrain.model.gpt import GPT
from chattrain.storage.tensors import require_shapes
from chattrain.tokenizer import Tokenizer


class FolderFormat(Enum):
    """Who wrote the model of a folder."""

    chattrain = "chattrain"  # a run or a checkpoint of ours
    nanochat = "nanochat"
    huggingface = "huggingface"
    unknown = "unknown"


@dataclass(frozen=True)
class ModelFolder:
    """A folder, recognised once: the rest of the way asks this description and not the folder."""

    path: Path
    format: FolderFormat
    model_files: tuple[Path, ...] = ()  # weights; of nanochat one a step, oldest first
    tokenizer: Path | None = None  # folder of the tokenizer; None: there is none
    stage: str | None = None  # base, mid or sft, where the folder's name says so

    @property
    def is_foreign(self) -> bool:
        """Is it another program's model?"""
        return self.format in (FolderFormat.nanochat, FolderFormat.huggingface)


@dataclass
class ImportedModel:
    """A model of the GPT's architecture, read from another program's folder."""

    sizes: dict[str, int]  # the GPT's arguments: vocab_size, n_layer, n_embd, n_head, n_kv_head
    weights: dict[str, Tensor]  # fp32, under the GPT's parameter names
    tokenizer: Tokenizer
    step: int  # optimizer steps it was trained for; 0: unknown
    seq_len: int | None  # tokens a row in training

    def check(self, where: str) -> None:
        """Raises UserError that names tensors missing, unknown or of another shape than the sizes say."""
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in GPT(**self.sizes).state_dict().items()}
        require_shapes(where, self.weights, expected)
