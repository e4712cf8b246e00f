"""Causal attention, within documents where a row holds several: the kernels, and which of them runs when.

The kernels are torch's SDPA (`attention`), FlashAttention for rows of several documents (`varlen_attention`), and attention by
blocks (`block_attention`), which is faster on a CPU. `choose_attention` has the table of who uses which.

Block attention: each query block multiplies only key blocks from the start of its first token's document up to itself. So half
of the T x T square is never computed, and with short documents nearly all of it. Query blocks with equally many key blocks share
one batched product. As in FlashAttention (https://arxiv.org/abs/2205.14135), backward recomputes the probabilities from the
log-sum-exp of each query's scores, so memory grows with T and not with its square. Only the element-wise work between the matrix
products is compiled.

B rows, T tokens, H heads of D channels; N blocks of n tokens a row; W windows, each a query block and its L keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from chattrain import torch_compat

BLOCK = 128  # tokens a block, at most: the products are large enough to be fast, and little of them is masked out
LONG = 1024  # tokens of a row of documents, from which on computing blocks pays on a CPU whose products take little time
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, T, H, D) to the output of each head (B, T, H, D)


def choose_attention(
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None, use_block_attention: bool = False
) -> Attend:
    """The attention of one forward pass: q (B, T, H, D), k and v of as many heads or a divisor of them, to (B, T, H, D).

    | device | pass | dtype | isolated documents | kernel |
    |---|---|---|---|---|
    | CPU | training and multiple choice of a compiled model | bf16 or fp32 | where `block_attention_pays` | `block_attention` |
    | CUDA with `has_varlen` | training, compiled or not | bf16 | yes | `varlen_attention` |
    | any | all others, such as validation and generation | bf16 or fp32 | yes | `attention` with `document_mask` |
    | any | all others | bf16 or fp32 | no | `attention`, causal |

    The arguments are these facts as the model knows them:
    - positions (B, T) int64, given if and only if documents are isolated: they begin at 0 in each document
    - cu_seqlens (documents + 1,) int32: the same documents for FlashAttention; None where the pass or the device has none
    - use_block_attention: should it be `block_attention`?
    The dtype is autocast's. What models of transformers use: hf_attention.py.
    """
    if use_block_attention:
        return partial(block_attention, positions=positions)
    if cu_seqlens is not None and torch.is_autocast_enabled("cuda"):
        return partial(varlen_attention, cu_seqlens=cu_seqlens)
    return partial(attention, mask=None if positions is None else document_mask(positions))


def never(positions: Tensor | None) -> bool:
    return False


def always(positions: Tensor | None) -> bool:
    return True


def block_attention_pays(positions: Tensor | None) -> bool:
    """Is `block_attention` faster than torch's SDPA on this CPU? positions (B, T) as above, the dtype is autocast's.

    Measured on 2 cores (forward and backward, heads of 128 channels). With AVX-512 and without AMX: in bf16 always, 1.7 to 1.9
    times at T = 512; in fp32 with documents, 1.2 to 1.3 times. With AMX SDPA takes 0.65 of the time at T = 512 without documents,
    0.75 to 0.9 with them, and only rows of 1,024 tokens or more in documents are computed faster by blocks: 1.0 to 1.3 times at
    1,024, 1.6 to 2.5 times at 2,048.
    """
    if torch_compat.has_amx():
        return positions is not None and positions.size(1) >= LONG
    return positions is not None or torch.is_autocast_enabled("cpu")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of q (B, T, H, D), and k, v of as many heads or a divisor of them. (B, T, H, D).

    mask: bool, True where a query sees a key; it broadcasts to (B, H, T, keys). None: causal.
    """
    grouped = q.size(2) != k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped).transpose(1, 2)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def document_mask(positions: Tensor) -> Tensor:
    """(B, 1, T, T) bool: causal within each document. A document begins where positions (B, T) are 0."""
    document = (positions == 0).cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & causal_mask(positions.size(1), positions.size(1), positions.device)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`attention` within the documents that begin at cu_seqlens in the flattened rows, by FlashAttention: see `has_varlen`."""
    # Under autocast q and k are fp32 after their norm in models of transformers, and autocast does not know this operator.
    flat_q, flat_k, flat_v = (x.flatten(0, 1).to(v.dtype) for x in (q, k, v))
    return torch_compat.varlen_attn(flat_q, flat_k, flat_v, cu_seqlens, longest=q.size(1)).view(q.shape)


def has_varlen(device: torch.device, head_dim: int) -> bool:
    """Does this device have FlashAttention for rows of several documents, in bf16? NVIDIA's do from Ampere on."""
    return device.type == "cuda" and head_dim % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)


