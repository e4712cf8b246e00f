"""A report shows what a run folder holds, whatever it holds."""

import json
import re
from pathlib import Path

import pytest

from chattrain.tracking.charts import running_mean
from chattrain.tracking.comparison import write_comparison
from chattrain.tracking.report import write_report
from chattrain.tracking.table import show_runs
from tests.tracking.folders import Page, line, run_folder


def report(run_dir: Path) -> str:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


ROWS = [
    {"step": 10, "time": 1.0, "train/loss": 3.0, "lr_factor": 1.0, "train/tokens_seen": 40960},
    {"step": 20, "time": 2.0, "train/loss": 2.5, "lr_factor": 0.5, "train/tokens_seen": 81920},
    {"step": 20, "time": 2.0, "val/bpb": 1.125, "val/loss": 2.25, "eval/mmlu_acc": 0.25, "eval/arc_easy_acc": 0.5},
]
SUMMARY = {
    "status": "completed",
    "steps": 20,
    "tokens_seen": 81920,
    "supervised_tokens": 60000,
    "tokens_per_second": 41234.5,
    "init": "runs/mid/a",
    "checkpoint": "checkpoints/step_000020",
}
CONFIG = "stage: sft\nrun:\n  name: tuesday\n"
CHARTS = ["train/loss", "val/loss", "val/bpb", "accuracy", "lr_factor"]  # of ROWS


def test_a_report_shows_title_summary_charts_metrics_and_config(tmp_path):
    html = report(run_folder(tmp_path, ROWS, CONFIG, SUMMARY))
    page = Page(html)
    assert list(page.charts) == CHARTS
    assert "<h1>sft tuesday <span" in html and "completed</span>" in html
    for words in ("81,920", "60,000", "41,234", "runs/mid/a", "checkpoints/step_000020", "1.125", "name: tuesday"):
        assert words in page.text
    assert line(page.charts["accuracy"], "arc_easy_acc") == {20: 0.5}


def test_rates_and_gradients_are_shown_by_group_with_speed_and_memory(tmp_path):
    names = [
        "lr/matrix",
        "lr/embed",
        "train/grad_norm",
        "train/grad_norm/embed",
        "train/tokens_per_second",
        "train/peak_memory_gib",
    ]
    rows = [
        {"step": step, "time": 0.0, "lr_factor": 0.5, **{name: float(step + i) for i, name in enumerate(names)}}
        for step in (1, 2)
    ]
    charts = Page(report(run_folder(tmp_path, rows))).charts
    assert list(charts) == ["learning rate by group", "gradient norm", "throughput, tokens/s", "peak memory, GiB"]
    assert line(charts["learning rate by group"], "lr/embed") == {1: 2, 2: 3}
    assert line(charts["gradient norm"], "train/grad_norm/embed") == {1: 4, 2: 5}


def test_accuracies_have_their_95_percent_interval(tmp_path):
    rows = [{"step": step, "time": 0.0, "eval/arc_acc": 0.5, "eval/arc_stderr": 0.02, "eval/arc_n": 625} for step in (0, 9)]
    page = Page(report(run_folder(tmp_path, rows)))
    assert page.charts["accuracy"]["series"][0]["half"] == pytest.approx([0.0392, 0.0392])
    assert "50.0% ± 3.9" in page.text


def test_validation_losses_say_what_they_are_over(tmp_path):
    page = Page(report(run_folder(tmp_path, ROWS, CONFIG, SUMMARY | {"validation": {"targets": "replies", "tokens": 1234}})))
    assert "val/loss (replies)" in page.charts and "val/loss (replies)" in page.text and "tokens 1,234" in page.text


def test_only_metrics_that_are_present_get_a_chart(tmp_path):
    html = report(run_folder(tmp_path, ROWS[:1]))
    assert list(Page(html).charts) == ["train/loss", "lr_factor"]
    assert "val/bpb" not in html and "accuracy" not in html


