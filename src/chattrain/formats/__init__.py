"""Models in the files of others, read into chattrain's own form and written out of it: one small file a format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chattrain import checkpoint
from chattrain.model.gpt import GPT
from chattrain.tokenizer import Tokenizer


@dataclass
class Foreign:
    """A model of the GPT's architecture out of another program's folder."""

    sizes: dict[str, int]  # the GPT's arguments: vocab_size, n_layer, n_embd, n_head, n_kv_head
    weights: dict[str, Tensor]  # fp32, under the GPT's parameter names
    tokenizer: Tokenizer
    step: int  # optimizer steps it was trained for; 0: unknown
    seq_len: int | None  # tokens a row in training

    def check(self, where: str) -> None:
        """Raises UserError that names tensors missing, unknown or of another shape than the sizes say."""
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in GPT(**self.sizes).state_dict().items()}
        checkpoint.require_shapes(where, self.weights, expected)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder in another program's form, or None where there is none. Raises UserError if it is broken."""
    from chattrain.formats import huggingface, nanochat, tokenizer_json

    if (folder / "tokenizer.pkl").is_file():
        return nanochat.read_tokenizer(folder)
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        file = folder / "tokenizer.json"
        native = tokenizer_json.read(huggingface.read_json(file)) if file.is_file() else None
        if native is not None:
            return native
        from chattrain.hf_tokenizer import HFTokenizer

        return HFTokenizer(folder)
    return None
