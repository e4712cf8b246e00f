"""Linear layers in fp8 through torchao (https://arxiv.org/abs/2209.05433 for the formats), where the GPU has them."""

from __future__ import annotations

import torch
from torch import nn

from chattrain.config.train import FP8_MULTIPLE
from chattrain.errors import UserError

OLDEST = (8, 9)  # compute capability: Ada, then Hopper and later


def check(device: torch.device) -> None:
    """Raises UserError where device or torchao do not allow it: before a run is begun."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < OLDEST:
        found = f"this is an {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"the device is {device.type}"
        raise UserError(
            f"train.fp8=true needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or more (RTX 40, L40, H100 "
            f"and later), but {found}; use train.fp8=false"
        )
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        raise UserError("train.fp8=true needs torchao: pip install torchao, or use train.fp8=false") from None


def convert(model: nn.Module, device: torch.device) -> None:
    """From now on the products of the model's linear layers are in fp8, forward and backward, with a scale a tensor.

    Weights, and so optimizer, checkpoints and exports, stay what they are. The head is left out, because its loss feels
    the rounding most, and so are layers whose sides fp8 products do not take. Raises UserError where device, torchao or
    the model's sizes do not allow it.
    """
    check(device)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head = model.lm_head

    def fits(layer: nn.Module, name: str) -> bool:
        return layer is not head and not (layer.in_features % FP8_MULTIPLE or layer.out_features % FP8_MULTIPLE)

    if not any(isinstance(module, nn.Linear) and fits(module, "") for module in model.modules()):
        raise UserError(
            f"train.fp8=true has no effect: no linear layer of this model has sides that are multiples of "
            f"{FP8_MULTIPLE}; use train.fp8=false"
        )
    padded = Float8LinearConfig(pad_inner_dim=True)  # rows of any width: the gradient of a weight sums over their tokens
    convert_to_float8_training(model, module_filter_fn=fits, config=padded)
