"""Messages of a run: the logger `chattrain` to stderr and to a file in the run folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("chattrain")


class _StderrHandler(logging.Handler):
    """Plain messages to what sys.stderr is at that moment: a rich bar swaps it to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            text = self.format(record)
            yellow = record.levelno >= logging.WARNING and sys.stderr.isatty()
            print(f"\033[33m{text}\033[0m" if yellow else text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def setup_logging(run_dir: Path | None, console: bool, resume: bool, name: str = "train.log") -> Callable[[], None]:
    """Sends the logger "chattrain" to run_dir/<name> (appended to on `resume`) and stderr; returns what undoes it.

    A second call takes the place of the first, so a sweep in one process prints each line once. `propagate` stays
    on, which lets pytest's caplog listen; give the root logger no handler of its own, or each line is printed twice.
    """
    handlers: list[logging.Handler] = [logging.NullHandler()]  # alone, it keeps logging's own fallback off stderr
    if run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        if not resume:
            (Path(run_dir) / name).unlink(missing_ok=True)
        file = logging.FileHandler(Path(run_dir) / name, encoding="utf-8")  # appends: see failures.Watch, which does too
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    if console:
        handlers.append(_StderrHandler())
    _detach([handler for handler in logger.handlers if handler.name == logger.name])
    for handler in handlers:
        handler.set_name(logger.name)  # the mark by which the next call finds them
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return lambda: _detach(handlers)


def _detach(handlers: list[logging.Handler]) -> None:
    for handler in handlers:
        logger.removeHandler(handler)
        handler.close()
