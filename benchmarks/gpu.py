"""Training steps on one GPU: tokens a second, model FLOPs utilisation, peak memory.

    python -m benchmarks.gpu --model d20 train.device_batch_size=16 train.activation_checkpointing=block

The real loop, on random weights and packed rows of random tokens, so that no data are needed. Any key of the configuration can
follow. `--device cpu --model tiny` tries it without a GPU. MFU is relative to the device's dense bf16 peak, n/a if that is
unknown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from chattrain import device as devices
from chattrain import loop
from chattrain.config import Config
from chattrain.config.compose import compose
from chattrain.config.instantiate import instantiate_config
from chattrain.data.batch import Batch
from chattrain.errors import UserError
from chattrain.parallel.ranks import Ranks
from chattrain.setup.build import build_model, in_context

WARM_UP = 3  # steps: the first compiles, the second is the first with optimizer state


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="d12", help="d12, d20 or another of conf/model (default d12)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps measured (default 10)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gpu.json"), help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration, such as train.fp8=true")
    asked = parser.parse_intermixed_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA device; `--device cpu --model tiny` runs without one", file=sys.stderr)
        sys.exit(2)
    try:
        found = measure(asked.model, asked.device, asked.steps, asked.overrides)
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    mfu = "n/a" if found["mfu"] is None else f"{found['mfu']:.1%}"
    print(
        f"{found['model']} on {found['device']}: {found['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, peak memory "
        f"{found['peak_memory_gib']:.2f} GiB"
    )
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {asked.out}")


def measure(model: str, device: str, steps: int, overrides: list[str]) -> dict:
    """Results and settings of `steps` steps after the warm-up. Raises UserError for a wrong override."""
    cfg = compose(
        [
            f"model={model}",
            "stage=base",
            "eval=none",
            "tracking=none",
            f"train.device={device}",
            f"train.max_steps={WARM_UP + steps}",
            *overrides,
        ]
    )
    found: dict = {}
    components = build_components(cfg, lambda step, values: found.update(values), Ranks())
    state = loop.State()
    for until in (WARM_UP, WARM_UP + steps):  # the second call measures its own steps only
        state = loop.fit(components, state, loop.Cadence(log=until, evaluate=None, save=None, last_step=until))
    kept = {key: getattr(value, "name", value) for key, value in vars(cfg.train).items()}
    return {
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "steps": steps,
        "tokens_a_step": components.loader.tokens,
        "tokens_per_second": found["train/tokens_per_second"],
        "mfu": found.get("train/mfu"),
        "peak_memory_gib": found["train/peak_memory_gib"],
        "loss": found["train/loss"],
        "settings": kept,
        "overrides": overrides,
    }


def build_components(cfg: Config, track, ranks: Ranks) -> loop.TrainerComponents:
    """The components of a run that reads no data, evaluates nothing and saves nothing."""
    device = devices.pick_device(cfg.train.device)
    bf16 = devices.use_bf16(cfg.train.dtype, device)
    model, strategy = build_model(cfg, cfg.tokenizer.vocab_size, None, device, ranks, bf16, cfg.train.compile is not False)
    autocast = devices.autocast(bf16, device)
    return loop.TrainerComponents(
        model=model,
        loss_of=in_context(autocast, model.loss),
        optimizer=instantiate_config(cfg.optimizer, model, strategy),
        lr_factor=lambda step: 1.0,
        loader=RandomRows(cfg, device, ranks.world_size),
        evaluate=lambda step: {},
        save=lambda state: None,
        track=track,
        show=lambda step: None,
        stop_asked=lambda: False,
        ranks=ranks,
        max_grad_norm=cfg.train.max_grad_norm,
        checks_each_step=device.type == "cpu",
        flops_per_token=model.flops_per_token(cfg.train.seq_len),
        peak_flops=devices.peak_flops(device),
        meters=devices.meters(device),
        strategy=strategy,
    )


class RandomRows:
    """Takes the place of the loader: every micro-batch has the same full rows of random tokens, all of them targets."""

    def __init__(self, cfg: Config, device: torch.device, world_size: int):
        B, T = cfg.train.device_batch_size, cfg.train.seq_len
        ids = torch.randint(0, cfg.tokenizer.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), num_tokens=B * T, num_supervised=B * T)
        count = cfg.train.rows_a_step(world_size) // (B * world_size)
        self.batches = [batch._replace() for _ in range(count)]  # distinct objects, as those of a real loader
        self.tokens = len(self.batches) * B * T  # an optimizer step
        self.waited_s = 0.0  # nothing is waited for

    def step(self, step: int) -> list[Batch]:
        return self.batches

    def describe(self, step: int) -> str:
        return "random tokens"


if __name__ == "__main__":
    main()
