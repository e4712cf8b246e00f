"""`--help`: a page for people, or one on each command, group, choice and key that is typed with it.

All of it comes from the schema (config/describe.py). Hydra's own help copies all schemas twice for every group that it lists, and
explains none of the keys.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from chattrain.commands.help import pages
from chattrain.config import describe
from chattrain.config.choices import all_groups
from chattrain.config.compose import config_dirs, key_of
from chattrain.errors import UserError

FLAGS = ("--help", "-h")
CONFIG_DIR = ("--config-dir", "-cd")


def is_requested(arguments: list[str]) -> bool:
    return any(flag in arguments for flag in FLAGS)


def text(arguments: list[str]) -> str:
    """The help that a command line asks for: on what else is typed, or on all.

    Raises UserError for a word that is no command, group or key.
    """
    own = tuple(own_folders(arguments))
    topics = [page(word, own) for word in topics_of(arguments)]
    return "\n".join(topics) if topics else pages.main_page(own)


def topics_of(arguments: list[str]) -> list[str]:
    """
    >>> topics_of(["-m", "--help", "optimizer", "--config-dir", "my_conf", "--config-dir=other", "command=chat"])
    ['optimizer', 'command=chat']
    """
    found, words = [], iter(arguments)
    for word in words:
        if word in CONFIG_DIR:
            next(words, None)
        elif not word.startswith("-"):
            found.append(word)
    return found


def own_folders(arguments: list[str]) -> list[Path]:
    """The folders of the user's own choices.

    >>> own_folders(["stage=sft", "--config-dir", "my_conf"]), own_folders(["--config-dir=my_conf"])
    ([PosixPath('my_conf')], [PosixPath('my_conf')])
    """
    words = [part for word in arguments for part in word.split("=", 1 if word.startswith("--") else 0)]
    given = [folder for flag, folder in pairwise(words) if flag in CONFIG_DIR]
    return [Path(folder) for folder in [*given, *config_dirs(arguments)]]


def page(word: str, own: tuple[Path, ...]) -> str:
    """The page on a word: a command, a group, a choice of it, a section of keys or a key. Raises UserError for another word."""
    key, _, value = word.partition("=")
    key, groups, commands = key_of(word), all_groups(own), describe.commands()
    if key == "command" and value:
        return pages.command_page(known(value, list(commands), "command"))
    if value and key in groups:
        choices = {choice.name: choice for choice in groups[key]}
        names = [known(name, list(choices), f"choice of {key}") for name in value.strip("[]").split(",")]
        return "\n".join(pages.choice_page(choices[name]) for name in names)
    if key in commands and not value and not pages.is_section_alone(key):
        return pages.command_page(key)
    if key in groups or key in describe.sections():
        return pages.group_page(key, own)
    if describe.find_keys(key):
        return pages.key_page(key, own)
    if found := [choice for group in groups.values() for choice in group if choice.name == word]:
        return "\n".join(pages.choice_page(choice) for choice in found)
    if key.startswith("hydra"):
        raise UserError(f"{key} is Hydra's own: --hydra-help, and https://hydra.cc")
    words = [*commands, *groups, *describe.sections(), *(k.name for k in describe.all_keys() if "<" not in k.name)]
    words += [choice.name for group in groups.values() for choice in group]
    return known(key, words, "command, group, choice or key")


def known(word: str, words: list[str], what: str) -> str:
    """The word. Raises UserError where it is none of the words, with those that are like it."""
    if word not in words:
        few = f"; choose from {', '.join(words)}" if len(words) < 30 else "; --help lists them"
        raise UserError(f"no {what} {word}{describe.suggestion(word, words) or few}")
    return word
