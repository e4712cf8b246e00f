"""What is swept, and how a job of a sweep is named after it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from chattrain.config.run import NAME_BYTES

VALUE_LENGTH = 24  # characters of a value in a name at most
NAME_LENGTH = 100  # characters of a run's name at most, and NAME_BYTES bytes
UNNAMED = ("stage", "run.name")  # swept keys that already decide the folder


def parse(overrides: Iterable[str]) -> dict[str, Override]:
    """The overrides by key or group; of several for one key the last counts, as in Hydra. Raises HydraException."""
    return {o.key_or_group: o for o in OverridesParser.create().parse_overrides(list(overrides))}


def swept_values(override: Override) -> list[str]:
    """The values of a sweep, as on the command line; [] for an interval, which has no list of them."""
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []


def run_name(base: str, values: dict[str, str]) -> str:
    """The name of a job's run: that of the sweep and the swept keys with their values. The stage has a folder instead.

    Keys are in alphabetical order, so that the name does not depend on theirs. No character needs quoting in a shell. A value
    that does not fit is shortened and gets a hash, so that two values never have one name.

    >>> run_name("night", {"stage": "sft", "optimizer.lr_scale": "0.3", "run.seed": "1"})
    'night-lr_scale_0.3-seed_1'
    >>> run_name("night", {"data.train_path": "a/very/long/path/to/talk.jsonl"})
    'night-train_path_talk.jsonl-eaf3d4'
    >>> run_name("night", {"optimizer.lr_scale": "1.7578970987405635"})
    'night-lr_scale_1.758-4cbe59'
    """
    named = {key: value for key, value in sorted(values.items()) if key not in UNNAMED}
    last = [key.rpartition(".")[2] for key in named]
    parts = [
        f"{short if last.count(short) == 1 else key.replace('/', '.')}_{_shorten(value)}"
        for short, (key, value) in zip(last, named.items(), strict=True)
    ]
    name = "-".join([base, *parts])
    if len(name) <= NAME_LENGTH and len(name.encode()) <= NAME_BYTES:
        return name
    begin = name[: NAME_LENGTH - 9].encode()[: NAME_BYTES - 9].decode(errors="ignore")
    return f"{begin}-{_hash(name, 8)}"


def _shorten(value: str) -> str:
    with suppress(ValueError):
        if len(value) > 8:
            return f"{float(value):.4g}-{_hash(value, 6)}"
    plain = re.sub(r"[^\w.+-]", "_", value.rpartition("/")[2].strip("'\"[]{}"))
    if plain == value and len(value) <= VALUE_LENGTH:
        return value
    return f"{plain[:VALUE_LENGTH]}-{_hash(value, 6)}"


def _hash(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]
