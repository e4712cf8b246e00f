"""Our attention in models of transformers, by transformers' own interface for attention functions.

The attention of a pass (see `choose_attention`) travels through the model as the argument `attend` of its forward, which layers
hand to the attention function that their config names. So no (B, 1, T, T) mask is made where a kernel knows the documents.

Architectures whose attention is more than softmax(q k^T) v (soft caps, sinks, sliding windows shorter than the row), or that do
not go through the interface, keep their own, with masks that transformers makes from the positions.

B rows, T tokens, H heads of D channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from chattrain.model.attention import Attend, attention, document_mask

NAME = "chattrain"  # in transformers' registry of attention functions
PROBE_TOKENS = 12  # a document of the probe
TOLERANCE = 1e-4  # of the largest feature, in fp32


def use_interface(inner: Any) -> str | None:
    """Let the model's attention take `attend`, where it can. Returns None, or why it cannot."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if inner.config._attn_implementation != "sdpa":
        return "it does not use torch's SDPA"
    AttentionInterface.register(NAME, partial(_attention, sdpa_attention_forward))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    inner.set_attn_implementation(NAME)
    return None if inner.config._attn_implementation == NAME else "it does not go through transformers' interface"


def own_attention(inner: Any) -> None:
    """Undo `use_interface`."""
    inner.set_attn_implementation("sdpa")


def arguments(attend: Attend, positions: Tensor | None, inputs: Tensor) -> dict[str, Any]:
    """What the forward of a model that uses the interface gets beside its inputs (B, T).

    transformers hands a mask of four dimensions on as it is, and makes none itself. Our function ignores it.
    """
    no_mask = torch.zeros(1, 1, 1, 1, device=inputs.device)
    return {"attend": attend, "attention_mask": no_mask, **({} if positions is None else {"position_ids": positions})}


def window(config: Any) -> int | None:
    """Tokens that the shortest attention window or chunk of the model sees; None: all see the whole row."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    sizes = [getattr(config, "attention_chunk_size", None)]
    if "sliding_attention" in kinds and getattr(config, "use_sliding_window", True) is not False:
        sizes.append(getattr(config, "sliding_window", None))
    return min((size for size in sizes if size), default=None)


@torch.no_grad()
def isolates(features: Any, ids: Tensor) -> str | None:
    """Are the features of two documents in one row, with our attention, those of the documents alone? None, or what went wrong.

    features: of inputs (B, T), with further arguments; ids: (2, T).
    """
    alone = features(input_ids=ids).flatten(0, 1)
    positions = torch.arange(ids.size(1)).repeat(2)[None]
    attend = partial(attention, mask=document_mask(positions))
    try:
        together = features(input_ids=ids.view(1, -1), **arguments(attend, positions, ids))[0]
    except (TypeError, ValueError, RuntimeError) as error:  # a forward that takes no further arguments, or _attention's own
        return str(error)
    if (together - alone).abs().max() > TOLERANCE * alone.abs().max():
        return "its layers give other numbers with our attention"
    return None


def _attention(
    sdpa: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attend: Attend | None = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, T, D), key and value of H or fewer heads, to (B, T, H, D).

    Without `attend` (generation) it is transformers' own SDPA. Raises ValueError for what `attend` does not compute.
    """
    if attend is None:
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **others)
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"it has {name}")
    if query.shape[-1] != value.shape[-1] or query.shape[-2] != key.shape[-2]:
        raise ValueError("its queries, keys and values differ in shape")
    D = query.shape[-1]
    if scaling is not None and abs(scaling * D**0.5 - 1) > 1e-6:  # kernels divide by the root of D
        query = query * (scaling * D**0.5)
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)), None