def test_a_report_needs_nothing_from_outside(tmp_path):
    html = report(run_folder(tmp_path, ROWS, CONFIG, SUMMARY))
    page = Page(html)
    assert page.addresses == [] and not {"link", "img", "iframe"} & set(page.elements)
    assert "@import" not in html and "url(" not in html
    assert re.findall(r"https?:[^ )]*", html) == ["https://github.com/leeoniya/uPlot"]  # in the comment that names the library


def test_a_report_is_small(tmp_path):
    rows = [
        {"step": step, "time": 0.0, "train/loss": 1.0 + step % 7, "lr/embed": 0.1, "lr/matrix": 0.1} for step in range(50_000)
    ]
    assert len(report(run_folder(tmp_path, rows))) < 400_000  # bytes; the numbers are in metrics.jsonl


def test_what_users_write_is_escaped_everywhere(tmp_path):
    evil = "</script><b>alert(1)</b>&\"'"
    rows = [{"step": 1, "time": 0.0, f"eval/{evil}_acc": 0.5, "eval/b_acc": 0.5, evil: 1.0, f"lr/{evil}": 1.0}]
    summary = {"status": evil, "init": evil, "error": evil, "validation": {"targets": evil, evil: evil}}
    config = json.dumps({"stage": evil, "run": {"name": evil}, "data": evil})  # JSON is YAML
    run_dir = run_folder(tmp_path / "run", rows, config, summary)
    for html in (report(run_dir), write_comparison([run_dir, run_dir], tmp_path / "both.html").read_text()):
        page = Page(html)
        assert "b" not in page.elements and page.charts


