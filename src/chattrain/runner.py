"""Plans a run, starts its processes, has its parts built (parts.py) and hands them to the loop. Read this, then loop.py."""

from __future__ import annotations

import gc
import json
import logging
import time
from contextlib import contextmanager
from dataclasses import asdict

from chattrain import checkpoint, device, distributed, launch, loop, slurm
from chattrain.config import Config
from chattrain.distributed import Ranks
from chattrain.errors import RunFailed, UserError, named
from chattrain.failures import log_name
from chattrain.files import replace_text
from chattrain.parts import build_parts, build_tracker
from chattrain.prepare import Plan, RunData, make_plan, open_data, report_counts
from chattrain.report import write_report
from chattrain.signals import stop_on_signal
from chattrain.tracking import NullTracker, read_metrics, setup_logging

log = logging.getLogger("chattrain")


def train(cfg: Config) -> dict:
    """Run a training from start to summary, on one process or many; returns the summary."""
    world_size = launch.world_size(cfg.distributed.nproc, cfg.train.device)
    if launch.started_by_launcher():
        return _train_as_rank(cfg, plan=None)
    nproc, nodes = launch.processes_here(cfg.distributed.nproc, cfg.train.device), slurm.nodes()
    if nodes:
        return _train_on(nodes, nproc, cfg)
    plan, data = make_plan(cfg, world_size)
    if plan.finished:
        return plan.finished
    if nproc == 1:
        return work(cfg, plan, Ranks(), data)
    try:
        return launch.start(nproc, None, _train_as_rank, cfg, plan)
    except (launch.Stopped, UserError, RunFailed) as error:
        summary = amended_summary(cfg, plan, data, error)
        if isinstance(error, launch.Stopped):
            return summary
        raise


def _train_on(nodes: slurm.Nodes, nproc: int, cfg: Config) -> dict:
    """The same where each node has this call: rank 0 plans for all, as under torchrun, and leaves the summary."""
    try:
        return launch.start(nproc, nodes, _train_as_rank, cfg, None)
    except launch.Stopped:
        raise KeyboardInterrupt from None


def amended_summary(cfg: Config, plan: Plan, data: RunData, error: Exception) -> dict:
    """Make what rank 0 left say what the launch says, and write it where rank 0 was ended before it could."""
    file = plan.run_dir / "summary.json"
    summary = json.loads(file.read_text()) if file.is_file() else summarize(cfg, plan, data, *_as_left(plan), error)
    if isinstance(error, launch.Stopped):
        summary["status"] = "interrupted"
        summary.pop("error", None)
    else:
        summary |= {"status": "failed", "error": named(error)}
    replace_text(file, json.dumps(summary, indent=1) + "\n")
    write_report(plan.run_dir)
    return summary


def _as_left(plan: Plan) -> tuple[NullTracker, loop.State]:
    """What can be known of a run whose rank 0 was ended before it could say it: what it has logged and saved."""
    tracker, state = NullTracker(), loop.State()
    for row in read_metrics(plan.run_dir / "metrics.jsonl"):
        state.step = row["step"]
        tracker.last |= {name: value for name, value in row.items() if name not in ("step", "time")}
    state.tokens_seen = tracker.last.get("train/tokens_seen", 0)
    state.supervised_tokens = tracker.last.get("train/supervised_tokens", 0)
    saved = checkpoint.newest_valid(plan.run_dir)
    tracker.mlflow_run_id = checkpoint.load_state(saved).mlflow_run_id if saved else None
    return tracker, state


def _train_as_rank(cfg: Config, plan: Plan | None) -> dict:
    """What each process of a launch runs. Under torchrun there is no parent to plan, so rank 0 does."""
    ranks = distributed.join(cfg.distributed.timeout_s, device.pick_device(cfg.train.device).type == "cuda")
    close_log = setup_logging(None, console=ranks.is_main, resume=False)
    try:
        plan = plan or ranks.first(lambda: make_plan(cfg, ranks.world_size)[0])
        if plan.finished:
            return plan.finished
        return work(cfg, plan, ranks, open_data(cfg, plan.tokenizer_dir, ranks.world_size))
    except BaseException as raised:
        raise ranks.first_error(raised) from None
    finally:
        close_log()
        ranks.close()


