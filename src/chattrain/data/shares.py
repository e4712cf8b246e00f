"""How many documents of each source an epoch of a mixture holds: pure functions of sizes, weights and shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chattrain.config.data import SourceConfig
from chattrain.config.words import WeightBy


@dataclass(frozen=True)
class Shares:
    """The keys data.weight_by and data.replay."""

    weight_by: WeightBy = WeightBy.documents  # what the weights of sources are shares of
    replay: float = 0.0  # share of an epoch's tokens that comes from base text
    num_replay: int = 0  # how many sources of the mixture, the last ones, are base text


def epoch_counts(
    sizes: Sequence[int], sources: Sequence[SourceConfig], mean_tokens: Sequence[float] = (), shares: Shares = Shares()
) -> list[int]:
    """The number of documents that each source contributes to one epoch of the mixture. `sizes`: documents of each source,
    `mean_tokens`: tokens of a document of each, on average.

    Without weights, each source is repeated `epochs` times. With weights, the counts are proportional to the weights, and the
    epoch is as large as it can be without repeating any source more than `epochs` times; the other sources are subsampled. With
    weight_by=tokens, the tokens are proportional to the weights. Base text is added, as often as its share of tokens needs.

    >>> epoch_counts([100, 10], [SourceConfig("a"), SourceConfig("b", epochs=2)])
    [100, 20]
    >>> weighted = [SourceConfig("a", weight=3), SourceConfig("b", weight=1)]
    >>> epoch_counts([100, 10], weighted)
    [30, 10]
    >>> epoch_counts([100, 10], weighted, [20.0, 100.0], Shares(WeightBy.tokens))  # 2,000 and 667 tokens
    [100, 7]
    >>> epoch_counts([100, 10], [SourceConfig("a"), SourceConfig("base")], [20.0, 100.0], Shares(replay=0.2, num_replay=1))
    [100, 5]
    """
    if shares.num_replay:
        own = len(sizes) - shares.num_replay
        counts = epoch_counts(sizes[:own], sources[:own], mean_tokens[:own], Shares(shares.weight_by))
        base = epoch_counts(sizes[own:], sources[own:])
        tokens, base_tokens = (_dot(c, m) for c, m in ((counts, mean_tokens[:own]), (base, mean_tokens[own:])))
        times = shares.replay / (1 - shares.replay) * tokens / base_tokens
        return counts + [max(1, round(times * n)) for n in base]
    most = [n * source.epochs for n, source in zip(sizes, sources, strict=True)]
    weights = [source.weight for source in sources if source.weight is not None]  # all have one, or none: DataConfig.check
    if not weights:
        return [max(1, round(n)) for n in most]
    if shares.weight_by == WeightBy.tokens:  # documents to a share of tokens
        weights = [weight / mean for weight, mean in zip(weights, mean_tokens, strict=True)]
    unit = min(n / weight for n, weight in zip(most, weights, strict=True))
    return [max(1, round(unit * weight)) for weight in weights]


def _dot(counts: Sequence[int], means: Sequence[float]) -> float:
    return sum(count * mean for count, mean in zip(counts, means, strict=True))
