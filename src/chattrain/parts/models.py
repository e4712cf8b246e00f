"""The check of models."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from chattrain.data.batch import Batch, as_batch
from chattrain.data.packing import IGNORE_INDEX, Tokens, shift
from chattrain.model.causal_lm import CausalLM
from chattrain.model.generate import generate
from chattrain.optim.groups import parameter_groups
from chattrain.parts.contracts import BuildsModel, require

VOCAB = 256
B, T = 2, 24
CLOSE = 1e-4  # nats a token in fp32


def check_model(build: BuildsModel) -> None:
    """Raises ContractBroken unless weights follow the seed and a checkpoint, every parameter fits a group, `loss` is the weighted
    sum of `losses`, no token sees a later one or another document, and replies with a cache are those without."""
    model = build(vocab_size=VOCAB, start=None, seed=1)
    require(isinstance(model, CausalLM), f"it is a {type(model).__name__}, not a CausalLM")
    _check_weights(build, model)
    parameter_groups(model)  # raises UserError for one that fits none
    _randomise(model)
    model.eval()
    _check_losses(model)
    _check_causality(model)
    _check_isolation(model)
    _check_choices(model)
    _check_generation(model)


def _check_weights(build: BuildsModel, model: CausalLM) -> None:
    twin, other = (build(vocab_size=VOCAB, start=None, seed=seed) for seed in (1, 2))
    require(_same(model.weights(), twin.weights()), "two models of one seed have different weights")
    require(not _same(model.weights(), other.weights()), "models of different seeds have the same weights")
    _randomise(model)
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: value.contiguous() for name, value in model.weights().items()}
        save_file(weights, Path(folder) / "model.safetensors")
        loaded = build(vocab_size=VOCAB, start=Path(folder), seed=3)
    require(_same(model.weights(), loaded.weights()), "a model built from a checkpoint (start) has not its weights")
    require("vocab_size" in model.shape, "its `shape`, which a checkpoint records, has no vocab_size")


def _randomise(model: CausalLM) -> None:
    """Small random weights, as a head of zeros would hide what is wrong."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def _check_losses(model: CausalLM) -> None:
    batch, weights = _batch(seed=0), torch.rand(B, T, generator=torch.Generator().manual_seed(7))
    weights[:, ::3] = 1.0
    targets = batch.targets.clone()
    targets[:, 1::4], weights[:, 1::4] = IGNORE_INDEX, 0.0
    batch = batch._replace(
        targets=targets,
        weights=weights,
        sum_of_weights=float(weights.sum()),
        target_indices=(targets.flatten() != IGNORE_INDEX).nonzero().flatten(),
    )
    losses, loss = model.losses(batch), model.loss(batch)
    total = loss.item()
    require(tuple(losses.shape) == (B, T), f"losses has the shape {tuple(losses.shape)}, not (B, T) = {(B, T)}")
    require(bool((losses[targets == IGNORE_INDEX] == 0).all()), "losses is not 0 where targets are ignored")
    expected = float((losses * weights).sum())
    require(
        abs(total - expected) <= CLOSE * B * T,
        f"loss is {total:.6g}, but the losses times their weights sum to {expected:.6g}",
    )
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    require(not without, f"no gradient reaches {', '.join(without)}")
    model.zero_grad()


def _check_causality(model: CausalLM) -> None:
    batch, cut = _batch(seed=0), T // 2
    later = batch.inputs.clone()
    later[:, cut:] = (later[:, cut:] + 1) % VOCAB
    before, after = (model.losses(batch._replace(inputs=inputs))[:, :cut] for inputs in (batch.inputs, later))
    require(_close(before, after), "a token sees later ones: losses change where only later inputs do")


def _check_isolation(model: CausalLM) -> None:
    """Two documents in a row have the losses that each has in a row of its own."""
    ids = torch.randint(0, VOCAB, (2, T // 2 + 1), generator=torch.Generator().manual_seed(3)).tolist()
    documents = [shift(np.array(one)) for one in ids]
    together = as_batch([Tokens.join(documents)], T, 0, sizes=[[T // 2, T // 2]])
    alone = as_batch(documents, T // 2, 0)
    require(
        _close(model.losses(together).view(2, T // 2), model.losses(alone)),
        "documents that share a row see each other: `features` must use batch.positions or batch.cu_seqlens",
    )


def _check_choices(model: CausalLM) -> None:
    inputs = _batch(seed=4).inputs
    last = torch.tensor([T - 1, T // 2])
    choices = torch.tensor([[1, 2, 3], [4, 5, 6]])
    logits, log_sum = model.choice_logits(inputs, last, choices)
    got = logits - log_sum[:, None]
    wanted = []
    for b in range(B):
        for choice in choices[b].tolist():
            ids = [*inputs[b, : last[b] + 1].tolist(), choice]
            batch = as_batch([shift(np.array(ids))], len(ids) - 1, 0)
            wanted.append(-model.losses(batch)[0, -1])
    require(_close(got.flatten(), torch.stack(wanted)), "choice_logits are not the log-probabilities that losses has")


def _check_generation(model: CausalLM) -> None:
    """Replies with the cache are the likeliest tokens of passes over the whole text."""
    prompt = _batch(seed=8).inputs[0, :7].tolist()
    reply = list(generate(model, prompt, max_tokens=6, stop_ids=set()))
    ids = list(prompt)
    for i, token in enumerate(reply):
        every = torch.arange(VOCAB)[None]
        logits, _ = model.choice_logits(torch.tensor([ids]), torch.tensor([len(ids) - 1]), every)
        best = float(logits.max())
        require(
            float(logits[0, token]) >= best - CLOSE,
            f"token {i} of a reply is not the likeliest one: `next_logits` with its cache differs from a pass over all of it",
        )
        ids.append(token)


def _batch(seed: int) -> Batch:
    ids = torch.randint(0, VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return as_batch([shift(row) for row in ids.numpy()], T, 0)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= CLOSE)