def work(cfg: Config, plan: Plan, ranks: Ranks, data: RunData) -> dict:
    """Train in this process. Whatever happens, rank 0 leaves a summary.json that says so."""
    close_log = setup_logging(plan.run_dir, ranks.is_main, bool(plan.resume), log_name(ranks.rank))
    tracker, state, error = NullTracker(), loop.State(), None
    ranks.before_the_end(plan.run_dir / log_name(ranks.rank),
                         lambda reason: leave(cfg, plan, data, ranks, tracker, state, reason))
    with stop_on_signal(ranks.failed) as stop_asked:
        try:
            device.keep_freed_memory(device.pick_device(cfg.train.device, ranks.local_rank))
            gc.collect()  # what an earlier job of a sweep has left, its model too
            log.info("run folder %s, starting from %s", plan.run_dir, plan.start.description)
            if plan.start.warning:
                log.warning(plan.start.warning)
            report_counts(data.train, data.num_steps)
            saved = checkpoint.load_state(plan.resume) if plan.resume else None
            tracker = build_tracker(cfg, plan, ranks, data, saved)
            parts, state = build_parts(cfg, plan, ranks, data, tracker, stop_asked, saved)
            cadence = loop.Cadence(cfg.log.every, cfg.eval.every, cfg.checkpoint.every, data.num_steps)
            try:
                with garbage_between_steps():
                    state = loop.fit(parts, state, cadence)
            finally:
                parts.loader.close()
        except BaseException as raised:
            unexpected = not isinstance(raised, UserError | RunFailed | KeyboardInterrupt)
            log.error("at step %d: %s", state.step, raised, exc_info=unexpected, extra={"file_only": True})
            error = ranks.first_error(raised, f"step {state.step}")
            if error is raised:
                raise
            raise error from None
        finally:
            summary = leave(cfg, plan, data, ranks, tracker, state, error)
            close_log()
    return summary


def leave(cfg: Config, plan: Plan, data: RunData, ranks: Ranks, tracker, state: loop.State,
          error: BaseException | None) -> dict:
    """The summary; rank 0 writes it and the report, and ends what tracks the run."""
    summary = summarize(cfg, plan, data, tracker, state, error)
    try:
        if ranks.is_main:
            replace_text(plan.run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
            write_report(plan.run_dir)
            log.info("%s at step %d of %d: %s", summary["status"], state.step, data.num_steps, plan.run_dir / "report.html")
            if summary["status"] == "interrupted":
                log.info("the same command with run.dir=%s goes on from its checkpoint", plan.run_dir)
    finally:
        tracker.finish(summary)
    return summary


def summarize(cfg: Config, plan: Plan, data: RunData, tracker, state: loop.State, error: BaseException | None) -> dict:
    interrupted = state.interrupted or isinstance(error, KeyboardInterrupt)
    newest = checkpoint.all_checkpoints(plan.run_dir)
    return {
        "status": "interrupted" if interrupted else "failed" if error else "completed",
        "stage": cfg.stage, "run_dir": str(plan.run_dir), "steps": state.step, "num_steps": data.num_steps,
        "tokens_seen": state.tokens_seen, "supervised_tokens": state.supervised_tokens,
        "tokens_per_second": state.tokens_per_second, "metrics": dict(tracker.last),
        "checkpoint": str(newest[-1]) if newest else None, "init": plan.start.description,
        "mlflow_run_id": tracker.mlflow_run_id, "finished_at": time.time(),
        "data": asdict(data.train.counts), **({"error": named(error)} if error else {})}


@contextmanager
def garbage_between_steps():
    """Python's collector off, and what is there already left out of it: the loop calls it where a stall costs no step."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
