"""Tensors in files: safetensors, and what torch.save wrote, read as tensors alone. Nothing is unpickled freely."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from chattrain.errors import UserError


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that a module saves, each tensor once: of weights that are tied, the first name."""
    first = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if first[id(tensor)] == name}


def fill_model(file: Path, model: nn.Module) -> None:
    """Fill the model with the tensors of a safetensors file.

    Raises UserError naming tensors that are missing, unknown or of another shape.
    """
    tensors = read_tensors(file)
    weights = model.weights()
    require_shapes(str(file), tensors, {name: tensor.shape for name, tensor in weights.items()})
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(tensors[name])


def require_shapes(where: str, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raises UserError that names tensors missing, unknown or of another shape than the model has."""
    wrong = [f"{n} is missing" for n in sorted(shapes.keys() - tensors.keys())]
    wrong += [f"{n} is unknown" for n in sorted(tensors.keys() - shapes.keys())]
    wrong += [
        f"{n} is {tuple(tensors[n].shape)}, the model has {tuple(shapes[n])}"
        for n in sorted(shapes.keys() & tensors.keys())
        if tensors[n].shape != shapes[n]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where} does not fit the model: {'; '.join(wrong[:3])}{more}")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises UserError for a file that is no safetensors file."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def read_torch_file(file: Path) -> Any:
    """torch.load of tensors and plain values, nothing else; a zip file, as torch.save writes it, is mapped."""
    if zipfile.is_zipfile(file) and (bad := _damaged(file)):
        raise UserError(f"{file} is damaged: {bad} has another checksum; fetch it anew")
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of zip files, of pickles, of the disk: many kinds, one meaning
        # torch's own message is left out: it advises to load the file with weights_only=False.
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{file} asks for more than tensors, {asked[1]}: refused; save it anew with tensors alone") from error
        raise UserError(
            f"{file} cannot be read as tensors ({type(error).__name__}): it is damaged or no file of torch.save; fetch it anew"
        ) from error


def is_plain_tensor(value: Any) -> bool:
    """A tensor whose numbers are there, one after the other: not sparse, nested or without data."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _damaged(file: Path) -> str | None:
    """The first part of a zip file whose checksum is wrong, which torch does not look at."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return f"its directory ({error})"
