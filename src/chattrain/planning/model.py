"""The model of a configuration, without its weights: shapes only."""

from __future__ import annotations

from pathlib import Path

from chattrain.config import Config
from chattrain.config.model import GPTConfig
from chattrain.errors import UserError
from chattrain.model.causal_lm import CausalLM
from chattrain.model.gpt import GPT


def fake_model(cfg: Config, vocab_size: int, start: Path | None) -> CausalLM:
    """The model, to be called under FakeTensorMode. `start` is the Hugging Face folder of model=hf, else unused.

    Raises UserError for train.fp8=true and for a Hugging Face folder that cannot be read.
    """
    if cfg.train.fp8:
        raise UserError(
            "train.fp8=true cannot be planned: its layers do not run without a GPU; plan with train.fp8=false, whose "
            "weights, gradients and optimizer are the same"
        )
    if isinstance(cfg.model, GPTConfig):
        return GPT(vocab_size, **{key: value for key, value in vars(cfg.model).items() if not key.startswith("_")})
    return _huggingface(start)


def _huggingface(start: Path | None) -> CausalLM:
    """The model that model/hf.py builds, from the folder's config.json only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from chattrain.model.hf import HFModel

    try:
        config = AutoConfig.from_pretrained(str(start), local_files_only=True, trust_remote_code=False)
        inner = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types for files that it cannot read
        raise UserError(f"{start} cannot be planned as a causal model of transformers: {error}") from error
    return HFModel(inner, {}).train()
