"""What optimizers and parallel strategies use of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn


class TrainableModel(Protocol):
    """An nn.Module with these members. Models live in a room above, whose classes cannot be imported here."""

    forward_methods: ClassVar[tuple[str, ...]]  # methods besides `forward` that read weights
    block_forward_methods: ClassVar[tuple[str, ...]]  # the same of each block
    n_embd: int

    @property
    def lm_head(self) -> nn.Module: ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in the order in which forward runs them; empty where the model does not mark them."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the model that a checkpoint holds."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...
