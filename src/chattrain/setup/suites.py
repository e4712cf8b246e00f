"""Opens the suites whose answers the model writes, and the prompts of eval.prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chattrain.chat import Malformed, chat_format, render_prompt
from chattrain.config import Config
from chattrain.config.data import SourceConfig
from chattrain.config.words import OnMalformed, Part, Schema
from chattrain.data.malformed import MalformedRows
from chattrain.data.sources import GENERATE, open_records
from chattrain.errors import UserError
from chattrain.evals import sandbox
from chattrain.evals.generative import SUITES, Problem, problems
from chattrain.setup.opening import Opening, cache_dir
from chattrain.tokenizer import AnyTokenizer, HFTokenizer
from chattrain.tokenizer.special_tokens import BOS

ARITHMETIC = f"{GENERATE}arithmetic"
NUM_GENERATED = {"spelling": 256, "arithmetic": 256}  # questions of a generated suite; 256 of spelling as in nanochat


def open_suites(opening: Opening) -> dict[str, list[Problem]]:
    """The problems of each suite, by its name. What is missing is noted.

    Raises UserError for data that is missing or malformed, and where HumanEval cannot be run safely.
    """
    cfg, asked = opening.cfg, {}
    for name, source in _sources(opening).items():
        if SUITES[name].runs:
            sandbox.check()
        limit = cfg.eval.generative_limit
        if limit is not None and (source.limit is None or limit < source.limit):
            source.limit = limit
        malformed = MalformedRows() if cfg.data.on_malformed == OnMalformed.skip else None
        records = open_records(name, source, cache_dir(cfg.data), cfg.data.limits)
        asked[name] = problems(name, records, opening.tokenizer, malformed)
        opening.say_limit(name, len(records), None if source.path.startswith(GENERATE) else len(records.table))
        if malformed:
            opening.note_malformed(name, len(asked[name]), malformed)
    return asked


def _sources(opening: Opening) -> dict[str, SourceConfig]:
    """Where the problems of each suite come from."""
    cfg, config, sources = opening.cfg, opening.cfg.eval, {}
    if config.gsm8k:
        if config.gsm8k_path is None:
            opening.note("gsm8k", f"eval.gsm8k_path is not given: openai/gsm8k, a folder in its layout, or {ARITHMETIC}")
        elif config.gsm8k_path == ARITHMETIC:
            sources["arithmetic"] = _generated("arithmetic", "arithmetic", config.on)
        elif config.on == Part.val:
            sources["gsm8k"] = SourceConfig(config.gsm8k_path, Schema.gsm8k, subset="main", split=config.split)
    if config.spelling:
        sources["spelling"] = _generated("spelling", "count_letters", config.on, config.words_path)
    if config.humaneval:
        if config.humaneval_path is None:
            opening.note("humaneval", "eval.humaneval_path is not given: openai/openai_humaneval, or a folder in its layout")
        elif config.on == Part.val:
            sources["humaneval"] = SourceConfig(config.humaneval_path, Schema.humaneval, split=config.split)
    if config.on == Part.test and cfg.eval.generates and not sources:
        opening.note("gsm8k", "eval.on=test: GSM8K and HumanEval are the questions that trainings are measured on")
    return sources


def _generated(name: str, task: str, on: Part, words: str | None = None) -> SourceConfig:
    return SourceConfig(f"{GENERATE}{task}", split=on.name, limit=NUM_GENERATED[name], words=words)


@dataclass(frozen=True)
class Prompts:
    """eval.prompts as tokens."""

    texts: list[str]
    ids: list[list[int]]
    stop_ids: set[int]  # end a reply


def open_prompts(cfg: Config, tokenizer: AnyTokenizer) -> Prompts | None:
    """eval.prompts; where it is null, the prompts of the data for this stage. None: there are none.

    Of stage=base they are texts to go on with, else what a user says. Raises UserError for a file that cannot be read and a text
    that cannot be rendered.
    """
    texts = cfg.eval.prompts
    if texts is None:
        stages = cfg.data.stages
        texts = stages[cfg.stage].prompts if cfg.stage in stages else []
    texts = _lines(Path(texts).expanduser()) if isinstance(texts, str) else list(map(str, texts))
    if not texts:
        return None
    if not all(text.strip() for text in texts):
        raise UserError(f"eval.prompts={texts} holds an empty text; leave it out")
    if cfg.stage == "base":
        begin, stops = _document_borders(tokenizer)
        return Prompts(texts, [[*begin, *ids] for ids in tokenizer.encode_batch(texts)], stops)
    try:
        ids = [render_prompt({"messages": [{"role": "user", "content": text}]}, tokenizer) for text in texts]
    except Malformed as error:
        raise UserError(f"eval.prompts cannot be rendered: {error}") from error
    return Prompts(texts, ids, chat_format(tokenizer).stop_ids)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"eval.prompts={file} cannot be read ({error}); give a text file with one prompt a line, or a list: "
            'eval.prompts=["What is 2 + 2?"]'
        ) from None


def _document_borders(tokenizer: AnyTokenizer) -> tuple[list[int], set[int]]:
    """(tokens that begin a document, tokens that end it): BOS begins the next one."""
    if isinstance(tokenizer, HFTokenizer):
        begin = [] if tokenizer.bos_text is None else [tokenizer.special(tokenizer.bos_text)]
        return begin, {*begin, *tokenizer.eos_ids}
    bos = tokenizer.special(BOS)
    return [bos], {bos}
