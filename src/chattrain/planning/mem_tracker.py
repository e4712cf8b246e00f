"""Counts the bytes alive in a training step on fake tensors, by category and by phase."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _ModState

CPU = torch.device("cpu")
COLLECTIVES = (torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default)
CATEGORIES = {
    "weights": (_MemRefType.PARAM, _MemRefType.BUFFER),
    "gradients": (_MemRefType.GRAD,),
    "optimizer": (_MemRefType.OPT,),
    "activations": (_MemRefType.ACT, _MemRefType.OTH),
    "temporary": (_MemRefType.TEMP,),
}


class StepMemTracker(MemTracker):
    """torch's MemTracker with peaks of forward, backward and optimizer. Its own peaks of each module take most of the time."""

    def __init__(self, copies: bool) -> None:
        """copies: does the backend of collectives gather or sum into a tensor of its own, as gloo does?"""
        super().__init__()
        self.copies = copies
        self.collective_copy = 0  # bytes of that tensor, while a collective runs
        self.phases: dict[str, int] = {}  # forward, backward, optimizer: peak bytes
        self.at_peak: dict[str, int] = {}  # bytes by category at the highest peak

    def reset_peaks(self) -> None:
        self.phases, self.at_peak = {}, {}

    def track_gradients(self, model: nn.Module) -> None:
        """Count the gradients of all its parameters as gradients, also of parameters that are used outside their module."""
        self._track_module_params_and_buffers(model, install_grad_hooks=True)

    def current(self) -> dict[str, int]:
        """Bytes alive by category, and their `total`."""
        snapshot = self._curr_mem_snap.get(CPU, {})
        sizes = {name: sum(snapshot.get(kind, 0) for kind in kinds) for name, kinds in CATEGORIES.items()}
        return sizes | {"total": snapshot.get("Total", 0)}

    def kept_by_forward(self, blocks: Iterable[nn.Module]) -> dict[str, int]:
        """Bytes kept for backward by the blocks and by everything else, and bytes of logits; to be called right after forward.

        Logits, with their exponentials and gradients, are the peak of forward minus what is alive now.
        """
        kept = sum(self._activations(block, _ModState.POST_FW) - self._activations(block, _ModState.PRE_FW) for block in blocks)
        current = self.current()
        kept = min(kept, current["activations"])  # fsdp's gathered weights count as activations of a block, and are freed soon
        return {
            "blocks": kept,
            "embedding and head": current["activations"] - kept,
            "logits": max(0, self.phases["forward"] - current["total"]),
        }

    def _activations(self, module: nn.Module, state: _ModState) -> int:
        return self.memory_tracking[module].snapshots[state][0].get(CPU, {}).get(_MemRefType.ACT, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.collective_copy = 0
        if self.copies and func in COLLECTIVES:
            self.collective_copy = max(t.untyped_storage().nbytes() for t in args if isinstance(t, Tensor))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _update_peak_stats(self, peak_state: _ModState) -> None:
        phase = "optimizer" if self._in_opt else "backward" if peak_state == _ModState.PEAK_BW else "forward"
        total = self._curr_mem_snap.get(CPU, {}).get("Total", 0) + self.collective_copy
        if total > max(self.phases.values(), default=0):
            self.at_peak = self.current()
        self.phases[phase] = max(self.phases.get(phase, 0), total)
