"""How much of the loss each token carries: a function of what the token is (chat.Kind) and of its turn, apart from how rows are
made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from chattrain.chat import Kind
from chattrain.config.words import Supervise
from chattrain.errors import UserError


@dataclass(frozen=True)
class LossWeights:
    """The keys loss.*. A supervised token weighs 1, a token that is flagged off 0, any other one `prompt_weight`."""

    supervise: Supervise = Supervise.auto
    prompt_weight: float = 0.0  # 0 to 1
    rows_need_replies: bool = False  # is a conversation without a reply in its row left out, even where prompts weigh?

    def resolved(self, implied: Supervise) -> LossWeights:
        """With `implied`, which a collator implies, for auto. Raises UserError for a prompt_weight that no token has."""
        chosen = replace(self, supervise=implied) if self.supervise == Supervise.auto else self
        if chosen.supervise == Supervise.all and chosen.prompt_weight:
            raise UserError(
                f"loss.prompt_weight={self.prompt_weight} has no effect where every token is supervised; choose "
                "loss.supervise=assistant or last_assistant"
            )
        return chosen

    @property
    def prompts_count(self) -> bool:
        """Is a conversation that holds only a prompt worth a row?"""
        return (self.supervise == Supervise.all or self.prompt_weight > 0) and not self.rows_need_replies

    def of(self, kinds: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """(tokens,) fp32: the weights of a document's tokens, each of a kind and of a turn, both (tokens,).

        Under last_assistant the replies of earlier turns are prompt. A document without turns, such as a text, is one turn.

        >>> kinds, turns = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 1, 1])
        >>> LossWeights(Supervise.assistant, 0.5).of(kinds, turns)
        array([0.5, 0.5, 1. , 1. , 0.5, 1. ], dtype=float32)
        >>> LossWeights(Supervise.last_assistant).of(kinds, turns)
        array([0., 0., 0., 0., 0., 1.], dtype=float32)
        >>> LossWeights(Supervise.all).of(np.array([0, 1, 2, 3]), np.zeros(4))
        array([1., 1., 0., 0.], dtype=float32)
        """
        if self.supervise == Supervise.all:
            return (kinds & Kind.OFF == 0).astype(np.float32)
        supervised = kinds == Kind.ASSISTANT
        if self.supervise == Supervise.last_assistant:
            supervised &= turns == last_turn(kinds, turns)
        weights = supervised.astype(np.float32)
        if self.prompt_weight:
            weights[~supervised & (kinds & Kind.OFF == 0)] = self.prompt_weight
        return weights


# Weighs apart what val/loss and val/loss_all are over, whatever a training weighs: assistant tokens 1, other real tokens less.
MEASURED = LossWeights(Supervise.assistant, prompt_weight=0.5, rows_need_replies=True)


def last_turn(kinds: np.ndarray, turns: np.ndarray) -> int:
    """The last turn that has a reply, be it flagged off; -1 if there is none.

    >>> last_turn(np.array([0, 1, 0]), np.array([0, 0, 1]))
    0
    """
    of_replies = turns[kinds & Kind.ASSISTANT > 0]
    return int(of_replies.max()) if len(of_replies) else -1
