"""Rows of a step's batches, with what each token is and where it comes from, as `command=inspect` shows them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from chattrain.data.batch import Batch
from chattrain.data.collators import EMPTY, Collator
from chattrain.data.locating import Located, Search, locate
from chattrain.data.mask_check import trained_weights
from chattrain.data.packing import IGNORE_INDEX
from chattrain.data.passes import PassLimits
from chattrain.setup.data import RunData
from chattrain.tokenizer import AnyTokenizer, Tokenizer
from chattrain.tracking.tokens import Document, Row, Token, visible

MOST_PARTS = 4  # tokens that one character is made of, at most


def step_rows(data: RunData, step: int, wanted: list[int], limits: PassLimits, world_size: int) -> list[Row]:
    """The rows of a step (from 0) whose numbers in it are wanted, in the micro-batches in which the loop will see them."""
    collator, first = data.train, step * data.rows_per_step
    spelling = Spelling(data.tokenizer)
    groups = collator.split_micro_batches(np.arange(data.rows_per_step) + first, limits, world_size)
    found: dict[int, Row] = {}
    for number, group in enumerate(groups):
        for rank, indices in enumerate(group):
            here = [b for b, row in enumerate(indices.tolist()) if row != EMPTY and row - first in wanted]
            if here:
                batch = collator.batch(indices)
                name = f"micro-batch {number + 1} of {len(groups)}" + (f" of rank {rank}" if world_size > 1 else "")
                for b in here:
                    row = int(indices[b])
                    found[row - first] = _row(collator, batch, b, row, row - first, name, spelling)
    collator.mixture.release()
    return [found[number] for number in wanted]


def _row(collator: Collator, batch: Batch, b: int, row: int, number: int, name: str, spelling: Spelling) -> Row:
    inputs, mixture = batch.inputs[b].numpy(), collator.mixture
    located = locate(inputs, collator.pieces(row), mixture) or Search(mixture, [inputs]).locate(inputs)
    size = collator.batch(np.array([row])).num_tokens if located.size is None else located.size
    documents = [document for _, document, _, _ in located.spans()]
    tokens = list(_tokens(collator, batch, b, located, size, spelling))
    carried = sum(token.weight > 0 for token in tokens)
    shape = f"{len(batch.inputs)} x {len(inputs):,} tokens"
    named = [Document(visible(mixture.describe(i)), mixture.caches[mixture.source_of(i)].name) for i in documents]
    return Row(
        number=number,
        name=visible(collator.describe(row)),
        batch=f"{name}, {shape}; here {size:,} tokens, {len(inputs) - size:,} of padding, {carried:,} with a loss",
        documents=named,
        tokens=tokens,
        padding=len(inputs) - size,
        padding_text=spelling.of([int(inputs[-1])])[0],
    )


def _tokens(collator: Collator, batch: Batch, b: int, located: Located, size: int, spelling: Spelling) -> Iterator[Token]:
    """The row's inputs in order, and between them the targets that are no inputs. The last token of a document is shown with
    weight 0 where it is no target either."""
    inputs, targets, weights = batch.inputs[b].tolist(), batch.targets[b].tolist(), trained_weights(batch)[b].tolist()
    places = _places(located)
    order: list[Token] = []
    weight = 0.0  # of the next input, as the target of the one before
    for t in range(size):
        span, position = places.get(t, (None, None if batch.positions is None else int(batch.positions[b, t])))
        order.append(Token("", inputs[t], spelling.is_special(inputs[t]), weight, t, position, span))
        ending = None  # the token of the document that follows its last input
        if span is not None and position is not None and places.get(t + 1, (None, 0))[0] != span:
            tokens = collator.mixture.read(int(located.documents[t]))[0]
            ending = int(tokens[position + 1]) if position + 1 < len(tokens) else None
        following = inputs[t + 1] if t + 1 < size and ending is None else None
        target = ending if targets[t] == IGNORE_INDEX else targets[t]
        weight = weights[t] if target == following else 0.0
        if target not in (None, following):
            place = (None, None) if ending is None else (None if position is None else position + 1, span)
            order.append(Token("", target, spelling.is_special(target), weights[t], t + 1, *place, False))
    for text, token in zip(spelling.of([token.id for token in order]), order, strict=True):
        yield token._replace(text=text)


def _places(located: Located) -> dict[int, tuple[int, int]]:
    """Index of an input -> (its document in the row, its index in that document)."""
    spans = enumerate(located.spans())
    return {at + k: (number, begin + k) for number, (at, _, begin, end) in spans for k in range(end - begin)}


class Spelling:
    """What tokens look like: special ones by their names, others as the characters that they are parts of."""

    def __init__(self, tokenizer: AnyTokenizer):
        self.tokenizer = tokenizer
        self.sizes = tokenizer.token_bytes()  # 0: special, or not used

    def is_special(self, token: int) -> bool:
        return not (0 <= token < len(self.sizes)) or not self.sizes[token]

    def of(self, ids: list[int]) -> list[str]:
        """The text of each token, made visible; "" for one that only completes the character of a token before."""
        texts: list[str] = []
        while len(texts) < len(ids):
            at = len(texts)
            taken, text = 1, self._decode(ids, at, 1)
            while "\ufffd" in text and taken < MOST_PARTS and at + taken < len(ids) and not self.is_special(ids[at + taken]):
                taken += 1
                text = self._decode(ids, at, taken)
            if "\ufffd" in text:  # no character, whatever follows
                taken, text = 1, self._decode(ids, at, 1)
            texts += [visible(text), *[""] * (taken - 1)]
        return texts

    def _decode(self, ids: list[int], at: int, count: int) -> str:
        """The text of tokens at ... at + count - 1."""
        tokens = ids[at : at + count]
        try:
            if isinstance(self.tokenizer, Tokenizer) or at == 0 or self.is_special(tokens[0]) or self.is_special(ids[at - 1]):
                return self.tokenizer.decode(tokens)
            before = self.tokenizer.decode(ids[at - 1 : at])  # some tokenizers drop the blank of a text's first token
            both = self.tokenizer.decode([ids[at - 1], *tokens])
            return both.removeprefix(before) if both.startswith(before) else self.tokenizer.decode(tokens)
        except (KeyError, OverflowError, TypeError):
            return f"<unknown id {tokens[0]}>"
