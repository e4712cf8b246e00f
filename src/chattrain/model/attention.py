"""Causal attention, within documents where rows hold several: torch's own, and one in blocks that is faster on a CPU.

In blocks: by plain matrix products, a block of queries meets the blocks of keys from the one in which its first document begins
to its own, so that half of the square of all pairs is never computed, and with short documents nearly all of it. Blocks with
equally many key blocks go through one batched product. As in FlashAttention (https://arxiv.org/abs/2205.14135) the probabilities
are made again in backward from their log-sums, so that memory grows with T and not with its square; only what lies between the
products is compiled.

B rows, T tokens, H heads of D channels; N blocks of n tokens a row, W windows of L keys each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from chattrain import torch_compat

BLOCK = 128  # tokens, at most where T allows: products large enough, waste small enough


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of q (B, T, H, D), and k, v of as many heads or a divisor of them. (B, T, H, D).

    mask, bool and True where a query sees a key, broadcasts to (B, H, T, keys). None: each token sees those before it.
    """
    grouped = q.size(2) != k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped).transpose(1, 2)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def document_mask(positions: Tensor) -> Tensor:
    """(B, 1, T, T) bool: each token sees those before it in its document, which begins where positions (B, T) are 0."""
    document = (positions == 0).cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & causal_mask(positions.size(1), positions.size(1), positions.device)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`attention` within the documents that begin at cu_seqlens in the flattened rows, by FlashAttention: see `has_varlen`."""
    flat = (x.flatten(0, 1).to(v.dtype) for x in (q, k, v))  # autocast leaves what was normalised in fp32, and does not know it
    return torch_compat.varlen_attn(*flat, cu_seqlens, longest=q.size(1)).view(q.shape)


def has_varlen(device: torch.device, head_dim: int) -> bool:
    """Is there FlashAttention for rows of several documents, in bf16, on this device? Ampere and later."""
    return device.type == "cuda" and head_dim % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)


def block_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
    """What `attention` gives with the mask of these positions (B, T), or with none, on a CPU.

    In fp32 and without documents torch's own is as fast, and is taken.
    """
    if positions is None and q.dtype == torch.float32:
        return attention(q, k, v)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    B, T = q.shape[:2]
    first = q.new_zeros(B, T, dtype=torch.int64) if positions is None else torch.arange(T) - positions
    return torch.ops.chattrain.block_attention(q, k, v, first)[0]


def block_size(T: int) -> int:
    """Tokens of a block: as few blocks of up to BLOCK as hold T, and of these the smallest.

    >>> [block_size(T) for T in (48, 128, 136, 512, 509)]
    [48, 128, 68, 128, 128]
    """
    blocks = -(-T // BLOCK)
    return -(-T // blocks)


def _windows(first: Tensor, n: int, heads: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Windows by their length: numbers (W,) of query blocks, (W, L / n) of their key blocks, and bounds (W, n).

    first (B, T) is the place in its row at which a token's document begins. Blocks are numbered through rows, heads and places.
    A query's bound is the first key that it sees, counted from the window's beginning.
    """
    first = F.pad(first[:, None].float(), (0, -first.size(1) % n), mode="replicate")[:, 0].long()
    begin = first[:, ::n] // n  # (B, N), the key block in which the document of a block's first token begins
    place = torch.arange(begin.size(1))
    length = place - begin + 1
    for blocks in length.unique().tolist():
        row, block = (length == blocks).nonzero(as_tuple=True)
        bounds = first.view(len(first), -1, n)[row, block] - ((block + 1 - blocks) * n)[:, None]
        numbers = (row[:, None] * heads + torch.arange(heads)) * len(place) + block[:, None]  # (windows of a head, H)
        keys = numbers.flatten()[:, None] + torch.arange(1 - blocks, 1)
        yield numbers.flatten(), keys, bounds.float().repeat_interleave(heads, dim=0)


def _to_blocks(x: Tensor, n: int) -> Tensor:
    """(B, T, H, D) to (B x H x N, n, D), with zeros behind T where it is no multiple of n."""
    return F.pad(x.transpose(1, 2), (0, 0, 0, -x.size(1) % n)).reshape(-1, n, x.size(3))


