"""Every parameter belongs to one group: `matrix`, `vector`, `embed` or `lm_head`."""

from __future__ import annotations

from torch import nn

from chattrain.errors import UserError

Groups = dict[str, list[tuple[str, nn.Parameter]]]  # group -> (name, parameter) pairs
GROUPS = ("matrix", "vector", "embed", "lm_head")


def parameter_groups(model: nn.Module) -> Groups:
    """(name, parameter) pairs by group: the head's weight (an embedding tied to it included), then embeddings, then 2-D
    weights as `matrix` and smaller ones as `vector`.

    Raises UserError if a parameter fits no group.
    """
    groups: Groups = {name: [] for name in GROUPS}
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
            raise UserError(
                f"{name} of shape {tuple(p.shape)} fits no parameter group: models with stacked experts or "
                "convolutions are not trained here"
            )
    return groups
