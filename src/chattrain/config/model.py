"""The `model` group: chattrain's GPT, given by its sizes, or any causal model of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from chattrain.errors import UserError


@dataclass
class ModelConfig:
    _target_: str = MISSING

    def check(self) -> None:
        """Raises UserError for sizes that do not fit each other."""

    def misfit(self, saved: dict[str, Any]) -> str | None:
        """How the configured model differs from `saved`, the `shape` of a saved model; None: they are the same."""
        raise NotImplementedError


@dataclass
class GPTConfig(ModelConfig):
    _target_: str = "chattrain.model.gpt.build"
    n_layer: int = MISSING  # blocks
    n_embd: int = MISSING  # width of the stream between the blocks, a multiple of 2 x n_head
    n_head: int = MISSING  # query heads
    n_kv_head: int | None = None  # key and value heads; null: as many as query heads

    def check(self) -> None:
        kv = self.n_kv_head if self.n_kv_head is not None else self.n_head
        if self.n_layer < 1 or self.n_head < 1 or kv < 1:
            raise UserError(f"model.n_layer={self.n_layer}, n_head={self.n_head}, n_kv_head={kv} must be 1 or more")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"model.n_embd={self.n_embd} does not give {self.n_head} heads of an even size; "
                "make n_embd a multiple of 2 x n_head"
            )
        if self.n_head % kv:
            raise UserError(f"model.n_head={self.n_head} is not a multiple of model.n_kv_head={kv}")

    def misfit(self, saved: dict[str, Any]) -> str | None:
        if "model_type" in saved:
            return f"it has a Hugging Face model of type {saved['model_type']}, which is model=hf"
        configured = {
            "n_layer": self.n_layer,
            "n_embd": self.n_embd,
            "n_head": self.n_head,
            "n_kv_head": self.n_kv_head or self.n_head,
        }
        return (
            ", ".join(f"it has {k}={saved.get(k)}, the config asks for {v}" for k, v in configured.items() if saved.get(k) != v)
            or None
        )


@dataclass
class HFModelConfig(ModelConfig):
    _target_: str = "chattrain.model.hf.build"

    def misfit(self, saved: dict[str, Any]) -> str | None:
        return None if "model_type" in saved else "it is none of Hugging Face's but one of model=tiny, d6, d12, d20, d32"
