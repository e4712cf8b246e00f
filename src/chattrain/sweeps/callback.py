"""Hydra calls this once it has composed the command line, before any job (`hydra.callbacks` in conf/config.yaml)."""

from __future__ import annotations

from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from chattrain.errors import UserError
from chattrain.sweeps import launching


class Refused(BaseException):
    """Carries a UserError through Hydra, which makes a warning of every Exception of a callback."""

    def __init__(self, error: UserError):
        super().__init__(error)
        self.error = error


class QuietReturn(JobReturn):
    """A JobReturn that raises the error of a failed job without printing it: chattrain prints it once, as one message."""

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class Begin(Callback):
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        self._begin(config, multirun=False)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._begin(config, multirun=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        job_return.__class__ = QuietReturn  # the caller keeps this object

    def _begin(self, config: DictConfig, multirun: bool) -> None:
        try:
            if (launch := launching.current()) is not None:
                launch.sweep.begin(config, multirun, launch.command)
        except UserError as error:
            raise Refused(error) from None
