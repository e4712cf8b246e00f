"""The help and the docs come from the schema: every key has a comment, and what is said of a default is what is composed."""

from __future__ import annotations

import pytest

from chattrain.config import describe
from chattrain.config.choices import all_groups
from chattrain.config.compose import compose, known_keys
from chattrain.config.words import Command


def test_every_key_has_a_comment():
    assert [key.name for key in describe.all_keys() if not key.meaning] == []


def test_every_choice_begins_with_a_comment_and_every_group_says_what_it_chooses():
    groups = all_groups()
    assert [f"{group}={choice.name}" for group, choices in groups.items() for choice in choices if not choice.meaning] == []
    assert [group for group in groups if not describe.group_meaning(group)] == []


def test_every_command_says_what_it_does():
    assert describe.commands().keys() == Command.__members__.keys()
    assert all(describe.commands().values())


def test_no_key_is_left_out(monkeypatch):
    monkeypatch.setattr("chattrain.config.compose.SCHEMAS", {})  # of parts of one's own that other tests have read
    described = {key.name for key in describe.all_keys()} | describe.sections().keys()
    assert set(known_keys()) - described == set()


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_defaults_are_those_that_are_composed(stage):
    cfg = compose([f"stage={stage}"])
    for key in describe.all_keys():
        if not key.owners and "<" not in key.name and key.name != "stage":
            part = cfg
            for name in key.name.split("."):
                part = getattr(part, name)
            values = describe.defaults(key)
            assert values.get(stage, next(iter(values.values()))) == describe.as_yaml(part), key.name


def test_a_key_of_some_choices_has_their_own_defaults():
    (layers,) = describe.find_keys("model.n_layer")
    assert describe.defaults(layers) == {"d6": "6", "d12": "12", "d20": "20", "d32": "32", "tiny": "4"}
