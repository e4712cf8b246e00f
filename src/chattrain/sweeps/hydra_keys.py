"""Keys of Hydra that have no effect here: refused with the key that has one."""

from __future__ import annotations

import copy
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chattrain.config.compose import conf_dir
from chattrain.errors import UserError

SCRATCH = "${oc.env:CHATTRAIN_SCRATCH,.}"  # as in conf/config.yaml
# key -> its value in conf/config.yaml, and what to use instead
WITHOUT_EFFECT = {
    "run.dir": (SCRATCH, "runs go to run.root/<stage>/<run.name>; use run.dir, run.root or run.name"),
    "sweep.dir": (SCRATCH, "a sweep's runs go to run.root/<stage>, its table to run.root/sweeps/<sweep.name>; use run.root"),
    "sweep.subdir": (".", "a sweep's runs are named after what is swept; use sweep.name"),
    "job.chdir": (False, "a run never leaves the folder in which it was started; use run.root for where runs go"),
}


def own_dirs(hydra: DictConfig | HydraConf) -> list[str]:
    """The user's own folders of choices, of --config-dir and hydra.searchpath, absolute."""
    folders = [Path(source.path).resolve() for source in hydra.runtime.config_sources if source.schema == "file"]
    return [str(folder) for folder in folders if folder != conf_dir().resolve()]


def refuse_keys_without_effect(hydra: DictConfig) -> None:
    """Raises UserError where the command line or a YAML file sets one of them. `hydra`: the node `hydra` of the configuration."""
    for key, (ours, instead) in WITHOUT_EFFECT.items():
        group, _, name = key.partition(".")
        value = hydra[group]._get_node(name)._value()  # as written, not resolved
        if value != ours:
            raise UserError(f"hydra.{key}={value} has no effect here: {instead}")


def refuse_unused_sweep(hydra: DictConfig, typed: list[str]) -> None:
    """Raises UserError for values to sweep in a configuration that is run once, unless hydra.mode asks for that.

    `typed`: the arguments as typed. Hydra adds hydra.mode=RUN to the overrides where nothing gives a mode.
    """
    params = hydra.sweeper.get("params")
    given = "hydra.mode=RUN" not in hydra.overrides.hydra or "hydra.mode=RUN" in typed
    if params and not given:
        raise UserError(
            f"hydra.sweeper.params has values for {', '.join(params)}, but this is one run; add -m, or "
            "`hydra: { mode: MULTIRUN }` to the YAML file (hydra.mode=RUN runs once all the same)"
        )


def refuse_unread_lists(config: DictConfig) -> None:
    """Raises UserError for a YAML list in hydra.sweeper.params, which is one value to Hydra, where the key takes no list."""
    for key, value in (config.hydra.sweeper.get("params") or {}).items():
        if not OmegaConf.is_list(value):
            continue
        try:
            OmegaConf.update(copy.deepcopy(config), key, value)
        except OmegaConfBaseException:
            values = ",".join(map(str, value))
            raise UserError(
                f"{key}: {value} in hydra.sweeper.params is one value, a list, which {key} does not take; for a job each write "
                f"`{key}: {values}`, without brackets"
            ) from None


def refuse_intervals(overrides: dict[str, Override]) -> None:
    """Raises UserError for an interval, which Hydra's basic sweeper cannot run."""
    for key, override in overrides.items():
        if override.is_interval_sweep():
            raise UserError(
                f"{override.input_line} holds no values, but bounds for a search; add hydra/sweeper=optuna, or give "
                f"the values, such as {key}=1,3,10"
            )
