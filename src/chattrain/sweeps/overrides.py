"""What the overrides of a job tell: how to run it alone, and what it shares with the other jobs of its sweep."""

from __future__ import annotations

from chattrain.tracking.sweep_record import JobRecord


def command_alone(command: list[str], overrides: list[str]) -> list[str]:
    """What `python -m chattrain` takes to run one job alone, under a name of its own. `command`: the sweep's, as typed.

    >>> command_alone(["-m", "--config-dir", "mine", "run.seed=1,2", "run.name=x"], ["run.seed=1", "run.name=x"])
    ['--config-dir', 'mine', 'run.seed=1']
    >>> command_alone(["hparams_search=lr"], ["hparams_search=lr", "optimizer.lr_scale=3"])
    ['hparams_search=lr', 'optimizer.lr_scale=3', 'hydra.mode=RUN']
    """
    folders = [a for pair in zip(command, [*command[1:], ""], strict=True) for a in _config_dir(*pair)]
    own = [o for o in overrides if not o.startswith(("sweep.", "run.name="))]
    in_yaml = not {"-m", "--multirun"} & set(command) or any(o.startswith("hparams_search=") for o in own)
    return [*folders, *own, *(["hydra.mode=RUN"] if in_yaml else [])]


def shared_settings(job: JobRecord, swept: set[str]) -> tuple[str, ...]:
    """The overrides of a job that all jobs of its sweep share; where it starts from follows from the others."""
    return tuple(sorted(o for o in job.overrides if o.lstrip("+").partition("=")[0] not in swept | {"init.from"}))


def _config_dir(argument: str, following: str) -> list[str]:
    """The argument, with the one that follows it, if it names the user's folder of YAML files.

    >>> _config_dir("--config-dir", "mine"), _config_dir("--config-dir=mine", "-m"), _config_dir("mine", "-m")
    (['--config-dir', 'mine'], ['--config-dir=mine'], [])
    """
    if argument in ("--config-dir", "-cd"):
        return [argument, following]
    return [argument] if argument.startswith("--config-dir=") else []
