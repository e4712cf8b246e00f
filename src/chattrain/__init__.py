"""chattrain: turn a language model into a chat model."""

__version__ = "0.1.0"


def run(overrides: list[str] | None = None) -> dict:
    """Compose the configuration with these overrides, as typed on the command line, and run its command.

    Returns the summary (for command=train, what summary.json holds). The caller's Hydra, signal handlers, logging and environment
    are as before once it returns. Raises UserError for a user's mistake and
    RunFailed where the run went wrong.

    >>> run(["stage=sft", "train.max_steps=20"])  # doctest: +SKIP
    """
    from chattrain.commands.execute import execute
    from chattrain.config.compose import compose, config_dirs
    from chattrain.setup.job import Job, as_job

    typed = list(overrides or [])
    cfg = compose(typed)
    with as_job(Job(overrides=typed, config_dirs=config_dirs(typed))):
        return execute(cfg)
