"""Errors that carry what is wrong, the value, and the way out."""


class UserError(Exception):
    """A mistake in what the user asked for. Ends with this one message on stderr, no traceback, exit status 2."""

    exit_status = 2


class RunFailed(Exception):
    """The run itself went wrong (a loss that is not finite, ...): one message, summary.json says `failed`, exit status 1."""

    exit_status = 1
