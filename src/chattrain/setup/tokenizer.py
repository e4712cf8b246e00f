"""The tokenizer of a run: the checkpoint's, the user's, or one trained on the run's own data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from chattrain.config import Config
from chattrain.config.data import DataConfig
from chattrain.config.words import OnMalformed, Schema
from chattrain.data.malformed import MalformedRows
from chattrain.data.records import Records
from chattrain.data.sources import identity, open_records
from chattrain.errors import UserError
from chattrain.setup.opening import cache_dir
from chattrain.storage.files import make_folder
from chattrain.tasks import multiple_choice, record_to_segments
from chattrain.tokenizer import Tokenizer
from chattrain.tokenizer.native import FORMAT_VERSION

log = logging.getLogger("chattrain")


def choose_tokenizer(cfg: Config, start: Path | None) -> Path:
    """The folder to load the tokenizer from: the checkpoint `start`, else tokenizer.path, else one trained on this run's data.

    A trained tokenizer is kept in the cache. Raises UserError where tokenizer.path names another tokenizer than the checkpoint's.
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
    return _train_tokenizer(cfg.data, cfg.stage, cfg.tokenizer.vocab_size, cfg.tokenizer.train_chars)


def _train_tokenizer(data: DataConfig, stage: str, vocab_size: int, train_chars: int) -> Path:
    """The folder of a byte-pair encoding of training texts, from the cache or trained now.

    The texts are those of this stage, or of data.tokenizer_stages; `train_chars` characters of them at most.
    """
    mixtures = [data.mixture(name) for name in data.tokenizer_stages or [stage]]
    sources = {
        json.dumps([s.path, s.subset, s.split, s.part, s.words]): (name, s)
        for mixture in mixtures
        for name, s in mixture.train.items()
    }
    cache = cache_dir(data)
    identities = [identity(name, source, cache) for name, source in sources.values()]
    inputs = [FORMAT_VERSION, identities, list(sources), vocab_size, train_chars, *([sorted(data.ignore)] if data.ignore else [])]
    folder = cache / "tokenizers" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]
    if not (folder / "encoding.json").is_file():
        log.info("training a tokenizer of %d tokens on this data", vocab_size)
        opened = [open_records(name, source, cache, data.limits) for name, source in sources.values()]
        skip = data.on_malformed == OnMalformed.skip
        trained = Tokenizer.train(_texts(opened, train_chars, data.ignore, skip), vocab_size)
        if trained.vocab_size < vocab_size:
            log.warning("the data gives only %d tokens, not tokenizer.vocab_size=%d", trained.vocab_size, vocab_size)
        make_folder(folder, trained.save)
    return folder


def _texts(opened: list[Records], max_chars: int, ignore: list[str], skip_malformed: bool) -> Iterator[str]:
    """The texts of all sources; each source gives about max_chars / number of sources characters at most.

    Raises UserError for a malformed record; with skip_malformed it is left out, and counted where its source is tokenised.
    """
    for records in opened:
        left = max_chars // len(opened)
        for _, texts in records.convert(
            lambda record, schema=records.schema: _texts_of(record, schema, ignore),
            malformed=MalformedRows() if skip_malformed else None,
        ):
            yield from texts
            left -= sum(len(text) for text in texts)
            if left < 0:
                break


def _texts_of(record: dict, schema: str, ignore: list[str]) -> list[str]:
    segments = record_to_segments(record, schema, ignore=ignore)
    if schema == Schema.multiple_choice.name:
        return [multiple_choice.tokenizer_text(record)]
    return [segment.text for segment in segments if not segment.special]
