"""Words that begin with a dash: Hydra's flags, wherever they are typed, and --version."""

from __future__ import annotations

import difflib
from importlib import metadata

import chattrain
from chattrain.config.compose import groups, known_keys
from chattrain.errors import UserError

SWEEPS = ("-m", "--multirun")
VERSION = "--version"
INFO = ("--info", "-i")  # with one of a few words behind, or none
COMPLETION = ("--shell-completion", "-sc")
VALUED = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
PLAIN = (*SWEEPS, VERSION, "--help", "-h", "--hydra-help", "--resolve", "--run", "-r", *INFO, *COMPLETION)
MODES = (SWEEPS, ("--run", "-r"), ("--cfg", "-c"), INFO, COMPLETION)


def version() -> str:
    """chattrain's version, and those of what decides what it computes.

    >>> version().split()[0]
    'chattrain'
    """
    others = [f"{name} {metadata.version(name)}" for name in ("torch", "hydra-core")]
    return f"chattrain {chattrain.__version__} ({', '.join(others)})"


def first(arguments: list[str]) -> list[str]:
    """The arguments with all flags before the overrides: Python's argparse does not take them in between. Raises UserError for a
    flag that is not known, and for two that exclude each other.

    >>> first(["stage=sft", "-m", "train.max_steps=1,2", "--config-dir", "my_conf", "run.name=a"])
    ['-m', '--config-dir', 'my_conf', 'stage=sft', 'train.max_steps=1,2', 'run.name=a']
    """
    flags, front, overrides, before = [], [], [], ""
    for word in arguments:
        if before in VALUED:
            front.append(word)
        elif before in INFO and "=" not in word and not word.startswith("-"):
            front[-1] = f"--info={word}"
        elif word.startswith("-"):
            flags.append(word.partition("=")[0])
            front.append("--info=all" if word in INFO else word)
        else:
            overrides.append(word)
        before = word
    for flag in flags:
        if not _is_known(flag):
            if (key := flag.lstrip("-")) in (*groups(), *known_keys()):
                raise UserError(f"{flag}: settings are typed without dashes: {key}=<value>")
            near = difflib.get_close_matches(flag, [*VALUED, *PLAIN], n=1)
            raise UserError(f"no flag {flag}{f', did you mean {near[0]}?' if near else ''}; --help lists what can be typed")
    given = [found[0] for mode in MODES if (found := [flag for flag in flags if flag in mode])]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: leave out all but one")
    return front + overrides


def _is_known(flag: str) -> bool:
    """argparse takes the beginning of a long flag for the whole, and a value right behind a short one: -cjob."""
    if flag.startswith("--"):
        return len(flag) > 2 and any(known.startswith(flag) for known in (*VALUED, *PLAIN, "--experimental-rerun"))
    return flag in PLAIN or flag.startswith(("-c", "-p"))
