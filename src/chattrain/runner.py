"""The training: sets up a run, starts its processes, hands the components to the loop. Read this, then loop.py.

There are four ways in. They differ in who sets the run up, who opens its data, who writes summary.json and who prints an error:

    started as              sets up        opens the data          writes summary.json                prints an error
    one process             itself         itself                  itself                             itself
    distributed.nproc > 1   the launcher   launcher, every rank    rank 0; the launcher corrects it   the launcher
    torchrun                rank 0         every rank              rank 0                             the first rank that failed
    srun, one task a node   rank 0         every rank              rank 0                             that rank's launcher

"Sets up" is `setup_run` (setup/plan.py): it finds the user's mistakes before a run folder exists, and makes the token caches.
With distributed.nproc > 1 the launcher is the process that the user started, which is no rank; on Slurm each node's task is one.

Rank 0 may be ended before it can write summary.json: after another rank has failed, a thread in each rank ends the process
(parallel/failures.py). On rank 0 that thread writes the summary first.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from chattrain import device, loop
from chattrain.config import Config
from chattrain.errors import RunFailed, UserError, explain_file_error
from chattrain.parallel import launch, slurm
from chattrain.parallel.failures import log_name
from chattrain.parallel.ranks import Ranks, join
from chattrain.parallel.signals import listen_to_signals
from chattrain.setup.build import build_components
from chattrain.setup.data import RunData
from chattrain.setup.learning_rates import peak_rates, report_rates
from chattrain.setup.plan import RunSetup, choose_run_dir, open_on_rank, setup_run
from chattrain.setup.provenance import write_provenance
from chattrain.setup.report_data import report_data
from chattrain.setup.runs import resume_hint
from chattrain.setup.summary import correct_summary, summarize, write_summary
from chattrain.setup.tracker import build_tracker
from chattrain.storage import checkpoint
from chattrain.storage.lock import RunLock
from chattrain.tracking.console import setup_logging
from chattrain.tracking.tracker import NullTracker, Tracker

log = logging.getLogger("chattrain")


def train(cfg: Config) -> dict:
    """Run a training from start to summary, on one process or many; returns the summary."""
    if launch.started_by_launcher():
        launch.world_size(cfg.distributed.nproc, cfg.train.device)  # refuses another number than the launcher has started
        return _train_as_rank(cfg, launcher_setup=None)
    with device.deterministic(cfg.train.deterministic, cfg.train.device):
        nproc, nodes = launch.processes_here(cfg.distributed.nproc, cfg.train.device), slurm.nodes()
        if nodes:
            return _train_on_nodes(nodes, nproc, cfg)
        with RunLock(choose_run_dir(cfg.run, cfg.stage)) as lock:
            return _train_here(cfg, nproc, lock)


def _train_here(cfg: Config, nproc: int, lock: RunLock) -> dict:
    """Set the run up and train, in this process or in nproc processes of this host."""
    setup, data = setup_run(cfg, nproc, lock)
    if setup.finished:
        return setup.finished
    if nproc == 1:
        return train_on_rank(cfg, setup, Ranks(), data)
    try:
        return launch.start(nproc, None, _train_as_rank, cfg, setup)
    except (launch.Stopped, UserError, RunFailed) as error:
        summary = correct_summary(cfg.stage, setup, data, error)
        if isinstance(error, launch.Stopped):
            return summary
        raise


def _train_on_nodes(nodes: slurm.Nodes, nproc: int, cfg: Config) -> dict:
    """The task of each node makes this call. Rank 0 sets the run up for all nodes and writes the summary, as under torchrun."""
    try:
        return launch.start(nproc, nodes, _train_as_rank, cfg, None)
    except launch.Stopped:
        raise KeyboardInterrupt from None


def _train_as_rank(cfg: Config, launcher_setup: RunSetup | None) -> dict:
    """What each process of a launch runs. `launcher_setup` is None under torchrun and srun: rank 0 then sets the run up and holds
    its lock."""
    with device.deterministic(cfg.train.deterministic, cfg.train.device):  # before the process uses CUDA
        return _join_and_train(cfg, launcher_setup)


def _join_and_train(cfg: Config, launcher_setup: RunSetup | None) -> dict:
    ranks = join(cfg.distributed.timeout_s, device.pick_device(cfg.train.device).type == "cuda")
    close_log = setup_logging(None, console=ranks.is_main, resume=False)
    lock = RunLock(choose_run_dir(cfg.run, cfg.stage))
    try:
        setup: RunSetup = launcher_setup or ranks.run_on_rank0(lambda: setup_run(cfg, ranks.world_size, lock)[0])
        if setup.finished:
            return setup.finished
        return train_on_rank(cfg, setup, ranks, open_on_rank(cfg, setup, ranks.world_size))
    except BaseException as raised:
        raise ranks.report_failure(raised) from None
    finally:
        close_log()
        lock.release()
        ranks.close()


def train_on_rank(cfg: Config, setup: RunSetup, ranks: Ranks, data: RunData) -> dict:
    """Train in this process; returns the summary. However the training ends, rank 0 writes summary.json."""
    close_log = setup_logging(setup.run_dir, ranks.is_main, bool(setup.resume), log_name(ranks.rank))
    tracker, state, error, trainer = NullTracker(), loop.State(), None, None
    ranks.on_forced_exit(
        setup.run_dir / log_name(ranks.rank), lambda reason: finalize_run(cfg.stage, setup, data, ranks, tracker, state, reason)
    )
    with listen_to_signals(ranks.failed) as signals:
        try:
            device.keep_freed_memory(device.pick_device(cfg.train.device, ranks.local_rank))
            gc.collect()  # frees the model of the job before, in a sweep
            log.info("run folder %s, starting from %s", setup.run_dir, setup.start.description)
            for warning in (setup.start.warning, device.busy_cores(device.pick_device(cfg.train.device, ranks.local_rank))):
                if warning:
                    log.warning(warning)
            report_data(data)
            if setup.compilation.reason:
                log.log(setup.compilation.level, setup.compilation.reason)
            saved = checkpoint.load_state(setup.resume) if setup.resume else None
            if ranks.is_main:
                write_provenance(cfg, setup, data, ranks.world_size, saved.step if saved else 0)
            tracker = build_tracker(cfg, setup, data, saved, ranks)
            trainer, state = build_components(cfg, setup, ranks, data, tracker, signals, saved)
            data.learning_rates = peak_rates(trainer.optimizer, trainer.lr_factor, data.num_steps)
            report_rates(cfg, data.learning_rates)
            cadence = loop.Cadence(cfg.log.every, cfg.eval.every, cfg.checkpoint.every, cfg.train.last_step(data.num_steps))
            try:
                with collect_garbage_between_steps():
                    state = loop.fit(trainer, state, cadence)
            finally:
                trainer.loader.close()
        except BaseException as raised:
            if trainer and not isinstance(raised, KeyboardInterrupt):
                trainer.finish_saving(together=False)
            unexpected = not isinstance(raised, UserError | RunFailed | KeyboardInterrupt)
            log.error("at step %d: %s", state.current_step, raised, exc_info=unexpected, extra={"file_only": True})
            if isinstance(raised, OSError):
                raised = explain_file_error(raised, str(setup.run_dir)) or raised
            if isinstance(raised, RuntimeError) and "does not have a deterministic implementation" in str(raised):
                reason = str(raised).partition(". ")[0]
                raised = RunFailed(f"train.deterministic=true: {reason}; leave it out, or use what has one")
            error = ranks.report_failure(raised, f"step {state.current_step}")
            if error is raised:
                raise
            raise error from None
        finally:
            summary = finalize_run(cfg.stage, setup, data, ranks, tracker, state, error)
            close_log()
    return summary | (
        {"stop_asked": True} if signals.stop_asked() else {}
    )  # of a run that was complete all the same: a sweep ends


def finalize_run(
    stage: str,
    setup: RunSetup,
    data: RunData,
    ranks: Ranks,
    tracker: Tracker | NullTracker,
    state: loop.State,
    error: BaseException | None,
) -> dict:
    """End the tracker's run and return the summary. Rank 0 writes summary.json and the report first."""
    summary = summarize(stage, setup, data, tracker, state, error)
    try:
        if ranks.is_main:
            write_summary(setup.run_dir, summary)
            status, report = summary["status"], setup.run_dir / "report.html"
            log.info("%s %s step %d of %d: %s", status, "after" if error else "at", state.step, data.num_steps, report)
            asked_to_stop = status == "interrupted" and (state.interrupted or error)  # not by train.stop_after
            if asked_to_stop and (hint := resume_hint(setup.run_dir)):
                log.info(hint)
    finally:
        tracker.finish(summary)
    return summary


@contextmanager
def collect_garbage_between_steps() -> Iterator[None]:
    """Freeze existing objects and disable automatic garbage collection; `fit` collects after logging, where a pause costs no
    step."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
