"""`python -m chattrain.licences`: the packages that chattrain needs, installed here, each with its version and licence."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution


def dependencies(package: str = "chattrain") -> dict[str, Distribution]:
    """The installed packages that a package needs, and that those need, by name. Extras count where they are installed."""
    found: dict[str, Distribution] = {}
    waiting = [package]
    while waiting:
        name = waiting.pop()
        try:
            needs = distribution(name)
        except PackageNotFoundError:  # of an extra or another system
            continue
        for requirement in needs.requires or []:
            of_extra = "extra ==" in requirement and name != package
            needed = canonical(re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0])
            if needed not in found and not of_extra and needed != package:
                waiting.append(needed)
        if name != package:
            found[name] = needs
    return dict(sorted(found.items()))


def canonical(name: str) -> str:
    """
    >>> canonical("Ruamel.YAML_x")
    'ruamel-yaml-x'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(package: Distribution) -> str:
    """The licence that a package names: its SPDX expression, else its classifiers, else the first line of its text."""
    told = package.metadata

    def named(key: str) -> list[str]:
        return told.get_all(key) or []

    classified = [text.rpartition(" :: ")[2] for text in named("Classifier") if text.startswith("License ::")]
    texts = [text.strip().partition("\n")[0] for text in named("License")]
    ordered = [*named("License-Expression"), ", ".join(name for name in classified if name != "OSI Approved"), *texts]
    return next(filter(None, ordered), "not named")


def main() -> None:
    for name, package in dependencies().items():
        print(f"{name:32s} {package.version:20s} {licence(package)}")


if __name__ == "__main__":
    main()
