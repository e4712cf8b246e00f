"""Are the targets of real batches those that the loss.* keys ask for? Their documents tell, apart from what made the batches.

A mask can be lost anywhere between the chat format and the model, and the loss does not show it: nanochat trained on every token
for 31 days. So the weights are computed anew here, from kinds and turns, and not by `LossWeights`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from chattrain.chat import Kind
from chattrain.config.words import Supervise
from chattrain.data.batch import Batch
from chattrain.data.collators import EMPTY, Collator
from chattrain.data.locating import Located, Search, locate
from chattrain.data.packing import IGNORE_INDEX

CONTEXT, REPLY, END = "context tokens carry loss", "reply tokens carry no loss", "tokens that end a reply carry no loss"
PROMPT, WEIGHT = "context tokens carry no loss", "tokens have another weight"
NOT_NEXT, PADDING = "targets are not the next token of their document", "targets are padding"
SHOWN = 5  # rows that are named


@dataclass
class Compared:
    """What was compared. `wrong`: targets by what is wrong with them; `rows`: the first few rows that have some."""

    tokens: int = 0  # whose weight was compared
    wrong: Counter[str] = field(default_factory=Counter)
    rows: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)  # what is wrong with whole batches, a sentence each


@dataclass(frozen=True)
class Policy:
    """What the keys loss.* ask for; `supervise` is not auto."""

    supervise: Supervise
    prompt_weight: float

    def weights(self, kinds: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """(tokens,): of a document's tokens, each of a kind and of a turn."""
        off, reply = kinds & Kind.OFF > 0, kinds & Kind.ASSISTANT > 0
        trained = reply & ~off
        if self.supervise == Supervise.last_assistant and reply.any():
            trained &= turns == turns[np.flatnonzero(reply)].max()
        if self.supervise == Supervise.all:
            trained = ~off
        return np.where(trained, 1.0, np.where(off, 0.0, self.prompt_weight))


def compare(collator: Collator, groups: Sequence[np.ndarray], policy: Policy, stop_ids: Collection[int]) -> Compared:
    """Compare the micro-batches of these row indices with the policy. Documents are found by what the collator says of its rows,
    where that is so, else by their tokens."""
    compared, unplaced = Compared(), []
    for rows in groups:
        batch = collator.batch(rows)
        compared.batches += _check_totals(batch)
        for b, row in enumerate(rows.tolist()):
            found = locate(batch.inputs[b].numpy(), [] if row == EMPTY else collator.pieces(row), collator.mixture)
            if found is None:
                unplaced.append((batch, b, row))
            else:
                _compare_row(compared, collator, batch, b, row, found, policy, stop_ids)
    if unplaced:
        search = Search(collator.mixture, [batch.inputs[b].numpy() for batch, b, _ in unplaced])
        for batch, b, row in unplaced:
            _compare_row(compared, collator, batch, b, row, search.locate(batch.inputs[b].numpy()), policy, stop_ids)
    compared.batches = list(dict.fromkeys(compared.batches))
    collator.mixture.release()
    return compared


def trained_weights(batch: Batch) -> np.ndarray:
    """(B, T): the weight with which each target reaches the loss."""
    targets = batch.targets.numpy()
    weights = np.ones(targets.shape) if batch.weights is None else batch.weights.numpy().astype(np.float64)
    chosen = targets != IGNORE_INDEX
    if batch.target_indices is not None:
        named = np.zeros(targets.size, dtype=bool)
        named[batch.target_indices.numpy()] = True
        chosen &= named.reshape(targets.shape)
    return np.where(chosen, weights, 0.0)


def _check_totals(batch: Batch) -> list[str]:
    """Do the sums of a batch, by which its loss is divided and its tokens are counted, fit its targets?"""
    said, weights, targets = [], trained_weights(batch), batch.targets.numpy()
    if not np.isclose(batch.loss_weight, weights.sum(), rtol=1e-4):
        said.append(f"the loss of a batch is divided by {batch.loss_weight:g}, and its targets weigh {weights.sum():g}")
    elif batch.num_supervised != (weights == 1).sum():
        said.append(f"num_supervised of a batch is {batch.num_supervised}, and {(weights == 1).sum()} of its targets weigh 1")
    if batch.target_indices is not None and len(batch.target_indices) != (targets != IGNORE_INDEX).sum():
        named, there = len(batch.target_indices), (targets != IGNORE_INDEX).sum()
        said.append(f"target_indices of a batch name {named} targets, and it has {there}")
    return said


def _compare_row(
    compared: Compared,
    collator: Collator,
    batch: Batch,
    b: int,
    row: int,
    found: Located,
    policy: Policy,
    stop_ids: Collection[int],
) -> None:
    """Add what is wrong with row b of the batch to `compared`."""
    targets, weights = batch.targets[b].numpy(), trained_weights(batch)[b]
    wrong: Counter[str] = Counter()
    whole = 0  # where a document has ended of which each token is an input, so that the next one begins as its last target
    for at, document, begin, end in found.spans():
        tokens, kinds, turns = collator.mixture.read(document)
        asked = policy.weights(kinds, turns)
        if begin == 0 and whole == at > 0 and weights[at - 1] > 0 and not asked[0]:
            wrong[CONTEXT] += 1
        whole = at + end - begin if end == len(tokens) else 0
        following = slice(begin + 1, end + 1)  # the targets; one fewer where the whole document is inputs
        ids = tokens[following].astype(np.int64)
        here = slice(at, at + len(ids))
        if not np.allclose(asked[following], weights[here], atol=1e-3):
            is_end = np.isin(ids, list(stop_ids)) & (kinds[following] == Kind.ASSISTANT)
            wrong += _differences(asked[following], weights[here], is_end)
        wrong[NOT_NEXT] += int(((targets[here] != ids) & (weights[here] > 0)).sum())
        compared.tokens += len(ids)
    if found.size is not None:
        wrong[PADDING] += int((weights[found.size :] > 0).sum())
    wrong = +wrong
    if wrong:
        compared.wrong += wrong
        if len(compared.rows) < SHOWN:
            compared.rows.append(collator.describe(row) if row != EMPTY else "a row of padding")


def _differences(asked: np.ndarray, has: np.ndarray, is_end: np.ndarray) -> Counter[str]:
    """How many weights differ, by how, of the weights asked for and those of the targets, both (tokens,)."""
    lost = (asked == 1) & (has == 0)
    kinds = {
        CONTEXT: (asked == 0) & (has > 0),
        REPLY: lost & ~is_end,
        END: lost & is_end,
        PROMPT: (asked > 0) & (asked < 1) & (has == 0),
        WEIGHT: (asked > 0) & (has > 0) & ~np.isclose(asked, has, atol=1e-3),
    }
    return Counter({name: int(where.sum()) for name, where in kinds.items()})
