"""Accuracy on problems whose solution the model writes: GSM8K, sums, spelling, HumanEval.

Replies are greedy, as of nanochat's chat_eval, so a score has no randomness. The calculator answers the calls of a reply.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chattrain.chat import Malformed, render_prompt
from chattrain.chat.reply import reply_text
from chattrain.data.malformed import MalformedRows
from chattrain.data.records import Records
from chattrain.evals import sandbox
from chattrain.evals.replies import Reply, Writer, gather
from chattrain.parallel.ranks import Ranks
from chattrain.tasks import humaneval, record_to_document
from chattrain.tasks.gsm8k import last_number, marked_answer
from chattrain.tokenizer import AnyTokenizer

WORKERS = 4  # programs that run at once


class Problem(NamedTuple):
    ids: list[int]  # token ids of the prompt
    question: str
    expected: str  # the right answer, as the suite extracts it
    key: str  # hash of question and answer: the same for any tokenizer and in any set
    record: dict
    index: int = 0  # of its record in the source


@dataclass(frozen=True)
class Suite:
    """How replies are judged. `flexible`: a second way, whose accuracy is eval/<set>_flexible_acc; None: there is none."""

    schema: str  # of the records
    extract: Callable[[str], str | None]  # what of a reply is compared with the right answer
    flexible: Callable[[str], str | None] | None = None
    runs: bool = False  # replies are programs, which pass their tests or not

    def expected(self, document: dict, record: dict) -> str:
        """The right answer. Raises Malformed where there is none."""
        if self.runs:
            return record["test"]
        content = document["messages"][-1]["content"]
        found = self.extract(content if isinstance(content, str) else content[-1]["text"])
        if found is None:
            raise Malformed("its solution has no answer that can be compared")
        return found

    def is_right(self, problem: Problem, reply: str) -> bool:
        if self.runs:
            return sandbox.passes(humaneval.program(problem.record, reply))
        return self.extract(reply) == problem.expected


SUITES = {
    "gsm8k": Suite("gsm8k", marked_answer, flexible=last_number),
    "arithmetic": Suite("messages", last_number),
    "spelling": Suite("messages", marked_answer),
    "humaneval": Suite("humaneval", humaneval.code, runs=True),
}


def problems(name: str, records: Records, tokenizer: AnyTokenizer, malformed: MalformedRows | None = None) -> list[Problem]:
    """The records of a suite as problems. Malformed ones are added to `malformed`; None: the first is refused by a UserError."""
    suite = SUITES[name]

    def ask(record: dict) -> Problem:
        document = record_to_document(record, suite.schema)
        question, expected = document["messages"][0]["content"], suite.expected(document, record)
        key = hashlib.sha256(json.dumps([question, expected]).encode()).hexdigest()[:16]
        return Problem(render_prompt(document, tokenizer), question, expected, key, record if suite.runs else {})

    records = Records(records.table, records.indices, f"suite {name}", records.path, suite.schema, records.places)
    asked = [problem._replace(index=i) for i, problem in records.convert(ask, malformed=malformed)]
    if not asked and malformed is not None:
        raise records.nothing_usable(malformed)
    return asked


@dataclass
class Generative:
    """Measures of one suite, the same on any number of ranks:

    - eval/<name>_acc: fraction of the problems whose reply has the right answer; of GSM8K and spelling: the number behind the
      first `####`, as in nanochat; of sums the last number; of HumanEval a program that passes the tests;
    - eval/<name>_flexible_acc (GSM8K): the last number of the reply, wherever it stands: flexible-extract of the LM Evaluation
      Harness;
    - eval/<name>_stderr and _n as for multiple choice; eval/<name>_ended: fraction of the replies that end by themselves.

    Every rank must hold all weights when it writes its share of the replies. `answers` holds what was answered last, `speed` how
    long this rank wrote and how many tokens all did.
    """

    name: str
    problems: list[Problem]
    write: Writer
    tokenizer: AnyTokenizer
    ranks: Ranks
    answers: list[dict[str, Any]] = field(default_factory=list)  # in the order of the source
    speed: dict[str, float] = field(default_factory=dict)

    def __call__(self) -> dict[str, float]:
        """The measures over all ranks, by name."""
        began = time.perf_counter()
        replies = self.write([problem.ids for problem in self.problems])
        self.speed = {"seconds": time.perf_counter() - began, "tokens": sum(len(reply.ids) for reply in replies)}
        texts = [reply_text(self.tokenizer, reply.ids) for reply in replies]
        self.answers = [
            self._answer(problem, reply, text, right)
            for problem, reply, text, right in zip(self.problems, replies, texts, self._judge(texts), strict=True)
        ]
        return self._metrics()

    def _judge(self, texts: list[str]) -> list[bool]:
        """Is each reply right? Each rank judges its share: of HumanEval it runs the programs."""
        suite, share = SUITES[self.name], slice(self.ranks.rank, None, self.ranks.world_size)
        with ThreadPoolExecutor(WORKERS if suite.runs else 1) as pool:
            right = pool.map(suite.is_right, self.problems[share], texts[share])
        return [bool(row[0]) for row in gather([[int(ok)] for ok in right], len(texts), self.ranks)]

    def _answer(self, problem: Problem, reply: Reply, text: str, right: bool) -> dict[str, Any]:
        suite = SUITES[self.name]
        compared = {} if suite.runs else {"expected": problem.expected, "extracted": suite.extract(text)}
        flexible = {"flexible": suite.flexible(text) == suite.flexible(problem.expected)} if suite.flexible else {}
        return {
            "set": self.name,
            "index": problem.index,
            "key": problem.key,
            "question": problem.question,
            "reply": text,
            **compared,
            "right": right,
            **flexible,
            "ended": reply.ended,
            "tokens": len(reply.ids),
        }

    def _metrics(self) -> dict[str, float]:
        n, name = len(self.answers), f"eval/{self.name}"
        ways = {"": "right", **({"_flexible": "flexible"} if SUITES[self.name].flexible else {})}
        metrics: dict[str, float] = {}
        for suffix, way in ways.items():
            accuracy = sum(answer[way] for answer in self.answers) / n
            metrics |= {f"{name}{suffix}_acc": accuracy, f"{name}{suffix}_stderr": math.sqrt(accuracy * (1 - accuracy) / n)}
            metrics[f"{name}{suffix}_n"] = n
        return metrics | {f"{name}_ended": sum(answer["ended"] for answer in self.answers) / n}
