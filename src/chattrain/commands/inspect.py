"""command=inspect: the rows of a step as the loop will see them, the mixture, and what the audit finds. Starts no training."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from chattrain.config import Config
from chattrain.config.commands import InspectConfig
from chattrain.data.packing import IGNORE_INDEX
from chattrain.data.statistics import Filling, by_source, histogram, measure_filling
from chattrain.device import pick_device
from chattrain.errors import UserError
from chattrain.parallel import launch
from chattrain.setup.data import RunData, open_data, pass_limits
from chattrain.setup.opening import cache_dir
from chattrain.setup.report_data import describe_findings, describe_left_out, mixture_table, ranges, report_notes
from chattrain.setup.shown_rows import step_rows
from chattrain.setup.start import find_start
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.storage.files import replace_text
from chattrain.tokenizer import Tokenizer
from chattrain.tokenizer.special_tokens import SPECIAL_TOKENS
from chattrain.tracking import token_page, token_text
from chattrain.tracking.tokens import Row

BAR = 40  # characters of the longest bar
Say = Callable[[str | Text], None]


def main(cfg: Config) -> dict:
    """Print rows of a step with the loss weights of their tokens marked, the table of the mixture and the audit's findings, and
    write them as a page. Returns them as numbers. A fault that the audit finds is shown and refuses nothing."""
    start = find_start(cfg)
    world_size = launch.processes_here(cfg.distributed.nproc, cfg.train.device)
    file = _file(cfg)
    data = open_data(cfg, choose_tokenizer(cfg, start.checkpoint), world_size)
    report_notes(data)
    limits = pass_limits(cfg.train, pick_device(cfg.train.device).type)
    rows = step_rows(data, cfg.inspect.step - 1, _wanted(cfg.inspect, data), limits, world_size)
    filling = measure_filling(data.train, data.rows_per_step, data.num_steps, limits, world_size)
    sources, lengths, facts = by_source(data.train), histogram(data.train.mixture.lengths), _facts(data, rows, filling)
    weight = data.train.mixture.weights.prompt_weight
    mixture, found = mixture_table(sources), describe_findings(data.audit)
    title = f"{cfg.stage}, step {cfg.inspect.step} of {data.num_steps}"
    replace_text(file, token_page.write(title, facts, rows, cfg.inspect.ids, mixture, ranges(lengths), found))
    with _output() as say:
        _say_rows(say, rows, data, weight, cfg.inspect.ids)
        for name, value in facts.items():
            say(f"{name:20s} {value:,.8g}")
        _say_mixture(say, data, mixture, ranges(lengths), found)
        say(f"\nas a page: {file}")
    return {
        **facts,
        "sources": {name: asdict(source) for name, source in sources.items()},
        "lengths": lengths,
        "audit": data.audit.facts,
        "rows": [_as_numbers(row) for row in rows],
        "html": str(file),
    }


def _facts(data: RunData, rows: list[Row], filling: Filling) -> dict[str, Any]:
    tokens = [token for row in rows for token in row.tokens]
    return {
        "documents_an_epoch": data.train.counts.documents,
        "rows_per_step": data.rows_per_step,
        "num_steps": data.num_steps,
        "truncated": data.train.counts.truncated,
        "left_out": data.train.counts.left_out,
        "tokens_shown": sum(token.is_input for token in tokens),
        "supervised_shown": sum(token.weight == 1 for token in tokens),
        "loss_weight_shown": sum(token.weight for token in tokens),
        "packing_efficiency": filling.share,
    }


def _wanted(config: InspectConfig, data: RunData) -> list[int]:
    """The numbers of the rows to show, in their step. Raises UserError for a step or a row beyond the end, and for a source that
    no row has."""
    if config.step > data.num_steps:
        raise UserError(f"inspect.step={config.step} is beyond the run's {data.num_steps} steps")
    if config.row is not None and config.row >= data.rows_per_step:
        raise UserError(f"inspect.row={config.row} is beyond the {data.rows_per_step} rows of a step, which count from 0")
    if config.row is not None:
        return [config.row]
    numbers = list(range(data.rows_per_step))
    if config.source is not None:
        names = [cache.name for cache in data.train.mixture.caches]
        if config.source not in names:
            raise UserError(f"inspect.source={config.source} is no source of this training; it has {', '.join(names)}")
        first, index = (config.step - 1) * data.rows_per_step, names.index(config.source)
        numbers = [number for number in numbers if _holds(data, first + number, index)]
        if not numbers:
            raise UserError(f"step {config.step} has no row of source {config.source}; try another inspect.step")
    return numbers[: config.rows]


def _holds(data: RunData, row: int, source: int) -> bool:
    """Does a target of the row come from this source?"""
    batch = data.train.batch(np.array([row]))
    return batch.sources is not None and bool(((batch.sources == source) & (batch.targets != IGNORE_INDEX)).any())


def _file(cfg: Config) -> Path:
    """Where the page goes. Raises UserError where it cannot be written."""
    default = cache_dir(cfg.data) / "inspect" / f"{cfg.stage}_step_{cfg.inspect.step:06d}.html"
    file = default if cfg.inspect.html is None else Path(cfg.inspect.html).expanduser().absolute()
    if file.is_dir():
        raise UserError(f"inspect.html={cfg.inspect.html} is a folder; name a file, such as {file / 'rows.html'}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"inspect.html={file}: {file.parent} cannot be made: {error.strerror}") from error
    return file


@contextmanager
def _output() -> Iterator[Say]:
    """What takes the lines of the output: a terminal's pager, which colours them, else stdout."""
    if not sys.stdout.isatty():
        try:
            yield lambda line: print(_encodable(str(line)), flush=True)
        except BrokenPipeError:  # the reader, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    os.environ.setdefault("LESS", "-RFX")  # shows colours, and does not wait where all fits on the screen
    console = Console(highlight=False, markup=False, emoji=False)
    with console.pager(styles=True):
        yield lambda line: console.print(line, soft_wrap=True)


