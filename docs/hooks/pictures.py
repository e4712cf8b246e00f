"""The pictures of concepts.md, drawn from batches that chattrain makes of the conversations in talk.jsonl.

python docs/hooks/pictures.py    writes them to docs/pictures/; `make docs` does the same
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from chattrain.chat import render
from chattrain.config.compose import compose
from chattrain.data.batch import Batch
from chattrain.data.packing import IGNORE_INDEX
from chattrain.optim import schedules
from chattrain.optim.newton_schulz import NS_COEFFICIENTS
from chattrain.setup.data import RunData, open_data, pass_limits
from chattrain.tokenizer import Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from svg import BLUE, CONTEXT, INK, LINE, MARK, ORANGE, PADDING, SOFT, TARGET, Axes, Picture, write_if_new  # noqa: E402

TALK = HERE / "talk.jsonl"
SEQ_LEN, ROWS = 64, 4  # of the rows that are drawn
CELL = 10  # pixels


def draw(folder: Path) -> list[Path]:
    """Write all pictures; returns their files."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Tokenizer.train([TALK.read_text()], 400)
        tokenizer.save(Path(scratch) / "tokenizer")
        pictures = {
            "mask": _mask(tokenizer),
            "rows": _rows(Path(scratch)),
            "divisor": _divisor(Path(scratch)),
            "schedules": _schedules(),
            "muon": _muon(),
        }
    files = [folder / f"{name}.svg" for name in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        write_if_new(file, picture.svg())
    return files


def _data(scratch: Path, *overrides: str) -> RunData:
    local = ["stage=sft", "data=local", f"data.train_path={TALK}", f"data.cache_dir={scratch}/cache", "data.workers=1"]
    return open_data(compose([*local, f"train.seq_len={SEQ_LEN}", "eval=none", *overrides]), scratch / "tokenizer", 1)


# --- what carries loss -----------------------------------------------------------------------------------------------


def _mask(tokenizer: Tokenizer) -> Picture:
    """The tokens of one conversation with a tool, coloured by their mask."""
    import json

    conversation = json.loads(TALK.read_text().splitlines()[3])
    ids, mask = render(conversation, tokenizer)
    picture = Picture(720, "The tokens of a conversation: those of the assistant carry loss, all others are context")
    x, y = 0.0, 0.0
    for token, supervised in zip(ids, mask, strict=True):
        text = tokenizer.decode([token])
        shown = text.replace(" ", "\u00b7").replace("\n", "\\n")
        width = 8 + 7.3 * len(shown)
        if x + width > picture.width:
            x, y = 0.0, y + 28
        picture.rect(x, y, width, 22, TARGET if supervised else CONTEXT, "#ffffff")
        color = "#ffffff" if supervised else INK
        picture.parts.append(
            f'<text class="mono" x="{x + 4:.4g}" y="{y + 15:.4g}" fill="{color}" font-size="12">{_safe(shown)}</text>'
        )
        x += width + 2
    picture.legend(y + 40, {"carries loss: the model must write it itself": TARGET, "context: read, never predicted": CONTEXT})
    return picture


def _safe(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(scratch: Path) -> Picture:
    """The first rows of a step of each collator."""
    picture = Picture(SEQ_LEN * CELL, "Rows of the three collators: packed, masked, best_fit")
    y = 0.0
    for collator, what in (
        ("packed", "collator=packed: one stream of tokens, cut into full rows; every token is a target"),
        ("masked", "collator=masked: a conversation a row, padded; the assistant's tokens are targets"),
        ("best_fit", "collator=best_fit: whole conversations share a row; each attends to itself alone"),
    ):
        train = _data(scratch, f"collator={collator}", f"train.rows_per_step={ROWS}", f"train.device_batch_size={ROWS}").train
        batch = train.batch(np.arange(ROWS))
        picture.text(0, y + 12, what, bold=True)
        for row in range(ROWS):
            _draw_row(picture, batch, row, y + 20 + row * (CELL + 5), train.mixture.caches[0].tokens[0])
        y += 20 + ROWS * (CELL + 5) + 18
    picture.legend(
        y, {"its next token is a target": TARGET, "context": CONTEXT, "padding": PADDING, "a conversation begins": MARK}
    )
    return picture


def _draw_row(picture: Picture, batch: Batch, row: int, y: float, bos: int) -> None:
    inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
    end = max((i for i, target in enumerate(targets) if target != IGNORE_INDEX), default=-1) + 1
    for i in range(SEQ_LEN):
        is_target = i < len(targets) and targets[i] != IGNORE_INDEX
        picture.rect(i * CELL, y, CELL - 1, CELL, TARGET if is_target else CONTEXT if i < end else PADDING)
    for i in range(end):
        if inputs[i] == bos:
            picture.rect(i * CELL - 1, y - 2, 2, CELL + 4, MARK)


# --- one divisor -----------------------------------------------------------------------------------------------------


def _divisor(scratch: Path) -> Picture:
    """What a token of each micro-batch of a real step weighs in a mean of means, and under one divisor."""
    data = _data(scratch, "collator=masked", "train.rows_per_step=14", "train.device_batch_tokens=64")
    limits = pass_limits(compose(["stage=sft", f"train.seq_len={SEQ_LEN}", "train.device_batch_tokens=64"]).train, "cpu")
    rows = np.arange(data.rows_per_step)
    counts = [data.train.batch(part[0]).num_supervised for part in data.train.split_micro_batches(rows, limits, 1)]
    total, width, gap = sum(counts), 640, 6
    picture = Picture(width, "The weight of a token in each micro-batch of a step: a mean of means, and one divisor")
    means = [total / (len(counts) * count) for count in counts]  # relative to 1 / total
    picture.text(0, 12, "The weight of one target, by its micro-batch (1: an equal share of the step)", bold=True)
    step = width / len(counts)
    scale = 120 / max(means)
    for i, (count, weight) in enumerate(zip(counts, means, strict=True)):
        x = i * step
        picture.rect(x, 150 - weight * scale, (step - gap) / 2 - 1, weight * scale, ORANGE)
        picture.rect(x + (step - gap) / 2, 150 - scale, (step - gap) / 2 - 1, scale, BLUE)
        picture.text(x + (step - gap) / 4, 144 - weight * scale, f"{weight:.2f}", ORANGE, 11, "middle")
        picture.text(x + (step - gap) / 2, 166, f"{count} targets", SOFT, 11, "middle")
    picture.line([(0, 150), (width, 150)], INK)
    picture.legend(184, {"mean over micro-batches of each one's mean": ORANGE, "sum over all targets / their number": BLUE})
    return picture


# --- schedules and Muon ----------------------------------------------------------------------------------------------


def _schedules() -> Picture:
    """The factor of the learning rate over a run of 1,000 steps, of mid and of sft."""
    picture = Picture(640, "The learning rate over a run: mid is constant, then linear to 0; sft is linear from 0.02")
    num_steps = 1000
    mid = [(s, schedules.constant_then_linear(s, num_steps, decay_ratio=0.2)) for s in range(0, num_steps, 10)]
    sft = [(s, schedules.linear(s, num_steps, init_lr_frac=0.02)) for s in range(0, num_steps, 10)]
    for x, title, curve, top in ((30, "stage=mid", mid, 1.0), (360, "stage=sft (50 times as tall)", sft, 0.02)):
        picture.text(x, 12, title, bold=True)
        axes = Axes(picture, x, 24, 260, 110, num_steps, top * 1.1)
        axes.ticks({0: "0", 500: "half", 1000: "end"}, {0: "0", top: f"{top:g}"})
        axes.curve(curve, BLUE, 2)
    return picture


def _muon() -> Picture:
    """What each Newton-Schulz iteration does to the singular values of a direction."""
    a, b, c = NS_COEFFICIENTS
    picture = Picture(640, "Muon: five iterations bring the singular values of a direction close to 1")
    picture.text(30, 12, "singular value afterwards, by singular value before (1: the largest)", bold=True)
    axes = Axes(picture, 30, 24, 580, 200, 1.0, 1.25)
    axes.ticks({x / 10: f"{x / 10:g}" for x in range(0, 11, 2)}, {0: "0", 0.5: "0.5", 1: "1"})
    before = [x / 400 for x in range(401)]
    values = before
    colors = [LINE, "#c6dbef", "#9ecae1", "#6baed6", "#3182bd", BLUE]
    for k, color in enumerate(colors):
        axes.curve(list(zip(before, values, strict=True)), color, 2 if k in (0, 5) else 1, "5 3" if k == 0 else "")
        values = [a * s + b * s**3 + c * s**5 for s in values]
    picture.legend(252, {"before": colors[0], **{f"after {k}": color for k, color in list(enumerate(colors))[1:]}})
    return picture


if __name__ == "__main__":
    for file in draw(HERE.parent / "pictures"):
        print(file)
