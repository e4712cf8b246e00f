"""Run folders and sweeps, written as training writes them."""

import json
from html.parser import HTMLParser
from pathlib import Path

from chattrain.tracking.sweep_record import JobRecord, SweepRecord

OPEN_ENDED = {"meta", "br", "img", "link"}  # HTML elements without an end tag


class Page(HTMLParser):
    """Every element of a page, its charts by title, and whether each element that opens also closes, in order."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.addresses, self.open, self.texts, self.charts = [], [], [], [], {}
        self._title, self._json = "", False
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self._json = ("type", "application/json") in attrs
        if tag not in OPEN_ENDED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "figcaption":
            self._title = data
        elif self._json and self.open[-1] == "script":
            self.charts[self._title] = json.loads(data)
        elif self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def line(chart: dict, label: str) -> dict[float, float]:
    """The points of a line of a chart."""
    (series,) = (one for one in chart["series"] if one["label"] == label)
    return {x: y for x, y in zip(chart["x"], series["values"], strict=True) if y is not None}


def run_folder(folder: Path, rows: list[dict], config: str = "", summary: dict | None = None, torn: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    if config:
        (folder / "config.yaml").write_text(config)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def job(num: int, objective: float | None, status: str = "completed", **more) -> JobRecord:
    """`values` may be given by `rate` and `seed`."""
    values = more.pop("values", {})
    if "rate" in more:
        values = {"optimizer.lr_scale": str(more.pop("rate"))} | values
    if "seed" in more:
        values |= {"run.seed": str(more.pop("seed"))}
    overrides = more.pop("overrides", ["stage=sft", "run.name=lrs", *(f"{key}={value}" for key, value in values.items())])
    return JobRecord(num, more.pop("stage", "sft"), values, overrides, status=status, objective=objective, **more)


def sweep(jobs: list[JobRecord], objective: str = "val/loss", **more) -> SweepRecord:
    swept = list(dict.fromkeys(key for one in jobs for key in one.values))
    return SweepRecord("lrs", ["-m", "stage=sft"], 0.0, swept=swept, objective=objective, jobs=jobs, **more)
