"""What mkdocs calls while it builds the site: pictures and the page of keys are made, links to code become text."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "src")]
import pictures  # noqa: E402
import reference  # noqa: E402


def on_pre_build(config) -> None:
    pictures.draw(Path(config.docs_dir) / "pictures")


def on_files(files, config):
    files.append(File.generated(config, "configuration.md", content=reference.page()))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The page with links to files outside of docs/ as text, as the site does not hold them. A missing file is an error."""

    def as_text(link: re.Match) -> str:
        text, target = link[1], link[2].partition("#")[0]
        if not (Path(config.docs_dir) / target).exists():
            raise PluginError(f"{page.file.src_uri}: no file {target}")
        return text

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", as_text, markdown)
