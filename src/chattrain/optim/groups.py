"""Every parameter belongs to one group: `matrix`, `vector`, `embed` or `lm_head`."""

from __future__ import annotations

from torch import nn

GROUPS = ("matrix", "vector", "embed", "lm_head")


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """(name, parameter) pairs by group. The embedding and the head are the model's `embed` and `lm_head` modules by
    place; of the rest, 2-D weights are `matrix` and smaller ones `vector`.

    Raises ValueError if a parameter fits no group or a group takes one twice (tied weights).
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUPS}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = id(model.lm_head.weight)
    for name, p in model.named_parameters():
        if id(p) == head:
            groups["lm_head"].append((name, p))
        elif id(p) in embeddings:
            groups["embed"].append((name, p))
        elif p.ndim == 2:
            groups["matrix"].append((name, p))
        elif p.ndim < 2:
            groups["vector"].append((name, p))
        else:
            raise ValueError(f"{name} of shape {tuple(p.shape)} fits no parameter group")
    routed = [id(p) for members in groups.values() for _, p in members]
    if sorted(routed) != sorted(id(p) for p in model.parameters()):
        raise ValueError("parameters are not routed to exactly one group each")
    return groups
