"""The check of optimizers, on a small GPT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chattrain.model.gpt import GPT
from chattrain.optim.groups import Groups
from chattrain.optim.named import NamedOptimizer
from chattrain.optim.newton_schulz import Orthogonalizer
from chattrain.parallel.strategy import SingleProcess
from chattrain.parts.contracts import BuildsOptimizer, require

STEPS = 3
TOLERANCE = 1e-5  # of weights, between one rank and two


def check_optimizer(build: BuildsOptimizer) -> None:
    """Raises ContractBroken unless the optimizer steps every weight, follows the schedule's factor, goes on from its state to the
    same bits, changes nothing in a step that is not finite, and does on two ranks what it does on one."""
    whole = _small_gpt()
    optimizer = build(whole, None)
    require(isinstance(optimizer, NamedOptimizer), f"it is a {type(optimizer).__name__}, not a NamedOptimizer")
    _check_groups(whole, optimizer)
    _train(whole, [(optimizer, dict(whole.named_parameters()))])
    _check_state(build, whole, optimizer)
    _check_void(build)
    _check_two_ranks(build, whole)


def _check_groups(model: GPT, optimizer: NamedOptimizer) -> None:
    missing = {id(p) for p in model.parameters()} ^ {id(p) for p in optimizer.parameters()}
    require(not missing, "it does not hold each parameter of the model exactly once")
    unnamed = [group for group in optimizer.param_groups if not isinstance(group.get("name"), str)]
    require(not unnamed, "each of its param_groups needs a `name`, which is that of its learning rate: lr/<name>")
    rates = optimizer.learning_rates()
    optimizer.set_lr_factor(0.5)
    halved = {name: rate * 0.5 for name, rate in rates.items()}
    require(optimizer.learning_rates() == halved, "the schedule's factor does not multiply its learning rates")
    optimizer.set_lr_factor(0.0)
    before = _weights(model)
    _gradients(model, 0)
    optimizer.step()
    require(_equal(before, model), "with a factor of 0 it changes weights")
    optimizer.set_lr_factor(1.0)
    _gradients(model, 1)
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    require(not still, f"it does not change {', '.join(still)}")


def _check_state(build: BuildsOptimizer, model: GPT, optimizer: NamedOptimizer) -> None:
    state = {name: value.clone() for name, value in optimizer.state().items()}
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    require(not wrong, f"its state holds {', '.join(wrong)}, which are no tensors")
    twin = _small_gpt()
    twin.load_state_dict(model.state_dict())
    resumed = build(twin, None)
    if state:
        resumed.load_state(state)
    for one, stepped in ((model, optimizer), (twin, resumed)):
        _gradients(one, 99)
        stepped.step()
    require(_equal(_weights(model), twin), "it goes on otherwise from its saved state: something is kept outside of `state`")


def _check_void(build: BuildsOptimizer) -> None:
    model = _small_gpt()
    optimizer = build(model, None)
    _train(model, [(optimizer, dict(model.named_parameters()))])
    before, state = _weights(model), {name: value.clone() for name, value in optimizer.state().items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.void_if(torch.tensor(1.0))
    optimizer.step()
    require(_equal(before, model), "a step whose gradients are not finite changes weights")
    after = optimizer.state()
    changed = [name for name in state if not name.endswith("/step") and not torch.equal(state[name], after[name])]
    require(not changed, f"a step whose gradients are not finite changes its state: {', '.join(changed)}")


def _check_two_ranks(build: BuildsOptimizer, whole: GPT) -> None:
    alone, shared = _small_gpt(), _small_gpt()
    _train(alone, [(build(alone, SingleProcess()), dict(alone.named_parameters()))])
    halves = [_Half(rank) for rank in (0, 1)]
    optimizers = [build(shared, half) for half in halves]
    _train(shared, [(optimizer, half.slices) for optimizer, half in zip(optimizers, halves, strict=True)])
    worst = max(
        ((p - q).abs().max().item(), name) for (name, p), q in zip(alone.named_parameters(), shared.parameters(), strict=True)
    )
    require(
        worst[0] <= TOLERANCE,
        f"on two ranks {worst[1]} differs by up to {worst[0]:.2g} from one rank's, each with slices of all parameters; if a step "
        "needs whole ones, name their groups: strategy.partition_params(groups, whole=('matrix',))",
    )


@dataclass
class _Half:
    """A Partition that gives a rank half of the rows of every parameter, or, of those that are to be whole, every second one."""

    rank: int

    def __post_init__(self) -> None:
        self.slices: dict[str, nn.Parameter] = {}

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        own: Groups = {name: [] for name in groups}
        for group, members in groups.items():
            for i, (name, p) in enumerate(members):
                if group in whole and i % 2 == self.rank:
                    own[group].append((name, p))
                elif group not in whole:
                    half = len(p) // 2
                    rows = slice(0, half) if self.rank == 0 else slice(half, None)
                    own[group].append((name, nn.Parameter(p.data[rows])))  # the same memory
        self.slices = {name: p for members in own.values() for name, p in members}
        return own

    def orthogonalizer(self) -> Orthogonalizer:
        return SingleProcess().orthogonalizer()


def _train(model: GPT, optimizers: list[tuple[NamedOptimizer, dict[str, nn.Parameter]]]) -> None:
    """STEPS steps; `optimizers`: with the parameters, or slices of them, that each steps, by name."""
    for step in range(STEPS):
        _gradients(model, step)
        for rank, (_, slices) in enumerate(optimizers):
            for name, p in slices.items():
                grad = model.get_parameter(name).grad
                assert grad is not None
                if p.shape != grad.shape:
                    p.grad = grad[: len(p)] if rank == 0 else grad[len(grad) - len(p) :]
        for optimizer, _ in optimizers:
            optimizer.step()


def _small_gpt() -> GPT:
    model = GPT(vocab_size=256, n_layer=2, n_embd=32, n_head=2)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def _gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _equal(before: dict[str, Tensor], model: nn.Module) -> bool:
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())
