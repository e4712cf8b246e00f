"""The head of a model of transformers: the chunked pass of head.py where it gives the model's own logits, else the model's own.

Heads of transformers are a linear layer, often tied to the embedding, some with a bias, a factor on the logits or a soft cap. The
names of factors and caps in config.json are listed here; whether the arithmetic is right is seen by comparing logits.

B rows, T tokens, C channels, V vocabulary, N supervised tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chattrain.model.head import HeadSettings, sum_dtype, summed_loss, token_losses

FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
DIVISORS = ("logits_scaling",)  # Granite, MiniCPM
CAP = "final_logit_softcapping"  # Gemma
TOLERANCE = 1e-4  # of the largest logit, in fp32: sums in another order differ by about 1e-6


class ChunkedHead:
    """Logits are cap x tanh(z / cap), or z where there is no cap, with z = factor x (W features + b)."""

    def __init__(self, inner: Any):
        config = inner.config.get_text_config()
        self.inner, self.cap = inner, getattr(config, CAP, None)
        self.factor = 1.0
        for name in FACTORS:
            self.factor *= getattr(config, name, None) or 1.0
        for name in DIVISORS:
            self.factor /= getattr(config, name, None) or 1.0

    def features(self, **arguments: Any) -> Tensor:
        """(B, T, C), with the factor"""
        features = self.inner.base_model(use_cache=False, **arguments).last_hidden_state
        return features if self.factor == 1.0 else features * self.factor

    def summed_loss(self, features: Tensor, targets: Tensor, settings: HeadSettings, loss_weights: Tensor | None) -> Tensor:
        """Of features (N, C) and targets (N,), in nats; the loss weights (N,) multiply the losses, None: 1."""
        weight, bias = self._weights()
        return summed_loss(features, weight, targets, self.cap, settings, bias, loss_weights)

    def token_losses(self, features: Tensor, targets: Tensor, settings: HeadSettings) -> Tensor:
        """(N,), fp32, of features (N, C) and targets (N,), in nats."""
        weight, bias = self._weights()
        return token_losses(features, weight, targets, self.cap, settings, bias)

    def logits(self, features: Tensor) -> Tensor:
        """(..., V) of features (..., C), all computed in fp32: under autocast they would be bf16, with ties."""
        weight, bias = self._weights()
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(features.float(), weight.float(), None if bias is None else bias.float())
            return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        head = self.inner.get_output_embeddings()
        return head.weight, None if head.bias is None else head.bias * self.factor


class OwnHead:
    """The head as the model computes it, for all tokens at once. Features are its logits."""

    def __init__(self, inner: Any):
        self.inner = inner

    def features(self, **arguments: Any) -> Tensor:
        """(B, T, V)"""
        return self.inner(use_cache=False, **arguments).logits

    def summed_loss(self, features: Tensor, targets: Tensor, settings: HeadSettings, loss_weights: Tensor | None) -> Tensor:
        losses = self.token_losses(features, targets, settings)
        return (losses if loss_weights is None else losses * loss_weights).sum(dtype=sum_dtype(features.device))

    def token_losses(self, features: Tensor, targets: Tensor, settings: HeadSettings) -> Tensor:
        return F.cross_entropy(features.float(), targets, reduction="none")

    def logits(self, features: Tensor) -> Tensor:
        return features.float()


def choose_head(inner: Any) -> ChunkedHead | OwnHead:
    """A chunked head, if the model has what it needs: a body that gives hidden states, and a linear layer."""
    is_linear = isinstance(inner.get_output_embeddings(), nn.Linear)
    return ChunkedHead(inner) if is_linear and inner.base_model is not inner else OwnHead(inner)


@torch.no_grad()
def is_right(head: ChunkedHead, inputs: Tensor) -> bool:
    """Does the head give the logits of the model on these inputs (B, T), to TOLERANCE?"""
    expected = head.inner(input_ids=inputs, use_cache=False).logits.float()
    logits = head.logits(head.features(input_ids=inputs))
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= TOLERANCE * expected.abs().max())
