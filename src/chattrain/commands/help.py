"""`--help`: examples, the groups with their choices, and every key with the value that this command line composes.

Hydra's own help is slow, as it copies all schemas twice for every group that it lists. So Hydra only composes the keys (its
`--cfg job`), and the text around them comes from here.
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
  python -m chattrain -m stage=sft optimizer.lr_scale=1,3,6,10,20,30    a sweep
  python -m chattrain command=evaluate stage=sft                 also: chat, inspect, plan, report, sync, import, export,
                                                                 verify_resume, reproduce, lineage

Groups (group=choice):
{groups}

Keys (key=value), with the values of this command line:
{keys}
Hydra's own options: --hydra-help. The meaning and unit of each key: src/chattrain/config/."""


def is_requested(arguments: list[str]) -> bool:
    return any(flag in arguments for flag in FLAGS)


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Arguments that make Hydra print the composed keys instead; a swept key has its first value.

    >>> hydra_arguments(["-m", "stage=base,mid", "--help"])
    ['stage=base', '--cfg', 'job']
    """
    kept = [a for a in arguments if a not in (*FLAGS, *SWEEPS)]
    if len(kept) < len([a for a in arguments if a not in FLAGS]):
        kept = [a.partition(",")[0] if re.fullmatch(r"[\w.@/]+=[^\[{(\"']+", a) else a for a in kept]
    return [*kept, "--cfg", "job"]


def show(print_keys: Callable[[], None], arguments: list[str]) -> None:
    """Print the help on stdout. `print_keys` makes Hydra print the keys; where it raises, nothing is printed."""
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
    """The folder of the user's own choices that `--config-dir` names; [] without.

    >>> _config_dir(["stage=sft", "--config-dir", "my_conf"])
    [PosixPath('my_conf')]
    """
    words = [word for argument in arguments for word in argument.split("=", 1 if argument.startswith("--") else 0)]
    return [Path(folder) for flag, folder in pairwise(words) if flag in ("--config-dir", "-cd")]
