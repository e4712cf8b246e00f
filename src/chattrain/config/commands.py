"""The keys of commands: `chat.*`, `inspect.*`, `verify.*`, `export.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chattrain.errors import UserError


@dataclass
class ChatConfig:
    prompt: Any = None  # what is asked: a text or a list of texts; null: typed on the terminal, turn by turn
    max_tokens: int = 256  # tokens of a reply at most
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = 50  # sample from the k most likely tokens; null: from all

    def check(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise UserError(
                f"chat.max_tokens={self.max_tokens} and chat.top_k={self.top_k} must be 1 or more, "
                f"chat.temperature={self.temperature} 0 or more"
            )


@dataclass
class InspectConfig:
    rows: int = 3  # rows of the step to show
    step: int = 1  # step whose rows are shown, counted as the log counts them
    row: int | None = None  # the one row of the step to show, from 0; null: the first `rows`
    source: str | None = None  # show only rows that hold a document of this source
    ids: bool = False  # a table of each row too: id, document, position and weight of each token
    html: str | None = None  # file to write the rows to, as a page; null: one in the cache folder, whose path is printed

    def check(self) -> None:
        if self.rows < 1 or self.step < 1 or (self.row is not None and self.row < 0):
            raise UserError(
                f"inspect.rows={self.rows} and inspect.step={self.step} must be 1 or more, inspect.row={self.row} 0 or more"
            )


@dataclass
class VerifyConfig:
    steps: int = 20  # optimizer steps of command=verify_resume

    def check(self) -> None:
        if self.steps < 2:
            raise UserError(f"verify.steps={self.steps} must be 2 or more")


@dataclass
class ExportConfig:
    dir: str | None = None  # folder to write; null: <run>/<format>/<step>