def _encodable(text: str) -> str:
    """The text without characters that stdout's encoding has not."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _say_rows(say: Say, rows: list[Row], data: RunData, prompt_weight: float, ids: bool) -> None:
    coloured = sys.stdout.isatty()
    names = list(SPECIAL_TOKENS) if isinstance(data.tokenizer, Tokenizer) else data.tokenizer.special_texts
    say(token_text.legend(prompt_weight, coloured) + "\n")
    for row in rows:
        say(f"row {row.number}: {row.name}")
        say(f"  {row.batch}")
        say(token_text.coloured(row) if coloured else token_text.plain(row, names))
        say("\n".join(["", *token_text.table(row), ""]) if ids else "")


def _say_mixture(say: Say, data: RunData, mixture: list[list[str]], lengths: dict[str, int], found: list[str]) -> None:
    say("\nan epoch")
    widths = [max(map(len, column)) for column in zip(*mixture, strict=True)]
    for line in mixture:
        cells = [cell.rjust(n) if i else cell.ljust(n) for i, (cell, n) in enumerate(zip(line, widths, strict=True))]
        say(f"  {'  '.join(cells)}".rstrip())
    say("\ntokens of a document")
    most = max(lengths.values())
    for name, count in lengths.items():
        say(f"  {name:>15s}  {count:>11,}  {'█' * round(BAR * count / most)}".rstrip())
    for line in describe_left_out(data.train):
        say(line)
    say("\naudit")
    for line in found:
        say(f"  {line}")


def _as_numbers(row: Row) -> dict[str, Any]:
    """A row for programs: a list for each property of its tokens."""
    columns = {
        name: [getattr(token, name) for token in row.tokens] for name in ("id", "weight", "position", "document", "is_input")
    }
    return {"number": row.number, "documents": [document.name for document in row.documents], "padding": row.padding, **columns}
