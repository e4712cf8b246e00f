"""The pages of the help, as text."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from chattrain.commands.help.examples import COMMANDS, EXAMPLES, Example, Page
from chattrain.config import describe
from chattrain.config.choices import Choice, all_groups, default_choices, overrides_of, set_by
from chattrain.config.describe import Key, as_yaml
from chattrain.config.on_resume import BY_CONTENT, Change, is_within, on_resume

INDENT = 17
ON_RESUME = {
    "silent": "may change it",
    "warned": "may change it, with a warning",
    "content": "may change it where the rows stay the same (run.allow_change allows others)",
    "refused": "may not change it (run.allow_change=[{}] allows it)",
}


def main_page(own: tuple[Path, ...]) -> str:
    commands = {name: first_line(text) for name, text in describe.commands().items()}
    defaults = default_choices()
    groups = {
        group: f"{describe.group_meaning(group)}: {', '.join(_starred(c.name, defaults.get(group)) for c in choices)}"
        for group, choices in all_groups(own).items()
    }
    sections = [name for name in describe.sections() if name not in groups]
    return "\n".join(
        [
            "chattrain: turn a language model into a chat model, in two trainings (mid, then sft) that differ in YAML only.\n",
            "  python -m chattrain [command=name] [group=choice ...] [key=value ...] [-m]\n",
            "Commands (command=name; train is the default):",
            *entries(commands),
            "\nGroups (group=choice; * is the default):",
            *entries(groups),
            "\nKeys (section.key=value) are in these sections, and in the groups:",
            *wrapped(", ".join(sections), "  "),
            "\nExamples:",
            *examples(EXAMPLES),
            "\nRead on:",
            *entries(
                {
                    "--help <word>": "a command, group, choice, section or key: --help sft, --help train, --help train.seq_len",
                    "--cfg job": "every key, with the values that the rest of the command line gives them",
                    "docs/": "quickstart, your own data, how-tos, every key; `make docs` builds them as a site",
                }
            ),
        ]
    )


def command_page(name: str) -> str:
    text, page = describe.commands()[name], COMMANDS.get(name, Page())
    wanted = [*page.keys, *([name] if name in describe.sections() and name not in page.keys else [])]
    names = [key.name for key in describe.all_keys()]
    lines = []
    for entry in wanted:
        if entry in page.whole:
            continue
        found = [name for name in dict.fromkeys(names) if name == entry or name.startswith(f"{entry}.")]
        lines += [line for name in found for key in describe.find_keys(name) for line in key_lines(key)]
    whole = {entry: describe.sections().get(entry) or describe.group_meaning(entry) for entry in page.whole}
    return "\n".join(
        [
            f"command={name}",
            *(
                line
                for paragraph in text.split("\n\n")
                for line in ["", *wrapped(" ".join(paragraph.split()), "  ")][name == "" :]
            ),
            *(["\nKeys:", *lines] if lines else []),
            *(["\nSections and groups that it reads (--help <name> lists their keys):", *entries(whole)] if whole else []),
            "\nExamples:",
            *examples(page.examples),
            "",
        ]
    )


def group_page(name: str, own: tuple[Path, ...]) -> str:
    """A group with its choices, a section with its keys, or both."""
    choices = all_groups(own).get(name, [])
    default = default_choices().get(name)
    keys = [key for key in describe.all_keys() if key.section == name and key.name != name]
    return "\n".join(
        [
            f"{name}: {describe.group_meaning(name) or describe.sections()[name]}",
            *([f"\nChoices ({name}=choice; * is the default):"] if choices else []),
            *entries({_starred(choice.name, default): choice.meaning for choice in choices}),
            *([f"\nWhat a choice sets: --help {name}=<choice>."] if choices else []),
            *(["\nKeys:", *(line for key in keys for line in key_lines(key))] if keys else []),
            "",
        ]
    )


def choice_page(choice: Choice) -> str:
    """A choice with what its file sets, and its keys."""
    keys = describe.choice_keys(choice)
    others = {name: as_yaml(value) for name, value in choice.sets.items() if name not in [key.name for key in keys]}
    chosen = {group: f"{group}={name}" for group, name in overrides_of(choice).items()}
    return "\n".join(
        [
            f"{choice.group}={choice.name}: {choice.meaning}",
            *(["\nIt chooses:", *wrapped(", ".join(chosen.values()), "  ")] if chosen else []),
            *(["\nIt sets:", *(f"  {name}={value}" for name, value in others.items())] if others else []),
            *(["\nKeys:", *(line for key in keys for line in key_lines(key, as_yaml(key.default)))] if keys else []),
            "",
        ]
    )


def key_page(name: str, own: tuple[Path, ...]) -> str:
    """Everything about a key."""
    found = describe.find_keys(name)
    lines = [found[0].name]
    for key in found:
        facts = {"of": key.of, "type": key.type, "words": ", ".join(key.words), "default": default_text(key)}
        lines += ["", *wrapped(key.meaning, "  "), "", *entries({k: v for k, v in facts.items() if v})]
    setters = {choice: as_yaml(value) for choice, value in set_by(found[0].name, own).items()}
    facts = {
        "set by": ", ".join(f"{choice} ({value})" for choice, value in setters.items()),
        "goes with": ", ".join(describe.related(found[0])),
        "a resumed run": ON_RESUME[on_resume_word(found[0])].format(found[0].name),
    }
    return "\n".join([*lines, *entries({k: v for k, v in facts.items() if v}), ""])


def default_text(key: Key) -> str:
    """The default of a key, where stages or choices differ for each.

    >>> default_text(describe.find_keys("train.rows_per_step")[0]), default_text(describe.find_keys("log.every")[0])
    ('base null, mid null, sft 32', '10')
    """
    values = describe.defaults(key)
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{name} {value}" for name, value in values.items())


def is_section_alone(name: str) -> bool:
    """Is a word the name of a command and of a section that has a page of its own?"""
    return name in COMMANDS and name in COMMANDS[name].whole


def on_resume_word(key: Key) -> str:
    """silent, warned or refused; content: what the key leads to is compared, not its value."""
    change = on_resume(key.name)
    by_content = any(is_within(key.name, entry) for entry in BY_CONTENT)
    return "content" if by_content and change == Change.refused else change.value


# --- lines -----------------------------------------------------------------------------------------------------------


def key_lines(key: Key, default: str | None = None) -> list[str]:
    """A key with its default, and below it what it means. `default`: that of a choice; None: where nothing else is typed."""
    facts = [key.meaning or "", f"one of {', '.join(key.words)}" if key.words and not _all_named(key) else ""]
    only = f"  [{key.of}]" if key.owners and default is None else ""
    return [f"  {key.name} = {default or default_text(key)}{only}", *wrapped("; ".join(f for f in facts if f), "      ")]


def _all_named(key: Key) -> bool:
    """Does the meaning say all words that the key takes?"""
    return all(re.search(rf"\b{re.escape(word)}\b", key.meaning) for word in key.words)


def examples(given: tuple[Example, ...] | list[Example]) -> list[str]:
    return [line for typed, what in given for line in (f"  python -m chattrain {typed}", f"      {what}")]


def entries(texts: dict[str, Any]) -> list[str]:
    """Names on the left, what they mean on the right, wrapped."""
    lines = []
    for name, text in texts.items():
        body = wrapped(str(text), " " * (INDENT + 2)) or [""]
        head = f"  {name:<{INDENT}}"
        lines += [head + body[0].lstrip(), *body[1:]] if len(name) < INDENT else [head.rstrip(), *body]
    return lines


def wrapped(text: str, indent: str) -> list[str]:
    width = max(60, min(110, shutil.get_terminal_size((110, 24)).columns))
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def first_line(text: str) -> str:
    """The first sentence of a text, without its stop."""
    return re.split(r"\.(?:\s|$)", " ".join(text.split()), maxsplit=1)[0]


def _starred(name: str, default: str | None) -> str:
    return f"{name}*" if name == default else name
