"""Command lines and configurations, mutated: composed, or refused with one message and exit status 2."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from chattrain.config.compose import compose, known_keys
from tests.fuzz.inputs import TEXTS, for_all, forms, mutated_bytes, refusal
from tests.helpers import command_line

TYPED = [
    "stage=sft",
    "stage=mid optimizer=adamw optimizer.lr=1e-4",
    "stage=sft data=local data.train_path=talk.jsonl data.schema=messages",
    "train.max_steps=10 train.rows_per_step=4 checkpoint.every=5",
    "command=chat chat.prompt=['Hello!','Who are you?']",
    "schedule=cosine schedule.warmup_steps=10 +run.notes=x ~eval",
    "run.dir=runs/a init.from=scratch runs=[a,b]",
]
ODD = [
    *TEXTS,
    "[",
    "]",
    "{",
    "{a:1}",
    "[[]]",
    "'",
    '"',
    "'a",
    "$",
    "${",
    "${a}",
    "${oc.env:NO}",
    "a=b",
    "1_000",
    "1e999",
    "nan",
    "-inf",
    "[1,2",
]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Keys that there are with values that are odd, or what users type, with letters changed."""
    if draw(st.booleans()):
        return [
            f"{draw(st.sampled_from(['', '+', '++', '~']))}{key}={draw(st.sampled_from(ODD) | st.text(max_size=12))}"
            for key in draw(st.lists(st.sampled_from(known_keys()), min_size=1, max_size=2))
        ]
    typed = draw(st.sampled_from(TYPED)).encode()
    return [word for word in draw(mutated_bytes(typed)).decode(errors="replace").split(" ") if word]


@forms(20, 400)
def test_a_mutated_command_line_composes_or_is_refused(workplace, count):
    for_all(count, command_lines(), lambda typed: refusal(lambda: compose(typed)))


@forms(4, 40)
def test_a_mutated_command_line_ends_with_one_message(workplace, capsys, count):
    def check(typed: list[str]) -> None:
        end = command_line(capsys, "--cfg=job", *[word.replace("\0", "") for word in typed if not word.startswith("-")])
        assert end.status == 0 or (end.status in (1, 2) and end.message)

    for_all(count, command_lines(), check)


OWN = b"""# @package _global_
defaults:
  - override /optimizer: adamw
train:
  max_steps: 7
optimizer:
  lr: 3e-4
"""


@forms(6, 100)
def test_a_mutated_file_of_the_users_own_configuration(workplace, capsys, count):
    folder = workplace / "own" / "experiment"
    folder.mkdir(parents=True)

    def check(content: bytes) -> None:
        (folder / "mine.yaml").write_bytes(content)
        end = command_line(capsys, "--config-dir", "own", "experiment=mine", "--cfg=job")
        assert end.status == 0 or (end.status == 2 and end.message)

    for_all(count, mutated_bytes(OWN), check)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [ran]", "!!python/name:os.system"])
def test_a_tag_in_a_configuration_makes_nothing(workplace, capsys, text):
    (workplace / "own" / "experiment").mkdir(parents=True)
    (workplace / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\nrun:\n  name: {text}\n")
    end = command_line(capsys, "--config-dir", "own", "experiment=mine", "--cfg=job")
    assert end.status == 2 and end.message
    assert not (workplace / "ran").exists()
