"""A sweep is answered: its jobs ranked, the optimum fitted, what is doubtful said, the best ready to run again."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from chattrain.tracking.answer import find_answer
from chattrain.tracking.run_folder import RunFolder
from chattrain.tracking.sweep_report import write_sweep_report
from chattrain.tracking.table import show_sweep
from tests.tracking.folders import Page, job, line, run_folder, sweep

RATES = (1, 3, 10, 30, 100)


def loss(rate: float, optimum: float = 9.0) -> float:
    return 0.8 + 0.03 * np.log10(rate / optimum) ** 2


def sft_run(folder: Path, targets: str | None = "replies", **metrics: float) -> Path:
    rows = [
        {"step": 10, "time": 0.0, "train/loss": 1.0, "lr_factor": 0.0164, "lr/matrix": 0.02 * 0.0164, **metrics},
        {"step": 20, "time": 0.0, "train/loss": 0.9, "lr_factor": 0.004, "lr/matrix": 0.02 * 0.004, **metrics},
    ]
    summary = {"status": "completed", **({"validation": {"targets": targets}} if targets else {})}
    return run_folder(folder, rows, "stage: sft\nschedule: {init_lr_frac: 0.02}\n", summary)


def test_jobs_are_sorted_by_the_objective_and_failures_come_last_with_their_error():
    jobs = [
        job(0, 0.9, rate=1),
        job(1, None, "failed", rate=3, error="RunFailed: loss"),
        job(2, 0.8, rate=10),
        job(3, 0.7, "pruned", rate=30),
    ]
    ranking = find_answer(sweep(jobs), {}).ranking
    assert [row.job.num for row in ranking.rows] == [2, 0, 3, 1]
    assert [row.best for row in ranking.rows] == [True, False, False, False]


def test_an_accuracy_is_better_the_higher_it_is():
    jobs = [job(i, value, rate=rate) for i, (rate, value) in enumerate(((1, 0.3), (3, 0.6), (10, 0.5)))]
    assert find_answer(sweep(jobs, "eval/arc_acc", direction="maximize"), {}).ranking.winners[0].job.num == 1


def test_seeds_are_repeats_and_a_lucky_one_does_not_win():
    values = {1: (0.80, 0.90), 10: (0.82, 0.82)}
    jobs = [job(2 * i + s, ys[s], rate=rate, seed=s) for i, (rate, ys) in enumerate(values.items()) for s in (0, 1)]
    answer = find_answer(sweep(jobs), {})
    (winner,) = answer.ranking.winners
    assert winner.job.values["optimizer.lr_scale"] == "10" and winner.mean == pytest.approx(0.82) and winner.num_seeds == 2
    assert answer.ranking.rows[0].best
    assert any(doubt.startswith("Within the noise") and "lr_scale=1 " in doubt for doubt in answer.doubts)


def test_the_fitted_optimum_is_named_with_its_interval():
    noise = np.random.default_rng(1).normal(0, 0.001, (5, 3))
    jobs = [job(3 * i + s, loss(rate) + noise[i, s], rate=rate, seed=s) for i, rate in enumerate(RATES) for s in range(3)]
    answer = find_answer(sweep(jobs), {})
    (group,) = answer.ranking.groups
    low, high = group.fit.interval
    assert low < 9 < high and high / low < 2
    assert any(f"95 % interval {low:.3g} to {high:.3g}" in sentence for sentence in answer.sentences)


def test_three_rates_claim_no_interval_and_are_called_few():
    answer = find_answer(sweep([job(i, loss(rate), rate=rate) for i, rate in enumerate((1, 10, 100))]), {})
    assert answer.ranking.groups[0].fit.interval is None
    assert any("No interval is claimed" in sentence for sentence in answer.sentences)
    assert any("3 rates are few" in doubt for doubt in answer.doubts)


@pytest.mark.parametrize(("optimum", "edge", "further"), [(1000.0, "largest", "333"), (0.1, "smallest", "0.333")])
def test_a_best_at_the_edge_of_the_grid_is_doubted_and_says_where_to_go_on(optimum, edge, further):
    answer = find_answer(sweep([job(i, loss(rate, optimum), rate=rate) for i, rate in enumerate(RATES)]), {})
    (doubt,) = (doubt for doubt in answer.doubts if "grid" in doubt)
    assert edge in doubt and f"go on with {further}." in doubt
    assert answer.ranking.groups[0].fit.minimum is None


def test_an_optimum_inside_the_grid_is_not_doubted_where_seeds_agree():
    jobs = [job(2 * i + s, loss(rate) + s * 1e-5, rate=rate, seed=s) for i, rate in enumerate(RATES) for s in (0, 1)]
    assert find_answer(sweep(jobs), {}).doubts == []
    (doubt,) = find_answer(sweep(jobs[::2]), {}).doubts
    assert "one seed" in doubt


def test_a_difference_without_anything_to_measure_noise_by_is_doubted():
    jobs = [job(i, 0.8 + i / 10, values={"schedule.decay_ratio": str(i), "optimizer": "adamw"}) for i in range(2)]
    assert any("add seeds" in doubt for doubt in find_answer(sweep(jobs), {}).doubts)


def test_accuracies_within_their_standard_errors_are_ties(tmp_path):
    values = {0: 0.50, 1: 0.53, 2: 0.90}
    jobs = [job(i, value, values={"collator": f"c{i}"}) for i, value in values.items()]
    runs = {
        i: RunFolder.read(sft_run(tmp_path / str(i), **{"eval/arc_acc": value, "eval/arc_stderr": 0.02}))
        for i, value in values.items()
    }
    worst = find_answer(sweep(jobs, "eval/arc_acc", direction="minimize"), runs)
    assert any("collator=c1" in doubt and "collator=c2" not in doubt for doubt in worst.doubts)


def test_optimizers_are_fitted_apart():
    optima = {"muon_adamw": 5.0, "adamw": 40.0}
    jobs = [
        job(i, loss(rate, optima[name]), rate=rate, values={"optimizer": name})
        for i, (name, rate) in enumerate((name, rate) for name in optima for rate in RATES)
    ]
    groups = find_answer(sweep(jobs), {}).ranking.groups
    assert {group.name: round(group.fit.minimum, 3) for group in groups} == {"optimizer=muon_adamw": 5.0, "optimizer=adamw": 40.0}


def test_of_a_chain_of_stages_the_last_is_ranked():
    jobs = [
        job(0, 0.1, stage="base", rate=1),
        job(1, 0.9, stage="sft", rate=1),
        job(2, 0.2, stage="base", rate=3),
        job(3, 0.8, rate=3),
    ]
    ranking = find_answer(sweep(jobs), {}).ranking
    assert [row.job.num for row in ranking.ranked] == [3, 1]


def test_losses_over_different_targets_are_ranked_apart(tmp_path):
    runs = {i: RunFolder.read(sft_run(tmp_path / str(i), targets)) for i, targets in enumerate(("all", "replies", "all"))}
    answer = find_answer(sweep([job(0, 0.5, rate=1), job(1, 2.0, rate=3), job(2, 0.6, rate=10)]), runs)
    assert sorted(row.job.num for row in answer.ranking.winners) == [0, 1]
    assert any("ranked apart" in doubt for doubt in answer.doubts)
    accuracy = find_answer(sweep([job(0, 0.5, rate=1), job(1, 2.0, rate=3)], "eval/arc_acc", direction="maximize"), runs)
    assert [row.job.num for row in accuracy.ranking.winners] == [1]


def test_the_command_runs_the_best_alone_under_a_name_of_its_own():
    overrides = ["stage=sft", "run.name=lrs", "sweep.name=lrs", "data.train_path=[a b.jsonl,c.jsonl]", "optimizer.lr_scale=10"]
    (command,) = find_answer(sweep([job(0, 0.8, rate=10, overrides=overrides)]), {}).commands
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "chattrain"]
    assert words[3:] == ["stage=sft", "data.train_path=[a b.jsonl,c.jsonl]", "optimizer.lr_scale=10", "run.name=lrs-best"]


def test_two_winners_are_trained_again_under_two_names(tmp_path):
    runs = {i: RunFolder.read(sft_run(tmp_path / str(i), targets)) for i, targets in enumerate(("all", "replies"))}
    commands = find_answer(sweep([job(0, 0.5, rate=1), job(1, 2.0, rate=3)]), runs).commands
    assert sorted(shlex.split(command)[-1] for command in commands) == ["run.name=lrs-best-all", "run.name=lrs-best-replies"]


def test_a_job_without_swept_values_is_counted_from_one():
    assert find_answer(sweep([job(0, 0.5)]), {}).sentences[0].startswith("Best: job 1,")


def test_the_command_that_measures_the_best_names_its_run(tmp_path):
    jobs = [job(i, loss(rate), rate=rate, run_dir=str(tmp_path / f"a run {i}")) for i, rate in enumerate(RATES)]
    (said,) = (sentence for sentence in find_answer(sweep(jobs), {}).sentences if "too good" in sentence)
    words = shlex.split(said[said.index("python") :])
    assert words[3:6] == ["command=evaluate", "eval.on=test", f"init.from={tmp_path / 'a run 2'}"]


def test_the_best_is_scored_on_data_that_did_not_choose_it_or_said_to_be_too_good():
    jobs = [job(i, loss(rate), rate=rate) for i, rate in enumerate(RATES)]
    assert any("0.8123" in sentence for sentence in find_answer(sweep(jobs), {}, test={"test/loss": 0.8123}).sentences)
    assert any("too good" in sentence for sentence in find_answer(sweep(jobs), {}).sentences)


def test_peak_rates_are_those_that_the_run_recorded_and_guessed_only_for_an_old_one(tmp_path):
    folder = sft_run(tmp_path)
    assert RunFolder.read(folder).peak_rates() == {"lr/matrix": pytest.approx(0.0004)}
    (folder / "summary.json").write_text(json.dumps({"learning_rates": {"matrix": 0.0007, "vector": 0.01}}))
    assert RunFolder.read(folder).peak_rates() == {"lr/matrix": 0.0007, "lr/vector": 0.01}


def test_a_sweep_without_a_completed_job_says_so():
    answer = find_answer(sweep([job(0, None, "failed", rate=1, error="UserError: no")]), {})
    assert answer.commands == [] and "no answer" in answer.sentences[0]
    assert find_answer(sweep([]), {}).commands == []


def written(tmp_path: Path) -> Path:
    """A sweep of five rates and two seeds in <tmp>/sweeps/lrs, with one failure."""
    jobs = []
    for i, (rate, seed) in enumerate((rate, seed) for rate in RATES for seed in (1, 2)):
        value = loss(rate) + 0.001 * seed
        run_dir = sft_run(tmp_path / "sft" / f"lrs-{i}", **{"val/loss": value, "eval/arc_acc": 0.5, "eval/arc_stderr": 0.02})
        jobs.append(job(i, value, rate=rate, seed=seed, run_dir=str(run_dir), steps=20, num_steps=20))
    jobs.append(job(10, None, "failed", rate=1000, seed=1, error="RunFailed: step 3: non-finite | loss", steps=2, num_steps=20))
    folder = tmp_path / "sweeps" / "lrs"
    sweep(jobs).write(folder)
    return folder


def test_the_end_of_a_sweep_shows_and_keeps_the_table_and_the_answer(tmp_path, capsys):
    folder = written(tmp_path)
    show_sweep(folder)
    shown, table = capsys.readouterr().out, (folder / "table.md").read_text()
    for text in (shown, table):
        assert "val/loss (replies)" in text and "50.0% ± 3.9" in text
        (best,) = (row for row in text.split("\n") if "★" in row)
        assert (
            " 10 " in best and "0.8011" in best and "0.0004" in best
        )  # matrices: 0.02 x 0.02, though first logged at 0.82 of it
        assert "run.name=lrs-best" in text
    assert "RunFailed: step 3: non-finite \\| loss" in table.split("\n\n")[1].split("\n")[-1]  # the failure, in the last row
    assert str(folder / "report.html") in shown
    answer = json.loads((folder / "answer.json").read_text())
    assert answer["rows"][0]["best"] and answer["rows"][-1]["error"].startswith("RunFailed")
    assert answer["fits"][0]["minimum"] == pytest.approx(9, rel=0.01)


def test_the_report_of_a_sweep_draws_the_objective_over_the_rate_and_the_curves(tmp_path):
    page = Page(write_sweep_report(written(tmp_path)).read_text())
    chart = page.charts["val/loss (replies) over optimizer.lr_scale"]
    assert chart["x_log"] and len(line(chart, "seed 1")) == 5 and line(chart, "mean")[10] == pytest.approx(loss(10) + 0.0015)
    assert chart["bands"][0]["low"] < 9 < chart["bands"][0]["high"]
    assert min(line(chart, "parabola").items(), key=lambda point: point[1])[0] == pytest.approx(9, rel=0.1)
    assert line(page.charts["val/loss (replies)"], "lr_scale=10 (mean of 2)")[20] == pytest.approx(loss(10) + 0.0015)
    assert "RunFailed" in page.text


def test_a_run_that_diverged_does_not_hide_the_optimum(tmp_path):
    jobs = [job(i, loss(rate), rate=rate) for i, rate in enumerate(RATES)] + [job(9, 1e6, rate=1000)]
    sweep(jobs).write(tmp_path)
    chart = Page(write_sweep_report(tmp_path).read_text()).charts["val/loss over optimizer.lr_scale"]
    assert chart["y_range"][1] < 2


def test_a_sweep_is_shown_though_its_report_cannot_be_written(tmp_path, capsys, caplog):
    folder = written(tmp_path)
    (folder / "report.html").mkdir()
    show_sweep(folder)
    assert "★" in capsys.readouterr().out and len(caplog.records) == 1


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl", "config.yaml", "all"])
def test_run_folders_may_have_lost_files(tmp_path, missing):
    folder = written(tmp_path)
    for run_dir in (tmp_path / "sft").iterdir():
        for file in list(run_dir.iterdir()):
            if missing in (file.name, "all"):
                file.unlink()
    show_sweep(folder)
    assert "★" in (folder / "table.md").read_text() and (folder / "report.html").is_file()
