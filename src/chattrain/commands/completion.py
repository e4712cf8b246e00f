"""Completion in bash, and in zsh through its bashcompinit: `eval "$(python -m chattrain -sc install=bash)"`.

Hydra's own does not know `python -m`, completes enums as `command=Command.train`, and composes the configuration at every Tab. It
stays for fish: `-sc install=fish`, with the console script `chattrain`.
"""

from __future__ import annotations

import os
from pathlib import Path

from chattrain.commands import help
from chattrain.config import describe
from chattrain.config.choices import all_groups

FLAGS = ("-sc", "--shell-completion")
SCRIPT = r"""_chattrain() {
    [[ -n "$ZSH_VERSION" ]] && setopt localoptions shwordsplit ksharrays
    local line="${COMP_LINE:0:$COMP_POINT}" word call
    case "$line" in
        *python*" -m chattrain "*) call="${line%%-m chattrain *}-m chattrain" ;;
        *python*) return ;;
        *) call="${line%% *}" ;;
    esac
    word="${line##* }"
    COMPREPLY=($(COMP_LINE="$line" $call -sc query=bash 2> /dev/null))
    if [[ ${#COMPREPLY[@]} == 0 && "$word" == *=* ]]; then
        COMPREPLY=($(compgen -P "${word%%=*}=" -f -- "${word#*=}"))
        [[ ${#COMPREPLY[@]} == 1 && -d "${COMPREPLY[0]#*=}" ]] && COMPREPLY[0]+=/
    fi
    if [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *[=./] ]]; then
        compopt -o nospace 2> /dev/null
    fi
}
COMP_WORDBREAKS="${COMP_WORDBREAKS//=}"
if [[ -n "$ZSH_VERSION" ]]; then
    complete -o nospace -F _chattrain chattrain python python3  # it has no compopt
else
    complete -o default -F _chattrain chattrain python python3
fi"""


def is_requested(arguments: list[str]) -> bool:
    return bool(set(FLAGS) & set(arguments)) and bool({"install=bash", "query=bash"} & set(arguments))


def text(arguments: list[str]) -> str:
    """The script to evaluate, or what may stand in place of the last word of $COMP_LINE, a line each."""
    if "install=bash" in arguments:
        return SCRIPT
    *before, word = os.environ.get("COMP_LINE", "").split(" ")
    return "\n".join(candidates(before, word))


def candidates(before: list[str], word: str) -> list[str]:
    """What a word may become: groups, sections and keys; behind `=` choices and words; behind --help anything that has a page.

    >>> candidates([], "sch"), candidates([], "schedule.in"), candidates([], "optimizer=muon_adamw,a")
    (['schedule=', 'schedule.'], ['schedule.init_lr_frac='], ['optimizer=muon_adamw,adamw'])
    >>> candidates(["--help"], "train.max_s")
    ['train.max_steps', 'train.max_supervised_tokens', 'train.max_skipped']
    """
    groups = all_groups(tuple(help.own_folders(before)))
    keys = list(dict.fromkeys(key.name for key in describe.all_keys() if "<" not in key.name))
    if before and before[-1] in help.FLAGS:
        found = [*describe.commands(), *groups, *describe.sections(), *keys]
    elif "=" in word:
        key, _, value = word.partition("=")
        given = value[: 1 + max(value.rfind(","), value.rfind("["))]
        words = [choice.name for choice in groups.get(key, [])] or [word for k in describe.find_keys(key) for word in _words(k)]
        found = [f"{key}={given}{name}" for name in words or _runs(key, before)]
    elif "." in word:
        found = [f"{key}=" for key in keys]
    else:
        found = [f"{group}=" for group in groups] + [
            f"{key}=" for key in keys if "." not in key and key not in describe.sections()
        ]
        found += [f"{section}." for section in describe.sections()] + ["--help", "--multirun", "--cfg", "--config-dir"]
    return list(dict.fromkeys(name for name in found if name.startswith(word)))


def _runs(key: str, before: list[str]) -> list[str]:
    """For a key that names runs, those that there are."""
    roots = [word.partition("=")[2] for word in before if word.startswith("run.root=")]
    folders = sorted(file.parent for file in Path([*roots, "runs"][0]).glob("*/*/config.yaml"))
    if key in ("init.from", "runs"):
        return [f"{folder.parent.name}/{folder.name}" for folder in folders]
    return [folder.name for folder in folders] if key == "run.name" else []


def _words(key: describe.Key) -> tuple[str, ...]:
    return key.words or (("true", "false") if "true or false" in key.type else ())
