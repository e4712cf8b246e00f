"""Errors that carry what is wrong, the value, and the way out."""

LINGER_S = 1.5  # seconds that the first rank to fail stays before it speaks: the store may end with it, and all must have heard


class UserError(Exception):
    """A mistake in what the user asked for. Ends with this one message on stderr, no traceback, exit status 2."""

    exit_status = 2
    speaks = False  # has this rank told the others, so that it is the one to say it, whatever its number?


class RunFailed(Exception):
    """The run itself went wrong (a loss that is not finite, ...): one message, summary.json says `failed`, exit status 1."""

    exit_status = 1
    speaks = False


class OtherRankFailed(RunFailed):
    """The same, where a process that is nearer to the failure says it: this one keeps silent."""


def named(error: BaseException) -> str:
    """The error as summary.json has it."""
    return f"{'RunFailed' if isinstance(error, RunFailed) else type(error).__name__}: {error}"
