"""A checkpoint as an MLflow model that chats: `mlflow models serve -m <folder> --env-manager local` answers over HTTP."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from chattrain.chat import Malformed
from chattrain.tracking.mlflow_store import set_environment

CODE = Path(__file__).with_name("mlflow_chat_model.py")
LEFT_OUT = ("optimizer.safetensors", "manifest.json")  # of the checkpoint: what only a resumed run needs, and its checksums


def write(folder: Path, checkpoint: Path) -> None:
    """Write the model's folder, which exists and is empty: MLmodel, the code, and the checkpoint without optimizer state."""
    set_environment()
    from mlflow.pyfunc import save_model

    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        needed = Path(scratch) / "checkpoint"
        shutil.copytree(checkpoint, needed, ignore=shutil.ignore_patterns(*LEFT_OUT), copy_function=_link_or_copy)
        save_model(
            path=str(folder),
            python_model=str(CODE),
            artifacts={"checkpoint": str(needed)},
            pip_requirements=[pinned(name) for name in ("chattrain", "mlflow", "torch")],
            metadata={"checkpoint": str(checkpoint)},
        )


def as_message(item: dict[str, Any]) -> dict[str, str]:
    """An item of the Responses format as a message. Raises Malformed for what is no text, such as an image or a tool call.

    >>> as_message({"role": "user", "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]})
    {'role': 'user', 'content': 'Hello'}
    """
    role, content = item.get("role"), item.get("content")
    parts = [{"text": content}] if isinstance(content, str) else content or []
    texts = [part.get("text") for part in parts]
    if not role or not texts or not all(isinstance(text, str) for text in texts):
        raise Malformed(f"{item.get('type') or 'an item'} without a role and a text; send messages with text only")
    return {"role": str(role), "content": "".join(map(str, texts))}


def _link_or_copy(source: str, target: str) -> None:
    """MLflow copies the file once more: a link spares the first copy."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def pinned(package: str) -> str:
    """The package at the version installed here, without a local part such as +cpu.

    >>> pinned("no-such-package")
    'no-such-package'
    """
    try:
        return f"{package}=={version(package).partition('+')[0]}"
    except PackageNotFoundError:
        return package
