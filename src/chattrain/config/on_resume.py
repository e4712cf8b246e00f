"""Which keys a resumed run may change. docs/resume.md shows the same table."""

from __future__ import annotations

from enum import Enum


class Change(Enum):
    silent = "silent"
    warned = "warned"
    refused = "refused"  # unless run.allow_change names the key


# A key, or a group of keys -> what happens where a resumed run has another value of it. The longest entry that fits counts; keys
# without an entry are refused.
ON_RESUME = {
    # Where the run goes, how fast it is, what it says of itself: numbers change by rounding at most.
    "command": Change.silent,
    "format": Change.silent,
    "runs": Change.silent,
    "run": Change.silent,
    "init": Change.silent,
    "tracking": Change.silent,
    "log": Change.silent,
    "checkpoint": Change.silent,
    "distributed": Change.silent,
    "sweep": Change.silent,
    "chat": Change.silent,
    "serve": Change.silent,
    "inspect": Change.silent,
    "plan": Change.silent,
    "verify": Change.silent,
    "export": Change.silent,
    "train.stop_after": Change.silent,
    "train.device": Change.silent,
    "train.activation_checkpointing": Change.silent,
    "train.device_batch_size": Change.silent,
    "train.device_batch_tokens": Change.silent,
    "train.compile": Change.silent,  # of it, what was decided is compared, and a change is warned of
    "eval.batch_size": Change.silent,
    "eval.reply_batch_size": Change.silent,
    "eval.prompts": Change.silent,  # samples/* and samples.jsonl are of other prompts from then on
    "data.audit": Change.silent,
    "data.cache_dir": Change.silent,
    "data.workers": Change.silent,
    # How long it is, and what a run that goes on does not read.
    "init.from": Change.warned,
    "train.max_steps": Change.warned,  # says how the schedule moves
    "train.num_epochs": Change.warned,
    "train.max_tokens": Change.warned,
    "train.max_supervised_tokens": Change.warned,
    "train.deterministic": Change.warned,  # the bits before and after are repeatable in another way
    # What decides the numbers.
    "run.seed": Change.refused,
    "tokenizer": Change.refused,
    "data": Change.refused,  # only where the documents, or what is measured, are others
    "collator": Change.refused,
    "loss": Change.refused,
    "model": Change.refused,
    "optimizer": Change.refused,
    "schedule": Change.refused,
    "eval": Change.refused,
    "train": Change.refused,
}
BY_CONTENT = ("data", "train.rows_per_step", "train.total_batch_size")  # compared by the rows that they lead to


def on_resume(key: str) -> Change:
    """What happens where a resumed run has another value of the key.

    >>> [on_resume(key).value for key in ("log.every", "train.max_steps", "optimizer.lr_scale", "run.seed")]
    ['silent', 'warned', 'refused', 'refused']
    """
    fitting = [entry for entry in ON_RESUME if is_within(key, entry)]
    return ON_RESUME[max(fitting, key=len)] if fitting else Change.refused


def is_within(key: str, entry: str) -> bool:
    """Is the key the entry, or in the group that it names?

    >>> is_within("data.train_path", "data"), is_within("database", "data")
    (True, False)
    """
    return key == entry or key.startswith(f"{entry}.")
