"""sbatch, srun and sacct for tests, under these names: jobs run on this host at once, each node is this host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

STATES = Path(os.environ.get("SLURM_STAND_IN", "."))  # a file a task of the array, empty while it runs


def sbatch(script: str) -> None:
    """Submit an array of jobs, and return while they run."""
    text = Path(script).read_text()
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", text))
    last = int(re.match(r"0-(\d+)", options.get("array", "0-0")).group(1))
    for index in range(last + 1):
        (STATES / f"42_{index}").touch()
        job = {
            "SLURM_JOB_ID": str(43 + index),
            "SLURM_ARRAY_JOB_ID": "42",
            "SLURM_ARRAY_TASK_ID": str(index),
            "SLURM_NNODES": options["nodes"],
            "SLURM_NTASKS": options["nodes"],
            "SLURM_JOB_NODELIST": "localhost",
        }
        command = f"{text}\necho COMPLETED > {STATES}/42_{index}"  # the script is moved as soon as it is submitted
        subprocess.Popen(
            ["bash", "-c", command],
            env={**os.environ, **job},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print("Submitted batch job 42")


def srun(*arguments: str) -> None:
    """One task a node, each of which writes to --output and --error."""
    written = dict(a[2:].split("=", 1) for a in arguments if a.startswith(("--output=", "--error=")))
    for index, word in enumerate(arguments):
        if word in ("--output", "--error"):
            written[word[2:]] = arguments[index + 1]
    command = arguments[next(i for i, word in enumerate(arguments) if "python" in word) :]
    started = []
    for task in range(int(os.environ["SLURM_NTASKS"])):
        names = {"%A": os.environ["SLURM_ARRAY_JOB_ID"], "%a": os.environ["SLURM_ARRAY_TASK_ID"], "%t": str(task)}
        paths = [re.sub("%[Aat]", lambda found, n=names: n[found.group()], written[which]) for which in ("output", "error")]
        env = {**os.environ, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURM_LOCALID": "0"}
        while not Path(paths[0]).parent.is_dir():  # submitit makes it once the job has its number
            time.sleep(0.05)
        with open(paths[0], "a") as out, open(paths[1], "a") as err:
            started.append(subprocess.Popen(command, stdout=out, stderr=err, env=env))
    sys.exit(max(process.wait() for process in started))


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for file in STATES.iterdir():
        print(f"{file.name}|{file.read_text().strip() or 'RUNNING'}|localhost")


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct}[Path(sys.argv[1]).name](*sys.argv[2:])
