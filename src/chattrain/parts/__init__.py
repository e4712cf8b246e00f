"""The contracts of parts of one's own, each a Protocol with a check that a test of theirs calls.

    from chattrain.parts import check_schedule

    def test_my_schedule_keeps_the_contract():
        check_schedule(my_schedule)

Keys of a part are bound first: `check_optimizer(functools.partial(build, lr=0.1))`. A check raises `ContractBroken`, an
AssertionError that says what is wrong. chattrain's own parts pass the same checks.
"""

from chattrain.parts.collators import check_collator
from chattrain.parts.contracts import BuildsCollator, BuildsModel, BuildsOptimizer, ContractBroken, Schedule, Source
from chattrain.parts.models import check_model
from chattrain.parts.optimizers import check_optimizer
from chattrain.parts.schedules import check_schedule
from chattrain.parts.sources import check_source

__all__ = [
    "BuildsCollator",
    "BuildsModel",
    "BuildsOptimizer",
    "ContractBroken",
    "Schedule",
    "Source",
    "check_collator",
    "check_model",
    "check_optimizer",
    "check_schedule",
    "check_source",
]
