"""Commands that people read, in the help and in the docs: found and composed."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from chattrain.commands import completion, help
from chattrain.config import Config
from chattrain.config.compose import compose, key_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)(?P<title>[^\n]*)\n(?P<text>.*?)^```", re.M | re.S)
ENTRY = re.compile(r"(?:^|\s)(?:(?:\S*python3?|torchrun|uv run)\s(?:[^\n#]*?\s)?-m chattrain|(?:\S*/)?chattrain)(?=\s|$)")
PLACEHOLDER = re.compile(r"<(\w[\w ,-]*)>")


def typed_in(text: str) -> list[list[str]]:
    """The arguments of each call of chattrain in the text of a shell. A placeholder, `<folder or hub name>`, becomes one word.

    >>> typed_in("A=1 python -m chattrain stage=mid  # train\\n.venv/bin/python -m pytest\\nchattrain init.from=<a folder>/b")
    [['stage=mid'], ['init.from=a_folder/b']]
    """
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if entry := ENTRY.search(line.strip()):
            line = line.replace(')"', "")  # of `eval "$(python -m chattrain ...)"`
            rest = PLACEHOLDER.sub(lambda name: re.sub(r"\W+", "_", name[1]), line.strip()[entry.end() :])
            found.append(shlex.split(rest, comments=True))
    return found


def composed(arguments: list[str]) -> list[Config]:
    """The configurations of a command line, one a value of a swept key; a question for help is answered. Raises UserError."""
    for page in (completion, help):
        if page.is_requested(arguments):
            assert page.text(arguments)
            return []
    words = iter(arguments)
    typed, folders = [], []
    for word in words:
        if word == "--config-dir":
            folders.append(next(words))
        elif word == "--cfg":
            next(words)
        elif not word.startswith("-"):
            typed.append(word)
    for name in re.findall(r"\$\{oc\.env:(\w+)\}", " ".join(typed)):
        os.environ.setdefault(name, "set-by-the-user")
    if folders:
        typed.append(f"hydra.searchpath=[{','.join(folders)}]")
    return [compose(one) for one in jobs(typed)] if "-m" in arguments else [compose(typed)]


def jobs(typed: list[str]) -> list[list[str]]:
    """The overrides of jobs that together have each value of each swept key: as many as the longest list, not all combinations.

    >>> jobs(["stage=mid,sft", "a=1", "b=1,2,3"])
    [['stage=mid', 'a=1', 'b=1'], ['stage=sft', 'a=1', 'b=2'], ['stage=sft', 'a=1', 'b=3']]
    """
    Plugins.instance()
    values = []
    for override in OverridesParser.create().parse_overrides(typed):
        key = override.input_line.partition("=")[0] if override.input_line else key_of(str(override))
        swept = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        values.append([f"{key}={value}" for value in swept] if swept else [override.input_line])
    rows = zip_longest(*values)
    last = [items[-1] for items in values]
    return [[given if given is not None else last[i] for i, given in enumerate(row)] for row in rows]


@dataclass
class Block:
    """A block of code of a page. `mark`: its invisible comment, `not run: <reason>`."""

    mark: str
    language: str
    title: str
    text: str

    @property
    def runs(self) -> bool:
        return not self.mark.startswith("not run: ")


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [Block(m["mark"] or "", m["language"], m["title"], m["text"]) for m in BLOCK.finditer(page.read_text())]
    return [block for block in found if block.language in languages]


def write_files(page: Path, folder: Path) -> None:
    """The files that a page shows with their name as title."""
    for block in blocks(page, "yaml", "json", "python"):
        if title := re.search(r'title="([^"]+)"', block.title):
            (folder / title[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / title[1]).write_text(block.text)
