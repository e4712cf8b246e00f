"""The table of keys that a resumed run may change."""

from __future__ import annotations

import re
from pathlib import Path

from chattrain.config.changes import FREE
from chattrain.config.on_resume import ON_RESUME, Change, on_resume

DOCS = Path(__file__).parents[2] / "docs" / "resume.md"


def test_docs_show_the_table_of_the_code():
    rows = re.findall(r"^\| `([a-z_.]+)` \| (silent|warned|refused) \|$", DOCS.read_text(), re.MULTILINE)
    assert rows == [(key, change.value) for key, change in ON_RESUME.items()]


def test_what_decides_no_number_of_a_run_may_change_and_all_else_is_refused():
    """The table and the keys that tell runs apart say the same, but for what is compared by its contents."""
    for key in FREE:
        if key not in ("data", "train.rows_per_step", "train.total_batch_size"):
            assert on_resume(key) != Change.refused, key
    for key in ("optimizer.lr_scale", "schedule.init_lr_frac", "loss.supervise", "eval.every", "run.seed", "new.key"):
        assert on_resume(key) == Change.refused
