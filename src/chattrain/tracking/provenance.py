"""Who started a run, with which command, from which code: MLflow's tags for these."""

from __future__ import annotations

import getpass
import shlex
import subprocess
from pathlib import Path

from chattrain.redact import redact

GIT_SECONDS = 10  # longest wait for one call of git


def source_tags(overrides: list[str]) -> dict[str, str]:
    """User and command. `overrides`: of the command line; [] where `chattrain.run` was called from Python."""
    tags = {"mlflow.source.name": command_text(overrides), "mlflow.source.type": "LOCAL"}
    try:
        return {"mlflow.user": getpass.getuser(), **tags}
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return tags


def command_text(overrides: list[str]) -> str:
    return redact(f"chattrain {shlex.join(overrides)}") if overrides else "chattrain.run"


def git_tags() -> dict[str, str]:
    """Commit, branch and whether files differ from the commit, of the repository that the package lies in, else of the current
    folder's. {} without git or a repository. It takes a moment in a large one."""
    for folder in (Path(__file__).parent, Path.cwd()):
        commit = git(folder, "rev-parse", "HEAD")
        if commit:
            tags = {"mlflow.source.git.commit": commit}
            if branch := git(folder, "rev-parse", "--abbrev-ref", "HEAD"):
                tags["mlflow.source.git.branch"] = branch
            changed = git(folder, "status", "--porcelain", "--untracked-files=no")
            return tags if changed is None else {**tags, "mlflow.source.git.dirty": str(bool(changed)).lower()}
    return {}


def git(folder: Path, *arguments: str) -> str | None:
    """What a call of git prints; None where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
