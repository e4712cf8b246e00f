"""Find the folder of a name and recognise whose model it holds, once: other code gets a `ModelFolder`."""

from __future__ import annotations

import re
from pathlib import Path

from chattrain.errors import UserError
from chattrain.formats import huggingface, nanochat
from chattrain.formats.imported import FolderFormat, ModelFolder

STAGES = ("base", "mid", "sft")

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "model_*.pt", "tokenizer.pkl", "token_bytes.pt"]


def locate(name: str) -> ModelFolder:
    """The model folder of `init.from=<name>`. Raises UserError if there is no such folder or repository."""
    return recognise(_find(name).resolve())


def _find(name: str) -> Path:
    """The folder of that path, or a snapshot of the hub's repository of that name. Raises UserError if there is neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{folder} is a file; name its folder"
            if folder.is_file()
            else f"no folder {folder}; the path is looked up from {Path.cwd()}, and a hub name is owner/name"
        )
    if name.partition("/")[0] in STAGES:  # no owner on the hub is meant
        raise UserError(f"there is no run {name} here (looked up in run.root, and as a folder from {Path.cwd()})")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # errors of the network, the hub and the disk have many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"there is no folder {name} (looked up from {Path.cwd()}), and the hub gave nothing of that name: {reason[0]}"
        ) from error


def hint(folder: Path) -> str:
    """`; did you mean ...?` if one or two levels below there is a model of nanochat, else an empty string."""
    below = sorted(f for pattern in ("*/model_*.pt", "*/*/model_*.pt") for f in folder.glob(pattern))
    return f"; did you mean {below[0].parent}?" if below else ""


def recognise(folder: Path) -> ModelFolder:
    """Whose model a folder holds: a run or checkpoint of chattrain if it looks like one, else nanochat's, else Hugging Face's."""
    if (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir():
        return ModelFolder(folder, FolderFormat.chattrain)
    return nanochat.find(folder) or huggingface.find(folder) or ModelFolder(folder, FolderFormat.unknown)
