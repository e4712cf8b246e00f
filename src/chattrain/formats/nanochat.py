"""nanochat's model folders (December 2025): weights, sizes and tokenizer, without arbitrary unpickling.

    model_021400.pt  meta_021400.json  tokenizer.pkl  token_bytes.pt

The tokenizer is in the folder itself (as on the hub), in its tokenizer/ folder, or in nanochat's base directory next to
base_checkpoints/.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chattrain.errors import UserError
from chattrain.formats.imported import FolderFormat, ImportedModel, ModelFolder
from chattrain.storage.tensors import is_plain_tensor, read_torch_file
from chattrain.tokenizer import Tokenizer
from chattrain.tokenizer.nanochat import read_encoding

if TYPE_CHECKING:
    from chattrain.tokenizer.huggingface import HFTokenizer

MODEL_FILE = re.compile(r"model_(\d+)\.pt")
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")  # keys of model_config
STAGES = {"base_checkpoints": "base", "mid_checkpoints": "mid", "chatsft_checkpoints": "sft"}
# Tensors of later versions, whose architecture differs: part of the tensor name -> description.
NEWER = {
    "value_embeds.": "value embeddings",
    "ve_gate": "gates of value embeddings",
    "resid_lambdas": "residual scalars",
    "x0_lambdas": "scalars of the first embedding",
    "smear": "smeared embeddings",
    "backout": "a backed-out residual",
}
EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


def find(folder: Path) -> ModelFolder | None:
    """The folder as a ModelFolder if it has a `model_NNNNNN.pt`, else None."""
    files = _model_files(folder)
    if not files:
        return None
    tokenizer = next((path for path in _tokenizer_folders(folder) if (path / "tokenizer.pkl").is_file()), None)
    stage = next((STAGES[part] for part in reversed(folder.resolve().parts) if part in STAGES), None)
    return ModelFolder(folder, FolderFormat.nanochat, tuple(files), tokenizer, stage)


def read(source: ModelFolder, tokenizer_dir: Path | None = None) -> ImportedModel:
    """Read the newest step of the folder. Raises UserError for files that are missing, broken or of another architecture.

    The weights are fp32, converted exactly from bf16 and fp16; weights in fp32 are memory-mapped and not copied.
    """
    folder, file = source.path, source.model_files[-1]
    number = file.stem.removeprefix("model_")
    meta = file.with_name(f"meta_{number}.json")
    config, weights = _read_config(meta), _read_weights(file)
    _refuse_newer(file, config, weights)
    sizes = _sizes(meta, config)
    if sizes["n_layer"] > len(weights) or sizes["n_embd"] > sum(t.numel() for t in weights.values()):
        raise UserError(
            f"{file} does not fit the model: n_layer={sizes['n_layer']}, n_embd={sizes['n_embd']} of {meta.name} "
            f"are too large for its {len(weights)} tensors; take both files from the same checkpoint"
        )
    seq_len = sizes.pop("sequence_len")
    tokenizer_dir = tokenizer_dir or source.tokenizer
    if tokenizer_dir is None:
        raise UserError(
            f"{folder} has no tokenizer: no tokenizer.pkl in {', '.join(map(str, _tokenizer_folders(folder)))}; name its "
            "folder with tokenizer.path=<folder>"
        )
    tokenizer = _read_tokenizer(tokenizer_dir)
    if tokenizer.vocab_size != sizes["vocab_size"]:
        raise UserError(
            f"the tokenizer in {tokenizer_dir} has {tokenizer.vocab_size} tokens, the model in {file} "
            f"{sizes['vocab_size']}; name the right one with tokenizer.path=<folder>"
        )
    model = ImportedModel(sizes, weights, tokenizer, int(number), seq_len)
    model.check(str(file))
    return model


def _model_files(folder: Path) -> list[Path]:
    """The weight files, sorted by step, oldest first."""
    matches = (MODEL_FILE.fullmatch(f.name) for f in folder.glob("model_*.pt"))
    return [folder / match[0] for match in sorted(filter(None, matches), key=lambda match: int(match[1]))]


def _tokenizer_folders(folder: Path) -> list[Path]:
    """The folders in which the tokenizer of a model may be."""
    return [folder, folder / "tokenizer", folder.resolve().parent.parent / "tokenizer"]


def _read_tokenizer(folder: Path) -> Tokenizer | HFTokenizer:
    if (folder / "tokenizer.pkl").is_file():
        return Tokenizer(read_encoding(folder))
    return Tokenizer.load(folder)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["model_config"]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; it belongs to the weights of the same step") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} holds no model_config: {error!r}; take the one that nanochat wrote with the weights") from error
    if not isinstance(config, dict):
        raise UserError(
            f"{file} holds no model_config but a {type(config).__name__}; take the one that nanochat wrote with the weights"
        )
    return config


def _refuse_newer(file: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises UserError that names all settings and tensors that the architecture of December 2025 does not have."""
    first_names = {kind: name for name in reversed(sorted(weights)) for mark, kind in NEWER.items() if mark in name}
    news = [f"{kind} ({name})" for kind, name in first_names.items()]
    if unknown := sorted(config.keys() - set(SIZES)):
        news.append(f"its model_config has {', '.join(unknown)}")
    if news:
        raise UserError(f"{file} is of a newer nanochat: {', '.join(news)}. chattrain reads the architecture of December 2025")


def _sizes(file: Path, config: dict[str, Any]) -> dict[str, int]:
    if missing := [name for name in SIZES if name not in config]:
        raise UserError(f"{file}: model_config lacks {', '.join(missing)}; take the one that nanochat wrote with the weights")
    if wrong := [f"{name}={value!r}" for name, value in config.items() if type(value) is not int or value < 1]:
        raise UserError(f"{file}: {', '.join(wrong)} in model_config must be whole numbers above 0")
    n_embd, n_head, n_kv_head = config["n_embd"], config["n_head"], config["n_kv_head"]
    if n_embd % (2 * n_head) or n_head % n_kv_head:
        raise UserError(f"{file}: n_embd={n_embd} must be a multiple of 2 x n_head={n_head}, and n_head of n_kv_head={n_kv_head}")
    return dict(config)


def _read_weights(file: Path) -> dict[str, Tensor]:
    state = read_torch_file(file)
    if not isinstance(state, dict) or not all(is_plain_tensor(tensor) for tensor in state.values()):
        raise UserError(f"{file} holds no weights: it must be a dictionary of dense tensors by name, as nanochat saves it")
    weights = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    if len(weights) < len(state):
        raise UserError(f"{file} holds a tensor twice, with and without _orig_mod. before its name; save one of them")
    if wrong := [f"{name} is {tensor.dtype}" for name, tensor in weights.items() if tensor.dtype not in EXACT_IN_FP32]:
        raise UserError(f"{file}: {wrong[0]}, which fp32 does not represent exactly; save it as fp32, bf16 or fp16")
    return {name: tensor.float() for name, tensor in weights.items()}
