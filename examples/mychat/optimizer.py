"""An optimizer: any of torch.optim, or of one's own, over the groups of the model."""

import torch

from chattrain.optim.named import over_groups


class Lion(torch.optim.Optimizer):
    """Steps of +-lr: the sign of an average of gradients (https://arxiv.org/abs/2302.06675)."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                update = average.lerp(p.grad, 1 - group["betas"][0]).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                average.lerp_(p.grad, 1 - group["betas"][1])


def lion(model, strategy, lr: float = 3e-4, lr_scale: float = 1.0, betas: list[float] = (0.9, 0.99), weight_decay: float = 0.0):
    return over_groups(Lion, model, strategy, lr * lr_scale, weight_decay, betas=tuple(betas))
