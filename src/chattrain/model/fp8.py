"""Linear layers in fp8 (formats: https://arxiv.org/abs/2209.05433) through torchao, on GPUs that have it."""

from __future__ import annotations

import torch
from torch import nn

from chattrain.config.train import FP8_MULTIPLE
from chattrain.errors import UserError
from chattrain.model.causal_lm import CausalLM

MIN_CAPABILITY = (8, 9)  # compute capability: Ada; Hopper and later have more


def check(device: torch.device) -> None:
    """Raises UserError if the device has no fp8 or torchao is not installed. Called before a run starts."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        actual = f"this is an {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"the device is {device.type}"
        raise UserError(
            f"train.fp8=true needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or more (RTX 40, L40, "
            f"H100 and later), but {actual}; use train.fp8=false"
        )
    try:
        import torchao.float8  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("train.fp8=true needs torchao: pip install torchao, or use train.fp8=false") from None


def convert(model: CausalLM, device: torch.device) -> None:
    """Replace the model's linear layers, in place, by ones whose products are in fp8 in forward and backward, scaled by tensor.

    Weights keep their dtype, and so do optimizer state, checkpoints and exports. The head stays as it is, because rounding hurts
    the loss most there, and so do layers whose sizes are no multiples of FP8_MULTIPLE. Raises UserError if the device has no fp8,
    torchao is not installed, or no layer can be converted.
    """
    check(device)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore[reportMissingImports]

    head = model.lm_head

    def fits(layer: nn.Linear, name: str) -> bool:
        return layer is not head and not (layer.in_features % FP8_MULTIPLE or layer.out_features % FP8_MULTIPLE)

    if not any(isinstance(module, nn.Linear) and fits(module, "") for module in model.modules()):
        raise UserError(
            f"train.fp8=true has no effect: no linear layer of this model has sides that are multiples of "
            f"{FP8_MULTIPLE}; use train.fp8=false"
        )
    padded = Float8LinearConfig(pad_inner_dim=True)  # a weight's gradient sums over the tokens of a batch, of any number
    convert_to_float8_training(model, module_filter_fn=fits, config=padded)
