"""Any Hugging Face causal model in the loop (extra `hf`): the interface of CausalLM around a model of transformers.

B rows, T tokens, V vocabulary, L choices.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chattrain.data.batch import Batch
from chattrain.data.packing import IGNORE_INDEX
from chattrain.errors import UserError
from chattrain.model import hf_generate
from chattrain.model.attention import document_mask
from chattrain.model.causal_lm import CausalLM
from chattrain.model.compiling import compile_each
from chattrain.model.head import sum_dtype
from chattrain.model.hf_generate import HFCache
from chattrain.model.kv_cache import KVCache
from chattrain.model.recompute import recompute
from chattrain.storage.files import read_json
from chattrain.storage.tensors import unique_tensors

# Text files that a checkpoint holds beside the weights, so that transformers loads the checkpoint itself.
FILES = ("config.json", "generation_config.json")


class HFModel(CausalLM):
    """`model(inputs, targets)` gives the loss of every target, `model(inputs)` the logits. Weights are fp32."""

    inner: Any  # a PreTrainedModel; transformers is imported where it is used

    def __init__(self, inner: Any, files: dict[str, str]):
        super().__init__()
        self.inner, self.files = inner, files
        self.compiles = False  # see compile_blocks
        config = inner.config.get_text_config()
        self.vocab_size, self.n_embd, self.n_layer = config.vocab_size, config.hidden_size, config.num_hidden_layers

    def weights(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by the names that transformers uses."""
        return unique_tensors(self.inner)

    def train(self, mode: bool = True) -> HFModel:
        """Always evaluation mode: with dropout, a run would depend on more than its seed and its batches."""
        return super().train(False)

    @property
    def lm_head(self) -> nn.Linear:
        return self.inner.get_output_embeddings()

    @property
    def shape(self) -> dict[str, Any]:
        return {
            "model_type": self.inner.config.model_type,
            "vocab_size": self.vocab_size,
            "n_layer": self.n_layer,
            "n_embd": self.n_embd,
        }

    def forward(self, inputs: Tensor, targets: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """With targets (B, T): their losses in nats, fp32 (B, T), 0 where ignored. Without: logits (B, T, V).

        positions (B, T) begin at 0 with each document of a row: attention then stays within a document.
        """
        logits = self.features(inputs, positions).float()
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(targets.shape)

    def features(self, inputs: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        packed = {} if positions is None else {"position_ids": positions, "attention_mask": document_mask(positions)}
        return self.inner(input_ids=inputs, use_cache=False, **packed).logits

    def loss(self, batch: Batch) -> Tensor:
        logits, targets = self.features(batch.inputs, batch.positions).flatten(0, 1), batch.targets.flatten()
        if batch.target_indices is not None:
            logits, targets = logits[batch.target_indices], targets[batch.target_indices]
        return F.cross_entropy(logits.float(), targets, reduction="none").sum(dtype=sum_dtype(logits.device))

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        return self(*batch.arguments)

    def checkpoint_activations(self, selective: bool) -> None:
        """Trade time for memory, see `recompute`. To be called before `compile_blocks`.

        transformers' own switch works in training mode only, which would turn dropout on. Raises UserError for an
        architecture whose layers are no GradientCheckpointingLayer.
        """
        if not self.blocks:
            raise UserError(
                f"train.activation_checkpointing={'selective' if selective else 'block'}, but transformers marks "
                f"no layers of {self.inner.config.model_type} for it; use train.activation_checkpointing=none"
            )
        recompute(self.blocks, selective)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers in order; empty where transformers does not mark them as GradientCheckpointingLayer."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.inner.modules() if isinstance(module, GradientCheckpointingLayer)]

    def compile_blocks(self, dynamic: bool) -> None:
        self.compiles = True
        compile_each(self.blocks, dynamic)

    @torch.no_grad()
    def choice_logits(self, inputs: Tensor, positions: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        kept, indices = positions.unique(return_inverse=True)
        with self._head_in_fp32():
            logits = self.inner(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits  # (B, kept, V)
        logits = logits[torch.arange(len(inputs), device=inputs.device), indices].float()  # (B, V)
        return logits.gather(1, choices), logits.logsumexp(dim=1)

    @contextmanager
    def _head_in_fp32(self):
        """Compute the head in fp32 within this context: under autocast its logits would be bf16, with ties."""

        def recompute_head(head: nn.Linear, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            with torch.autocast(logits.device.type, enabled=False):
                return F.linear(arguments[0].float(), head.weight.float(), None if head.bias is None else head.bias.float())

        hook = self.lm_head.register_forward_hook(recompute_head)
        try:
            yield
        finally:
            hook.remove()

    def new_cache(self, rows: int, max_tokens: int) -> KVCache | HFCache:
        return hf_generate.new_cache(self.inner, rows, max_tokens)

    def next_logits(self, inputs: Tensor, cache: KVCache | HFCache, counts: Tensor | None = None) -> Tensor:
        return hf_generate.next_logits(self.inner, inputs, cache, counts)

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of forward and backward: 6 a weight of the matmuls, and attention (PaLM, https://arxiv.org/abs/2204.02311)."""
        embedding = self.inner.get_input_embeddings().weight
        tied = embedding is self.lm_head.weight
        matmul_weights = sum(p.numel() for p in self.parameters()) - (0 if tied else embedding.numel())
        return 6 * matmul_weights + 12 * self.n_layer * self.n_embd * seq_len


def build(vocab_size: int, start: Path, seed: int) -> HFModel:
    """The model on the CPU, from a Hugging Face folder or a checkpoint of one. `vocab_size` is the tokenizer's.

    Raises UserError if transformers cannot load the folder as a causal model, if weights are missing, or if the tokenizer has
    more ids than the model.
    """
    files = {name: (start / name).read_text(encoding="utf-8") for name in FILES if (start / name).is_file()}
    model = HFModel(_load(start), files)
    if vocab_size > model.vocab_size:
        raise UserError(f"the tokenizer of {start} has {vocab_size} tokens, its model only {model.vocab_size}")
    return model.train()


def check_start(folder: Path, seq_len: int) -> None:
    """Raises UserError for a folder of quantised weights or an adapter, or a model with fewer positions than seq_len."""
    config = read_json(folder / "config.json")
    partial = (
        "quantised weights"
        if config.get("quantization_config")
        else "an adapter"
        if (folder / "adapter_config.json").is_file()
        else None
    )
    if partial:
        raise UserError(f"{folder} holds {partial}: only whole floating-point weights are trained; merge or dequantise it first")
    longest = (config.get("text_config") or config).get("max_position_embeddings") or config.get("n_positions") or seq_len
    if seq_len > longest:
        raise UserError(
            f"train.seq_len={seq_len} is more than the {longest} positions of the model in {folder}; set "
            f"train.seq_len={longest} or less"
        )


def _load(folder: Path) -> nn.Module:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UserError("model=hf needs transformers: pip install 'chattrain[hf]'") from None
    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers raises errors of many types for files that it cannot read
        raise UserError(f"{folder} cannot be loaded by transformers as a causal model: {error}") from error
    inner, info = loaded
    wrong = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, info[kind]))[:3])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    if wrong:
        raise UserError(f"the weights in {folder} do not fit the model of its config.json: {'; '.join(wrong)}")
    return inner
