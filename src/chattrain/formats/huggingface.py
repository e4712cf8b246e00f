"""Hugging Face folders of model type `nanochat`: written so that transformers loads them, and read back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from chattrain.errors import UserError
from chattrain.formats.chat_template import chat_template
from chattrain.formats.imported import FolderFormat, ImportedModel, ModelFolder
from chattrain.model.gpt import LOGIT_CAP, ROPE_BASE
from chattrain.storage.files import read_json
from chattrain.storage.tensors import read_tensors
from chattrain.tokenizer import Tokenizer, tokenizer_json
from chattrain.tokenizer.special_tokens import ASSISTANT_END, BOS

MODEL_TYPE = "nanochat"
EPS = torch.finfo(torch.float32).eps  # the eps of rms_norm in fp32
DEFAULT_EPS = 1e-6  # transformers' default, read as EPS: logits of random models change by at most 2e-4
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Names of ours -> names of transformers, within a block and outside.
BLOCK_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTER_NAMES = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}


def find(folder: Path) -> ModelFolder | None:
    """The folder as a ModelFolder if it has a config.json and safetensors weights, else None."""
    weights = [folder / name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    if not weights or not (folder / "config.json").is_file():
        return None
    return ModelFolder(folder, FolderFormat.huggingface, tuple(weights[:1]), tokenizer=folder, stage=None)


def model_type(folder: Path) -> str:
    """The model_type of a config.json. Raises UserError if the file cannot be read or names no type."""
    kind = read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{folder / 'config.json'} names no model_type")
    return kind


def write(folder: Path, sizes: dict[str, int], weights: dict[str, Tensor], tokenizer: Tokenizer, seq_len: int) -> None:
    """Write a model into an empty folder, for AutoModelForCausalLM and AutoTokenizer to load offline. Weights stay fp32."""
    bos, end = tokenizer.special(BOS), tokenizer.special(ASSISTANT_END)
    tokens = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": end}
    hf_names = _hf_names(sizes["n_layer"])
    save_file(
        {hf_names[name]: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    _write_json(
        folder / "config.json",
        {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": MODEL_TYPE,
            "dtype": "float32",
            **_fixed(sizes),
            "vocab_size": sizes["vocab_size"],
            "hidden_size": sizes["n_embd"],
            "num_hidden_layers": sizes["n_layer"],
            "num_attention_heads": sizes["n_head"],
            "num_key_value_heads": sizes["n_kv_head"],
            "max_position_embeddings": seq_len,
            "rms_norm_eps": EPS,
            **tokens,
        },
    )
    _write_json(
        folder / "generation_config.json", {"do_sample": False, "bos_token_id": bos, "pad_token_id": end, "eos_token_id": end}
    )
    write_tokenizer(folder, tokenizer, seq_len)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    """Write the files that AutoTokenizer loads, chat template included."""
    _write_json(folder / "tokenizer.json", tokenizer_json.write(tokenizer.encoding))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": ASSISTANT_END,
            "pad_token": ASSISTANT_END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": seq_len,
        },
    )
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer), encoding="utf-8")


def read(folder: Path) -> ImportedModel:
    """Read a folder of model type `nanochat`.

    Raises UserError for settings that the GPT does not implement, for weights that do not fit, and for a tokenizer that tiktoken
    cannot express or whose number of tokens is not the model's.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder} is of model type {config.get('model_type')}, not {MODEL_TYPE}")
    sizes = _sizes(folder / "config.json", config)
    our_names = {theirs: ours for ours, theirs in _hf_names(sizes["n_layer"]).items()}
    weights = {our_names.get(name, name): tensor for name, tensor in _read_weights(folder).items()}
    if wrong := sorted(name for name, tensor in weights.items() if not tensor.is_floating_point()):
        raise UserError(f"{folder} does not fit the model: {wrong[0]} is {weights[wrong[0]].dtype}, not a floating-point format")
    encoding = tokenizer_json.read(read_json(folder / "tokenizer.json"))
    if encoding is None:
        raise UserError(
            f"{folder / 'tokenizer.json'} is none that chattrain or nanochat wrote: no tiktoken encoding with "
            f"nanochat's special tokens gives the same ids; model=hf init.from={folder} trains with it as it is"
        )
    tokenizer = Tokenizer(encoding)
    if tokenizer.vocab_size != sizes["vocab_size"]:
        raise UserError(f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, its model {sizes['vocab_size']}")
    seq_len = config.get("max_position_embeddings")
    model = ImportedModel(sizes, {name: t.float() for name, t in weights.items()}, tokenizer, step=0, seq_len=seq_len)
    model.check(str(folder))
    return model


def _fixed(sizes: dict[str, int]) -> dict[str, Any]:
    """The settings of a config.json that follow from the GPT's architecture."""
    return {
        "hidden_act": "relu2",
        "intermediate_size": 4 * sizes["n_embd"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "final_logit_softcapping": LOGIT_CAP,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
    }


def _sizes(file: Path, config: dict[str, Any]) -> dict[str, int]:
    """The sizes of a config.json. Raises UserError that names the settings that the GPT does not implement."""
    named = {
        "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
    }
    sizes: dict[str, Any] = {ours: config.get(theirs) for ours, theirs in named.items()}
    if sizes["n_kv_head"] is None:
        sizes["n_kv_head"] = sizes["n_head"]
    if wrong := [f"{named[name]}={value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]:
        raise UserError(f"{file}: {', '.join(wrong)} must be whole numbers above 0")
    if sizes["n_embd"] % (2 * sizes["n_head"]) or sizes["n_head"] % sizes["n_kv_head"]:
        raise UserError(
            f"{file}: hidden_size={sizes['n_embd']}, num_attention_heads={sizes['n_head']} and "
            f"num_key_value_heads={sizes['n_kv_head']} do not divide"
        )
    expected = _fixed(sizes) | {"head_dim": sizes["n_embd"] // sizes["n_head"], "quantization_config": None}
    actual = _effective_settings(config, expected)
    differs = [f"{name}={actual[name]!r} instead of {value!r}" for name, value in expected.items() if actual[name] != value]
    if (eps := config.get("rms_norm_eps", DEFAULT_EPS)) not in (EPS, DEFAULT_EPS):
        differs.append(f"rms_norm_eps={eps!r} instead of {EPS!r} or {DEFAULT_EPS!r}")
    if differs:
        raise UserError(
            f"{file} describes a model that chattrain does not implement: {', '.join(differs)}; model=hf trains it as it is"
        )
    return sizes


def _effective_settings(config: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The values that transformers would use for the expected settings: those of config.json, or its own defaults."""
    defaults = {**expected, "intermediate_size": 8192}  # the only default of transformers that differs from what we expect
    settings = {name: config.get(name, value) for name, value in defaults.items()}
    settings["head_dim"] = settings["head_dim"] or expected["head_dim"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    settings["rope_parameters"] = {
        "rope_type": rope.pop("type", "default"),
        "rope_theta": config.get("rope_theta") or ROPE_BASE,
        **rope,
    }
    if settings["rope_parameters"].get("partial_rotary_factor") == 1:
        del settings["rope_parameters"]["partial_rotary_factor"]
    return settings


def _hf_names(n_layer: int) -> dict[str, str]:
    """Our name of each weight -> its name in transformers."""
    blocks = {
        f"transformer.h.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(n_layer)
        for ours, theirs in BLOCK_NAMES.items()
    }
    return OUTER_NAMES | blocks


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the weight file, or of all files that the index names."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{folder / INDEX} holds no weight_map, which gives the file of each tensor by name")
    files = sorted(set(weight_map.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise UserError(f"{folder / INDEX} names files outside its folder: {', '.join(outside)}")
    return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
