"""What an optimizer asks of the way in which its parameters are spread over processes."""

from __future__ import annotations

from typing import Protocol

from chattrain.optim.groups import Groups
from chattrain.optim.newton_schulz import Orthogonalizer


class Partition(Protocol):
    """What of a model this process steps; parallel/strategy.py has the implementations."""

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        """This process's part of the parameters. Those of the groups in `whole` are not cut."""

    def orthogonalizer(self) -> Orthogonalizer:
        """Muon's directions for the parameters of this part."""
