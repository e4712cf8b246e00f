"""Build the object that a part of the configuration describes by its `_target_`."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from chattrain.config.own import OwnPart
from chattrain.errors import UserError


def instantiate_config(config: Any, *arguments: Any, **named: Any) -> Any:
    """`hydra.utils.instantiate`, except that a UserError raised by the target is not wrapped in Hydra's exception."""
    try:
        return instantiate(config.call() if isinstance(config, OwnPart) else config, *arguments, **named)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
