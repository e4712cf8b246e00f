"""The page of all keys, from the schema."""

from __future__ import annotations

from chattrain.commands.help import pages
from chattrain.config import describe
from chattrain.config.choices import all_groups, default_choices
from chattrain.config.describe import Key


def page() -> str:
    """configuration.md: groups with their choices, then every key with meaning, type, default and what a resumed run may do."""
    groups = all_groups()
    lines = [
        "# Configuration",
        "",
        "Every group and every key, as the code declares them. `python -m chattrain --help <word>` shows the same on a terminal.",
        "A choice is typed `group=choice`, a key `section.key=value`. **Default** is what is composed where nothing else is",
        "typed; where stages or choices differ, each is named. **Resumed** says whether a resumed run may change a key: *yes*,",
        "with a *warning*, *no* (unless `run.allow_change` names it), or where it leads to the *same rows*.",
        "",
        "## Top level",
        "",
        *_table([key for key in describe.all_keys() if "." not in key.name and key.name not in describe.sections()]),
    ]
    for name in dict.fromkeys([*groups, *describe.sections()]):
        lines += ["", f"## {name}", "", f"{_sentence(describe.group_meaning(name) or describe.sections().get(name, ''))}", ""]
        if name in groups:
            lines += ["| choice | |", "|---|---|"]
            star = default_choices().get(name)
            lines += [f"| `{c.name}`{' (default)' if c.name == star else ''} | {_cell(c.meaning)} |" for c in groups[name]] + [""]
        lines += _table([key for key in describe.all_keys() if key.section == name and key.name != name])
    return "\n".join(lines) + "\n"


def _table(keys: list[Key]) -> list[str]:
    if not keys:
        return []
    return [
        "| key | meaning | type | default | resumed |",
        "|---|---|---|---|---|",
        *(f"| {_name(key)} | {_cell(key.meaning)} | {_type(key)} | {_default(key)} | {_resumed(key)} |" for key in keys),
    ]


def _name(key: Key) -> str:
    return f"`{key.name}`" + (f"<br>*{key.of}*" if key.owners else "")


def _type(key: Key) -> str:
    return ", ".join(f"`{word}`" for word in key.words) or key.type


def _default(key: Key) -> str:
    values = describe.defaults(key)
    if len(set(values.values())) == 1:
        return f"`{next(iter(values.values()))}`"
    return "<br>".join(f"{name}: `{value}`" for name, value in values.items())


def _resumed(key: Key) -> str:
    return {"silent": "yes", "warned": "warning", "refused": "no", "content": "same rows"}[pages.on_resume_word(key)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


if __name__ == "__main__":
    print(page())
