"""Hugging Face folders of a known shape with random weights, and conversations of known lengths: no network, no data.

The tokenizer has a token for each byte and none for longer texts, so a text has as many tokens as bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SPECIAL = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATE_TOKENS = 21  # of CHATML around a question and an answer
# Of the published models: config.json of HuggingFaceTB/SmolLM2-135M and Qwen/Qwen3-0.6B.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "Llama",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1_536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
    ),
    "qwen3-0.6b": (
        "Qwen3",
        {
            "vocab_size": 151_936,
            "hidden_size": 1_024,
            "intermediate_size": 3_072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "tiny": (
        "Qwen3",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ),
}


def model_folder(parent: Path, shape: str, device: str) -> Path:
    """The folder of this shape below `parent`: made now, its weights drawn on `device`, or found there. Weights are in bf16, as
    published ones are, with tied embeddings."""
    import torch
    import transformers

    folder = parent / shape
    if (folder / "done").is_file():
        return folder
    name, sizes = SHAPES[shape]
    config = getattr(transformers, f"{name}Config")(tie_word_embeddings=True, max_position_embeddings=8_192, **sizes)
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    write_tokenizer(folder)
    model.generation_config.eos_token_id = SPECIAL.index("<|im_end|>")
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes of the sides
    (folder / "done").touch()
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges, with the chat template CHATML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    raw.add_special_tokens(list(SPECIAL))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>", bos_token="<|bos|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def write_conversations(file: Path, rows: int, shortest: int = 130, longest: int = 450) -> Path:
    """Questions and answers as JSON Lines, in rows of `shortest` to `longest` tokens, as GSM8K's are in published tokenizers.

    Most are near the shorter end; a bit more than half of a row is the answer. `rows` are left where every 20th is held out."""
    rng = random.Random(0)

    def text(size: int) -> str:
        letters = rng.choices("etaoinshrdlu ", k=size - 2)
        return "".join(["a", *letters, "."])  # no space at its ends, which templates strip

    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows * 20 // 19 + 20):
            size = round(rng.triangular(shortest, longest, shortest + 0.3 * (longest - shortest))) - TEMPLATE_TOKENS
            asked = round(size * rng.uniform(0.3, 0.6))
            messages = [{"role": "user", "content": text(asked)}, {"role": "assistant", "content": text(size - asked)}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file
