"""How Hydra reads YAML files: as it does, and a choice whose `_target_` is the user's own gets the schema of its signature."""

from __future__ import annotations

from hydra._internal.core_plugins.file_config_source import FileConfigSource as HydraFileConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource as HydraStructuredConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, Node

from chattrain.config import own


class FileConfigSource(HydraFileConfigSource):  # of the same name: Hydra registers its own once more and keeps ours
    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        group, _, choice = config_path.removesuffix(".yaml").partition("/")
        if group in own.GROUPS and isinstance(result.config, DictConfig):
            whole = result.header.get("package") == "_global_"
            part = result.config.get(group) if whole else result.config
            if isinstance(part, DictConfig):
                _add_schema(result.config, part, group, choice, group if whole else "_here_")
        return result


class StructuredConfigSource(HydraStructuredConfigSource):
    def __deepcopy__(self, memo: dict) -> StructuredConfigSource:
        """Itself: Hydra copies its sources before it reads files, and a copy would not have the schemas that these register."""
        return self


def _add_schema(config: DictConfig, part: DictConfig, group: str, choice: str, package: str) -> None:
    """Register the schema of an own part, and put it first in the choice's defaults list, so that its file and the command line
    are checked against it. A choice that extends another one has that one's schema."""
    target, given = part._get_node("_target_"), list(config.get("defaults") or [])
    target = target._value() if isinstance(target, Node) else None
    if not own.is_own(target) or any(entry != "_self_" for entry in given):
        return
    keys = tuple(str(key) for key in part if key != "defaults")
    schema = own.SCHEMAS[f"{group}={choice}"] = own.schema_of(group, str(target), keys)
    name = choice.replace("/", "_")
    ConfigStore.instance().store(group=f"own/{group}", name=name, node=schema)
    config["defaults"] = [{f"/own/{group}@{package}": name}, "_self_"]


def install() -> None:
    """Make Hydra read YAML files this way in this process."""
    Plugins.instance()  # registers Hydra's own sources
    for source in (FileConfigSource, StructuredConfigSource):
        SourcesRegistry.instance().types[source.scheme()] = source
