"""Hugging Face folders of the model type `nanochat`: written for transformers to load, and read back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from chattrain.errors import UserError
from chattrain.formats.imported import FolderFormat, ImportedModel, ModelFolder
from chattrain.model.gpt import LOGIT_CAP, ROPE_BASE
from chattrain.storage.files import read_json
from chattrain.storage.tensors import read_tensors
from chattrain.tokenizer import Tokenizer, tokenizer_json
from chattrain.tokenizer.special_tokens import ASSISTANT_END, BOS

MODEL_TYPE = "nanochat"
EPS = torch.finfo(torch.float32).eps  # of rms_norm in fp32
DEFAULT_EPS = 1e-6  # of transformers, read as EPS: the models train with EPS, and the logits of random ones move by 2e-4 at most
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Our names and theirs, within a block and outside.
BLOCK_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTER_NAMES = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}

# Renders what chat.py renders. Text stands between special tokens, so the ids are the same too; two parts of plain text in a
# row become one text. Text that looks like a special token is refused: a template cannot keep it apart.
#
# What is supervised up to the next tool output stands in one `generation` block: of a character that is several tokens,
# transformers takes the first one alone for the end of a block. So a block should end with a special token; it does, but where
# tool output follows upon text without a call.
CHAT_TEMPLATE = """\
{%- macro text(content, i) -%}
{%- for name in [SPECIAL_TOKENS] -%}
{%- if name in content -%}
{{- raise_exception('message ' ~ i ~ ' holds the text ' ~ name ~ ', which the tokenizer would take for the special token') -}}
{%- endif -%}
{%- endfor -%}
{{- content -}}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] is not defined or message['content'] is not defined or message['content'] is none -%}
{{- raise_exception('message ' ~ loop.index0 ~ ' needs `role` and `content`') -}}
{%- endif -%}
{%- endfor -%}
{%- if messages[0]['role'] == 'system' -%}
{%- if messages | length < 2 or messages[1]['role'] != 'user' -%}
{{- raise_exception('a system message must be followed by a user message') -}}
{%- endif -%}
{%- if messages[0]['content'] is not string -%}
{{- raise_exception('system and first user message must be strings') -}}
{%- endif -%}
{%- set system = messages[0]['content'] ~ '\\n\\n' -%}
{%- set first = 1 -%}
{%- else -%}
{%- set system = '' -%}
{%- set first = 0 -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in messages[first:] -%}
{%- set i = loop.index0 + first -%}
{%- set expected = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
{%- set content = message['content'] -%}
{%- if message['role'] != expected -%}
{{- raise_exception('message ' ~ i ~ ' is from ' ~ message['role'] ~ ' where ' ~ expected ~ ' must speak') -}}
{%- endif -%}
{%- if expected == 'user' -%}
{%- if content is not string -%}
{{- raise_exception('message ' ~ i ~ ': the content of a user must be a string') -}}
{%- endif -%}
{{- '<|user_start|>' ~ text((system if loop.first else '') ~ content, i) ~ '<|user_end|>' -}}
{%- else -%}
{%- if content is string -%}
{%- set content = [{'type': 'text', 'text': content}] -%}
{%- elif content is mapping or content is not iterable or not content -%}
{{- raise_exception('message ' ~ i ~ ': the content of an assistant must be a string or a list of parts') -}}
{%- endif -%}
{{- '<|assistant_start|>' -}}
{%- set run = namespace(done='', plain='') -%}
{%- for part in content -%}
{%- if part is not mapping or part['text'] is not string -%}
{{- raise_exception('message ' ~ i ~ ': a part must have a `type` and a string `text`') -}}
{%- endif -%}
{%- if part['type'] == 'text' -%}
{%- set run.plain = run.plain ~ part['text'] -%}
{%- else -%}
{%- set run.done = run.done ~ text(run.plain, i) -%}
{%- set run.plain = '' -%}
{%- if part['type'] == 'python' -%}
{%- set run.done = run.done ~ '<|python_start|>' ~ text(part['text'], i) ~ '<|python_end|>' -%}
{%- elif part['type'] == 'python_output' -%}
{%- generation -%}{{- run.done -}}{%- endgeneration -%}
{%- set run.done = '' -%}
{{- '<|output_start|>' ~ text(part['text'], i) ~ '<|output_end|>' -}}
{%- else -%}
{{- raise_exception('message ' ~ i ~ ': unknown part type; known are text, python, python_output') -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- generation -%}{{- run.done ~ text(run.plain, i) ~ '<|assistant_end|>' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages[-1]['role'] == 'assistant' -%}
{{- raise_exception('nobody waits for a reply: the last message is from the assistant already') -}}
{%- endif -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def chat_template(tokenizer: Tokenizer) -> str:
    """The template (Jinja) of a tokenizer, which names all of its special tokens."""
    return CHAT_TEMPLATE.replace("[SPECIAL_TOKENS]", json.dumps(sorted(tokenizer.encoding._special_tokens)))


def find(folder: Path) -> ModelFolder | None:
    """The model of a folder with a config.json and safetensors weights; None where one of them is missing."""
    weights = [folder / name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    if not weights or not (folder / "config.json").is_file():
        return None
    return ModelFolder(folder, FolderFormat.huggingface, tuple(weights[:1]), tokenizer=folder, stage=None)


def model_type(folder: Path) -> str:
    """Raises UserError for a config.json that cannot be read or names no type."""
    kind = read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{folder / 'config.json'} names no model_type")
    return kind


def write(folder: Path, sizes: dict[str, int], weights: dict[str, Tensor], tokenizer: Tokenizer, seq_len: int) -> None:
    """Fill an empty folder that AutoModelForCausalLM and AutoTokenizer load, offline. Weights stay fp32."""
    bos, end = tokenizer.special(BOS), tokenizer.special(ASSISTANT_END)
    tokens = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": end}
    theirs = _their_names(sizes["n_layer"])
    save_file(
        {theirs[name]: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()},
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
    """What AutoTokenizer loads, chat template included."""
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
    """A folder of model type `nanochat`. Raises UserError for settings that our model does not compute, weights that do not
    fit, and a tokenizer that tiktoken cannot express or that has another number of tokens than the model."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder} is of model type {config.get('model_type')}, not {MODEL_TYPE}")
    sizes = _sizes(folder / "config.json", config)
    ours = {theirs: name for name, theirs in _their_names(sizes["n_layer"]).items()}
    weights = {ours.get(name, name): tensor for name, tensor in _read_weights(folder).items()}
    if wrong := sorted(name for name, tensor in weights.items() if not tensor.is_floating_point()):
        raise UserError(f"{folder} does not fit the model: {wrong[0]} is {weights[wrong[0]].dtype}, not a floating-point format")
    encoding = tokenizer_json.read(read_json(folder / "tokenizer.json"))
    if encoding is None:
        raise UserError(
            f"{folder / 'tokenizer.json'} is none that chattrain or nanochat wrote: no tiktoken encoding with "
            f"nanochat's special tokens gives its ids; model=hf init.from={folder} trains with it as it is"
        )
    tokenizer = Tokenizer(encoding)
    if tokenizer.vocab_size != sizes["vocab_size"]:
        raise UserError(f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, its model {sizes['vocab_size']}")
    seq_len = config.get("max_position_embeddings")
    model = ImportedModel(sizes, {name: t.float() for name, t in weights.items()}, tokenizer, step=0, seq_len=seq_len)
    model.check(str(folder))
    return model


def _fixed(sizes: dict[str, int]) -> dict[str, Any]:
    """What of a config.json is the same in all our models."""
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
    """The sizes of a config.json. Raises UserError that names what differs from what our model computes."""
    named = {
        "vocab_size": "vocab_size",
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
    }
    sizes = {ours: config.get(theirs) for ours, theirs in named.items()}
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
    found = _found(config, expected)
    differs = [f"{name}={found[name]!r} instead of {value!r}" for name, value in expected.items() if found[name] != value]
    if (eps := config.get("rms_norm_eps", DEFAULT_EPS)) not in (EPS, DEFAULT_EPS):
        differs.append(f"rms_norm_eps={eps!r} instead of {EPS!r} or {DEFAULT_EPS!r}")
    if differs:
        raise UserError(
            f"{file} describes a model that chattrain does not compute: {', '.join(differs)}; model=hf trains it as it is"
        )
    return sizes


def _found(config: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json, of the settings that are expected to have one value."""
    left_out = {**expected, "intermediate_size": 8192}  # the one default of theirs that is no default of ours
    found = {name: config.get(name, value) for name, value in left_out.items()}
    found["head_dim"] = found["head_dim"] or expected["head_dim"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    found["rope_parameters"] = {
        "rope_type": rope.pop("type", "default"),
        "rope_theta": config.get("rope_theta") or ROPE_BASE,
        **rope,
    }
    if found["rope_parameters"].get("partial_rotary_factor") == 1:
        del found["rope_parameters"]["partial_rotary_factor"]
    return found


def _their_names(n_layer: int) -> dict[str, str]:
    """Our name of each weight -> theirs."""
    blocks = {
        f"transformer.h.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(n_layer)
        for ours, theirs in BLOCK_NAMES.items()
    }
    return OUTER_NAMES | blocks


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Of one file or of several that an index names."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / INDEX} holds no weight_map: the file of each tensor by name is wanted")
    files = sorted(set(places.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise UserError(f"{folder / INDEX} names files outside its folder: {', '.join(outside)}")
    return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
