"""The replies to eval.prompts as a table: a row a prompt, a column a step."""

from __future__ import annotations

import json
from html import escape

COLUMNS = 5  # steps that are shown: the first, the last, and some between them
SHOWN = 400  # characters of a reply


def chosen_steps(steps: list[int], most: int = COLUMNS) -> list[int]:
    """The first and the last of steps that ascend, and of the others as many as there is room for, evenly.

    >>> chosen_steps([0, 10, 20, 30, 40, 50, 60, 70, 80], 5), chosen_steps([0, 10], 5)
    ([0, 20, 40, 60, 80], [0, 10])
    """
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def html_table(samples: list[dict]) -> str:
    """`samples`: the lines of samples.jsonl. What is wrong with a reply stands behind it."""
    steps = chosen_steps(sorted({row["step"] for row in samples}))
    found = {(row["prompt"], row["step"]): row for row in samples}
    head = "".join(f"<th>step {step}</th>" for step in steps)
    body = ""
    for prompt in dict.fromkeys(row["prompt"] for row in samples):
        cells = "".join(f"<td>{_cell(found.get((prompt, step)))}</td>" for step in steps)
        body += f"<tr><th>{escape(prompt)}</th>{cells}</tr>\n"
    return f'<div class="samples"><table><tr><th>prompt</th>{head}</tr>\n{body}</table></div>'


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    reply = row["reply"] if len(row["reply"]) <= SHOWN else row["reply"][:SHOWN] + "…"
    faults = [
        words for words, wrong in (("does not end", not row.get("ended")), ("repeats itself", row.get("repeating"))) if wrong
    ]
    faults += ["empty"] if not row["reply"].strip() else []
    return escape(reply) + (f"<small>{', '.join(faults)}</small>" if faults else "")


def mlflow_table(samples: list[dict]) -> str:
    """The same lines as MLflow's own tables are stored, which its page shows and `mlflow.load_table` reads."""
    columns = ["step", "prompt", "reply", "ended", "repeating"]
    return json.dumps({"columns": columns, "data": [[row.get(name) for name in columns] for row in samples]})
