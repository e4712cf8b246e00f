"""Several torch optimizers as one, with state by parameter name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # entries of torch.optim.AdamW's state; other optimizers declare theirs as STATE


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
        nothing waits for the device. None: they do. torch's fused AdamW knows the attribute by this name; its other forms, on
        devices without a fused one, step all the same."""
        for optimizer in self.optimizers:
            if hasattr(optimizer, "found_inf") or all(group.get("fused") for group in optimizer.param_groups):
                optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
                optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]

    def step(self) -> None:
        for optimizer in self.optimizers:
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
            expected = set(getattr(optimizer, "STATE", ADAMW_STATE))
            for group in optimizer.param_groups:
                for p in group["params"]:
                    saved = by_name[self._names[p]]
                    if set(saved) != expected:
                        raise ValueError("the optimizer state was saved by another optimizer")
                    optimizer.state[p] = {entry: _copy_for(value, p, group) for entry, value in saved.items()}


def _copy_for(value: Tensor, p: nn.Parameter, group: dict) -> Tensor:
    """A copy with the device and dtype that the optimizer expects: its parameter's device, but the CPU for step counts of
    unfused optimizers."""
    if not value.ndim:
        return value.to(p.device, copy=True) if group.get("fused") else value.clone()
    dtype = group.get("momentum_dtype") or group.get("state_dtype") or value.dtype
    return value.to(p.device, dtype, copy=True)
