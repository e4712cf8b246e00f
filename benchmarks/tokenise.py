"""Rendering and tokenising conversations on one core, against tiktoken alone on the same texts."""

from __future__ import annotations

from benchmarks.timing import in_turns, row, show
from chattrain.chat import encode_pieces
from chattrain.tasks import document, generated
from chattrain.tokenizer import Tokenizer


def measure() -> list[dict]:
    rows = generated.rows("small_talk", "train", 2000) + generated.rows("count_letters", "train", 1000)
    documents = [document(r, "messages") for r in rows]
    texts = [piece.text for pieces in documents for piece in pieces if not piece.special]
    tokenizer = Tokenizer.train(texts, 2048)
    seconds = in_turns(lambda: encode_pieces([document(r, "messages") for r in rows], tokenizer, None),
                       lambda: tokenizer.encode_batch(texts))
    return [row("render + tokenise, against tiktoken alone", sum(map(len, texts)), "characters", *seconds)]


if __name__ == "__main__":
    show(measure())
