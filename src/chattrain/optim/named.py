"""Several torch optimizers as one, with state by parameter name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chattrain.optim.groups import parameter_groups
from chattrain.optim.partition import Partition
from chattrain.optim.trainable import TrainableModel

FUSED = ("cuda", "cpu", "mps")  # types of devices that have torch's fused AdamW
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # entries of torch.optim.AdamW's state


def over_groups(
    make: Callable[..., torch.optim.Optimizer],
    model: TrainableModel,
    strategy: Partition | None,
    lr: float,
    weight_decay: float | None = None,
    **settings: Any,
) -> NamedOptimizer:
    """`make(<groups>, lr=lr, **settings)`, such as torch.optim.SGD, over the groups of the model. `strategy` None: this process
    steps all parameters. `weight_decay`: of matrices alone; None: the groups have none of their own."""
    groups = parameter_groups(model)
    used = [name for name, members in groups.items() if members]
    own = strategy.partition_params(groups) if strategy else groups
    members: list[dict[str, Any]] = [{"name": name, "params": [p for _, p in own[name]]} for name in used]
    if weight_decay is not None:
        members = [member | {"weight_decay": weight_decay if member["name"] == "matrix" else 0.0} for member in members]
    return NamedOptimizer([make(members, lr=lr, **settings)], own)


class NamedOptimizer:
    """Steps several torch.optim optimizers together. `groups`: the (name, parameter) pairs by group that they step.

    Every parameter group has a `name` (`lr/<name>` in the metrics) and keeps the learning rate it was built with, which the
    schedule's factor multiplies. State is saved under the parameters' names, so a checkpoint depends neither on the order of
    parameters nor on how they are distributed over processes. Raises ValueError unless each parameter is in one optimizer.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], groups: dict[str, list[tuple[str, nn.Parameter]]]):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.param_groups:
            group["base_lr"] = group["lr"]
        self._void: Tensor | None = None
        self._names: dict[Tensor, str] = {p: name for members in groups.values() for name, p in members}
        held = self.parameters()
        if len(held) != len(self._names) or set(held) != set(self._names):
            raise ValueError("the optimizers must hold each parameter exactly once")

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def set_lr_factor(self, factor: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def learning_rates(self) -> dict[str, float]:
        return {f"lr/{group['name']}": float(group["lr"]) for group in self.param_groups}

    def by_group(self, metric: str, values: Tensor | None) -> dict[str, float]:
        """`<metric>/<group>` -> value. `values`: (groups,), in the order of `param_groups`; {} without."""
        names = [f"{metric}/{group['name']}" for group in self.param_groups]
        return {} if values is None else dict(zip(names, values.tolist(), strict=True))

    def void_if(self, found_inf: Tensor | None) -> None:
        """The next steps change neither weights nor state where `found_inf` (fp32, on the device) is 1. It is not read here, so
        nothing waits for the device. None: they do. torch's fused optimizers know the attribute by this name, and so do ours. For
        one that does not know it, `step` waits and reads."""
        self._void = found_inf
        for optimizer in self.optimizers:
            if _knows_found_inf(optimizer):
                optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
                optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]

    def step(self) -> None:
        for optimizer in self.optimizers:
            if self._void is None or _knows_found_inf(optimizer) or not self._void:
                optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`<parameter>/<entry>` -> tensor, such as `lm_head.weight/exp_avg`."""
        out = {}
        for optimizer in self.optimizers:
            for p, entries in optimizer.state.items():
                for entry, value in entries.items():
                    out[f"{self._names[p]}/{entry}"] = torch.as_tensor(value)
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned. Raises ValueError for other parameters, or for the state of another optimizer."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            by_name.setdefault(name, {})[entry] = value
        if set(by_name) != set(self._names.values()):
            raise ValueError("the optimizer state is of other parameters")
        for optimizer in self.optimizers:
            expected = _entries(optimizer)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    saved = by_name[self._names[p]]
                    if set(saved) != expected:
                        raise ValueError("the optimizer state was saved by another optimizer")
                    optimizer.state[p] = {entry: _copy_for(value, p, group) for entry, value in saved.items()}


def _knows_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "found_inf") or all(group.get("fused") for group in optimizer.param_groups)


def _entries(optimizer: torch.optim.Optimizer) -> set[str]:
    """The names in a parameter's state: what the class declares as STATE, else what a step of its like leaves.

    Raises ValueError where none can be made of the optimizer's defaults.
    """
    if hasattr(optimizer, "STATE"):
        return set(optimizer.STATE)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(optimizer, torch.optim.AdamW):
        return set(ADAMW_STATE)
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.zeros(2, 2)
    try:
        like = type(optimizer)([p], **optimizer.defaults)
    except TypeError as error:
        raise ValueError(f"{type(optimizer).__name__} must declare STATE, the names in its state of a parameter") from error
    like.step()
    return set(like.state[p])


def _copy_for(value: Tensor, p: nn.Parameter, group: dict) -> Tensor:
    """A copy with the device and dtype that the optimizer expects: its parameter's device, but the CPU for step counts of
    unfused optimizers."""
    if not value.ndim:
        return value.to(p.device, copy=True) if group.get("fused") else value.clone()
    dtype = group.get("momentum_dtype") or group.get("state_dtype") or (p.dtype if value.is_floating_point() else value.dtype)
    return value.to(p.device, dtype, copy=True)
