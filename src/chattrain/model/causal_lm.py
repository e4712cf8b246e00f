"""What the loop, evaluations, generation and checkpoints ask of a model: `GPT` and `HFModel` are the two.

B rows, T tokens, V vocabulary, L choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from chattrain.data.batch import Batch
from chattrain.model.head import HeadSettings


class CausalLM(nn.Module):
    """`model(inputs, targets)` gives the loss of every target, `model(inputs)` the logits. Weights are fp32."""

    # FSDP gathers weights around these methods as around `forward`.
    forward_methods: ClassVar[tuple[str, ...]] = ("loss", "losses", "choice_logits", "features")
    block_forward_methods: ClassVar[tuple[str, ...]] = ()  # of each block
    recomputes_inputs: ClassVar[bool] = False  # are compiled blocks made within `recomputing_inputs`?

    vocab_size: int
    n_layer: int
    n_embd: int
    max_positions: int | None = None  # tokens of a row at most; None: no limit
    lm_head: nn.Linear
    files: dict[str, str]  # text files that a checkpoint holds beside the weights: name -> content
    compiles: bool  # has `compile_blocks` been called?
    use_block_attention: Callable[[Tensor | None], bool]  # by positions (B, T), see `block_attention_pays`
    head_settings: HeadSettings | None  # None: those of the device

    @property
    def shape(self) -> dict[str, Any]:
        """The sizes that a checkpoint records."""
        raise NotImplementedError

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers that forward runs through in order: the units of compilation, activation checkpointing and sharding."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the losses of the batch's targets times their weights, in nats; see `sum_dtype`."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each target in nats, fp32 (B, T), 0 where ignored: computed as `loss` computes it, without gradients."""
        raise NotImplementedError

    def features(self, inputs: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """What `loss` computes before the head, (B, T, any), from token ids (B, T); see `Batch` for the other arguments."""
        raise NotImplementedError

    def checkpoint_activations(self, selective: bool) -> None:
        """Trade time for memory, see `recompute`. To be called before `compile_blocks`."""
        raise NotImplementedError

    def compile_blocks(self, dynamic: bool) -> None:
        """Compile the blocks, which are alike: one compilation serves all of them, training and validation.

        dynamic: it also serves batches of any shape; otherwise each shape gets its own.
        """
        raise NotImplementedError

    def choice_logits(self, inputs: Tensor, positions: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, fp32 (B, L), of the tokens choices (B, L) as successors of positions (B,) in inputs (B, T), and the logarithm,
        fp32 (B,), of the sum over the vocabulary: logits less this are log-probabilities."""
        raise NotImplementedError

    def new_cache(self, rows: int, max_tokens: int) -> Any:
        """An empty key-value cache for `rows` rows of at most max_tokens each: a `KVCache`, or what has its `advance`."""
        raise NotImplementedError

    def next_logits(self, inputs: Tensor, cache: Any, counts: Tensor | None = None) -> Tensor:
        """Logits, fp32 (B, V), of the token after inputs (B, T), which follow the tokens in the cache.

        counts (B,): how many of each row's inputs are tokens, the rest at its right being padding; None: all. Keys and values go
        into the cache; the caller counts them with its `advance`.
        """
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of forward and backward: 6 a weight of the matmuls, and attention (PaLM, https://arxiv.org/abs/2204.02311)."""
        raise NotImplementedError
