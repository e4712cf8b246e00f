"""The tokenizer of a run: the checkpoint's, the user's, or one trained on the run's own data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from chattrain.config import Config
from chattrain.config.words import Schema
from chattrain.data.sources import identity, open_records
from chattrain.errors import UserError
from chattrain.setup.data import cache_dir
from chattrain.storage.files import make_folder
from chattrain.tasks import multiple_choice, record_to_segments
from chattrain.tokenizer import Tokenizer
from chattrain.tokenizer.native import FORMAT_VERSION

log = logging.getLogger("chattrain")


def choose_tokenizer(cfg: Config, start: Path | None) -> Path:
    """Where the tokenizer is loaded from: the checkpoint, else tokenizer.path, else one trained on this data and kept.

    Raises UserError where a checkpoint is given a tokenizer.path whose ids differ.
    """
    given = Path(cfg.tokenizer.path).expanduser() if cfg.tokenizer.path else None
    if start is not None:
        saved = Tokenizer.load(start)
        if given is not None:
            other = Tokenizer.load(given)
            if other.fingerprint() != saved.fingerprint():
                raise UserError(
                    f"tokenizer.path={given} (vocabulary of {other.vocab_size}) is not the tokenizer that "
                    f"{start} was trained with (vocabulary of {saved.vocab_size}); leave tokenizer.path out"
                )
        return start
    if given is not None:
        Tokenizer.load(given)
        return given
    return _trained_tokenizer(cfg)


def _trained_tokenizer(cfg: Config) -> Path:
    """Byte-pair encoding of training texts: this stage's, or those of data.tokenizer_stages."""
    mixtures = [cfg.data.mixture(stage) for stage in cfg.data.tokenizer_stages or [cfg.stage]]
    sources = {
        json.dumps([s.path, s.subset, s.split, s.part, s.words]): (name, s)
        for mixture in mixtures
        for name, s in mixture.train.items()
    }
    identities = [identity(name, source, cache_dir(cfg.data)) for name, source in sources.values()]
    decides = [FORMAT_VERSION, identities, list(sources), cfg.tokenizer.vocab_size, cfg.tokenizer.train_chars]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:24]
    folder = cache_dir(cfg.data) / "tokenizers" / key
    if not (folder / "encoding.json").is_file():
        log.info("training a tokenizer of %d tokens on this data", cfg.tokenizer.vocab_size)
        opened = [(source, open_records(name, source, cache_dir(cfg.data))) for name, source in sources.values()]
        trained = Tokenizer.train(_texts(opened, cfg.tokenizer.train_chars), cfg.tokenizer.vocab_size)
        if trained.vocab_size < cfg.tokenizer.vocab_size:
            log.warning("the data gives only %d tokens, not tokenizer.vocab_size", trained.vocab_size)
        make_folder(folder, trained.save)
    return folder


def _texts(opened: list, max_chars: int) -> Iterator[str]:
    """Texts of all sources, each with the same share of max_chars."""
    for source, rows in opened:
        left = max_chars // len(opened)
        for _, row in rows.read(0, len(rows)):
            try:
                if source.schema == Schema.multiple_choice:
                    texts = [multiple_choice.tokenizer_text(row)]
                else:
                    texts = [segment.text for segment in record_to_segments(row, source.schema.name) if not segment.special]
            except (ValueError, KeyError, TypeError):  # malformed: reported when the row is tokenised
                continue
            yield from texts
            left -= sum(len(text) for text in texts)
            if left < 0:
                break
