"""A few shapes as SVG text. Numbers are rounded, so that the same picture is the same file everywhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, SOFT, LINE = "#24292f", "#57606a", "#d0d7de"
TARGET, CONTEXT, PADDING, MARK = "#2da44e", "#b6c6d8", "#f0f1f3", "#cf222e"
BLUE, ORANGE = "#0969da", "#bc4c00"


class Picture:
    """Shapes from the top left corner, in pixels."""

    def __init__(self, width: int, title: str):
        self.width, self.height, self.title = width, 0.0, title
        self.parts: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none") -> None:
        self.parts.append(f'<rect x="{x:.4g}" y="{y:.4g}" width="{w:.4g}" height="{h:.4g}" fill="{fill}" stroke="{stroke}"/>')
        self.height = max(self.height, y + h)

    def text(
        self, x: float, y: float, text: str, fill: str = INK, size: int = 12, anchor: str = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.4g}" y="{y:.4g}" fill="{fill}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )
        self.height = max(self.height, y + 4)

    def line(self, points: list[tuple[float, float]], color: str, width: float = 1, dash: str = "") -> None:
        path = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashed}/>')
        self.height = max([self.height, *(y for _, y in points)])

    def legend(self, y: float, entries: dict[str, str]) -> None:
        """Colors with what they mean, in one line."""
        x = 0.0
        for text, color in entries.items():
            self.rect(x, y, 12, 12, color, LINE)
            self.text(x + 18, y + 10, text, SOFT)
            x += 34 + 6.4 * len(text)

    def svg(self) -> str:
        width, height = self.width + 24, round(self.height + 24)
        size = f'width="{width}" height="{height}" viewBox="-12 -12 {width} {height}"'
        style = "text { font-family: system-ui, sans-serif; } .mono { font-family: ui-monospace, monospace; }"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(self.title)}" {size}>',
                f'<style>{style}</style><rect x="-12" y="-12" width="100%" height="100%" rx="6" fill="#ffffff"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


class Axes:
    """A plot in a Picture, with x and y from 0 to a largest value."""

    def __init__(self, picture: Picture, x: float, y: float, w: float, h: float, max_x: float, max_y: float):
        self.picture, self.x, self.y, self.w, self.h, self.max_x, self.max_y = picture, x, y, w, h, max_x, max_y
        picture.line([(x, y), (x, y + h), (x + w, y + h)], INK)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x + self.w * x / self.max_x, self.y + self.h * (1 - y / self.max_y)

    def curve(self, points: list[tuple[float, float]], color: str, width: float = 1.5, dash: str = "") -> None:
        self.picture.line([self.at(x, y) for x, y in points], color, width, dash)

    def ticks(self, xs: dict[float, str], ys: dict[float, str]) -> None:
        for value, text in xs.items():
            self.picture.text(self.at(value, 0)[0], self.y + self.h + 16, text, SOFT, 11, "middle")
        for value, text in ys.items():
            x, y = self.at(0, value)
            self.picture.text(x - 6, y + 4, text, SOFT, 11, "end")
            self.picture.line([(x, y), (x + self.w, y)], LINE, 1, "2 3")


def write_if_new(file: Path, text: str) -> None:
    """Write a file unless it holds this text: `make docs-serve` would see a change each time otherwise."""
    if not file.is_file() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
