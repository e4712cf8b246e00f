"""The state of the code: commit and uncommitted differences of the repositories that it lies in, and versions of packages."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from chattrain.redact import redact
from chattrain.tracking.provenance import git

DIFF_CHARACTERS = 1_000_000  # of a `git diff HEAD` that are kept

BESIDES = ("accelerate", "pyarrow", "tokenizers", "torchao", "triton")  # that numbers may depend on, required by others


def repositories() -> list[dict[str, Any]]:
    """Of chattrain's own folder and of the current folder, where a user's parts may lie; each repository once, [] without any."""
    places = {"chattrain": Path(__file__).parent, "current folder": Path.cwd()}
    found = [{"of": of, **state} for of, folder in places.items() if (state := repository(folder))]
    return found[:1] + [state for state in found[1:] if state["folder"] != found[0]["folder"]]


def code_commit() -> str | None:
    """The commit of chattrain's own code, with a `+` behind it where files differ; None outside a repository."""
    state = repository(Path(__file__).parent)
    return f"{state['commit']}{'+' * bool(state['diff'])}" if state else None


@cache  # a process runs the code that it has loaded, whatever is edited meanwhile
def repository(folder: Path) -> dict[str, Any] | None:
    """Top folder, commit, branch and `git diff HEAD` of the repository that a folder lies in; None where it lies in none.

    Of a longer diff the first DIFF_CHARACTERS are kept, and a last line says so. Files that git does not track are not in it.
    """
    commit, top = git(folder, "rev-parse", "HEAD"), git(folder, "rev-parse", "--show-toplevel")
    if not commit or not top:
        return None
    diff = redact(git(folder, "diff", "HEAD", "--no-ext-diff", "--no-color") or "")
    if len(diff) > DIFF_CHARACTERS:
        diff = f"{diff[:DIFF_CHARACTERS]}\n[cut here: {len(diff) - DIFF_CHARACTERS} of {len(diff)} characters are left out]"
    return {"folder": top, "commit": commit, "branch": git(folder, "rev-parse", "--abbrev-ref", "HEAD"), "diff": diff}


@cache
def packages() -> dict[str, str]:
    """Versions of chattrain and of what it requires, as far as it is installed."""
    try:
        lines = [line for line in metadata.requires("chattrain") or [] if "extra ==" not in line or 'extra == "hf"' in line]
        required = [re.split(r"[\s\[<>=~!;]", line, maxsplit=1)[0] for line in lines]
    except metadata.PackageNotFoundError:  # it runs from a checkout that is not installed
        required = ["torch", "numpy", "hydra-core", "omegaconf", "tiktoken", "datasets", "safetensors", "transformers"]
    found = {}
    for name in sorted({"chattrain", *required, *BESIDES}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
