"""The model: nanochat's GPT of December 2025.

Rotary embeddings (https://arxiv.org/abs/2104.09864), RMSNorm without parameters, on queries and keys too and after the
embedding, squared ReLU (https://arxiv.org/abs/2109.08668), no biases, untied head, logits with a soft cap at 15,
grouped-query attention (https://arxiv.org/abs/2305.13245) as an option. Parameter names are nanochat's.

B rows, T tokens, V vocabulary, C = n_embd channels, H heads of D channels, L choices.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chattrain.data.batch import Batch
from chattrain.data.packing import IGNORE_INDEX
from chattrain.model.attention import Attend, attention, block_attention_pays, choose_attention, has_varlen, never
from chattrain.model.causal_lm import CausalLM
from chattrain.model.compiling import compile_each
from chattrain.model.elementwise import norm, rotated_norm, squared_relu
from chattrain.model.head import (
    HeadSettings,
    compute_dtype,
    head_settings,
    in_places,
    summed_loss,
    supervised,
    target_weights,
    token_losses,
)
from chattrain.model.kv_cache import KVCache
from chattrain.model.recompute import recompute
from chattrain.storage.tensors import fill_model, unique_tensors

ROPE_BASE = 10_000.0
LOGIT_CAP = 15.0


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, n_kv_head: int):
        super().__init__()
        self.head_dim = n_embd // n_head
        self.c_q = nn.Linear(n_embd, n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(n_embd, n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(n_embd, n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.project(attend(self.queries(x, cos, sin), *self.keys_and_values(x, cos, sin)))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, H, D)"""
        return rotated_norm(self._heads(self.c_q(x)), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, H, D) each"""
        return rotated_norm(self._heads(self.c_k(x)), cos, sin), self._heads(self.c_v(x))

    def project(self, y: Tensor) -> Tensor:
        """The output projection: (B, T, H, D) to (B, T, C)."""
        return self.c_proj(y.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)  # (B, T, H, D)


class MLP(nn.Module):
    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(squared_relu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, n_kv_head: int):
        super().__init__()
        self.attn = Attention(n_embd, n_head, n_kv_head)
        self.mlp = MLP(n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """(B, T, C) to the same. What training and validation run; `compile_blocks` compiles it."""
        return self._layer(x, cos, sin, attend)

    def uncompiled(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`forward` for passes of other shapes than training's, which would compile anew for each: questions and replies."""
        return self._layer(x, cos, sin, attend)

    def _layer(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(norm(x), cos, sin, attend)
        return x + self.mlp(norm(x))

    def at(self, x: Tensor, cos: Tensor, sin: Tensor, indices: Tensor) -> Tensor:
        """`forward`'s output (B, C) at the token indices (B,) alone. The other tokens only need keys and values."""
        k, v = self.attn.keys_and_values(norm(x), cos, sin)
        x = x[torch.arange(len(x), device=x.device), indices][:, None]  # (B, 1, C)
        seen = torch.arange(k.size(1), device=x.device) <= indices[:, None]  # (B, T)
        q = self.attn.queries(norm(x), cos[indices][:, None], sin[indices][:, None])
        x = x + self.attn.project(attention(q, k, v, seen[:, None, None]))
        return (x + self.mlp(norm(x)))[:, 0]


class Transformer(nn.Module):
    """Embedding and blocks; a module of its own for nanochat's parameter names."""

    def __init__(self, vocab_size: int, n_layer: int, n_embd: int, n_head: int, n_kv_head: int):
        super().__init__()
        # From a tensor: nn.Embedding would draw weights, and on the meta device that imports torch's compiler, for a second.
        self.wte = nn.Embedding.from_pretrained(torch.zeros(vocab_size, n_embd), freeze=False)
        self.h = nn.ModuleList(Block(n_embd, n_head, n_kv_head) for _ in range(n_layer))


class GPT(CausalLM):
    """`model(inputs, targets)` gives the loss of every target, `model(inputs)` the logits.

    n_embd channels are split over n_head query heads, which share n_kv_head (None: n_head) key and value heads in groups.
    """

    block_forward_methods: ClassVar[tuple[str, ...]] = ("at", "uncompiled")

    def __init__(self, vocab_size: int, n_layer: int, n_embd: int, n_head: int, n_kv_head: int | None = None):
        super().__init__()
        self.n_layer, self.n_head, self.n_kv_head = n_layer, n_head, n_kv_head or n_head
        self.head_dim = n_embd // n_head
        self.n_embd, self.vocab_size = n_embd, vocab_size
        self.transformer = Transformer(vocab_size, n_layer, n_embd, n_head, self.n_kv_head)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.compiles, self.use_block_attention = False, never  # see compile_blocks
        self.head_settings = None
        self._rotary_tables: tuple[Tensor, Tensor] | None = None  # see _rotary
        self.files = {}

    def weights(self) -> dict[str, Tensor]:
        return unique_tensors(self)

    @property
    def shape(self) -> dict[str, int]:
        """The arguments of a GPT of this shape."""
        return {name: getattr(self, name) for name in ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head")}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Scaled normal matrices (https://arxiv.org/abs/2310.17813), zero output projections and head, normal embedding."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.zero_()
            elif name == "transformer.wte.weight":
                p.normal_(generator=generator)
            else:
                fan_out, fan_in = p.shape
                p.normal_(std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in), generator=generator)

    def features(self, inputs: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Token ids (B, T) to the input of the head (B, T, C). Attention is within documents if positions (B, T) are given.

        cu_seqlens: see `choose_attention`. Without gradients, a compiled block runs the graph that training compiled: gradients
        are enabled for it alone, and what it saves for backward is freed at once.
        """
        cu_seqlens = cu_seqlens if self.varlen else None
        if self.compiles and cu_seqlens is not None:
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one compilation for any number of documents
        x = self._embed(inputs)
        cos, sin = self._rotary(inputs.size(1), like=x)
        if positions is not None:
            cos, sin = cos[positions], sin[positions]  # (B, T, 1, D/2)
        attend = choose_attention(positions, cu_seqlens, self.use_block_attention(positions))
        shares_graph = self.compiles and not torch.is_grad_enabled()
        for block in self.blocks:
            if shares_graph:
                with torch.enable_grad():
                    x = block(x.requires_grad_(), cos, sin, attend).detach()
            else:
                x = block(x, cos, sin, attend)
        return norm(x)

    def _embed(self, inputs: Tensor) -> Tensor:
        """The stream of a pass at its beginning (B, T, C): bf16 under autocast, as in the reference, else fp32."""
        x = self.transformer.wte(inputs)
        return norm(x.to(compute_dtype(x)))

    def logits(self, features: Tensor) -> Tensor:
        """Features (..., C) to logits, fp32 (..., V), with the soft cap 15 tanh(x / 15)."""
        return soft_cap(self.lm_head(features))

    def forward(self, inputs: Tensor, targets: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """With targets (B, T): their losses in nats, fp32 (B, T), 0 where ignored. Without: logits (B, T, V).

        positions (B, T) begin at 0 with each document of a row: attention then stays within a document.
        """
        logits = self.logits(self.features(inputs, positions=positions))
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(targets.shape)

    def loss(self, batch: Batch) -> Tensor:
        features, targets = supervised(self.features(batch.inputs, batch.positions, batch.cu_seqlens), batch)
        weights = target_weights(batch)
        return summed_loss(features, self.lm_head.weight, targets, LOGIT_CAP, self._head_settings, loss_weights=weights)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        features, targets = supervised(self.features(batch.inputs, batch.positions, batch.cu_seqlens), batch)
        return in_places(token_losses(features, self.lm_head.weight, targets, LOGIT_CAP, self._head_settings), batch)

    @property
    def _head_settings(self) -> HeadSettings:
        return self.head_settings or head_settings(self.lm_head.weight.device.type, self.compiles)

    @property
    def varlen(self) -> bool:
        """Does attention get cu_seqlens? Decided outside compiled graphs, as it asks the driver."""
        return has_varlen(self.lm_head.weight.device, self.head_dim)

    def checkpoint_activations(self, selective: bool) -> None:
        recompute(self.blocks, selective)

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.transformer.h))

    def compile_blocks(self, dynamic: bool) -> None:
        self.use_block_attention = block_attention_pays if self.lm_head.weight.device.type == "cpu" else never
        self.compiles = True
        compile_each(self.blocks, dynamic)

    @torch.no_grad()
    def choice_logits(self, inputs: Tensor, positions: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, fp32 (B, L), of the tokens choices (B, L) as successors of positions (B,) in inputs (B, T), and the logarithm,
        fp32 (B,), of the sum over the vocabulary.

        The head is computed in fp32, as bf16 would make ties. In the last block all tokens get keys and values, and only these
        positions the rest.
        """
        x = self._embed(inputs)
        cos, sin = self._rotary(inputs.size(1), like=x)
        *blocks, last = self.blocks
        attend = choose_attention(use_block_attention=self.use_block_attention(None))
        for block in blocks:
            x = block.uncompiled(x, cos, sin, attend)
        features = norm(last.at(x, cos, sin, positions))  # (B, C)
        with torch.autocast(inputs.device.type, enabled=False):
            features, weight = features.float(), self.lm_head.weight
            logits = soft_cap(torch.einsum("bc,blc->bl", features, weight[choices].float()))
            return logits, soft_cap(features @ weight.float().T).logsumexp(dim=1)

    def new_cache(self, rows: int, max_tokens: int) -> KVCache:
        return KVCache(rows, max_tokens, self.lm_head.weight.device)

    def next_logits(self, inputs: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        features = self.decode(inputs, cache)
        if counts is None:
            return self.logits(features[:, -1])
        return self.logits(features[torch.arange(len(inputs), device=inputs.device), counts - 1])

    def decode(self, inputs: Tensor, cache: KVCache) -> Tensor:
        """`features` of inputs (B, T), which follow the tokens in the cache."""
        x, positions = self._embed(inputs), cache.begin(inputs.size(1))
        cache.rotary = cache.rotary or self._rotary(cache.max_tokens, like=x)
        cos, sin = (table[positions] for table in cache.rotary)  # (B, T, 1, D/2)
        for layer, block in enumerate(self.blocks):
            x = block.uncompiled(x, cos, sin, partial(_attend, cache, layer))
        return norm(x)

    def _rotary(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, D/2) of positions 0 to length - 1, with the device and dtype of `like`. The tables are made once, in
        fp32 and then rounded, and grow when a pass is longer than any before."""
        tables = self._rotary_tables
        if tables is None or len(tables[0]) < length or tables[0].dtype != like.dtype or tables[0].device != like.device:
            with torch.inference_mode(False):  # tensors made in inference mode could not be used in training
                channels = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=like.device)
                positions = torch.arange(length, dtype=torch.float32, device=like.device)
                angles = torch.outer(positions, 1.0 / ROPE_BASE ** (channels / self.head_dim))[:, None, :]
                tables = self._rotary_tables = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        return tables[0][:length], tables[1][:length]

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of forward and backward: 6 a weight of the matmuls, and attention (PaLM, https://arxiv.org/abs/2204.02311)."""
        matmul_weights = sum(p.numel() for p in self.parameters()) - self.transformer.wte.weight.numel()
        return 6 * matmul_weights + 12 * self.n_layer * self.n_embd * seq_len


def build(vocab_size: int, start: Path | None, seed: int, **sizes: int) -> GPT:
    """The model on the CPU, with the weights of the checkpoint `start`; if None, random ones that depend on the seed only."""
    with torch.device("meta"):
        model = GPT(vocab_size, **sizes)
    model.to_empty(device="cpu")
    if start is None:
        model.init_weights(torch.Generator().manual_seed(seed))
    else:
        fill_model(start / "model.safetensors", model)
    return model


def soft_cap(logits: Tensor) -> Tensor:
    return LOGIT_CAP * torch.tanh(logits.float() / LOGIT_CAP)


def _attend(cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cache.attend(layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
