"""What the log says of a run's data."""

from __future__ import annotations

import logging

from chattrain.chat.format import DROPPED_THOUGHTS
from chattrain.data.collators import Collator
from chattrain.data.statistics import SourceStatistics
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
    if report.tokens and not report.of(FAULT):
        log.info("audit: the masks of %s tokens of real batches are those asked for", f"{report.tokens:,}")


def describe_findings(report: AuditReport) -> list[str]:
    """A line for each finding of the audit, the gravest first, and one for what was compared."""
    found = sorted(report.findings, key=lambda finding: -LEVELS[finding.level])
    lines = [f"{finding.level}: {finding.message}" for finding in found]
    return [*lines, f"the loss weights of {report.tokens:,} tokens of real batches were compared with their documents"]


def mixture_table(sources: dict[str, SourceStatistics]) -> list[list[str]]:
    """A header, a line a source, a line for all of them."""
    header = ["source", "records", "skipped", "documents", "tokens", "supervised", "share", "truncated", "left out", "longest"]
    lines = [
        [
            name,
            f"{source.records:,}",
            f"{sum(source.skipped.values()):,}" + "".join(f" ({reason})" for reason in source.skipped),
            f"{source.documents:,}",
            f"{source.tokens:,}",
            f"{source.supervised_tokens:,}",
            f"{source.share:.1%}",
            f"{source.truncated:,}",
            f"{source.left_out:,}",
            f"{source.longest:,}",
        ]
        for name, source in sources.items()
    ]
    found = list(sources.values())
    tokens, supervised = sum(s.tokens for s in found), sum(s.supervised_tokens for s in found)
    skipped, records = sum(sum(s.skipped.values()) for s in found), sum(s.records for s in found)
    numbers = [records, skipped, sum(s.documents for s in found), tokens, supervised]
    cut = [sum(s.truncated for s in found), sum(s.left_out for s in found), max(s.longest for s in found)]
    share = f"{supervised / max(1, tokens):.1%}"
    return [header, *lines, ["all", *(f"{n:,}" for n in numbers), share, *(f"{n:,}" for n in cut)]]


def ranges(lengths: dict[int, int]) -> dict[str, int]:
    """A histogram by powers of 2 with its ranges in words.

    >>> ranges({2: 1, 4: 2})
    {'2 to 3': 1, '4 to 7': 2}
    """
    return {f"{least:,} to {2 * least - 1:,}": count for least, count in lengths.items()}


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
