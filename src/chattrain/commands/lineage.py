"""command=lineage: what a checkpoint comes from, oldest first, with the settings that differ from one to the next."""

from __future__ import annotations

import json
from itertools import pairwise

from chattrain.commands.exit import print_for_programs
from chattrain.config import Config
from chattrain.setup.start import find_checkpoint
from chattrain.storage.lineage import Ancestor, read_lineage, to_json, whereabouts

WIDTH = 60  # characters of a value
HASH = 12
TARGET = "._target_"  # a part is named by its group


def main(cfg: Config) -> dict:
    """Print the chain of the run or checkpoint that is named, else of the newest finished run of the stage; returns it.

    An ancestor is `there`, `gone`, or `changed`: another model lies where it lay.
    """
    chain = read_lineage(find_checkpoint(cfg))
    found = {"lineage": [{**entry, "whereabouts": whereabouts(each)} for entry, each in zip(to_json(chain), chain, strict=True)]}
    for line in [*table(chain), *differences(chain)]:
        print(line)
    print_for_programs(found)
    return found


def table(chain: list[Ancestor]) -> list[str]:
    """A line a checkpoint, under a line of headings."""
    rows = [["stage", "run", "step", "weights", "config", "data", "chattrain", "commit", ""]]
    for each in chain:
        known = [each.stage, each.run, each.step, each.weights, each.config, each.data, each.chattrain, each.commit]
        cells = ["-" if value is None else str(value) for value in known]
        cells[3:6] = [cell[:HASH] for cell in cells[3:6]]
        cells[7] = cells[7][:HASH] + "+" * (cells[7].endswith("+"))
        origin = f", imported from {each.imported_from}" if each.imported_from else ""
        rows.append([*cells, f"{whereabouts(each)}{origin}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def differences(chain: list[Ancestor]) -> list[str]:
    lines = []
    for before, each in pairwise(chain):
        lines += ["", f"{each.run} was trained from {before.run} with"]
        lines += [
            f"  {key.removesuffix(TARGET)}: {_short(there)} -> {_short(here)}"
            for key, (there, here) in sorted(each.changes.items())
        ]
        if not each.changes:
            lines.append("  no differing setting known")
    return lines


def _short(value: object) -> str:
    """
    >>> _short([1, None]), _short("x" * 80)[-5:]
    ('[1, null]', 'x ...')
    """
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]} ..."
