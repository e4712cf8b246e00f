"""What an optimizer asks of the strategy that distributes its parameters over processes."""

from __future__ import annotations

from typing import Protocol

from chattrain.optim.groups import Groups
from chattrain.optim.newton_schulz import Orthogonalizer


class Partition(Protocol):
    """Which parameters of a model this process steps. Implemented by parallel/strategy.py."""

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        """The parameters, or slices of parameters, that this process steps; groups in `whole` need whole parameters."""
        ...

    def orthogonalizer(self) -> Orthogonalizer:
        """Computes Muon's directions for these parameters."""
        ...
