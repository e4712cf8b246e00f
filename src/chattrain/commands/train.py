"""command=train: the default."""

from chattrain.config import Config
from chattrain.tracking import setup_logging


def main(cfg: Config) -> dict:
    close_log = setup_logging(None, console=True, resume=False)
    try:
        from chattrain import runner

        return runner.train(cfg)
    finally:
        close_log()
