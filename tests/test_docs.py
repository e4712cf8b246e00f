"""What the docs tell users to type: every command composes, and what a laptop can do is done, on tiny settings."""

from __future__ import annotations

import html
import importlib.util
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import chattrain
from chattrain.config import describe
from chattrain.config.compose import key_of
from chattrain.config.quoting import as_overrides
from tests.documented import composed, typed_in
from tests.helpers import TINY, command_line, standing_in, train, write_talk

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)(?P<title>[^\n]*)\n(?P<text>.*?)^```", re.M | re.S)
INLINE = re.compile(r"`(python -m chattrain [^`]*)`")
MEASURED = {
    "eval.max_problems": "eval.max_problems=4",
    "eval.max_reply_tokens": "eval.max_reply_tokens=8",
    "eval.max_tokens": "eval.max_tokens=512",
    "tracking": "tracking=none",
}
# Settings that make a training take a second; what a page types itself is kept, but for the length of the run.
SMALL = {o.partition("=")[0]: o for o in TINY if not o.startswith(("data", "eval", "tracking"))} | {
    **MEASURED,
    "train.max_steps": "train.max_steps=2",
    "eval.prompts": "eval.prompts=[]",
    "init.strict": "init.strict=false",
}
WRITTEN = ("benchmarks/results.json", "benchmarks/gpu.json")  # by the benchmarks, and not committed
FILES = (".md", ".py", ".log", ".json", ".safetensors")  # ends of names that look like keys
NO_KEYS = ("data.malformed", "data.sources", "schedule.stairs", "schedule.drop")  # of summary.json, and of the examples' own part
LENGTH = ("train.max_steps", "train.num_epochs", "train.max_tokens", "train.rows_per_step", "train.device_batch_size")


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


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """A folder as a user of the docs has it: conversations, own choices, and runs under the names that pages use."""
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        for name in ("talk.jsonl", "held_out.jsonl", "other.jsonl"):
            write_talk(folder, name, factor=len(name))
        (folder / "my_conf").mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        for stage, name in [("base", "farm"), ("mid", "farm"), ("sft", "farm"), ("sft", "field")]:
            train(stage, name, "train.max_steps=2")
        yield folder


@pytest.fixture
def own_place(place, tmp_path, cache):
    """A copy of it for one page."""
    folder = shutil.copytree(place, tmp_path / "place", symlinks=True)
    with standing_in(folder, cache), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_composes(page, own_place):
    write_files(page, own_place)
    calls = [arguments for block in blocks(page, "bash", "sh") for arguments in typed_in(block.text)]
    calls += [arguments for inline in INLINE.findall(page.read_text()) for arguments in typed_in(inline)]
    for arguments in calls:
        composed([argument for argument in arguments if argument != "..."])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_says_why_and_what_is_run_is_a_command_of_ours(page):
    for block in blocks(page, "bash", "sh"):
        assert re.fullmatch(r"|not run: \w.{8,}", block.mark), block
        lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
        assert not block.runs or all(typed_in(line) for line in lines), f"say why this is not run: <!-- not run: ... -->\n{block}"
    outside = BLOCK.sub("", page.read_text())
    assert not re.search(r"^\s*(\S*python|torchrun) .*-m chattrain", outside, re.M), "a command that is in no block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_the_project_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:src|tests|conf|docs|benchmarks|examples)/[\w./-]+\w/?)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists() and path not in WRITTEN] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_that_a_page_names_are_there(page):
    named = re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", page.read_text())
    keys = [name for name in named if name.partition(".")[0] in describe.sections() and not name.endswith(FILES)]
    assert [name for name in keys if not describe.find_keys(name) and name not in NO_KEYS] == []


def test_the_readme_names_every_group_and_choice():
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:`\w+` ?)+)\|", (ROOT / "README.md").read_text(), re.M))
    assert {group: set(re.findall(r"\w+", choices)) for group, choices in rows.items()} == {
        group: {choice.name for choice in choices} for group, choices in describe.groups().items()
    }


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.runs for b in blocks(p, "bash", "sh", "python"))], ids=lambda p: p.stem
)
def test_what_a_page_says_can_be_done_is_done(page, own_place, capsys):
    write_files(page, own_place)
    names: dict = {}
    for block in blocks(page, "bash", "sh", "python"):
        if block.runs and block.language == "python":
            with small_by_default():
                exec(compile(block.text, str(page), "exec"), names)
        for arguments in typed_in(block.text) if block.runs and block.language != "python" else []:
            done = command_line(capsys, *small(arguments))
            assert done.status == 0, f"{arguments}\n{done.err}"


def small(arguments: list[str]) -> list[str]:
    """The command line with settings with which it takes a second."""
    given = {key_of(argument) for argument in arguments}
    command = next((a.partition("=")[2] for a in arguments if a.startswith("command=")), "train")
    if {"--help", "--cfg", "-sc"} & set(arguments):
        return arguments
    if command == "chat":
        more = ["chat.max_tokens=4", *([] if "chat.prompt" in given else ["chat.prompt=Hi"])]
    elif command == "evaluate":
        more = [o for key, o in MEASURED.items() if key not in given]
    elif command in ("train", "inspect", "plan", "verify_resume"):
        kept = [a for a in arguments if key_of(a) not in LENGTH]
        return [*kept, *(o for key, o in SMALL.items() if key not in {key_of(a) for a in kept})]
    else:
        more = []
    return [*arguments, *more]


@contextmanager
def small_by_default():
    """chattrain.run in a page of Python, with the same settings."""
    run = chattrain.run

    def run_small(overrides):
        return run(small(as_overrides(overrides) if isinstance(overrides, dict) else overrides))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chattrain, "run", run_small)
        yield


# --- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, strictly."""
    mkdocs = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    mkdocs.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_the_site_builds_strictly_and_has_every_page(site):
    assert all((site / f"{page.stem}.html").is_file() for page in PAGES[1:])
    assert not list(site.rglob("*.py"))


def test_the_site_has_every_key_of_the_schema(site):
    text = html.unescape((site / "configuration.html").read_text())
    assert [key.name for key in describe.all_keys() if f"<code>{key.name}</code>" not in text.replace("</span>", "")] == []


def test_pictures_are_those_that_batches_draw(tmp_path):
    """The committed ones, which `make docs` draws anew."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/hooks/pictures.py")
    assert spec is not None and spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    for drawn in pictures.draw(tmp_path):
        assert drawn.read_bytes() == (ROOT / "docs/pictures" / drawn.name).read_bytes(), "make docs draws it anew"
