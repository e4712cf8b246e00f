"""`--help`: what can be typed, the groups with their choices, and every key with the value that this command line composes.

Hydra's own help copies all schemas for every group that it lists, twice over, which takes longer than all the rest. So Hydra
composes the keys (its `--cfg job`), and what stands around them comes from here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

from chattrain.config.compose import conf_dir

SWEEPS = ("-m", "--multirun")
FLAGS = ("--help", "-h")
TEXT = """chattrain: turn a language model into a chat model.

  python -m chattrain stage=mid                                  train one stage
  python -m chattrain -m stage=base,mid,sft                      the three in order
  python -m chattrain -m stage=sft optimizer.lr_scale=0.3,1,3    a sweep
  python -m chattrain command=evaluate stage=sft                 also: chat, inspect, plan, report, import, export

Groups (group=choice):
{groups}

Keys (key=value), with what this command line composes:
{keys}
Hydra's own options: --hydra-help. A key's meaning and unit: the files config.py of src/chattrain."""


def is_asked(arguments: list[str]) -> bool:
    return any(flag in arguments for flag in FLAGS)


def for_keys(arguments: list[str]) -> list[str]:
    """What Hydra is called with instead, so that it prints the composed keys.

    Of the values of a sweep, the first.

    >>> for_keys(["-m", "stage=base,mid", "--help"])
    ['stage=base', '--cfg', 'job']
    """
    kept = [a for a in arguments if a not in (*FLAGS, *SWEEPS)]
    if len(kept) < len([a for a in arguments if a not in FLAGS]):
        kept = [a.partition(",")[0] if re.fullmatch(r"[\w.@/]+=[^\[{(\"']+", a) else a for a in kept]
    return [*kept, "--cfg", "job"]


def show(print_keys: Callable[[], None], arguments: list[str]) -> None:
    """Print the help on stdout, or nothing where the keys cannot be composed: what `print_keys` raises passes through."""
    with redirect_stdout(io.StringIO()) as keys:
        print_keys()
    choices: dict[str, set[str]] = {}
    for folder in [conf_dir(), *_config_dir(arguments)]:
        for file in folder.rglob("*.yaml"):
            choices.setdefault(file.parent.relative_to(folder).as_posix(), set()).add(file.stem)
    groups = [
        f"{group}: {', '.join(sorted(names))}"
        for group, names in sorted(choices.items())
        if group.partition("/")[0] not in (".", "hydra")
    ]
    print(TEXT.format(groups="\n".join(groups), keys=keys.getvalue()))


def _config_dir(arguments: list[str]) -> list[Path]:
    """The folder of the user's own choices, where one is given to Hydra.

    >>> _config_dir(["stage=sft", "--config-dir", "my_conf"])
    [PosixPath('my_conf')]
    """
    spelled = [word for argument in arguments for word in argument.split("=", 1 if argument.startswith("--") else 0)]
    return [Path(folder) for flag, folder in pairwise(spelled) if flag in ("--config-dir", "-cd")]
