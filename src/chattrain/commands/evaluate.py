"""command=evaluate: measure a checkpoint with its own stage, data and settings, or several against each other (runs=[a,b]).

What the command line gives wins over the checkpoint's own settings. Each measurement is kept in a folder of its own,
<run>/evaluate/<step>-<launch>/: result.json, result.md and, a line a question, answers.jsonl. With tracking=mlflow it is a run in
MLflow too, nested in that of the training.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

from chattrain import device
from chattrain.commands.exit import print_for_programs
from chattrain.config import Config
from chattrain.config.compose import compose, key_of
from chattrain.config.eval import SUITES
from chattrain.config.instantiate import instantiate_config
from chattrain.config.plain_yaml import read_yaml, section
from chattrain.config.words import Device, Part
from chattrain.errors import UserError
from chattrain.evals.paired import Difference, compare_answers, compare_losses
from chattrain.parallel import launch, slurm
from chattrain.parallel.ranks import Ranks, join
from chattrain.parallel.strategy import SingleProcess
from chattrain.setup.data import EvalData, open_eval_data, pass_limits
from chattrain.setup.evaluation import ANSWERS, Evaluation, write_answers
from chattrain.setup.job import current_job
from chattrain.setup.mlflow_evaluation import send_evaluation
from chattrain.setup.names import is_main_process, launch_name
from chattrain.setup.provenance import begun_elsewhere, read_provenance
from chattrain.setup.report_data import report_notes
from chattrain.setup.runs import run_folder, stage_of
from chattrain.setup.start import find_checkpoint, start_at, with_own_settings
from chattrain.setup.suites import ARITHMETIC
from chattrain.storage import checkpoint
from chattrain.storage.files import replace_text
from chattrain.tracking.chatcore import by_subject
from chattrain.tracking.console import setup_logging
from chattrain.tracking.result_page import result_page
from chattrain.tracking.run_folder import over
from chattrain.tracking.table_evaluations import describe, label

log = logging.getLogger("chattrain")

SHOWN = ("checkpoint", "trained", "stage", "part", "metrics", "validation", "questions", "subjects", "folder")


def main(cfg: Config) -> dict:
    """Measure the run or checkpoint that is named, else that of the newest finished run of this stage; with `runs`, each of them.

    Returns checkpoint, stage, part, metrics, validation (what the loss was measured on), questions (how many of how many were
    asked), subjects (accuracies by subject) and folder; with `runs` these of each run, and the differences.
    """
    if "eval.prompts" in map(key_of, current_job().overrides):
        raise UserError("eval.prompts is answered while a training goes on; ask a checkpoint with command=chat chat.prompt=[...]")
    try:
        return compare(cfg) if cfg.runs else _public(_show(measure(cfg)))
    except launch.Stopped:
        raise KeyboardInterrupt from None


def measure(cfg: Config) -> dict:
    """The result of one checkpoint, on one process or many. Only rank 0's has everything."""
    world_size = launch.world_size(cfg.distributed.nproc, cfg.train.device)
    if launch.started_by_launcher():
        return _evaluate_as_rank(cfg, own_settings=False)
    own = with_own_settings(cfg, find_checkpoint(cfg))
    nproc, nodes = launch.processes_here(cfg.distributed.nproc, cfg.train.device), slurm.nodes()
    launch.check_devices(device.pick_device(cfg.train.device), nproc)
    return evaluate(own, Ranks()) if world_size == 1 else launch.start(nproc, nodes, _evaluate_as_rank, own, True)


def compare(cfg: Config) -> dict:
    """Measure each of `runs`, and pair each with the first. Raises UserError where they were asked different questions."""
    if len(cfg.runs) < 2:
        raise UserError(f"runs=[{','.join(cfg.runs)}] must name two runs or more")
    named = [replace_start(cfg, reference) for reference in cfg.runs]
    for one in named:  # a misspelt name is answered before the first is measured
        find_checkpoint(one)
    results = [_show(measure(one)) for one in named]
    pairs = []
    for other in results[1:]:
        differences = _differences(results[0], other)
        pairs.append({difference.name: vars(difference) for difference in differences})
        if is_main_process():
            print(f"{label(results[0])} (first) against {label(other)} (second):")
            for found in differences:
                print(f"  {found.name}: {found.first:.4f} and {found.second:.4f}, {found.verdict}: {found.text}")
            if not differences:
                print("  nothing could be compared; the warning says why")
    shown = {"runs": [_public(result) for result in results], "pairs": pairs}
    if is_main_process():
        print_for_programs(shown)
    return shown


def replace_start(cfg: Config, reference: str) -> Config:
    """The configuration that reads the run or checkpoint `reference`, and no other."""
    one = copy.copy(cfg)
    one.runs, one.init, one.run = [], start_at(cfg.init, reference), replace(cfg.run, name=None, dir=None)
    return one


def score_on_test(run_dir: Path) -> dict | None:
    """The result of a run's newest checkpoint on the test part of its data, with its own settings; None where there is none.

    For the winner of a sweep: the validation part chose it, so its value there is too good.
    """
    folder = checkpoint.newest_valid(run_dir)
    if folder is None:
        return None
    cfg = compose(["command=evaluate", "tracking=none"])
    own = with_own_settings(cfg, folder, overrides=[])
    saved = section(read_yaml((folder / "config.yaml").read_text()), "train")
    own.train.device = Device[str(saved.get("device", "auto"))]
    own.eval.on = Part.test
    own.eval.validation = own.eval.validation and bool(own.data.mixture(own.stage).test)
    own.eval.multiple_choice = own.eval.multiple_choice and bool(own.data.multiple_choice_test)
    own.eval.gsm8k, own.eval.humaneval = own.eval.gsm8k and own.eval.gsm8k_path == ARITHMETIC, False
    if not any(getattr(own.eval, suite) for suite in SUITES):
        return None
    return _public(evaluate(own, Ranks()))


