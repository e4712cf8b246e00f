"""Whether a run is compiled: `train.compile`, decided once, before any process, from facts of the run and never from timings.

`auto` compiles where the planned steps gain more by it than compiling costs. A resumed run keeps what it began with, as compiled
steps and others differ by rounding.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch

from chattrain.config import Config
from chattrain.config.instantiate import instantiate_config
from chattrain.config.model import GPTConfig, HFModelConfig
from chattrain.config.words import Compile
from chattrain.device import obstacle_to_compiling
from chattrain.parallel.cores import cores
from chattrain.setup.data import RunData
from chattrain.setup.start import Start
from chattrain.storage.files import read_json

# Seconds that compiling costs, with an empty cache of torch's.
COMPILE_S = {"cpu": 28.0, "cuda": 20.0}
# Seconds that compiling saves, a token, layer and channel: of a core, and of a GPU.
CPU_SAVED_S = 1.7e-7
CUDA_SAVED_S = 8e-11
LAUNCH_SAVED_S = 2e-3  # a layer and forward pass on a GPU, where launching kernels takes longer than running them


@dataclass(frozen=True)
class PlannedWork:
    """What a run computes, as far as it decides whether compiling pays."""

    device: str  # cpu or cuda
    processors: int  # that share the tokens: cores of a CPU, or GPUs
    num_steps: int  # of the whole run, also where train.stop_after ends this part of it earlier
    tokens: int  # of the whole run over all ranks, padding included
    passes: int  # forward passes of a rank in a step
    n_layer: int
    n_embd: int


@dataclass(frozen=True)
class Compilation:
    """The decision, and how to log it."""

    on: bool
    reason: str = ""  # a line for the log; empty: it was asked for, and that is all
    level: int = logging.INFO


def seconds_saved(work: PlannedWork) -> float:
    """What compiling saves of the planned steps, in seconds.

    It saves traffic: element-wise operations of a block read and write its activations fewer times. So the gain grows with tokens
    x layers x channels, not with FLOPs. On both cores of a CPU with AVX-512 bf16 (torch 2.13), with nothing else running, tiny's
    base stage of the demo made 9,285 tokens/s uncompiled and 16,016 compiled (bf16, packed): 1.7e-7 s a token, layer, channel and
    core, which counts here. Compiling took 25 s (fp32) to 32 s (bf16) with an empty cache. How the gain depends on the model was
    measured on one core, with others busy, as seconds of a step of 4,096 tokens and of compiling:

        model  dtype  flow     uncompiled  compiled  compiling  saved a token, layer and channel
        tiny   fp32   packed         0.60      0.40         20    9.5e-8
        tiny   bf16   packed         0.52      0.36         32    7.6e-8
        d6     fp32   packed         4.06      3.46         29    6.4e-8
        d6     bf16   packed         1.97      1.49         30    5.1e-8
        tiny   fp32   masked         0.47      0.41         24    2.9e-8
        tiny   bf16   masked         0.49      0.34         31    6.9e-8

    The number format is left out, as it changes the gain less than the size of the model does.
    On a GPU it is an estimate: about 260 bytes a channel at 3.35 TB/s, or 2 ms of the 4 ms that launching a block's forward and
    backward took on an H100, whichever is more.
    """
    size = work.tokens * work.n_layer * work.n_embd / work.processors
    if work.device == "cpu":
        return CPU_SAVED_S * size
    return max(CUDA_SAVED_S * size, LAUNCH_SAVED_S * work.num_steps * work.passes * work.n_layer)


def choose(work: PlannedWork) -> Compilation:
    """The decision of `auto`, and why.

    >>> choose(PlannedWork("cpu", 2, num_steps=50, tokens=50 * 4096, passes=1, n_layer=4, n_embd=128)).reason
    'train.compile=auto: not compiled, which would take about 28 s and save about 9 s of the 50 steps planned'
    """
    cost, saved = COMPILE_S[work.device], seconds_saved(work)
    took, gain, steps = _duration(cost), _duration(saved), f"the {work.num_steps:,} steps planned"
    if saved > cost:
        return Compilation(True, f"train.compile=auto: compiling (about {took}) saves about {gain} of {steps}")
    return Compilation(False, f"train.compile=auto: not compiled, which would take about {took} and save about {gain} of {steps}")


def decide(
    cfg: Config, data: RunData, start: Start, world_size: int, device: torch.device, began_with: bool | None
) -> Compilation:
    """Whether the run is compiled, and a line that says why. `began_with`: the decision that a resumed run began with."""
    setting, obstacle = Compile(cfg.train.compile), obstacle_to_compiling(device)
    wanted = began_with if setting == Compile.auto else setting.value
    if obstacle and (wanted or setting == Compile.auto):
        level = logging.WARNING if wanted else logging.INFO
        return Compilation(False, f"train.compile={setting.name}: not compiled, as {obstacle}", level)
    if setting != Compile.auto:
        return Compilation(setting == Compile.true)
    if began_with is not None:
        return Compilation(began_with, f"train.compile=auto: {'compiled' if began_with else 'not compiled'}, as the run began")
    return choose(planned_work(cfg, data, start, world_size, device.type))


def planned_work(cfg: Config, data: RunData, start: Start, world_size: int, device: str) -> PlannedWork:
    """The work of the whole run on world_size ranks. `device`: cpu or cuda."""
    tokens = data.num_steps * data.rows_per_step * mean_row(cfg, data)
    n_layer, n_embd = model_size(cfg, data, start)
    return PlannedWork(
        device=device,
        processors=cores() if device == "cpu" else world_size,
        num_steps=data.num_steps,
        tokens=round(tokens),
        passes=math.ceil(tokens / data.num_steps / world_size / cfg.train.tokens_a_pass),
        n_layer=n_layer,
        n_embd=n_embd,
    )


def mean_row(cfg: Config, data: RunData) -> float:
    """Mean tokens of a row, padding included. Where rows have the lengths of their documents, it is the mean length, since
    rows of like length share a pass."""
    if not cfg.collator.has_varying_shapes:
        return cfg.train.seq_len
    mixture = data.train.mixture
    return float(np.minimum(mixture.lengths[mixture.order(0)], cfg.train.seq_len).mean())


def model_size(cfg: Config, data: RunData, start: Start) -> tuple[int, int]:
    """(layers, channels) of the model. One whose configuration does not tell them is built."""
    if isinstance(cfg.model, GPTConfig):
        return cfg.model.n_layer, cfg.model.n_embd
    if isinstance(cfg.model, HFModelConfig) and start.checkpoint:
        saved = read_json(start.checkpoint / "config.json")
        text = saved.get("text_config") or saved
        if "num_hidden_layers" in text and "hidden_size" in text:
            return text["num_hidden_layers"], text["hidden_size"]
    model = instantiate_config(cfg.model, vocab_size=data.tokenizer.vocab_size, start=start.checkpoint, seed=cfg.run.seed)
    return model.n_layer, model.n_embd


def _duration(seconds: float) -> str:
    """
    >>> [_duration(s) for s in (0.2, 20, 170, 4000, 90000)]
    ['0 s', '20 s', '3 min', '1.1 h', '25 h']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.2g} h"
