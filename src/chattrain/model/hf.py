"""Any Hugging Face causal model in the loop (extra `hf`): the interface of CausalLM around a model of transformers.

B rows, T tokens, V vocabulary, L choices.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chattrain.data.batch import Batch
from chattrain.data.packing import IGNORE_INDEX
from chattrain.errors import UserError
from chattrain.model import hf_attention, hf_generate
from chattrain.model.attention import block_attention_pays, choose_attention, has_varlen, never
from chattrain.model.causal_lm import CausalLM
from chattrain.model.compiling import CompiledBlocks
from chattrain.model.head import HeadSettings, compute_dtype, head_settings, in_places, supervised, target_weights
from chattrain.model.hf_generate import HFCache
from chattrain.model.hf_head import ChunkedHead, OwnHead, choose_head, is_right
from chattrain.model.kv_cache import KVCache
from chattrain.model.recompute import recompute
from chattrain.storage.files import read_json
from chattrain.storage.tensors import unique_tensors

log = logging.getLogger("chattrain")

# Text files that a checkpoint holds beside the weights, so that transformers loads the checkpoint itself.
FILES = ("config.json", "generation_config.json")


class HFModel(CausalLM):
    """`model(inputs, targets)` gives the loss of every target, `model(inputs)` the logits. Weights are fp32."""

    recomputes_inputs: ClassVar[bool] = True
    inner: Any  # a PreTrainedModel; transformers is imported where it is used

    def __init__(self, inner: Any, files: dict[str, str]):
        super().__init__()
        self.inner, self.files = inner, files
        config = inner.config.get_text_config()
        self.vocab_size, self.n_embd, self.n_layer = config.vocab_size, config.hidden_size, config.num_hidden_layers
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.max_positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self.head = choose_head(inner)
        self.head_settings = None
        self.compiled: CompiledBlocks | None = None  # see compile_blocks
        self.compiles, self.use_block_attention = False, never
        self.window = hf_attention.window(config)
        self.keeps_attention = hf_attention.use_interface(inner)  # why attention is the model's own; None: it is ours
        self._said: set[str] = set()
        inner.get_input_embeddings().register_forward_hook(_in_compute_dtype)

    def check(self) -> HFModel:
        """Compare head and attention with the model's own, on random tokens, and use the model's own where they differ."""
        ids = torch.randint(0, self.vocab_size, (2, hf_attention.PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        if isinstance(self.head, ChunkedHead) and not is_right(self.head, ids):
            self.head = OwnHead(self.inner)
        if isinstance(self.head, OwnHead):
            log.warning(
                "the head of %s is not a linear layer with a factor or a soft cap: its own is used, and the logits of all "
                "tokens, rows x tokens x %d, exist at once, several times over",
                self.inner.config.model_type,
                self.vocab_size,
            )
        if self.keeps_attention is None:
            self.keeps_attention = hf_attention.isolates(self.head.features, ids)
            if self.keeps_attention is not None:
                hf_attention.own_attention(self.inner)
        return self

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
        packed = {} if positions is None else {"position_ids": positions}
        logits = self.inner(input_ids=inputs, use_cache=False, **packed).logits.float()
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(targets.shape)

    def features(self, inputs: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        with nullcontext() if self.compiled is None else self.compiled.running():
            return self.head.features(input_ids=inputs, **self._attention(inputs, positions, cu_seqlens))

    def _attention(self, inputs: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> dict[str, Any]:
        """Arguments of the model's forward that choose its attention."""
        varlen = has_varlen(inputs.device, self.head_dim)
        keeps = self.keeps_attention
        if keeps is None and self.window is not None and inputs.size(1) > self.window:
            keeps = f"rows of {inputs.size(1)} tokens are longer than its attention window of {self.window}"
        if keeps is not None:
            if positions is not None and (varlen or self.use_block_attention(positions)):
                self._say_once(f"{self.inner.config.model_type} keeps its own attention, with masks, slower: {keeps}")
            return {} if positions is None else {"position_ids": positions}
        if cu_seqlens is not None and self.compiles:
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one compilation for any number of documents
        attend = choose_attention(positions, cu_seqlens if varlen else None, self.use_block_attention(positions))
        return hf_attention.arguments(attend, positions, inputs)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message)

    def loss(self, batch: Batch) -> Tensor:
        features, targets = supervised(self.features(batch.inputs, batch.positions, batch.cu_seqlens), batch)
        return self.head.summed_loss(features, targets, self._head_settings, target_weights(batch))

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        features, targets = supervised(self.features(batch.inputs, batch.positions, batch.cu_seqlens), batch)
        return in_places(self.head.token_losses(features, targets, self._head_settings), batch)

    @property
    def _head_settings(self) -> HeadSettings:
        return self.head_settings or head_settings(self.lm_head.weight.device.type, self.compiles)

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
        self.use_block_attention = block_attention_pays if self.lm_head.weight.device.type == "cpu" else never
        self.compiles = True
        architecture = self.inner.config.model_type
        if not self.blocks:
            log.warning("transformers marks no layers of %s: they run without torch.compile, slower", architecture)
        self.compiled = CompiledBlocks(self.blocks, dynamic, architecture)

    @torch.no_grad()
    def choice_logits(self, inputs: Tensor, positions: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        own_head = isinstance(self.head, OwnHead)  # then all is computed in fp32: in bf16 there would be ties
        with torch.autocast(inputs.device.type, enabled=False) if own_head else nullcontext():
            features = self.head.features(input_ids=inputs, **self._attention(inputs))
        logits = self.head.logits(features[torch.arange(len(inputs), device=inputs.device), positions])  # (B, V)
        return logits.gather(1, choices), logits.logsumexp(dim=1)

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
    return model.check().train()


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


def _in_compute_dtype(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
    """A forward hook: the stream of a pass begins in bf16 under autocast. transformers' norms compute in fp32 inside."""
    return embedded.to(compute_dtype(embedded))


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
