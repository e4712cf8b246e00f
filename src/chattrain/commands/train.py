"""command=train, the default: train one stage."""

from chattrain import runner
from chattrain.config import Config


def main(cfg: Config) -> dict:
    """Returns the summary of the run."""
    return runner.train(cfg)
