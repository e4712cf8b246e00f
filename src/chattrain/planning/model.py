"""The model of a configuration without its weights: shapes only."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from chattrain.config import Config
from chattrain.config.model import GPTConfig
from chattrain.errors import UserError
from chattrain.model.gpt import GPT


def fake_model(cfg: Config, vocab_size: int, start: Path | None) -> nn.Module:
    """Under FakeTensorMode. Raises UserError where train.fp8 is asked for, or a Hugging Face folder cannot be read."""
    if cfg.train.fp8:
        raise UserError(
            "train.fp8=true cannot be planned: its layers do not run without a GPU; plan with train.fp8=false, whose "
            "weights, gradients and optimizer are the same"
        )
    if isinstance(cfg.model, GPTConfig):
        return GPT(vocab_size, **{key: value for key, value in vars(cfg.model).items() if not key.startswith("_")})
    return _huggingface(start)


def _huggingface(start: Path) -> nn.Module:
    """As model/hf.py builds it, from the folder's config.json alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from chattrain.model.hf import HFModel

    try:
        config = AutoConfig.from_pretrained(start, local_files_only=True, trust_remote_code=False)
        inner = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises about files that are not its own
        raise UserError(f"{start} cannot be planned as a causal model of transformers: {error}") from error
    return HFModel(inner, {}).train()
