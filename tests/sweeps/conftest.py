"""A name for each test of sweeps."""

from __future__ import annotations

from itertools import count

import pytest

NAMES = (f"sweep{number}" for number in count())


@pytest.fixture
def name() -> str:
    """A name that no other test has."""
    return next(NAMES)
