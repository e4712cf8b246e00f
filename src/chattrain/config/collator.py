"""The group `collator`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class CollatorConfig:
    _target_: str = MISSING

    @property
    def isolates(self) -> bool:
        """Whether several documents share a row and attention stays within each."""
        return False

    @property
    def has_varying_shapes(self) -> bool:
        """Whether batches differ in shape."""
        return True


@dataclass
class JoiningCollatorConfig(CollatorConfig):
    isolate_documents: bool = False  # attention stays within a document; positions restart at each

    @property
    def has_varying_shapes(self) -> bool:
        return False

    @property
    def isolates(self) -> bool:
        return self.isolate_documents
