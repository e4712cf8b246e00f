"""command=evaluate: run the evaluations of the configuration on any checkpoint (init.from)."""

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
from chattrain.setup.build import in_context
from chattrain.setup.data import EvalData, open_eval_data
from chattrain.setup.evaluation import build_evaluation
from chattrain.setup.names import is_main_process
from chattrain.setup.start import find_checkpoint, with_own_settings
from chattrain.tracking.console import setup_logging

log = logging.getLogger("chattrain")


def main(cfg: Config) -> dict:
    """Evaluate the checkpoint of init.from (auto: of the newest finished run of this stage). Returns it and the metrics."""
    world_size = launch.world_size(cfg.distributed.nproc, cfg.train.device)
    close_log = setup_logging(None, console=is_main_process(), resume=False)
    try:
        if launch.started_by_launcher():
            return _evaluate_as_rank(cfg)
        cfg = with_own_settings(cfg, find_checkpoint(cfg))
        nproc, nodes = launch.processes_here(cfg.distributed.nproc, cfg.train.device), slurm.nodes()
        launch.check_devices(device.pick_device(cfg.train.device), nproc)
        return evaluate(cfg, Ranks()) if world_size == 1 else launch.start(nproc, nodes, _evaluate_as_rank, cfg)
    except launch.Stopped:
        raise KeyboardInterrupt from None
    finally:
        close_log()


def evaluate(cfg: Config, ranks: Ranks) -> dict:
    """Evaluate on this rank's share of the data; rank 0 prints. Raises UserError where there is nothing to evaluate."""
    folder = ranks.run_on_rank0(lambda: find_checkpoint(cfg))
    data = _open_on_all_ranks(cfg, folder, ranks)
    log.info("evaluating %s on %s", folder, ", ".join([*cfg.data.mixture(cfg.stage).val, *data.question_sets]))
    target = device.pick_device(cfg.train.device, ranks.local_rank)
    model = instantiate_config(cfg.model, vocab_size=data.tokenizer.vocab_size, start=folder, seed=cfg.run.seed).to(target)
    autocast = device.autocast(device.use_bf16(cfg.train.dtype, target), target)
    losses_of = in_context(autocast, model)  # one pass over the data takes less time than compiling
    batch_size = cfg.train.device_batch_size
    evaluate_at = build_evaluation(cfg.eval, batch_size, data, 0, model, losses_of, autocast, target, ranks, SingleProcess())
    metrics = evaluate_at(0)
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


def _open_on_all_ranks(cfg: Config, folder: Path, ranks: Ranks) -> EvalData:
    """Rank 0 makes the token caches, and where it raises, all ranks raise; the others then open what it made."""
    opened: list[EvalData] = []
    ranks.run_on_rank0(lambda: opened.append(open_eval_data(cfg, folder)))
    return opened[0] if opened else open_eval_data(cfg, folder)


def _evaluate_as_rank(cfg: Config) -> dict:
    ranks = join(cfg.distributed.timeout_s, device.pick_device(cfg.train.device).type == "cuda")
    close_log = setup_logging(None, console=ranks.is_main, resume=False)
    try:
        folder = ranks.run_on_rank0(lambda: find_checkpoint(cfg))
        return evaluate(with_own_settings(cfg, folder), ranks)
    except BaseException as raised:
        raise ranks.report_failure(raised) from None
    finally:
        close_log()
        ranks.close()
