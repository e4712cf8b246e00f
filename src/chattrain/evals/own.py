"""Measures of the user's own: what eval.own names, called at every evaluation."""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol

import torch

from chattrain.config.instantiate import instantiate_config
from chattrain.config.own import import_target
from chattrain.errors import UserError
from chattrain.model.causal_lm import CausalLM
from chattrain.parallel.ranks import Ranks
from chattrain.tokenizer import AnyTokenizer


class Measure(Protocol):
    """What a target of eval.own returns, called with `tokenizer=`, `ranks=` and its keys."""

    def __call__(self, model: CausalLM, /) -> dict[str, float]:
        """Numbers by name, which become eval/<name in eval.own>_<name>. Every rank makes the call, with all weights; where each
        measures a share, `ranks.sum` brings the shares together."""
        ...


class OwnMeasures:
    """All measures of eval.own. Raises UserError for a target that cannot be imported or takes other arguments."""

    def __init__(self, specs: dict[str, Any], tokenizer: AnyTokenizer, ranks: Ranks):
        self.measures: dict[str, Measure] = {}
        for name, spec in specs.items():
            if not isinstance(spec, dict) or not isinstance(spec.get("_target_"), str):
                raise UserError(f"eval.own.{name}={spec!r:.80} must be {{_target_: <module>.<function>, and its keys}}")
            label = f"eval.own.{name}._target_={spec['_target_']}"
            keys = {key: value for key, value in spec.items() if not key.startswith("_")}
            try:
                inspect.signature(import_target(label, spec["_target_"])).bind(tokenizer=tokenizer, ranks=ranks, **keys)
            except TypeError as error:
                raise UserError(f"{label}: {error}; it is called with tokenizer=, ranks= and its keys") from error
            self.measures[name] = instantiate_config({**spec, "_convert_": "all"}, tokenizer=tokenizer, ranks=ranks)

    @torch.no_grad()
    def __call__(self, model: CausalLM) -> dict[str, float]:
        """The metrics by name. What they draw changes no random number of the training. Raises UserError for what is none."""
        metrics: dict[str, float] = {}
        device = model.lm_head.weight.device
        for name, measure in self.measures.items():
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # by default those of all GPUs, with a warning
                found: Any = measure(model)
            if not isinstance(found, dict) or not all(map(_is_number, found.values())):
                raise UserError(f"eval.own.{name} measured {found!r:.100}; it must return finite numbers by name")
            metrics |= {f"eval/{name}_{key}": float(value) for key, value in found.items()}
        return metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
