"""What the docs say: every command composes, what they name is there, and the site builds strictly."""

from __future__ import annotations

import html
import importlib.util
import re
import tomllib

import pytest

from chattrain.config import describe
from chattrain.config.choices import all_groups
from tests.documented import BLOCK, PAGES, ROOT, blocks, composed, typed_in, write_files

INLINE = re.compile(r"`(python -m chattrain [^`]*)`")
WRITTEN = ("benchmarks/results.json", "benchmarks/gpu.json")  # by the benchmarks, and not committed
FILES = (".md", ".py", ".log", ".json", ".safetensors")  # ends of names that look like keys
NO_KEYS = ("data.malformed", "data.sources", "schedule.stairs", "schedule.drop")  # of summary.json, and of the examples' own part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_composes(page, workplace, monkeypatch):
    write_files(page, workplace)
    (workplace / "my_conf").mkdir(exist_ok=True)
    (workplace / "examples").symlink_to(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "examples")
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
        group: {choice.name for choice in choices} for group, choices in all_groups().items()
    }


def test_the_order_of_rooms_is_that_of_the_contract():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    assert " > ".join(layers) in " ".join((ROOT / "docs/architecture.md").read_text().split())


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
