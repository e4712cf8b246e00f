"""A part of the configuration as the object that its `_target_` builds."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from chattrain.errors import UserError


def instantiate_config(config: Any, *arguments: Any, **named: Any) -> Any:
    """Hydra's instantiate; a UserError from inside comes out as itself."""
    try:
        return instantiate(config, *arguments, **named)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
