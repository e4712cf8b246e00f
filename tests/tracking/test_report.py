"""A report shows what a run folder holds, whatever it holds."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from chattrain.tracking.report import curve_svg, write_report

SVG = "{http://www.w3.org/2000/svg}"
OPEN_ENDED = {"meta", "br", "img", "link"}  # HTML elements without an end tag


class Page(HTMLParser):
    """Every element of a page, and whether each that opens also closes, in order."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.addresses, self.open = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in OPEN_ENDED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def run_folder(folder: Path, rows: list[dict], config: str = "", summary: dict | None = None, torn: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    if config:
        (folder / "config.yaml").write_text(config)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


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


def test_a_report_shows_title_summary_charts_metrics_and_config(tmp_path):
    html = report(run_folder(tmp_path, ROWS, CONFIG, SUMMARY))
    page = Page(html)
    assert page.elements.count("svg") == 5  # train/loss, val/bpb, val/loss, lr_factor, accuracies
    assert "<h1>sft tuesday <span" in html and "completed</span>" in html
    for words in ("81,920", "60,000", "41,234", "runs/mid/a", "checkpoints/step_000020", "1.125", "name: tuesday"):
        assert words in html
    assert "eval/mmlu_acc" in html and "eval/arc_easy_acc" in html


def test_only_metrics_that_are_present_get_a_chart(tmp_path):
    html = report(run_folder(tmp_path, ROWS[:1]))
    assert Page(html).elements.count("svg") == 2
    assert "val/bpb" not in html and "accuracy" not in html


def test_a_report_needs_nothing_from_outside(tmp_path):
    html = report(run_folder(tmp_path, ROWS, CONFIG, SUMMARY))
    page = Page(html)
    assert page.addresses == [] and not {"script", "link", "img", "iframe"} & set(page.elements)
    assert "@import" not in html and "url(" not in html
    assert html.replace('xmlns="http://www.w3.org/2000/svg"', "").count("http") == 0


def test_what_users_write_is_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    rows = [{"step": 1, "time": 0.0, "eval/<script>_acc": 0.5, "eval/b_acc": 0.5, "<script>": 1.0}]
    summary = {"status": evil, "init": evil, "error": evil}
    config = json.dumps({"stage": evil, "run": {"name": evil}, "data": evil})  # JSON is YAML
    page = Page(report(run_folder(tmp_path, rows, config, summary)))
    assert "script" not in page.elements and "svg" in page.elements


def test_a_report_does_not_resolve_interpolations(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    html = report(run_folder(tmp_path, ROWS, 'stage: sft\nrun:\n  name: "${oc.env:SECRET}"\n'))
    assert "hunter2" not in html and "<h1>sft ${oc.env:SECRET} <span" in html


def test_an_interrupted_run_has_a_report(tmp_path):
    html = report(run_folder(tmp_path, ROWS, CONFIG, torn='{"step": 30, "train/lo'))
    assert Page(html).elements.count("svg") == 5 and "unfinished" in html and "sft tuesday" in html


def test_an_empty_run_has_a_report(tmp_path):
    html = report(tmp_path)
    assert Page(html).elements.count("svg") == 0 and tmp_path.name in html and "No numbers were logged" in html


def test_torn_config_and_summary_are_no_obstacle(tmp_path):
    run_folder(tmp_path, ROWS, config='stage: sft\nrun: {name: "tues')
    (tmp_path / "summary.json").write_text('{"status": "compl')
    html = report(tmp_path)
    assert Page(html).elements.count("svg") == 5 and "unfinished" in html and "tues" in html


def test_a_loss_that_was_not_finite_is_left_out_of_the_curve_and_named_in_the_table(tmp_path):
    html = report(run_folder(tmp_path, [*ROWS[:2], {"step": 30, "time": 3.0, "train/loss": None}]))
    assert html.count("<circle") == 4  # two losses and two learning rate factors
    assert "not finite" in html and "nan" not in html


def test_a_curve_is_a_standalone_picture_with_round_ticks_inside_its_frame():
    points = [(float(step), 11 - step / 20) for step in range(201)]
    svg = ElementTree.fromstring(curve_svg({"train/loss": points}, "loss & co", width=500, height=200))
    assert svg.tag == SVG + "svg" and svg.get("viewBox") == "0 0 500 200"
    texts = [text.text for text in svg.iter(SVG + "text")]
    assert texts[0] == "loss & co" and {"0", "50", "200", "2", "10"} <= set(texts) and "train/loss" not in texts
    pixels = [tuple(map(float, pair.split(","))) for pair in svg.find(SVG + "polyline").get("points").split()]
    assert len(pixels) == 201 and all(0 <= x <= 500 and 0 <= y <= 200 for x, y in pixels)
    assert pixels[0][0] < pixels[-1][0] and pixels[0][1] < pixels[-1][1]  # time goes right; a falling loss goes down


def test_several_series_have_a_legend():
    names = [f"eval/subject_{i}_acc" for i in range(12)]
    svg = ElementTree.fromstring(curve_svg({name: [(0, 0.1), (1, 0.9)] for name in names}, "accuracy"))
    texts = {text.text: text for text in svg.iter(SVG + "text")}
    assert set(names) <= set(texts)
    assert len({texts[name].get("y") for name in names}) > 1  # it goes on in a second row
    assert len(svg.findall(SVG + "polyline")) == 12


@pytest.mark.parametrize(
    "points", [[], [(5, 2.0)], [(0, 0.0), (9, 0.0)], [(1, 1e-7), (2, 3e7)], [(1, math.nan), (2, math.inf)], [(7, -3.0)]]
)
def test_any_points_make_a_picture(points):
    svg = ElementTree.fromstring(curve_svg({"a": points}, "a"))
    lone = [point for point in points if math.isfinite(point[1])]
    assert len(svg.findall(SVG + "circle")) == len(lone)
    assert bool(lone) != ("no data" in "".join(svg.itertext()))
