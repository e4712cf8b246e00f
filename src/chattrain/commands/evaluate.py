"""command=evaluate: the evals of the configuration on any checkpoint (init.from)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from chattrain import device
from chattrain.config import Config
from chattrain.config.instantiate import instantiate_config
from chattrain.errors import UserError
from chattrain.parallel import launch, slurm
from chattrain.parallel.ranks import Ranks, join
from chattrain.parallel.strategy import SingleProcess
from chattrain.setup.build import build_evaluation, in_context
from chattrain.setup.data import open_data
from chattrain.setup.names import is_first
from chattrain.setup.start import find_checkpoint
from chattrain.tracking.console import setup_logging

log = logging.getLogger("chattrain")


def main(cfg: Config) -> dict:
    """Evaluate the checkpoint that init.from names; auto: the newest finished run of this stage. Returns the metrics."""
    world_size = launch.world_size(cfg.distributed.nproc, cfg.train.device)
    close_log = setup_logging(None, console=is_first(), resume=False)
    try:
        if launch.started_by_launcher():
            return _evaluate_as_rank(cfg)
        find_checkpoint(cfg)
        nproc, nodes = launch.processes_here(cfg.distributed.nproc, cfg.train.device), slurm.nodes()
        launch.check_devices(device.pick_device(cfg.train.device), nproc)
        return evaluate(cfg, Ranks()) if world_size == 1 else launch.start(nproc, nodes, _evaluate_as_rank, cfg)
    except launch.Stopped:
        raise KeyboardInterrupt from None
    finally:
        close_log()


def evaluate(cfg: Config, ranks: Ranks) -> dict:
    folder = ranks.run_on_rank0(lambda: find_checkpoint(cfg))
    data = _open_on_all(cfg, folder, ranks)
    log.info("evaluating %s on %s", folder, ", ".join([*cfg.data.mixture(cfg.stage).val, *data.question_sets]))
    where = device.pick_device(cfg.train.device, ranks.local_rank)
    model = instantiate_config(cfg.model, vocab_size=data.tokenizer.vocab_size, start=folder, seed=cfg.run.seed).to(where)
    autocast = device.autocast(device.use_bf16(cfg.train.dtype, where), where)
    losses_of = in_context(autocast, model)  # a single pass is over before a compilation would pay
    metrics = build_evaluation(cfg, data, model, losses_of, autocast, where, ranks, SingleProcess())(0)
    if not metrics:
        raise UserError(
            "there is nothing to evaluate: eval=none, or no question set and no validation; "
            "use eval=bpb, eval=mmlu_arc or eval=full"
        )
    if ranks.is_main:
        print(folder)
        for name, value in metrics.items():
            print(f"  {name:28s} {value:.4f}")
        print(json.dumps({"checkpoint": str(folder), "metrics": metrics}))
    return {"checkpoint": str(folder), "metrics": metrics}


def _open_on_all(cfg: Config, folder: Path, ranks: Ranks):
    """Rank 0 makes the caches (or says what is wrong, on all ranks); the others then find them."""
    opened = []
    ranks.run_on_rank0(lambda: opened.append(open_data(cfg, folder, ranks.world_size, train=False)))
    return opened[0] if opened else open_data(cfg, folder, ranks.world_size, train=False)


def _evaluate_as_rank(cfg: Config) -> dict:
    ranks = join(cfg.distributed.timeout_s, device.pick_device(cfg.train.device).type == "cuda")
    close_log = setup_logging(None, console=ranks.is_main, resume=False)
    try:
        return evaluate(cfg, ranks)
    except BaseException as raised:
        raise ranks.report_failure(raised) from None
    finally:
        close_log()
        ranks.close()
