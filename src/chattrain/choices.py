"""The values that a key may take, as an Enum that Hydra knows."""

from __future__ import annotations

from enum import Enum


def choices(name: str, *names: str, module: str) -> type[Enum]:
    """Members of these names, with the names for values too: were they numbers, OmegaConf would take `key=1` for the first.

    `module`: that of the caller, in which pickle finds it.
    """
    return Enum(name, {one: one for one in names}, module=module)
