"""nanochat of December 2025 (its scripts/base_train.py) on the rows and from the weights that chattrain trains on.

The user's checkout is put on sys.path of this side's process. Its own model, Muon and AdamW, compiled and under its autocast, the
momentum by its schedule, a constant learning rate and no clipping, as on our side.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.peers.rounds import Missing, Step, Turns, train_in_turns

WANTED = "use a checkout of December 2025, such as commit 790f3be"


def check(checkout: Path | None) -> None:
    """Raises Missing."""
    if checkout is None:
        raise Missing("nanochat is not installed as a package: name a checkout with --nanochat PATH")
    source = checkout / "nanochat" / "gpt.py"
    if not source.is_file():
        raise Missing(f"{checkout} is no checkout of nanochat: it has no nanochat/gpt.py")
    if "def setup_optimizers(" not in source.read_text(encoding="utf-8"):
        raise Missing(f"the GPT of {checkout} has no setup_optimizers; {WANTED}")


def train(turns: Turns, checkout: Path, device: str, shape: dict[str, Any]) -> None:
    """The side of nanochat. `shape`: `sizes` of the model, rows, seq_len and passes, as our side says them."""
    gpt = imported(checkout)
    import torch

    from benchmarks.gpu import random_rows
    from chattrain.device import keep_freed_memory

    keep_freed_memory(torch.device(device))  # as our side: a difference in the allocator is not what is compared
    sizes, rows, seq_len, passes = shape["sizes"], shape["rows"], shape["seq_len"], shape["passes"]
    torch.set_float32_matmul_precision("high")  # as its compute_init
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(sequence_len=seq_len, **arguments(sizes)))
    model.to_empty(device=device)
    model.init_weights()
    load_our_weights(model, sizes)
    compiled = torch.compile(model, dynamic=False)
    optimizers = model.setup_optimizers()
    inputs, targets = (x.to(device) for x in random_rows(sizes["vocab_size"], rows, seq_len))
    autocast = torch.amp.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()

    def step(number: int) -> Callable[[], Step]:
        losses = []
        for _ in range(passes):
            with autocast:
                loss = compiled(inputs, targets)
            losses.append(loss.detach())
            (loss / passes).backward()
        for group in optimizers[1].param_groups:
            group["momentum"] = 0.85 + 0.1 * min(number / 300, 1)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return lambda: Step(float(sum(losses) / passes), passes * rows * seq_len)

    rates = [group["initial_lr"] for optimizer in optimizers for group in optimizer.param_groups]
    turns.built({"settings": {"learning_rates": rates, "compile": True, "autocast": device == "cuda", "passes": passes}})
    train_in_turns(turns, step, device == "cuda")


def imported(checkout: Path) -> Any:
    """nanochat.gpt of the checkout. Raises Missing where it cannot be imported."""
    check(checkout)
    sys.path.insert(0, str(checkout))
    os.environ.setdefault("NANOCHAT_BASE_DIR", str(Path(os.environ.get("TMPDIR", "/tmp")) / "nanochat"))
    try:
        import nanochat.gpt as gpt  # pyright: ignore[reportMissingImports]
    except Exception as error:  # whatever a checkout of another time raises
        raise Missing(f"nanochat cannot be imported from {checkout} ({error}); {WANTED}") from None
    return gpt


def arguments(sizes: dict[str, Any]) -> dict[str, int]:
    """Our sizes as arguments of its GPTConfig.

    >>> arguments({"vocab_size": 9, "n_layer": 2, "n_embd": 8, "n_head": 2, "n_kv_head": None, "_target_": "x"})
    {'vocab_size': 9, 'n_layer': 2, 'n_embd': 8, 'n_head': 2, 'n_kv_head': 2}
    """
    kept = {name: sizes[name] for name in ("vocab_size", "n_layer", "n_embd", "n_head")}
    return {**kept, "n_kv_head": sizes.get("n_kv_head") or sizes["n_head"]}


def load_our_weights(model: Any, sizes: dict[str, Any]) -> None:
    """The random weights that our side begins with: the names of both are the same."""
    from chattrain.config.compose import compose
    from chattrain.model.gpt import build

    model.load_state_dict(build(start=None, seed=compose([]).run.seed, **arguments(sizes)).state_dict(), strict=True)
