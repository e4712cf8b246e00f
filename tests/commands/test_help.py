"""`--help` answers in words: commands, groups, choices and keys, each with what it means, from the schema alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from chattrain.commands.help.examples import COMMANDS, EXAMPLES
from chattrain.config import describe
from chattrain.config.choices import all_groups
from chattrain.config.compose import conf_dir
from chattrain.config.words import Command
from tests.documented import composed, typed_in
from tests.helpers import command_line


def shown(capsys, *arguments: str) -> str:
    done = command_line(capsys, *arguments)
    assert done.status == 0 and done.err == "", done.err
    return done.out


def test_help_is_a_page_or_two_and_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['chattrain', '--help']\nfrom chattrain.__main__ import main\n"
        "try: main()\nfinally: print('HEAVY', {'torch', 'datasets', 'mlflow', 'numpy', 'tiktoken'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "HEAVY set()" in done.stdout
    assert len(done.stdout.splitlines()) < 80


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command_group_and_choice_with_what_it_is(flag, capsys):
    out = shown(capsys, flag)
    for name in Command.__members__:
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE)
    for group, choices in all_groups().items():
        entry = re.search(rf"^  {group} +\w(.|\n(?!  \w))*", out, re.MULTILINE)
        assert entry and all(re.search(rf"\b{choice.name}\b", entry[0]) for choice in choices), group
    assert "mid*" in out and "--cfg job" in out and "--help train.seq_len" in out


@pytest.mark.parametrize("name", Command.__members__)
def test_each_command_has_a_page_with_its_keys_and_two_examples(name, capsys):
    out = shown(capsys, f"command={name}", "--help")
    assert len(re.findall(r"^  python -m chattrain .+$", out, re.MULTILINE)) >= 2
    own = [key for key in describe.all_keys() if key.section == name and name not in COMMANDS[name].whole]
    assert all(f"{key.name} = " in out and key.meaning.split()[0] in out for key in own)
    assert out == shown(capsys, "--help", name) or name == "train"


@pytest.mark.parametrize("typed", [typed for page in COMMANDS.values() for typed, _ in page.examples] + [e[0] for e in EXAMPLES])
def test_every_example_of_the_help_composes(typed, workplace):
    for arguments in typed_in(f"python -m chattrain {typed}"):
        composed(arguments)


@pytest.mark.parametrize("section", list(describe.sections()))
def test_the_page_of_a_section_has_every_key_with_its_meaning(section, capsys):
    out = " ".join(shown(capsys, "--help", section).split())
    for key in describe.all_keys():
        if key.section == section:
            assert f"{key.name} = " in out and " ".join(key.meaning.split()) in out


@pytest.mark.parametrize("group", list(all_groups()))
def test_the_page_of_a_group_has_the_first_comment_of_each_choice(group, capsys):
    out = " ".join(shown(capsys, "--help", group).split())
    for file in (conf_dir() / group).glob("*.yaml"):
        first = next(line for line in file.read_text().splitlines() if line.startswith("#") and "@package" not in line)
        assert first.lstrip("# ").partition(". ")[0] in out, file


def test_the_page_of_a_choice_has_what_it_chooses_and_sets(capsys):
    for typed in ("stage=sft", "sft"):
        out = shown(capsys, "--help", typed)
        assert "collator=masked" in out and "train.rows_per_step=32" in out and "schedule.init_lr_frac=0.02" in out
    assert "gsm8k = true" in shown(capsys, "--help", "eval=[bpb,gsm8k]")
    assert "model.n_layer = 20" in shown(capsys, "model=d20", "--help")


def test_the_page_of_a_key_has_all_that_is_to_know_of_it(capsys):
    out = " ".join(shown(capsys, "--help", "train.rows_per_step").split())
    for part in (
        "rows an optimizer step",
        "whole number, or null",
        "base null, mid null, sft 32",
        "experiment=nanochat_sft_d20 (32)",
        "goes with train.total_batch_size",
        "may change it where the rows stay the same",
    ):
        assert part in out, part
    assert "auto, bf16, fp32" in shown(capsys, "--help", "train.dtype")
    assert "may not change it" in shown(capsys, "--help", "run.seed")
    assert "may change it, with a warning" in shown(capsys, "--help", "train.max_steps")
    assert "may change it\n" in shown(capsys, "--help", "log.every")


def test_a_key_that_two_choices_declare_has_the_default_of_each(capsys):
    out = shown(capsys, "--help", "optimizer.betas")
    assert "[0.8, 0.95]" in out and "[0.9, 0.95]" in out
    assert "optimizer=muon_adamw" in out and "optimizer=adamw" in out


def test_a_key_of_a_source_is_found_under_the_names_that_a_user_gave(capsys):
    assert "records at most" in shown(capsys, "--help", "data.stages.mid.train.talk.limit")
    assert "+tracking.tags.team=blue" in shown(capsys, "+tracking.tags.team=blue", "--help")


@pytest.mark.parametrize(
    "typed, near",
    [
        ("train.max_step=3", "train.max_steps"),
        ("optimiser", "optimizer"),
        ("seq_len", "train.seq_len"),
        ("evalute", "evaluate"),
        ("command=evalute", "evaluate"),
        ("optimizer=adamv", "adamw"),
        ("quickstrat", "quickstart"),
    ],
)
def test_help_on_an_unknown_word_suggests_a_near_one(typed, near, capsys):
    refused = command_line(capsys, "--help", typed)
    assert refused.status == 2 and refused.out == ""
    assert re.search(rf"did you mean {re.escape(near)}\?$", refused.message), refused.message


def test_help_lists_the_choices_of_the_users_own_folder(workplace, capsys):
    (workplace / "my_conf/data").mkdir(parents=True)
    (workplace / "my_conf/data/mine.yaml").write_text("# Letters to my aunt.\ndefaults: [demo]\n")
    for own in (["--config-dir", "my_conf"], ["--config-dir=my_conf"], [f"hydra.searchpath=[file://{workplace}/my_conf]"]):
        asked = [a for a in own if not a.startswith("hydra.")]
        if asked:
            assert "mine" in shown(capsys, *own, "--help")
            assert "Letters to my aunt." in shown(capsys, *own, "--help", "data")
            assert "data=mine" in shown(capsys, *own, "data=mine", "--help")


def test_help_explains_an_own_part_by_its_signature(workplace, capsys, monkeypatch):
    (workplace / "mypart.py").write_text("def factor(step, num_steps, *, bend: float = 0.5):\n    return 1.0\n")
    (workplace / "my_conf/schedule").mkdir(parents=True)
    (workplace / "my_conf/schedule/bent.yaml").write_text("# Bends once.\n_target_: mypart.factor\nbend: 0.7\n")
    monkeypatch.syspath_prepend(workplace)
    out = shown(capsys, "--config-dir", "my_conf", "--help", "schedule=bent")
    assert "Bends once." in out and "schedule.bend = 0.7" in out


def test_the_values_of_a_command_line_are_shown_by_cfg_job(capsys):
    assert "seq_len: 123" in shown(capsys, "stage=sft", "train.seq_len=123", "--cfg", "job")


# --- completion ------------------------------------------------------------------------------------------------------


def completed(line: str) -> list[str]:
    """What bash offers for a line, with the script of -sc install=bash evaluated as README says."""
    script = f"""
    python() {{ {sys.executable} "$@"; }}
    eval "$(python -m chattrain -sc install=bash)"
    compopt() {{ :; }}
    COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
    _chattrain
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_groups_choices_keys_words_and_files(workplace):
    (workplace / "talk.jsonl").write_text("")
    assert completed("python -m chattrain stage=mid optimizer=") == ["optimizer=adamw", "optimizer=muon_adamw"]
    assert completed("python -m chattrain train.max_st") == ["train.max_steps="]
    assert completed("python -m chattrain train.dtype=b") == ["train.dtype=bf16"]
    assert completed("python -m chattrain --help verify") == ["verify_resume", "verify", "verify.steps"]
    assert completed("python -m chattrain data.train_path=ta") == ["data.train_path=talk.jsonl"]
    assert completed("python -m pytest o") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_the_runs_that_there_are(workplace):
    for name in ("runs/sft/farm", "runs/mid/farm", "elsewhere/sft/field"):
        (workplace / name).mkdir(parents=True)
        (workplace / name / "config.yaml").write_text("")
    assert completed("python -m chattrain command=chat init.from=s") == ["init.from=sft/farm"]
    assert completed("python -m chattrain command=report runs=[mid/farm,s") == ["runs=[mid/farm,sft/farm"]
    assert completed("python -m chattrain stage=sft run.root=elsewhere run.name=") == ["run.name=field"]
    assert completed("python -m chattrain init.from=runs/m") == ["init.from=runs/mid/"]  # no run of that name: folders
