"""Training steps on one GPU: tokens a second, model FLOPs utilisation, peak memory, the first step, the optimizer.

    python -m benchmarks.gpu --model d20 train.device_batch_size=16 train.activation_checkpointing=block

The real loop, on random weights and packed rows of random tokens, so that no data are needed. Any key of the configuration can
follow. `--profile` adds the kernels of one more step, by kind. `--device cpu --model tiny` tries it without a GPU. MFU is
relative to the device's dense bf16 peak, n/a if that is unknown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks import STARTED, gpu_kernels
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
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps measured after the warm-up (default 10)")
    parser.add_argument("--profile", action="store_true", help="list the kernels of one more step, by kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gpu.json"), help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration, such as train.fp8=true")
    asked = parser.parse_intermixed_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA device; `--device cpu --model tiny` runs without one", file=sys.stderr)
        sys.exit(2)
    try:
        components, found = train(asked.model, asked.device, asked.steps, asked.overrides)
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    mfu = "n/a" if found["mfu"] is None else f"{found['mfu']:.1%}"
    print(
        f"{found['model']} on {found['device']}: {found['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, peak memory "
        f"{found['peak_memory_gib']:.2f} GiB; the first step took {found['first_step_s']:.1f} s and ended "
        f"{found['start_to_first_step_s']:.1f} s after the start; the optimizer takes {1e3 * found['optimizer_s']:.1f} ms a step"
    )
    if asked.profile:
        profiled = kernels(components, WARM_UP + asked.steps + 1)
        asked.out.write_text(json.dumps({**found, "kernels": [kernel._asdict() for kernel in profiled]}, indent=1) + "\n")
        print(f"\n{gpu_kernels.show(profiled)}\n")
    print(f"written to {asked.out}")


def measure(model: str, device: str, steps: int, overrides: list[str]) -> dict:
    """Results and settings of `steps` steps after the warm-up. Raises UserError for a wrong override."""
    return train(model, device, steps, overrides)[1]


def train(model: str, device: str, steps: int, overrides: list[str]) -> tuple[loop.TrainerComponents, dict]:
    """What has trained, for more steps, with the results and settings; see `measure`."""
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
    built = time.perf_counter()
    state, first_step = loop.State(), built
    for until in (1, WARM_UP, WARM_UP + steps):  # each call measures its own steps only
        state = loop.fit(components, state, loop.Cadence(log=until, evaluate=None, save=None, last_step=until))
        first_step = time.perf_counter() if until == 1 else first_step
    kept = {key: getattr(value, "name", value) for key, value in vars(cfg.train).items()}
    return components, {
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "steps": steps,
        "tokens_a_step": components.loader.tokens,
        "tokens_per_second": found["train/tokens_per_second"],
        "mfu": found.get("train/mfu"),
        "peak_memory_gib": found["train/peak_memory_gib"],
        "first_step_s": first_step - built,
        "start_to_first_step_s": first_step - STARTED,
        "optimizer_s": optimizer_seconds(components, state.step),
        "loss": found["train/loss"],
        "settings": kept,
        "overrides": overrides,
    }


def optimizer_seconds(components: loop.TrainerComponents, step: int) -> float:
    """Of one more step, with the device idle before and after."""
    inner, seconds = components.strategy.step, 0.0

    def timed(optimizer) -> None:
        nonlocal seconds
        wait_for_device()
        begun = time.perf_counter()
        inner(optimizer)
        wait_for_device()
        seconds = time.perf_counter() - begun

    components.strategy.step = timed
    loop.train_step(components, components.loader.step(step), step)
    components.strategy.step = inner
    return seconds


def kernels(components: loop.TrainerComponents, step: int) -> list[gpu_kernels.Kernel]:
    """Of one more step, the longest first."""
    components.strategy.step = gpu_kernels.in_optimizer(components.strategy.step)
    cuda = torch.cuda.is_available() and components.model.lm_head.weight.is_cuda
    return gpu_kernels.profiled(lambda: loop.train_step(components, components.loader.step(step), step), cuda)


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
        finish_saving=lambda: None,
        save_asked=lambda: False,
        is_best=lambda step, metrics: False,
        track=track,
        show=lambda step: None,
        stop_asked=lambda: False,
        ranks=ranks,
        max_grad_norm=cfg.train.max_grad_norm,
        checks_each_step=device.type == "cpu",
        max_skipped=None,
        watch=lambda step, loss: None,
        flops_per_token=model.flops_per_token(cfg.train.seq_len),
        peak_flops=devices.peak_flops(device),
        meters=devices.meters(device),
        strategy=strategy,
    )


def random_rows(vocab_size: int, rows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """inputs and targets (rows, seq_len) of full rows of random tokens, the same in every process."""
    ids = torch.randint(0, vocab_size, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class RandomRows:
    """Takes the place of the loader: every micro-batch has the same full rows of random tokens, all of them targets."""

    def __init__(self, cfg: Config, device: torch.device, world_size: int):
        B, T = cfg.train.device_batch_size, cfg.train.seq_len
        inputs, targets = (x.to(device) for x in random_rows(cfg.tokenizer.vocab_size, B, T))
        batch = Batch(inputs, targets, num_tokens=B * T, num_supervised=B * T)
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
