"""What the log says of a run's data."""

from __future__ import annotations

import logging

from chattrain.chat.format import DROPPED_THOUGHTS
from chattrain.data.collators import Collator
from chattrain.setup.audit import FAULT, LEVELS, AuditReport
from chattrain.setup.data import EvalData, RunData

log = logging.getLogger("chattrain")


def report_notes(data: EvalData) -> None:
    """Log what was found when the data was opened."""
    for level, note in dict.fromkeys(data.notes):  # a source of both training and validation gives each note twice
        log.log(level, note)


def report_data(data: RunData) -> None:
    """Log what the data is, how much of it is cut or left out, and how much of the validation data is trained on."""
    counts = data.train.counts
    report_notes(data)
    log.info("training mixture: %s documents an epoch; %d steps", f"{counts.documents:,}", data.num_steps)
    for line in describe_sources(data.train):
        log.info("  %s", line)
    if data.overlap is not None:
        log.info("validation: %s documents", f"{data.overlap.documents:,}")
    for line in describe_left_out(data.train):
        log.info("%s", line)
    report_audit(data.audit)


def report_audit(report: AuditReport) -> None:
    """Log what the audit found, and that it found nothing."""
    for finding in report.findings:
        log.log(LEVELS[finding.level], "%s", finding.message)
    if not report.of(FAULT):
        log.info("audit: the masks of %s tokens of real batches are those asked for", f"{report.tokens:,}")


def describe_left_out(collator: Collator) -> list[str]:
    """A line for each kind of content that the user or a chat template leaves out of a source's conversations."""
    lines = []
    for cache in collator.mixture.caches:
        for what, times in cache.left_out.items():
            by_template = f"{times:,} {what} left out, as the chat template does"
            by_user = f"`{what}` left out {times:,} times (data.ignore)"
            lines.append(f"data source {cache.name}: {by_template if what == DROPPED_THOUGHTS else by_user}")
    return lines


def describe_sources(collator: Collator) -> list[str]:
    """A line a source: what an epoch holds of it."""
    found = collator.by_source()
    tokens = sum(source.tokens for source in found.values())
    width = max(len(name) for name in found)
    return [
        f"{name:{width}s}  {source.documents:,} documents, {source.tokens:,} tokens ({source.tokens / max(1, tokens):.1%}), "
        f"{source.supervised_tokens:,} supervised"
        for name, source in found.items()
    ]
