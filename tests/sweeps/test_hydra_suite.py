"""Hydra's own tests for launchers, on ours: one job at a time, and side by side."""

from __future__ import annotations

import pytest
from hydra import version
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from chattrain.sweeps import launching


@pytest.fixture(autouse=True)
def without_chattrain(monkeypatch):
    """What an earlier test's command line left in this process: Hydra's version and our launch."""
    version.setbase("1.1")
    monkeypatch.setattr(launching, "_current", None)


IN_THIS_PROCESS: list[str] = []
SIDE_BY_SIDE = ["hydra.launcher.jobs=2"]


@pytest.mark.parametrize("launcher_name, overrides", [("local", IN_THIS_PROCESS), ("local", SIDE_BY_SIDE)])
class TestLauncher(LauncherTestSuite):
    pass


@pytest.mark.parametrize(
    "launcher_name, overrides",
    [("local", [*slots, "hydra.sweeper.max_batch_size=2"]) for slots in (IN_THIS_PROCESS, SIDE_BY_SIDE)],
)
class TestBatches(BatchedSweeperTestSuite):
    pass


@pytest.mark.parametrize(
    "task_launcher_cfg, extra_flags",
    [({}, ["-m", "hydra/launcher=local", *slots]) for slots in (IN_THIS_PROCESS, SIDE_BY_SIDE)],
)
class TestWholePrograms(IntegrationTestSuite):
    pass
