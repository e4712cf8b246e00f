"""`schedule._target_=tests.faults.schedule`: in the fourth step, FAULT befalls rank FAULT_RANK, FAULT_OF_OTHERS the others."""

from __future__ import annotations

import os
import signal
import time
import traceback


def schedule(step: int, num_steps: int, **settings) -> float:
    training = any(frame.name == "fit" for frame in traceback.extract_stack())  # the highest rate is asked for before
    if step == 3 and training:
        mine = os.environ["RANK"] == os.environ["FAULT_RANK"]
        happen(os.environ["FAULT"] if mine else os.environ.get("FAULT_OF_OTHERS"))
    return 1.0


def happen(what: str | None) -> None:
    if what == "raise":
        raise ValueError("the wheel came off")
    if what == "sleep":
        time.sleep(3600)
    if what == "compute":
        while True:
            pass
    if what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