def _from_blocks(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(B x H x N, n, any) to (B, T, H, any), of the shape of `like`."""
    B, T, H, _ = like.shape
    return x.view(B, H, -1, x.size(2))[:, :, :T].transpose(1, 2).to(dtype).contiguous()


def _take(blocks: Tensor, keys: Tensor) -> Tensor:
    """The blocks (W, L / n) side by side: (W, L, D)."""
    return blocks.index_select(0, keys.flatten()).view(len(keys), -1, blocks.size(2))


def _forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, D), and the log-sum of each query's scores, fp32 (B, T, H)."""
    n = block_size(q.size(1))
    queries, keys, values = (_to_blocks(x, n) for x in (q, k, v))
    out = torch.empty_like(queries)
    log_sums = torch.empty(*queries.shape[:2], 1, dtype=torch.float32)
    for numbers, window, bounds in _windows(first, n, q.size(2)):
        scores = torch.bmm(queries[numbers], _take(keys, window).mT)
        probabilities, log_sums[numbers] = _compiled(_probabilities)(*_dynamic(scores, bounds), q.size(3) ** -0.5)
        out[numbers] = torch.bmm(probabilities, _take(values, window))
    return _from_blocks(out, q, q.dtype), _from_blocks(log_sums, q, torch.float32)[..., 0].contiguous()


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n = block_size(q.size(1))
    queries, keys, values, grads = (_to_blocks(x, n) for x in (q, k, v, grad.to(q.dtype)))
    delta, log_sums = (_to_blocks(x, n) for x in ((grad.float() * out.float()).sum(-1, keepdim=True), log_sums[..., None]))
    grad_q = torch.empty_like(queries)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (keys, values))
    for numbers, window, bounds in _windows(first, n, q.size(2)):
        theirs, seen_keys, above = queries[numbers], _take(keys, window), grads[numbers]
        scores, wanted = torch.bmm(theirs, seen_keys.mT), torch.bmm(above, _take(values, window).mT)
        probabilities, slopes = _compiled(_score_gradients)(
            *_dynamic(scores, bounds, log_sums[numbers], wanted, delta[numbers]), q.size(3) ** -0.5
        )
        grad_q[numbers] = torch.bmm(slopes, seen_keys)
        for total, part in ((grad_k, torch.bmm(slopes.mT, theirs)), (grad_v, torch.bmm(probabilities.mT, above))):
            total.index_add_(0, window.flatten(), part.view(-1, n, part.size(2)).float())
    return tuple(_from_blocks(x, q, q.dtype) for x in (grad_q, grad_k, grad_v))


def _masked(scores: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """Scores (W, n, L) scaled, in fp32, and -inf where a query does not see the key. Its own is the n-th from the end on."""
    n, L = scores.shape[1:]
    own = torch.arange(L - n, L, dtype=torch.float32)[:, None]
    key = torch.arange(L, dtype=torch.float32)
    return torch.where((key <= own) & (key >= bounds[:, :, None]), scores.float() * scale, float("-inf"))


def _probabilities(scores: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    masked = _masked(scores, bounds, scale)
    log_sums = masked.logsumexp(dim=2, keepdim=True)
    return (masked - log_sums).exp().to(scores.dtype), log_sums


def _score_gradients(
    scores: Tensor, bounds: Tensor, log_sums: Tensor, wanted: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Probabilities, and the gradient on the scores before scaling, from that on the probabilities (`wanted`)."""
    probabilities = (_masked(scores, bounds, scale) - log_sums).exp()
    return probabilities.to(scores.dtype), (probabilities * (wanted.float() - delta) * scale).to(scores.dtype)


def _dynamic(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors (W, n or 1, L or 1), marked so that one compilation serves all their sizes."""
    for tensor in tensors:
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensors


@lru_cache(maxsize=2)
def _compiled(function):
    return torch.compile(function)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx, grad: Tensor, _: Tensor):
    return (*torch.ops.chattrain.block_attention_backward(grad, *ctx.saved_tensors), None)


# Operators of torch's own registry, so that torch.compile sees one node a layer and does not unroll the blocks. What it has
# compiled is kept on disk under their names: an operator that comes to return other shapes needs another name.
library = torch.library.Library("chattrain", "DEF")
library.define("block_attention(Tensor q, Tensor k, Tensor v, Tensor first) -> (Tensor, Tensor)")
library.define(
    "block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor first, Tensor out, Tensor log_sums)"
    " -> (Tensor, Tensor, Tensor)"
)
library.impl("block_attention", _forward, "CPU")
library.impl("block_attention_backward", _backward, "CPU")
torch.library.register_autograd("chattrain::block_attention", _gradient, setup_context=_save, lib=library)


@torch.library.register_fake("chattrain::block_attention", lib=library)
def _(q, k, v, first):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("chattrain::block_attention_backward", lib=library)
def _(grad, q, k, v, first, out, log_sums):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
