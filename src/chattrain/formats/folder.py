"""Which folder a name means, and what lies in it: asked once, handed on as a description."""

from __future__ import annotations

import re
from pathlib import Path

from chattrain.errors import UserError
from chattrain.formats import huggingface, nanochat
from chattrain.formats.imported import FolderFormat, ModelFolder

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "model_*.pt", "tokenizer.pkl", "token_bytes.pt"]


def locate(name: str) -> ModelFolder:
    """What `init.from=<name>` names, recognised. Raises UserError where there is no such folder or repository."""
    return recognise(_find(name).resolve())


def _find(name: str) -> Path:
    """The folder that a name means: itself, or a snapshot of the hub's repository. Raises UserError where there is neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{folder} is a file; name its folder"
            if folder.is_file()
            else f"no folder {folder}; the path is looked up from {Path.cwd()}, and a hub name is owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # of the network, of the hub, of the disk: many kinds, one meaning here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"there is no folder {name} (looked up from {Path.cwd()}), and the hub gives no repository of that name: {reason[0]}"
        ) from error


def hint(folder: Path) -> str:
    """`; did you mean ...?` where a model of nanochat lies one or two folders further down."""
    below = sorted(f for pattern in ("*/model_*.pt", "*/*/model_*.pt") for f in folder.glob(pattern))
    return f"; did you mean {below[0].parent}?" if below else ""


def recognise(folder: Path) -> ModelFolder:
    """Whose model a folder holds. A run or checkpoint of ours is one, whatever lies beside it; nanochat's files go before
    Hugging Face's."""
    if (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir():
        return ModelFolder(folder, FolderFormat.chattrain)
    return nanochat.find(folder) or huggingface.find(folder) or ModelFolder(folder, FolderFormat.unknown)
