"""The group `eval`."""

from __future__ import annotations

from dataclasses import dataclass, field

from chattrain.config.words import Part
from chattrain.errors import UserError


@dataclass
class EvalConfig:
    on: Part = Part.val  # part of the data; test, with command=evaluate: data that chose neither checkpoint nor settings
    # optimizer steps between evaluations, besides before the first and after the last step; null: only those two
    every: int | None = 100
    validation: bool = True  # val/loss and val/bpb of the validation mixture
    multiple_choice: bool = False  # accuracy on the question sets of the data, MMLU and ARC
    multiple_choice_every: int | None = None  # optimizer steps, a multiple of `every`; null: at every evaluation
    max_tokens: int | None = None  # tokens of the validation mixture at most; null: all
    max_problems: int | None = None  # questions of each set at most; null: all
    batch_size: int = 16  # questions a forward pass, for questions of average length: more if shorter, fewer if longer
    mmlu_path: str | None = None  # MMLU: hub name, or a folder with the hub's file layout; null: it is not asked
    arc_path: str | None = None  # ARC: the same; contains ARC-Easy and ARC-Challenge
    split: str = "test"  # of MMLU and ARC
    also: list[str] = field(default_factory=list)  # other stages whose validation data is measured too, as val/loss/<stage>

    def check(self) -> None:
        for name in ("every", "multiple_choice_every", "max_tokens", "max_problems", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"eval.{name}={value} must be 1 or more")
        steps = self.multiple_choice_every
        if steps is not None and (self.every is None or steps % self.every):
            raise UserError(
                f"eval.multiple_choice_every={steps} steps is not a multiple of eval.every={self.every}: "
                "questions are asked at some of the evaluations, not between them"
            )