def test_a_report_does_not_resolve_interpolations(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    html = report(run_folder(tmp_path, ROWS, 'stage: sft\nrun:\n  name: "${oc.env:SECRET}"\n'))
    assert "hunter2" not in html and "<h1>sft ${oc.env:SECRET} <span" in html


def test_an_interrupted_run_has_a_report(tmp_path):
    html = report(run_folder(tmp_path, ROWS, CONFIG, torn='{"step": 30, "train/lo'))
    assert list(Page(html).charts) == CHARTS and "unfinished" in html and "sft tuesday" in html


def test_an_empty_run_has_a_report(tmp_path):
    html = report(tmp_path)
    assert Page(html).charts == {} and tmp_path.name in html and "No numbers were logged" in html
    assert "script" not in Page(html).elements


def test_torn_config_and_summary_are_no_obstacle(tmp_path):
    run_folder(tmp_path, ROWS, config='stage: sft\nrun: {name: "tues')
    (tmp_path / "summary.json").write_text('{"status": "compl')
    html = report(tmp_path)
    assert list(Page(html).charts) == CHARTS and "unfinished" in html and "tues" in html


def test_a_loss_that_was_not_finite_is_left_out_of_the_curve_and_named_in_the_table(tmp_path):
    page = Page(report(run_folder(tmp_path, [*ROWS[:2], {"step": 30, "time": 3.0, "train/loss": None}])))
    assert line(page.charts["train/loss"], "one step") == {10: 3.0, 20: 2.5}
    assert "not finite" in page.text and "nan" not in page.text


def test_losses_that_rise_by_chance_are_not_drawn_as_a_rise(tmp_path):
    """sft's demo: five batches, each of other rows, while the validation loss falls."""
    losses = [0.407, 0.511, 0.538, 0.620, 0.464]
    rows = [{"step": 10 * i, "time": 0.0, "train/loss": loss} for i, loss in enumerate(losses, start=1)]
    chart = Page(report(run_folder(tmp_path, rows))).charts["train/loss"]
    assert list(line(chart, "one step").values()) == losses
    assert list(line(chart, "running mean").values()) == pytest.approx([sum(losses) / 5] * 5)


def test_a_divergence_is_drawn_as_one():
    points = [(step, 1.0 if step < 100 else 0.05 * (step - 80)) for step in range(200)]
    smooth, number = running_mean(points)
    assert number < 20 and smooth[-1][1] > 4 * smooth[50][1]


def test_a_loss_that_falls_is_followed_closely():
    points = [(step, 8.0 / (1 + step / 20)) for step in range(400)]
    smooth, _ = running_mean(points)
    assert max(abs(a - b) / b for (_, a), (_, b) in zip(smooth, points, strict=True)) < 0.25


def comparison(tmp_path: Path, *runs: tuple[str, dict]) -> Page:
    """Of runs with the same metrics, each with its config and more of its summary."""
    folders = [run_folder(tmp_path / str(i), ROWS, config, SUMMARY | more) for i, (config, more) in enumerate(runs)]
    return Page(write_comparison(folders, tmp_path / "new" / "page.html").read_text())


def test_a_comparison_begins_with_what_differs_in_the_configuration(tmp_path):
    a = "stage: sft\nrun: {name: a, seed: 1}\noptimizer: {lr: 0.5, eps: 1e-8}\nschedule: {decay_ratio: 0.2}\n"
    b = "stage: sft\nrun: {name: b, seed: 1}\noptimizer: {lr: 0.7, eps: 1e-8}\n"
    text = comparison(tmp_path, (a, {}), (b, {})).text.split("\n")
    rows = text[text.index("key") : text.index("What the runs reached")]
    assert [row for row in rows if row.strip()] == [
        "key",
        "sft a",
        "sft b",
        "optimizer.lr",
        "0.5",
        "0.7",
        "schedule.decay_ratio",
        "0.2",
        "–",
    ]


def test_a_comparison_lays_the_curves_of_runs_over_each_other(tmp_path):
    a, b = (f"stage: sft\nrun: {{name: {name}}}\n" for name in "ab")
    charts = comparison(tmp_path, (a, {}), (b, {})).charts
    assert line(charts["val/bpb"], "sft a") == line(charts["val/bpb"], "sft b") == {20: 1.125}
    assert len({series["color"] for series in charts["val/bpb"]["series"]}) == 2


def test_a_comparison_of_losses_over_different_targets_says_so(tmp_path):
    runs = [(CONFIG, {"validation": {"targets": targets}}) for targets in ("all", "replies")]
    page = comparison(tmp_path, *runs)
    assert "do not rank the runs" in page.text.split("Curves, by step")[0]
    assert "val/loss (all tokens)" in page.text and "val/loss (replies)" in page.text
    assert "do not rank" not in comparison(tmp_path / "same", runs[0], runs[0]).text


def test_a_comparison_of_losses_over_other_data_says_so(tmp_path):
    runs = [(CONFIG, {"validation": {"targets": "assistant", "tokens": tokens}}) for tokens in (1500, 1800)]
    assert "1,800 assistant tokens" in comparison(tmp_path, *runs).text.split("Curves, by step")[0]
    assert "do not rank" not in comparison(tmp_path / "same", runs[0], runs[0]).text


def test_a_comparison_takes_runs_with_missing_files(tmp_path):
    (tmp_path / "empty").mkdir()
    whole = run_folder(tmp_path / "whole", ROWS, CONFIG, SUMMARY)
    page = Page(write_comparison([tmp_path / "empty", whole], tmp_path / "page.html").read_text())
    assert "could not be read" in page.text and "unfinished" in page.text and "val/bpb" in page.charts


def test_the_table_of_a_chain_shows_the_stages_that_failed_last_and_is_kept(tmp_path, capsys):
    done = []
    for stage in ("base", "mid"):
        summary = {"status": "completed", "stage": stage, "steps": 20, "tokens_per_second": 1000.0}
        done.append(run_folder(tmp_path / stage / "night-lr_1", ROWS, CONFIG, summary))
    error = "RunFailed: step 3: non-finite | loss. " + "Lower the learning rate. " * 10
    show_runs(done, [("sft", error), ("rl", "skipped")], tmp_path)
    shown, kept = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    for text, whole in ((shown, False), (kept, True)):
        lines = [line.strip("| ") for line in text.splitlines()]
        first = [line.split()[0] for line in lines if line.startswith(("base", "mid", "sft", "rl"))]
        assert first == ["base", "mid", "sft", "rl"]
        assert "RunFailed: step 3: non-finite" in text and "skipped" in text
        assert text.count("Lower the learning rate") == 10 or not whole
    assert len(max(shown.splitlines(), key=len)) <= 160
