"""Generation with a model of transformers: through our own key-value cache where the architecture allows, else through its own.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from chattrain.model.kv_cache import KVCache

log = logging.getLogger("chattrain")

ATTENTION = "chattrain_cached"  # the name of `_cached_attention` in transformers' attention interface
_obstacles: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()  # answers of `_obstacle`
_said: WeakSet[Any] = WeakSet()  # models of which it is said that they keep their own cache


class HFCache:
    """Keys and values of the tokens so far, in the architecture's own cache class, which grows by itself.

    Shorter prompts are padded on the left, so that the next token of every row is in the same column.
    """

    def __init__(self) -> None:
        self.columns = 0  # padding counts
        self.padding: Tensor | None = None  # (B, 1) columns at the left of each row; None: no row has any
        self.past: Any = None  # past_key_values of transformers

    def begin(self, inputs: Tensor, counts: Tensor | None) -> dict[str, Any]:
        """The arguments of transformers for the next inputs (B, T), of which counts (B,) are tokens; None: all."""
        before, self.columns = self.columns, self.columns + inputs.size(1)
        columns = torch.arange(self.columns, device=inputs.device)
        if counts is not None and (counts != inputs.size(1)).any():
            self.padding = inputs.size(1) - counts[:, None]
            inputs = inputs.gather(1, (columns - self.padding) % inputs.size(1))
        if self.padding is None:
            return {"input_ids": inputs, "past_key_values": self.past}
        mask = (columns >= self.padding).long()  # (B, columns)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
        return {"input_ids": inputs, "past_key_values": self.past, "attention_mask": mask, "position_ids": positions}

    def advance(self, counts: list[int]) -> None:
        """Nothing to do: columns are counted where a pass begins."""


def new_cache(inner: Any, rows: int, max_tokens: int) -> KVCache | HFCache:
    obstacle = _obstacle(inner) if _sees_all(inner, max_tokens) else "not every layer attends to all tokens through it"
    if obstacle is None:
        return KVCache(rows, max_tokens, _device(inner), recordable=inner._can_compile_fullgraph)
    if inner not in _said:
        _said.add(inner)
        log.warning("%s keeps its own key-value cache, copied for every token, slower: %s", inner.config.model_type, obstacle)
    return HFCache()


def next_logits(inner: Any, inputs: Tensor, cache: KVCache | HFCache, counts: Tensor | None) -> Tensor:
    """See `CausalLM.next_logits`."""
    if isinstance(cache, HFCache):
        out = inner(**cache.begin(inputs, counts), use_cache=True, logits_to_keep=1)
        cache.past = out.past_key_values
        return out.logits[:, -1].float()
    positions = cache.begin(inputs.size(1))
    with _attending_to_cache(inner), _head_of_last(inner, counts):
        out = inner(input_ids=inputs, position_ids=positions, use_cache=False, kv_cache=cache)
    return out.logits[:, -1].float()


def _sees_all(inner: Any, max_tokens: int) -> bool:
    """Does a token see all of max_tokens tokens before it, in every layer? Not with states in place of keys or short windows."""
    config = inner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or max_tokens
    return inner._supports_attention_backend and kinds <= {"full_attention", "sliding_attention"} and window >= max_tokens


def _obstacle(inner: Any) -> str | None:
    """Why logits through our cache are not those of a whole row; None: they are. Tried once for each model, on five tokens, as
    architectures may do anything around their attention."""
    if inner not in _obstacles:
        ids = torch.arange(10, device=_device(inner)).view(2, 5) % inner.get_output_embeddings().out_features
        cache, counts = KVCache(2, 5, ids.device), torch.tensor([4, 2], device=ids.device)
        rows = torch.arange(2, device=ids.device)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            expected = inner(input_ids=ids, use_cache=False).logits.float()
            try:
                first = next_logits(inner, ids[:, :4], cache, counts)
                cache.advance([4, 2])
                second = next_logits(inner, ids[rows, counts][:, None], cache, None)
            except Exception as error:  # an architecture that calls its attention in another way can fail with any of them
                first_line = str(error).strip().partition("\n")[0]
                _obstacles[inner] = f"ours fails ({first_line})"
                return _obstacles[inner]
        difference = max((a - expected[rows, at]).abs().max() for a, at in ((first, counts - 1), (second, counts)))
        right = bool(difference <= 0.01 * expected.abs().max())
        _obstacles[inner] = None if right else "with ours it gives other logits"
    return _obstacles[inner]


def _device(inner: Any) -> torch.device:
    return inner.get_output_embeddings().weight.device


@contextmanager
def _attending_to_cache(inner: Any) -> Iterator[None]:
    _register()
    config, before = inner.config, inner.config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


@lru_cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _cached_attention)


def _cached_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """The attention of a layer of transformers: (B, H, T, D) each, to (B, T, H, D). What a token sees, the cache knows."""
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    cache: KVCache = more["kv_cache"]
    return cache.attend(module.layer_idx, query, key, value, more.get("scaling")).transpose(1, 2), None


@contextmanager
def _head_of_last(inner: Any, counts: Tensor | None) -> Iterator[None]:
    """Compute the head for the last token of each row alone, within this context: the last of counts (B,), or of all."""

    def last(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = arguments  # (B, T, C)
        return (x[:, -1:] if counts is None else x[torch.arange(len(x), device=x.device), counts - 1][:, None],)

    hook = inner.get_output_embeddings().register_forward_pre_hook(last)
    try:
        yield
    finally:
        hook.remove()
