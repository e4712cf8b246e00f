"""The group `eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chattrain.config.words import Part
from chattrain.errors import UserError

GENERATIVE = ("gsm8k", "spelling", "humaneval")  # suites whose answers the model writes
SUITES = ("validation", "multiple_choice", *GENERATIVE)  # keys that turn a measurement on
# Keys that go with a choice of the group, whether its file sets them or not.
CHOSEN = (*SUITES, "max_problems", "max_generative", "max_reply_tokens")


@dataclass
class EvalConfig:
    on: Part = Part.val  # part of the data; test, with command=evaluate: data that chose neither checkpoint nor settings
    # optimizer steps between evaluations, besides before the first and after the last step; null: only those two
    every: int | None = 100
    validation: bool = False  # val/loss and val/bpb of the validation mixture
    multiple_choice: bool = False  # accuracy on the question sets of the data, MMLU and ARC
    multiple_choice_every: int | None = None  # optimizer steps, a multiple of `every`; null: at every evaluation
    gsm8k: bool = False  # accuracy on the problems of eval.gsm8k_path: the model writes the solution, with the calculator
    spelling: bool = False  # accuracy in counting the letters of a word, with the calculator; generated questions
    humaneval: bool = False  # share of the programs of eval.humaneval_path that pass their tests; run in bubblewrap only
    # optimizer steps, a multiple of `every`, between measurements of gsm8k, spelling and humaneval; null: after the last step
    generative_every: int | None = None
    max_tokens: int | None = None  # tokens of the validation mixture at most; null: all
    max_problems: int | None = None  # questions of each set at most; null: all
    max_generative: int | None = None  # questions of gsm8k, spelling and humaneval at most, each; null: eval.max_problems
    batch_size: int = 16  # questions a forward pass, for questions of average length: more if shorter, fewer if longer
    reply_batch_size: int = 32  # replies that are written at once; each takes a row of the key-value cache
    max_reply_tokens: int = 256  # tokens of a written reply at most
    mmlu_path: str | None = None  # MMLU: hub name, or a folder with the hub's file layout; null: it is not asked
    arc_path: str | None = None  # ARC: the same; contains ARC-Easy and ARC-Challenge
    gsm8k_path: str | None = None  # GSM8K: hub name or folder; or generate:arithmetic, sums that a small model can learn
    humaneval_path: str | None = None  # HumanEval: hub name or folder; null: it is not asked
    words_path: str | None = None  # word list of `spelling`, one word a line; null: common words of Python's documentation
    split: str = "test"  # of MMLU, ARC, GSM8K and HumanEval
    also: list[str] = field(default_factory=list)  # other stages whose validation data is measured too, as val/loss/<stage>
    # What a training answers at every evaluation, to be read in its report: a list of texts, or a file with one a line.
    # null: the prompts of the data for this stage, if it has any; []: none.
    prompts: Any = None

    # measures of your own, at every evaluation: name -> {_target_: <module>.<function>, and its keys}; see docs/extending.md
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        """Is there a suite whose answers the model writes?"""
        return any(getattr(self, name) for name in GENERATIVE)

    @property
    def generative_limit(self) -> int | None:
        return self.max_problems if self.max_generative is None else self.max_generative

    def check(self) -> None:
        for name in (
            *("every", "multiple_choice_every", "generative_every", "max_tokens", "max_problems", "max_generative"),
            *("batch_size", "reply_batch_size", "max_reply_tokens"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"eval.{name}={value} must be 1 or more")
        for name in ("multiple_choice_every", "generative_every"):
            steps = getattr(self, name)
            if steps is not None and (self.every is None or steps % self.every):
                raise UserError(
                    f"eval.{name}={steps} steps is not a multiple of eval.every={self.every}: "
                    "questions are asked at some of the evaluations, not between them"
                )
        if self.prompts is not None and not isinstance(self.prompts, str | list):
            raise UserError(f"eval.prompts={self.prompts} must be a list of texts, or a file with one a line")
