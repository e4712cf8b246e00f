"""Samples while training: the replies to eval.prompts at every evaluation, in samples.jsonl of the run folder.

A loss can fall while replies never end, or say one thing again and again; here it is seen. Replies are greedy, so that only the
weights change them from one evaluation to the next.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from chattrain.chat.reply import reply_text
from chattrain.evals.replies import Writer, repeats
from chattrain.parallel.ranks import Ranks
from chattrain.setup.suites import Prompts
from chattrain.storage.files import replace_text
from chattrain.tokenizer import AnyTokenizer
from chattrain.tracking.run_folder import SAMPLES, read_samples
from chattrain.tracking.tokens import visible

log = logging.getLogger("chattrain")

SHOWN = 100  # characters of a reply in the log


class Samples:
    """Answers the prompts. `run_dir`: rank 0 keeps the replies there, after those up to `start_step` of the part of the run
    before this one; 0: it begins anew."""

    def __init__(
        self,
        prompts: Prompts,
        write: Writer,
        tokenizer: AnyTokenizer,
        ranks: Ranks,
        run_dir: Path,
        start_step: int,
    ):
        self.prompts, self.write, self.tokenizer, self.ranks = prompts, write, tokenizer, ranks
        self.file = run_dir / SAMPLES
        if ranks.is_main:
            forget_later(self.file, start_step)

    def __call__(self, step: int) -> dict[str, float]:
        """Fractions of the replies, over all prompts: samples/ended (by themselves, before eval.max_reply_tokens),
        samples/repeating (they end in a loop) and samples/empty."""
        rows = []
        for prompt, (ids, ended) in zip(self.prompts.texts, self.write(self.prompts.ids), strict=True):
            text = reply_text(self.tokenizer, ids)
            rows.append({"step": step, "prompt": prompt, "reply": text, "ended": ended, "repeating": repeats(ids)})
        if self.ranks.is_main:
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            said = visible(" ".join(rows[0]["reply"].split()))
            log.info("step %d  %s -> %s", step, rows[0]["prompt"], said if len(said) <= SHOWN else said[:SHOWN] + "…")
        empty = sum(not row["reply"].strip() for row in rows)
        counts = {"ended": sum(row["ended"] for row in rows), "repeating": sum(row["repeating"] for row in rows), "empty": empty}
        return {f"samples/{name}": count / len(rows) for name, count in counts.items()}


def forget_later(file: Path, step: int) -> None:
    """Keep of samples.jsonl what is of this step or an earlier one, as metrics.jsonl does; 0: nothing."""
    if file.is_file():
        kept = [row for row in read_samples(file) if row["step"] <= step] if step else []
        replace_text(file, "".join(json.dumps(row) + "\n" for row in kept))