def block_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
    """`attention` within the documents of positions (B, T), or causal without them, on a CPU, in the dtype of v."""
    q, k = (x.to(v.dtype) for x in (q, k))  # as in varlen_attention
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    B, T = q.shape[:2]
    doc_start = q.new_zeros(B, T, dtype=torch.int64) if positions is None else torch.arange(T) - positions
    return torch.ops.chattrain.block_attention(q, k, v, doc_start)[0]


def block_size(T: int) -> int:
    """Tokens a block: the fewest blocks of at most BLOCK tokens that hold T, and then the smallest size that gives so few.

    >>> [block_size(T) for T in (48, 128, 136, 512, 509)]
    [48, 128, 68, 128, 128]
    """
    blocks = -(-T // BLOCK)
    return -(-T // blocks)


def _windows(doc_start: Tensor, n: int, heads: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Windows grouped by their length L: indices (W,) of query blocks, indices (W, L / n) of their key blocks, bounds (W, n).

    doc_start (B, T) is the index in its row at which each token's document starts. Blocks are counted through rows, heads and
    tokens, in this order. A query's bound is the first key that it sees, counted from the start of its window.
    """
    doc_start = F.pad(doc_start[:, None].float(), (0, -doc_start.size(1) % n), mode="replicate")[:, 0].long()
    first_block = doc_start[:, ::n] // n  # (B, N), the key block in which the document of a block's first token starts
    block_indices = torch.arange(first_block.size(1))
    length = block_indices - first_block + 1
    for blocks in length.unique().tolist():
        row, block = (length == blocks).nonzero(as_tuple=True)
        bounds = doc_start.view(len(doc_start), -1, n)[row, block] - ((block + 1 - blocks) * n)[:, None]
        query_blocks = (row[:, None] * heads + torch.arange(heads)) * len(block_indices) + block[:, None]  # (W / H, H)
        key_blocks = query_blocks.flatten()[:, None] + torch.arange(1 - blocks, 1)
        yield query_blocks.flatten(), key_blocks, bounds.float().repeat_interleave(heads, dim=0)


def _to_blocks(x: Tensor, n: int) -> Tensor:
    """(B, T, H, D) to (B x H x N, n, D), padded with zeros where n does not divide T."""
    return F.pad(x.transpose(1, 2), (0, 0, 0, -x.size(1) % n)).reshape(-1, n, x.size(3))


def _from_blocks(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(B x H x N, n, any) to (B, T, H, any), with B, T and H of `like`."""
    B, T, H, _ = like.shape
    return x.view(B, H, -1, x.size(2))[:, :, :T].transpose(1, 2).to(dtype).contiguous()


def _gather(blocks: Tensor, indices: Tensor) -> Tensor:
    """The blocks at indices (W, L / n), concatenated within each window: (W, L, D)."""
    return blocks.index_select(0, indices.flatten()).view(len(indices), -1, blocks.size(2))


def _forward(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, D), and the log-sum-exp of each query's scores, fp32 (B, T, H)."""
    n = block_size(q.size(1))
    q_blocks, k_blocks, v_blocks = (_to_blocks(x, n) for x in (q, k, v))
    out = torch.empty_like(q_blocks)
    log_sums = torch.empty(*q_blocks.shape[:2], 1, dtype=torch.float32)
    for query, keys, bounds in _windows(doc_start, n, q.size(2)):
        scores = torch.bmm(q_blocks[query], _gather(k_blocks, keys).mT)
        probs, log_sums[query] = _compiled(_probabilities)(*_dynamic(scores, bounds), q.size(3) ** -0.5)
        out[query] = torch.bmm(probs, _gather(v_blocks, keys))
    return _from_blocks(out, q, q.dtype), _from_blocks(log_sums, q, torch.float32)[..., 0].contiguous()


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients on q, k and v, of their shapes."""
    n = block_size(q.size(1))
    q_blocks, k_blocks, v_blocks, grad_blocks = (_to_blocks(x, n) for x in (q, k, v, grad.to(q.dtype)))
    delta, log_sums = (_to_blocks(x, n) for x in ((grad.float() * out.float()).sum(-1, keepdim=True), log_sums[..., None]))
    grad_q = torch.empty_like(q_blocks)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k_blocks, v_blocks))
    for query, keys, bounds in _windows(doc_start, n, q.size(2)):
        q_blk, k_window, d_out = q_blocks[query], _gather(k_blocks, keys), grad_blocks[query]
        scores, d_probs = torch.bmm(q_blk, k_window.mT), torch.bmm(d_out, _gather(v_blocks, keys).mT)
        probs, d_scores = _compiled(_score_gradients)(
            *_dynamic(scores, bounds, log_sums[query], d_probs, delta[query]), q.size(3) ** -0.5
        )
        grad_q[query] = torch.bmm(d_scores, k_window)
        for total, part in ((grad_k, torch.bmm(d_scores.mT, q_blk)), (grad_v, torch.bmm(probs.mT, d_out))):
            total.index_add_(0, keys.flatten(), part.view(-1, n, part.size(2)).float())
    return _from_blocks(grad_q, q, q.dtype), _from_blocks(grad_k, q, q.dtype), _from_blocks(grad_v, q, q.dtype)


def _masked(scores: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """Scores (W, n, L) scaled, in fp32, and -inf where a query does not see the key. The n queries are the window's last keys."""
    n, L = scores.shape[1:]
    own = torch.arange(L - n, L, dtype=torch.float32)[:, None]
    key = torch.arange(L, dtype=torch.float32)
    return torch.where((key <= own) & (key >= bounds[:, :, None]), scores.float() * scale, float("-inf"))


def _probabilities(scores: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The soft-max of scores (W, n, L), in their dtype, and its log-sum-exp, fp32 (W, n, 1)."""
    masked = _masked(scores, bounds, scale)
    log_sums = masked.logsumexp(dim=2, keepdim=True)
    return (masked - log_sums).exp().to(scores.dtype), log_sums


def _score_gradients(
    scores: Tensor, bounds: Tensor, log_sums: Tensor, d_probs: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Probabilities (W, n, L), and the gradient on the unscaled scores from d_probs, the gradient on the probabilities.

    delta (W, n, 1) is the sum of gradient times output of each query, as in FlashAttention's backward.
    """
    probs = (_masked(scores, bounds, scale) - log_sums).exp()
    return probs.to(scores.dtype), (probs * (d_probs.float() - delta) * scale).to(scores.dtype)


def _dynamic(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, marked dynamic in all dimensions above 1, so that one compilation serves all sizes."""
    for tensor in tensors:
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensors


@lru_cache(maxsize=2)
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx, grad: Tensor, _: Tensor):
    return (*torch.ops.chattrain.block_attention_backward(grad, *ctx.saved_tensors), None)


# Registered as custom operators so that torch.compile sees one node a layer and does not unroll the loop over windows. Its cache
# on disk is keyed by operator names: an operator whose output shapes change needs a new name.
library = torch.library.Library("chattrain", "DEF")
library.define("block_attention(Tensor q, Tensor k, Tensor v, Tensor doc_start) -> (Tensor, Tensor)")
library.define(
    "block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor doc_start, Tensor out, Tensor log_sums)"
    " -> (Tensor, Tensor, Tensor)"
)
library.impl("block_attention", _forward, "CPU")
library.impl("block_attention_backward", _backward, "CPU")
torch.library.register_autograd("chattrain::block_attention", _gradient, setup_context=_save, lib=library)


@torch.library.register_fake("chattrain::block_attention", lib=library)
def _(q, k, v, doc_start):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("chattrain::block_attention_backward", lib=library)
def _(grad, q, k, v, doc_start, out, log_sums):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
