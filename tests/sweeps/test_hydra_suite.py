"""Hydra's own tests for launchers, on ours: one job at a time, and side by side."""

from __future__ import annotations

import pytest
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

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