def evaluate(cfg: Config, ranks: Ranks) -> dict:
    """Evaluate on this rank's share of the data; rank 0 keeps the result. Raises UserError where there is nothing to evaluate."""
    folder = ranks.run_on_rank0(lambda: find_checkpoint(cfg))
    data = _open_on_all_ranks(cfg, folder, ranks)
    sources = cfg.data.mixture(cfg.stage).part(cfg.eval.on) if cfg.eval.validation else {}
    report_notes(data)
    log.info("evaluating %s on %s", folder, ", ".join([*sources, *data.question_sets, *data.problem_sets]))
    target = device.pick_device(cfg.train.device, ranks.local_rank)
    model = instantiate_config(cfg.model, vocab_size=data.tokenizer.vocab_size, start=folder, seed=cfg.run.seed).to(target)
    autocast = device.autocast(device.use_bf16(cfg.train.dtype, target), target)
    device.choose_attention_kernels(target, cfg.collator.has_varying_shapes)
    limits = pass_limits(cfg.train, target.type)
    evaluate_at = Evaluation(cfg.eval, limits, data, 0, model, autocast, target, ranks, SingleProcess())
    metrics = evaluate_at(0)
    if not metrics:
        raise UserError(
            "there is nothing to evaluate: eval=none, or no question set and no validation; "
            "use eval=bpb, eval=mmlu_arc, eval=gsm8k, eval=spelling, eval=humaneval or eval=full"
            + "".join(f"\n{message}" for _, message in data.notes)
        )
    if cfg.eval.on == Part.test:
        metrics = {f"test/{name.partition('/')[2]}": value for name, value in metrics.items()}
    measured = data.measured
    result = {
        "checkpoint": str(folder),
        "trained": stage_of(folder),
        "stage": cfg.stage,
        "part": cfg.eval.on.name,
        "metrics": metrics,
        "questions": {name: {**asked, **data.speed.get(name, {})} for name, asked in data.asked.items()},
        "subjects": by_subject(data.answers),
        "validation": measured.facts | {"label": measured.label} if measured else None,
        "batches": measured.passes if measured else [],
    }
    result["folder"] = ranks.run_on_rank0(lambda: _keep(cfg, folder, result, data.answers))
    return result


def _keep(cfg: Config, measured: Path, result: dict, answers: list[dict]) -> str | None:
    """Write result and answers into a new folder, and send them to MLflow; returns the folder. None, with a warning, where it
    cannot be written."""
    run = run_folder(measured)
    root = run / "evaluate" if run != measured else Path(cfg.run.root).resolve() / "evaluated" / measured.name
    number, name = 1, f"{measured.name}-{launch_name()}"
    try:
        while (folder := root / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        folder.mkdir(parents=True)
        write_answers(folder / ANSWERS, answers)
        replace_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
        replace_text(folder / "result.md", result_page(result, answers))
        if cfg.tracking.mlflow:
            send_evaluation(cfg, folder, run, result)
        return str(folder)
    except OSError as error:
        log.warning("the result is not kept: %s", error)
        return None


def _differences(first: dict, second: dict) -> list[Difference]:
    answers = [_answers(result) for result in (first, second)]
    found = compare_answers(*answers)
    targets = {over("val/loss", (result["validation"] or {}).get("targets")) for result in (first, second)}
    if len(targets) > 1:
        log.warning(
            "the losses are over different targets (%s), so they are not compared",
            " and ".join(map(str, sorted(targets, key=str))),
        )
    elif loss := compare_losses("val/loss", first["batches"], second["batches"]):
        found.append(loss)
    elif None not in targets:
        log.warning(
            "the losses are not compared: they were measured on other rows, or on fewer than 10 batches; give both runs the same "
            "data, train.seq_len and a small train.device_batch_size"
        )
    return found


def _answers(result: dict) -> list[dict]:
    file = Path(result["folder"] or "") / ANSWERS
    return [json.loads(line) for line in file.read_text().splitlines()] if result["folder"] else []


def _public(result: dict) -> dict:
    return {name: result[name] for name in SHOWN if name in result}


def _show(result: dict) -> dict:
    """Print a result, for a reader and, in the last line, for a program."""
    if is_main_process():
        print(result["checkpoint"])
        print("\n".join(describe(result)))
        print_for_programs(_public(result))
    return result


def _open_on_all_ranks(cfg: Config, folder: Path, ranks: Ranks) -> EvalData:
    """Rank 0 makes the token caches, and where it raises, all ranks raise; the others then open what it made."""
    opened: list[EvalData] = []

    def open_first() -> None:
        try:
            opened.append(open_eval_data(cfg, folder))
        except UserError as error:
            elsewhere = begun_elsewhere(read_provenance(run_folder(folder)))
            raise UserError(f"{error}{elsewhere}") from error

    ranks.run_on_rank0(open_first)
    return opened[0] if opened else open_eval_data(cfg, folder)


def _evaluate_as_rank(cfg: Config, own_settings: bool) -> dict:
    """What each process of a launch runs. `own_settings`: the launcher has given `cfg` those of the checkpoint."""
    ranks = join(cfg.distributed.timeout_s, device.pick_device(cfg.train.device).type == "cuda")
    close_log = setup_logging(None, console=ranks.is_main, resume=False)
    try:
        if not own_settings:
            cfg = with_own_settings(cfg, ranks.run_on_rank0(lambda: find_checkpoint(cfg)))
        return evaluate(cfg, ranks)
    except BaseException as raised:
        raise ranks.report_failure(raised) from None
    finally:
        close_log()
        ranks.close()
