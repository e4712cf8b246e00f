"""Read tensors from safetensors files and from files of torch.save. Pickles are never loaded without restriction."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from chattrain.errors import UserError


class HasWeights(Protocol):
    def weights(self) -> dict[str, Tensor]: ...


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the module's state dict, each tensor once: tied weights appear under their first name."""
    first = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if first[id(tensor)] == name}


def fill_model(file: Path, model: HasWeights) -> None:
    """Copy the tensors of a safetensors file into the model, whose `weights()` gives name -> tensor.

    Raises UserError that names tensors that are missing, unknown or of another shape.
    """
    tensors = read_tensors(file)
    weights = model.weights()
    require_shapes(str(file), tensors, {name: tensor.shape for name, tensor in weights.items()})
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(tensors[name])


def require_shapes(source: str, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raises UserError if the tensors of `source` (a name for the message) are not those of the model. `shapes`: the model's."""
    wrong = [f"{n} is missing" for n in sorted(shapes.keys() - tensors.keys())]
    wrong += [f"{n} is unknown" for n in sorted(tensors.keys() - shapes.keys())]
    wrong += [
        f"{n} is {tuple(tensors[n].shape)}, the model has {tuple(shapes[n])}"
        for n in sorted(shapes.keys() & tensors.keys())
        if tensors[n].shape != shapes[n]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} does not fit the model: {'; '.join(wrong[:3])}{more}")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError if it is damaged or has another format."""
    try:
        return load_file(file)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a format that torch has not
        raise UserError(f"{file} cannot be read: {error}") from error


def read_torch_file(file: Path) -> Any:
    """`torch.load` with weights_only: tensors and plain values. Memory-mapped if it is a zip file, as torch.save writes it.

    Raises UserError if the file is damaged or would load anything else.
    """
    if zipfile.is_zipfile(file) and (bad := _damaged(file)):
        raise UserError(f"{file} is damaged: {bad} has a wrong checksum; download it again")
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # zip, pickle and disk raise many types of error; all mean that the file cannot be read
        # torch's own message is left out: it recommends weights_only=False.
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{file} asks for more than tensors, {found[1]}: refused; save it again with tensors only") from error
        raise UserError(
            f"{file} cannot be read as tensors ({type(error).__name__}): it is damaged or was not written by torch.save; "
            "download it again"
        ) from error


def is_plain_tensor(value: Any) -> bool:
    """Whether it is a dense tensor in CPU memory: not sparse, nested or on the meta device."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _damaged(file: Path) -> str | None:
    """The first member of a zip file with a wrong checksum, or None. torch does not verify checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return f"its directory ({error})"
