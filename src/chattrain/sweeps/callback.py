"""Hydra calls this once it has composed the command line, before any job (`hydra.callbacks` in conf/config.yaml)."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from chattrain.errors import UserError
from chattrain.sweeps import launching


class Refused(BaseException):
    """Carries a UserError through Hydra, which makes a warning of every Exception of a callback."""

    def __init__(self, error: UserError):
        super().__init__(error)
        self.error = error


class Begin(Callback):
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        self._begin(config, multirun=False)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._begin(config, multirun=True)

    def _begin(self, config: DictConfig, multirun: bool) -> None:
        try:
            if (launch := launching.current()) is not None:
                launch.sweep.begin(config, multirun)
        except UserError as error:
            raise Refused(error) from None
