"""The check of measures."""

from __future__ import annotations

from typing import Protocol

import torch

from chattrain.errors import UserError
from chattrain.evals.own import Measure, OwnMeasures
from chattrain.model.gpt import GPT
from chattrain.parallel.ranks import Ranks
from chattrain.parts.contracts import require
from chattrain.tokenizer import AnyTokenizer, Tokenizer
from chattrain.tokenizer.special_tokens import SPECIAL_TOKENS


class BuildsMeasure(Protocol):
    """`eval.own.<name>`, with `_target_: <module>.<function or class>`."""

    def __call__(self, *, tokenizer: AnyTokenizer, ranks: Ranks) -> Measure: ...


def check_eval(build: BuildsMeasure) -> None:
    """Raises ContractBroken unless the measure returns finite numbers by name, the same when asked again, and leaves the model as
    it was."""
    tokenizer = Tokenizer.train([], 256 + len(SPECIAL_TOKENS))
    model = GPT(tokenizer.vocab_size, n_layer=1, n_embd=32, n_head=2)
    model.init_weights(torch.Generator().manual_seed(0))
    model.eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    measures = OwnMeasures({}, tokenizer, Ranks())
    measures.measures["own"] = build(tokenizer=tokenizer, ranks=Ranks())
    try:
        found, again = measures(model), measures(model)
    except UserError as error:
        require(False, str(error))
    else:
        require(bool(found), "it measures nothing")
        require(found == again, f"it measures {found}, and {again} when asked again: seed what is random")
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    require(not changed, f"it changes weights: {', '.join(changed)}")
    require(not model.training, "it leaves the model in training mode")
    require(all(p.grad is None for p in model.parameters()), "it leaves gradients")
