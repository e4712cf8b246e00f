"""What each part is called with and returns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from chattrain.data.collators import Collator
from chattrain.data.mixture import Mixture
from chattrain.model.causal_lm import CausalLM
from chattrain.optim.named import NamedOptimizer
from chattrain.optim.partition import Partition
from chattrain.optim.trainable import TrainableModel


class ContractBroken(AssertionError):
    """A part does not keep its contract; the message says how."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ContractBroken(message)


class Schedule(Protocol):
    """`schedule=<choice>` with `_target_: <module>.<function>`."""

    def __call__(self, step: int, num_steps: int, /) -> float:
        """The factor on every learning rate in a step, counted from 0, of num_steps. A pure function, finite and 0 or more."""
        ...


class BuildsOptimizer(Protocol):
    """`optimizer=<choice>`. `optim.named.over_groups` makes one of a class of torch.optim."""

    def __call__(self, model: TrainableModel, strategy: Partition | None, /) -> NamedOptimizer:
        """An optimizer over `strategy.partition_params(parameter_groups(model))`: slices of parameters, unless `whole` names
        groups that need whole ones. None: over all parameters."""
        ...


class BuildsCollator(Protocol):
    """`collator=<choice>`."""

    def __call__(self, mixture: Mixture, seq_len: int, pad_id: int, /, *, last_epoch: int | None) -> Collator:
        """See `Collator`. Rows count over all epochs; with last_epoch=0 those after the first epoch are padding."""
        ...


class BuildsModel(Protocol):
    """`model=<choice>`."""

    def __call__(self, *, vocab_size: int, start: Path | None, seed: int) -> CausalLM:
        """The model on the CPU in fp32, with the weights of the checkpoint `start`; None: random ones that depend on the seed."""
        ...


class Source(Protocol):
    """`data.train_path=python:<module>.<function>`."""

    def __call__(self, split: str, /) -> Iterable[dict[str, Any]]:
        """The records of a split, `train`, `val` or `test`: dicts that JSON can hold, of one schema, the same at every call."""
        ...
