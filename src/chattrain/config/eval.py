"""The group `eval`."""

from __future__ import annotations

from dataclasses import dataclass

from chattrain.errors import UserError


@dataclass
class EvalConfig:
    every: int | None = 100  # optimizer steps; also before the first and after the last; null: only those two
    validation: bool = True  # val/loss and val/bpb of the validation mixture
    multiple_choice: bool = False  # accuracy on the question sets of the data, MMLU and ARC
    multiple_choice_every: int | None = None  # optimizer steps, a multiple of every; null: as often as all else
    max_tokens: int | None = None  # of the validation mixture, at most; null: all
    max_problems: int | None = None  # of each question set, at most; null: all
    batch_size: int = 16  # questions of average length a forward pass; of longer ones fewer, of shorter ones more
    mmlu_path: str | None = None  # hub name, or a folder in the hub's file layout
    arc_path: str | None = None  # likewise; holds ARC-Easy and ARC-Challenge
    split: str = "test"  # of MMLU and ARC

    def check(self) -> None:
        for name in ("every", "multiple_choice_every", "max_tokens", "max_problems", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"eval.{name}={value} must be 1 or more")
        rarer = self.multiple_choice_every
        if rarer is not None and (self.every is None or rarer % self.every):
            raise UserError(
                f"eval.multiple_choice_every={rarer} steps is not a multiple of eval.every={self.every}: "
                "questions are asked at some of the evaluations, not between them"
            )
