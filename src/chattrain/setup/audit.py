"""The audit of a training's data, at every start: silent mistakes that a falling loss does not show.

A fault of the mask ends the training before it begins: it would teach something else than was asked for. What may be meant, such
as conversations that are cut, is a warning (data.audit=refuse: ends it too). What is counted for each document is kept with the
token cache, so that a start costs about a second; the masks of real batches are compared anew each time, as code makes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from chattrain.chat import chat_format
from chattrain.config.words import Audit as Strictness
from chattrain.config.words import Supervise
from chattrain.data import counting
from chattrain.data.collators import Collator
from chattrain.data.loss_weights import LossWeights
from chattrain.data.mask_check import Compared, Policy, compare, trained_weights
from chattrain.data.overlap import Overlap
from chattrain.data.passes import PassLimits
from chattrain.data.question_overlap import QuestionOverlap
from chattrain.data.statistics import find_cuts, steps_to_sample
from chattrain.errors import UserError
from chattrain.tokenizer import AnyTokenizer

COMPARED_TOKENS = 1 << 16  # of batches whose masks are compared, padding counted, at most; one batch at least
SAMPLED_STEPS = 16  # that are compared, as far as COMPARED_TOKENS allow, and looked at for one without a loss
NEAR_SHARE = 0.05  # of the validation documents: fewer near copies than this are noted, as few templates make some alike
NAMED = 3  # documents that a message names
FAULT, WARNING, NOTE = "fault", "warning", "note"
LEVELS = {FAULT: logging.ERROR, WARNING: logging.WARNING, NOTE: logging.INFO}


@dataclass(frozen=True)
class Finding:
    """`count`: of documents, tokens or questions, as the message says."""

    level: str  # fault, warning, note
    name: str
    count: int
    message: str


@dataclass(frozen=True)
class AuditReport:
    """What the audit found. `tokens`: whose loss weights were compared with their documents."""

    findings: list[Finding] = field(default_factory=list)
    tokens: int = 0

    def of(self, level: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    @property
    def facts(self) -> dict[str, Any]:
        """For summary.json."""
        return {"tokens_compared": self.tokens, "findings": [asdict(finding) for finding in self.findings]}


def audit(
    collator: Collator,
    loss: LossWeights,
    tokenizer: AnyTokenizer,
    rows_per_step: int,
    num_steps: int,
    limits: PassLimits,
    overlap: Overlap | None,
    questions: dict[str, QuestionOverlap],
) -> AuditReport:
    """Audit the training data. `loss`: the keys loss.*; `overlap`, `questions`: what the training data shares with validation
    and evaluation."""
    chosen = loss.resolved(collator.supervises)
    policy = Policy(chosen.supervise, chosen.prompt_weight)
    compared = Compared()
    findings = [*_sources_without_loss(collator, policy), *_marks(collator, policy)]
    if collator.follows_loss_keys:
        groups = _groups(collator, rows_per_step, num_steps, limits)
        compared = compare(collator, groups, policy, chat_format(tokenizer).stop_ids)
        findings += _masks(compared, policy)
    else:
        findings.append(Finding(NOTE, "own_weights", 1, "the collator weighs tokens in its own way: no mask is compared"))
    findings += _empty_steps(collator, policy, rows_per_step, num_steps)
    findings += [*_cuts(collator), *_copies(overlap)]
    for name, shared in questions.items():
        findings += _asked(name, shared)
    return AuditReport(findings, compared.tokens)


def refuse(report: AuditReport, strictness: Strictness) -> None:
    """Raises UserError for a fault, and with data.audit=refuse for a warning too."""
    found = report.of(FAULT)
    more = report.of(WARNING) if strictness == Strictness.refuse else []
    if not found and not more:
        return
    said = "; ".join(finding.message for finding in [*found, *more])
    way_out = "look at the rows with command=inspect"
    if not found:
        way_out += ", or train all the same with data.audit=warn"
    raise UserError(f"the audit of the data refuses this training: {said}; {way_out}")


def _sources_without_loss(collator: Collator, policy: Policy) -> Iterator[Finding]:
    """Sources of which no token is trained: a fault, unless their conversations are cut, which a longer row would mend."""
    mixture = collator.mixture
    for cache, a, b in zip(mixture.caches, mixture.starts.tolist(), mixture.starts[1:].tolist(), strict=False):
        if not mixture.num_supervised[a:b].any():
            level, what = FAULT, ""
            reason = "they have no reply, or all is flagged off, or the mask is lost: mend the source, or leave it out"
        elif not mixture.keep[a:b].any():
            level, what, reason = (
                WARNING,
                f" within train.seq_len={collator.seq_len} tokens",
                "raise train.seq_len, or leave the source out",
            )
        else:
            continue
        yield Finding(
            level,
            "no_supervised_token",
            b - a,
            f"data source {cache.name}: none of its {b - a:,} documents has a token that carries loss "
            f"(loss.supervise={policy.supervise.name}){what} (first: {mixture.describe(a)}); {reason}",
        )


def _marks(collator: Collator, policy: Policy) -> Iterator[Finding]:
    """Faults that tokenising found in what the chat format marks as the model's own words."""
    said = {
        counting.OPEN_TURNS: "replies are trained without the token that ends them, so the model would not learn to stop",
        counting.EMPTY_REPLIES: "replies are empty, so the model learns to say nothing",
        counting.UNTRAINED_REPLIES: "of a sample of conversations do not mark the last reply to be trained",
        counting.TRAINED_PROMPTS: "of a sample of conversations mark tokens of the prompt to be trained",
    }
    level = FAULT if policy.supervise != Supervise.all else WARNING  # where all is trained, validation alone uses the marks
    for cache in collator.mixture.caches:
        for kind, fault in cache.faults.items():
            places = ", ".join(cache.places.short(i) for i in fault.records[:NAMED])
            told = WARNING if kind == counting.EMPTY_REPLIES else level  # it may be meant
            yield Finding(told, kind, fault.count, f"data source {cache.name}: {fault.count:,} {said[kind]} (first: {places})")


