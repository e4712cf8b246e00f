"""Runs a program that a model wrote, in bubblewrap only: no network, no files but Python's own, read-only, no other process,
limits on time and memory. Where bubblewrap cannot do that, nothing is run.
"""

from __future__ import annotations

import platform
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from chattrain.errors import UserError

SECONDS = 5  # of a program, on the clock and of the processor
MEMORY = 512 << 20  # bytes of address space
OUTPUT = 1 << 20  # bytes that it may print
SHOWN = ("/usr", "/lib", "/lib64", "/bin")  # folders that Python needs, where they exist

# Before the program, in its own process. Hard limits: it cannot raise them.
LIMITS = f"""\
import resource as _r
for _what, _most in ((_r.RLIMIT_AS, {MEMORY}), (_r.RLIMIT_CPU, {SECONDS}), (_r.RLIMIT_FSIZE, {OUTPUT}), (_r.RLIMIT_CORE, 0)):
    _r.setrlimit(_what, (_most, _most))
"""
RUN = "exec(compile({program!r}, '<reply>', 'exec'), {{'__name__': '__main__'}})\n"  # in a namespace of its own

# Numbers of Linux's system calls, by machine: its name in seccomp, (fork, vfork), clone, clone3.
CALLS = {"x86_64": (0xC000003E, (57, 58), 56, 435), "aarch64": (0xC00000B7, (), 220, 435)}
LOAD, EQUAL, AT_LEAST, SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of BPF
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # DENY | errno
EPERM, ENOSYS, CLONE_THREAD = 1, 38, 0x00010000


def check() -> None:
    """Raises UserError where a program cannot be run safely here."""
    reason = None
    if sys.platform != "linux" or platform.machine() not in CALLS:
        reason = f"it is for Linux on {' or '.join(CALLS)}"
    elif shutil.which("bwrap") is None:
        reason = "it is not installed: apt install bubblewrap, dnf install bubblewrap"
    elif error := _run("pass")[1]:
        reason = f"it cannot start here ({error})"
    if reason:
        raise UserError(
            f"eval.humaneval=true runs programs that the model writes, in bubblewrap only, and {reason}. Or leave HumanEval out: "
            "eval.humaneval=false"
        )


def passes(program: str) -> bool:
    """Does the program run to its end, without an error and within the limits?"""
    return _run(program)[0]


def _run(program: str) -> tuple[bool, str]:
    """(Did it run to its end, the last line that it printed to stderr)."""
    mark = secrets.token_hex()  # printed behind the program: exit status 0 may be its own
    python = Path(sys._base_executable).resolve()  # pyright: ignore[reportAttributeAccessIssue]
    command = ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
    for folder in dict.fromkeys([*SHOWN, sys.base_prefix]):
        command += ["--ro-bind-try", folder, folder]
    with tempfile.TemporaryFile() as seccomp, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        seccomp.write(no_processes(platform.machine()))
        seccomp.seek(0)
        command += [
            "--seccomp",
            str(seccomp.fileno()),
            "--remount-ro",
            "/",
            "--chdir",
            "/",
            "--",
            str(python),
            "-I",
            "-S",
            "-B",
            "-",
        ]
        try:
            done = subprocess.run(
                command,
                input=(LIMITS + RUN.format(program=program) + f"print({mark!r})\n").encode("utf-8", "replace"),
                stdout=out,
                stderr=err,
                timeout=SECONDS,
                pass_fds=(seccomp.fileno(),),
            )
        except subprocess.TimeoutExpired:
            return False, f"no end within {SECONDS} seconds"
        ends = [_end_of(file) for file in (out, err)]
    passed = done.returncode == 0 and ends[0] == mark
    return passed, "" if passed else ends[1] or f"exit status {done.returncode}"


def _end_of(file) -> str:
    """The last line of a file."""
    file.seek(max(0, file.seek(0, 2) - 1000))
    return (file.read().decode("utf-8", "replace").splitlines() or [""])[-1].strip()


def no_processes(machine: str) -> bytes:
    """A filter of system calls (seccomp, in BPF) under which a process may start threads, but no other process."""
    arch, forks, clone, clone3 = CALLS[machine]
    deny = DENY | EPERM
    checks = [  # (instruction, operand, jump if true, else); jumps count instructions to leave out
        (LOAD, 4, 0, 0),  # the machine
        (EQUAL, arch, 1, 0),
        (RETURN, KILL, 0, 0),
        (LOAD, 0, 0, 0),  # the number of the call
        (AT_LEAST, 0x40000000, 0, 1),  # numbers of x32
        (RETURN, deny, 0, 0),
        (EQUAL, clone3, 0, 1),  # libraries then use clone, whose flags can be read
        (RETURN, DENY | ENOSYS, 0, 0),
    ]
    for fork in forks:
        checks += [(EQUAL, fork, 0, 1), (RETURN, deny, 0, 0)]
    checks += [
        (EQUAL, clone, 0, 3),
        (LOAD, 16, 0, 0),  # its flags
        (SET, CLONE_THREAD, 1, 0),
        (RETURN, deny, 0, 0),
        (RETURN, ALLOW, 0, 0),
    ]
    return b"".join(struct.pack("<HBBI", code, true, false, operand) for code, operand, true, false in checks)
