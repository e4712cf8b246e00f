"""The short form of `make faults`: a run that is killed several times ends as if nothing had happened."""

from __future__ import annotations

import pytest

from tests.helpers import write_talk
from tests.kills import kill_and_resume


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_and_inside_saves_ends_as_one_that_nothing_disturbed(workplace, nproc):
    write_talk(workplace)
    story = kill_and_resume(workplace / "runs", count=4, steps=60, nproc=nproc)
    assert len(story.kills) >= 2
    assert [kill for kill in story.kills if not kill.survived] == []
    assert story.differences == []
