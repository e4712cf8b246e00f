"""command=train: the default."""

from chattrain import runner
from chattrain.config import Config
from chattrain.setup.names import is_first
from chattrain.tracking.console import setup_logging


def main(cfg: Config) -> dict:
    close_log = setup_logging(None, console=is_first(), resume=False)
    try:
        return runner.train(cfg)
    finally:
        close_log()
