"""command=train, the default: train one stage."""

from chattrain import runner
from chattrain.config import Config
from chattrain.setup.names import is_main_process
from chattrain.tracking.console import setup_logging


def main(cfg: Config) -> dict:
    """Returns the summary of the run."""
    close_log = setup_logging(None, console=is_main_process(), resume=False)
    try:
        return runner.train(cfg)
    finally:
        close_log()
