"""Any Hugging Face causal model in the loop (extra `hf`): what the GPT offers, on top of a transformers model.

B rows, T tokens, V vocabulary, L choices.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chattrain.data.batch import Batch
from chattrain.data.packing import IGNORE_INDEX
from chattrain.errors import UserError
from chattrain.model.attention import document_mask
from chattrain.model.compiling import compile_each
from chattrain.model.head import sum_dtype
from chattrain.model.recompute import recompute
from chattrain.storage.files import read_json
from chattrain.storage.tensors import unique_tensors

# Texts beside the weights, which a checkpoint carries along: with them transformers loads the checkpoint itself.
FILES = ("config.json", "generation_config.json")


@dataclass
class HFCache:
    """Keys and values of the tokens so far, in the kind of cache that the architecture wants; it grows by itself."""

    own: Tensor | None  # (B, max_tokens) 1 where a token is the row's own, 0 where padding; None: no row is padded
    past: Any = None
    length: int = 0

    def step(self, count: int) -> dict[str, Any]:
        """What transformers wants to be told with the next tokens."""
        before, self.length = self.length, self.length + count
        if self.own is None:
            return {"past_key_values": self.past}
        own = self.own[:, : self.length]
        positions = (own.cumsum(1) - 1).clamp(min=0)[:, before:]
        return {"past_key_values": self.past, "attention_mask": own, "position_ids": positions}


class HFModel(nn.Module):
    """`model(inputs, targets)` gives the loss of every target, `model(inputs)` the logits. Weights are fp32."""

    forward_methods: ClassVar[tuple[str, ...]] = ("loss", "choice_logits", "seen")  # read weights, as forward does; for FSDP
    block_forward_methods: ClassVar[tuple[str, ...]] = ()

    def __init__(self, inner: nn.Module, files: dict[str, str]):
        super().__init__()
        self.inner, self.files = inner, files
        self.trunk, self.compiles = self._logits, False  # what training runs; see compile_trunk
        config = inner.config.get_text_config()
        self.vocab_size, self.n_embd, self.n_layer = config.vocab_size, config.hidden_size, config.num_hidden_layers

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds, under the names that transformers uses."""
        return unique_tensors(self.inner)

    def train(self, mode: bool = True) -> HFModel:
        """Always as in evaluation: dropout would make a run depend on more than its seed and its batches."""
        return super().train(False)

    @property
    def lm_head(self) -> nn.Module:
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
        logits = self._logits(inputs, None, positions).float()
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(targets.shape)

    def _logits(
        self, inputs: Tensor, cache: None = None, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        packed = {} if positions is None else {"position_ids": positions, "attention_mask": document_mask(positions)}
        return self.inner(input_ids=inputs, use_cache=False, **packed).logits

    def loss(self, batch: Batch) -> Tensor:
        """Sum in nats of the losses of the batch's targets."""
        logits, targets = self.trunk(batch.inputs, None, batch.positions, batch.cu_seqlens).flatten(0, 1), batch.targets.flatten()
        if batch.target_indices is not None:
            logits, targets = logits[batch.target_indices], targets[batch.target_indices]
        return F.cross_entropy(logits.float(), targets, reduction="none").sum(dtype=sum_dtype(logits.device))

    def checkpoint_activations(self, selective: bool) -> None:
        """Trade time for memory, see `recompute`. Before `compile_trunk`.

        transformers' own switch works in its training mode alone, which would turn dropout on. Raises UserError for an
        architecture whose layers are not marked as such.
        """
        if not self.blocks:
            raise UserError(
                f"train.activation_checkpointing={'selective' if selective else 'block'}, but transformers marks "
                f"no layers of {self.inner.config.model_type} for it; use train.activation_checkpointing=none"
            )
        recompute(self.blocks, selective)

    @property
    def blocks(self) -> list[nn.Module]:
        """What forward runs through one after another; none where transformers does not mark them."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.inner.modules() if isinstance(module, GradientCheckpointingLayer)]

    def compile_trunk(self, dynamic: bool, by_block: bool = False) -> None:
        """Compile what `loss` runs. dynamic: for batches of any shape at once, else for each shape on its own. by_block: a block
        at a time, so that between them gradients leave and weights arrive."""
        self.compiles = True
        if by_block and self.blocks:
            compile_each(self.blocks, dynamic)
        else:
            self.trunk = torch.compile(self._logits, dynamic=dynamic)

    def seen(self, inputs: Tensor, cache: None, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The trunk, for checks of it."""
        return self.trunk(inputs, cache, positions, cu_seqlens)

    @torch.no_grad()
    def choice_logits(self, inputs: Tensor, positions: Tensor, choices: Tensor) -> Tensor:
        """Logits, fp32 (B, L), that the tokens choices (B, L) come after positions (B,) of inputs (B, T)."""
        kept, place = positions.unique(return_inverse=True)
        with self._head_in_fp32():
            logits = self.inner(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits  # (B, kept, V)
        return logits[torch.arange(len(inputs), device=inputs.device), place].float().gather(1, choices)

    @contextmanager
    def _head_in_fp32(self):
        """Under autocast the head would round to bf16 and make ties."""

        def again(head: nn.Linear, arguments: tuple[Tensor, ...], rounded: Tensor) -> Tensor:
            with torch.autocast(rounded.device.type, enabled=False):
                return F.linear(arguments[0].float(), head.weight.float(), None if head.bias is None else head.bias.float())

        hook = self.lm_head.register_forward_hook(again)
        try:
            yield
        finally:
            hook.remove()

    def new_cache(self, padding: Tensor, max_tokens: int) -> HFCache:
        """Room for max_tokens a row, of which the first padding (B,) are none of the row's own."""
        own = torch.arange(max_tokens, device=padding.device) >= padding[:, None]
        return HFCache(own.long() if padding.any() else None)

    def next_logits(self, inputs: Tensor, cache: HFCache) -> Tensor:
        """Logits (B, V) of the token after inputs (B, T), which stand behind what the cache holds."""
        out = self.inner(input_ids=inputs, use_cache=True, logits_to_keep=1, **cache.step(inputs.size(1)))
        cache.past = out.past_key_values
        return out.logits[:, -1].float()

    def flops_per_token(self, seq_len: int) -> int:
        """Of forward and backward: 6 a weight of the matmuls, and attention (PaLM, https://arxiv.org/abs/2204.02311)."""
        looked_up = self.inner.get_input_embeddings().weight
        tied = looked_up is self.lm_head.weight
        matmul_weights = sum(p.numel() for p in self.parameters()) - (0 if tied else looked_up.numel())
        return 6 * matmul_weights + 12 * self.n_layer * self.n_embd * seq_len


def build(vocab_size: int, start: Path, seed: int) -> HFModel:
    """The model on the CPU from a Hugging Face folder or a checkpoint of one. `vocab_size` is the tokenizer's.

    Raises UserError where transformers cannot load the folder as a causal model, weights are missing, or the tokenizer
    has ids that the model lacks.
    """
    files = {name: (start / name).read_text(encoding="utf-8") for name in FILES if (start / name).is_file()}
    model = HFModel(_load(start), files)
    if vocab_size > model.vocab_size:
        raise UserError(f"the tokenizer of {start} has {vocab_size} tokens, its model only {model.vocab_size}")
    return model.train()


def check_start(folder: Path, seq_len: int) -> None:
    """Raises UserError for a folder that holds no weights to train, or a model whose positions end before seq_len does."""
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
        inner, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever transformers raises about files that are not its own
        raise UserError(f"{folder} cannot be loaded by transformers as a causal model: {error}") from error
    wrong = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, found[kind]))[:3])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if found[kind]
    ]
    if wrong:
        raise UserError(f"the weights in {folder} do not fit the model of its config.json: {'; '.join(wrong)}")
    return inner
