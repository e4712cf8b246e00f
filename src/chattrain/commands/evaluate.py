"""command=evaluate: the evals of the configuration on any checkpoint (init.from)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from chattrain import device, distributed, init, launch, parts, slurm
from chattrain.config import Config
from chattrain.distributed import Ranks
from chattrain.errors import UserError
from chattrain.names import is_first
from chattrain.parallel.alone import Alone
from chattrain.prepare import build_part, find_start, open_data
from chattrain.tracking import setup_logging

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


def find_checkpoint(cfg: Config, any_model: bool = False) -> Path:
    """What init.from names; auto: of the newest finished run of this stage and model (any_model: else of any).

    Raises UserError where there is none, or (without any_model) where it holds another model than the configuration.
    """
    if cfg.init.source == "scratch":
        raise UserError(f"command={cfg.command.name} needs a trained model; name a run or checkpoint with init.from")
    if cfg.init.source != "auto":
        return find_start(cfg, any_model).checkpoint
    found = init.newest_finished(Path(cfg.run.root), cfg.stage, cfg.model)
    if found is None and any_model:
        found = init.newest_finished(Path(cfg.run.root), cfg.stage, None)
    if found is None:
        raise UserError(f"no finished {cfg.stage} run of this model in {Path(cfg.run.root).resolve()}; train one, or name "
                        "a run or checkpoint with init.from")
    return found


def evaluate(cfg: Config, ranks: Ranks) -> dict:
    folder = ranks.first(lambda: find_checkpoint(cfg))
    data = _open_on_all(cfg, folder, ranks)
    log.info("evaluating %s on %s", folder, ", ".join([*cfg.data.mixture(cfg.stage).val, *data.question_sets]))
    where = device.pick_device(cfg.train.device, ranks.local_rank)
    model = build_part(cfg.model, vocab_size=data.tokenizer.vocab_size, start=folder, seed=cfg.run.seed).to(where)
    autocast = device.autocast(device.use_bf16(cfg.train.dtype, where), where)
    losses_of = parts.inside(autocast, model)  # a single pass is over before a compilation would pay
    metrics = parts.build_evaluation(cfg, data, model, losses_of, autocast, where, ranks, Alone())(0)
    if not metrics:
        raise UserError("there is nothing to evaluate: eval=none, or no question set and no validation; "
                        "use eval=bpb, eval=mmlu_arc or eval=full")
    if ranks.is_main:
        print(folder)
        for name, value in metrics.items():
            print(f"  {name:28s} {value:.4f}")
        print(json.dumps({"checkpoint": str(folder), "metrics": metrics}))
    return {"checkpoint": str(folder), "metrics": metrics}


def _open_on_all(cfg: Config, folder: Path, ranks: Ranks):
    """Rank 0 makes the caches (or says what is wrong, on all ranks); the others then find them."""
    opened = []
    ranks.first(lambda: opened.append(open_data(cfg, folder, ranks.world_size, train=False)))
    return opened[0] if opened else open_data(cfg, folder, ranks.world_size, train=False)


def _evaluate_as_rank(cfg: Config) -> dict:
    ranks = distributed.join(cfg.distributed.timeout_s, device.pick_device(cfg.train.device).type == "cuda")
    close_log = setup_logging(None, console=ranks.is_main, resume=False)
    try:
        return evaluate(cfg, ranks)
    except BaseException as raised:
        raise ranks.first_error(raised) from None
    finally:
        close_log()
        ranks.close()