def _groups(collator: Collator, rows_per_step: int, num_steps: int, limits: PassLimits) -> list[np.ndarray]:
    """Row indices of micro-batches to compare: of the first step, and of others as long as there is room."""
    groups: list[np.ndarray] = []
    places = 0
    for step in steps_to_sample(collator, rows_per_step, num_steps, SAMPLED_STEPS):
        rows = np.arange(rows_per_step) + step * rows_per_step
        for group in collator.split_micro_batches(rows, limits, 1):
            places += len(group[0]) * collator.seq_len
            if groups and places > COMPARED_TOKENS:
                return groups
            groups.append(group[0])
    return groups


def _masks(compared: Compared, policy: Policy) -> Iterator[Finding]:
    """What is wrong with the targets of real batches."""
    asked = f"loss.supervise={policy.supervise.name}" + (
        f", loss.prompt_weight={policy.prompt_weight:g}" * bool(policy.prompt_weight)
    )
    if compared.wrong:
        counts = ", ".join(f"{count:,} {what}" for what, count in compared.wrong.most_common())
        rows = "; ".join(compared.rows[:NAMED])
        yield Finding(
            FAULT,
            "mask",
            compared.wrong.total(),
            f"the collator's batches have other targets than {asked} says: of {compared.tokens:,} tokens that were compared, "
            f"{counts} (first rows: {rows}); a collator that weighs tokens in its own way says so by follows_loss_keys = False",
        )
    if not compared.tokens:
        yield Finding(
            WARNING,
            "not_compared",
            1,
            "no document could be found in the collator's rows, so its masks were not compared: one that changes tokens says so "
            "by follows_loss_keys = False, another one says by pieces(row) which documents a row holds",
        )
    for sentence in compared.batches:
        yield Finding(FAULT, "batch_totals", 1, f"{sentence}, so its loss is wrong")


def _empty_steps(collator: Collator, policy: Policy, rows_per_step: int, num_steps: int) -> Iterator[Finding]:
    """Steps that would have no loss at all."""
    if policy.prompt_weight:
        return
    steps = steps_to_sample(collator, rows_per_step, num_steps, SAMPLED_STEPS)
    empty = [s for s in steps if not collator.count(np.arange(rows_per_step) + s * rows_per_step)[1]]
    if 0 not in empty and not trained_weights(collator.batch(np.arange(rows_per_step))).any():  # whatever it counts
        empty.insert(0, 0)
    collator.mixture.release()
    if empty:
        step = empty[0] + 1
        yield Finding(
            FAULT,
            "empty_step",
            len(empty),
            f"step {step} has no token that carries loss in its {rows_per_step} rows (first: "
            f"{collator.describe(empty[0] * rows_per_step)}), as have {len(empty)} of {len(steps)} steps that were looked at; "
            "more rows a step, or another loss.supervise, would give it some",
        )


def _cuts(collator: Collator) -> Iterator[Finding]:
    """Documents that a row does not hold whole."""
    counts, cuts, mixture = collator.counts, find_cuts(collator), collator.mixture

    def first(which: np.ndarray) -> str:
        return f"first: {', '.join(mixture.describe(int(i)) for i in np.flatnonzero(which)[:NAMED])}"

    if counts.truncated:
        yield Finding(
            WARNING,
            "truncated",
            counts.truncated,
            f"{counts.truncated} documents are longer than train.seq_len and cut ({counts.truncated_tokens} tokens lost; "
            f"{first(cuts.truncated)})",
        )
    kept = cuts.before_reply & ~cuts.left_out
    if kept.any():
        yield Finding(
            WARNING,
            "cut_before_reply",
            int(kept.sum()),
            f"{kept.sum()} documents are cut before their first reply, so that none of it is trained ({first(kept)}); raise "
            "train.seq_len",
        )
    if counts.left_out:
        beyond = int((cuts.left_out & cuts.before_reply).sum())
        reasons = f"{beyond} are cut before their first reply, {counts.left_out - beyond} have none that is trained"
        yield Finding(
            WARNING,
            "left_out",
            counts.left_out,
            f"{counts.left_out} documents have no token that carries loss within train.seq_len and are left out: {reasons} "
            f"({first(cuts.left_out)})",
        )


def _copies(overlap: Overlap | None) -> Iterator[Finding]:
    """Validation documents that are trained on."""
    if overlap is None or not (overlap.exact or overlap.near):
        return
    documents, exact, near = overlap
    yield Finding(
        WARNING if exact or near >= NEAR_SHARE * documents else NOTE,
        "validation_copies",
        exact + near,
        f"{exact + near:,} of {documents:,} validation documents are in the training data too: {exact:,} copies but for case and "
        f"punctuation, {near:,} near copies (70 % of their runs of 8 words); val/loss is lower for it",
    )


def _asked(name: str, shared: QuestionOverlap) -> Iterator[Finding]:
    """Questions of an evaluation that are trained on."""
    if shared.exact:
        yield Finding(
            WARNING,
            f"questions/{name}",
            shared.exact,
            f"{shared.exact:,} of {shared.questions:,} questions of {name} are asked in the training data too, in the same "
            f"words but for case and punctuation; eval/{name}_acc is higher for it",
        )
    if shared.shared:
        yield Finding(
            NOTE,
            f"questions/{name}/13_grams",
            shared.shared,
            f"{shared.shared:,} of {shared.sampled:,} questions of {name} share 13 words in a row with a sample of the training "
            "data",
        )
