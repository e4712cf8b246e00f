"""The group `loss`: what of a document carries loss, apart from how rows are made of documents."""

from __future__ import annotations

from dataclasses import dataclass

from chattrain.config.words import Supervise
from chattrain.errors import UserError


@dataclass
class LossConfig:
    # auto: what the collator implies, all with packed, assistant with masked and best_fit; all: every token of
    # a document; assistant: replies with their end tokens; last_assistant: the same of the last turn, earlier ones are prompt
    supervise: Supervise = Supervise.auto
    prompt_weight: float = 0.0  # 0 to 1: weight of the loss of all other tokens of a document, such as user turns and tool output

    def check(self) -> None:
        if not 0 <= self.prompt_weight <= 1:
            raise UserError(f"loss.prompt_weight={self.prompt_weight} must be from 0 to 1")
