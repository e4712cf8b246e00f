"""Every parameter belongs to one group: `matrix`, `vector`, `embed` or `lm_head`."""

from __future__ import annotations

from torch import nn

from chattrain.errors import UserError
from chattrain.optim.trainable import TrainableModel

Groups = dict[str, list[tuple[str, nn.Parameter]]]  # group -> (name, parameter) pairs
GROUPS = ("matrix", "vector", "embed", "lm_head")


def parameter_groups(model: TrainableModel) -> Groups:
    """(name, parameter) pairs by group: `lm_head` is the head's weight (also where an embedding is tied to it), `embed` the
    other embeddings, `matrix` the other 2-D weights, `vector` what has fewer dimensions.

    Raises UserError if a parameter fits no group.
    """
    groups: Groups = {name: [] for name in GROUPS}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = id(model.lm_head.get_parameter("weight"))
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
                "convolutions cannot be trained"
            )
    return groups
