"""command=serve: a trained model as a server, with OpenAI's API and a web page."""

from __future__ import annotations

import logging

from chattrain.config import Config
from chattrain.serving.run import serve
from chattrain.setup.speaker import open_speaker

log = logging.getLogger("chattrain")


def main(cfg: Config) -> dict:
    """Serve the model that the command line names until Ctrl-C, which is a KeyboardInterrupt as in every command."""
    speaker, folder = open_speaker(cfg)
    log.info("model %s, called %s, with a context of %d tokens", folder, speaker.name, speaker.context)
    serve(speaker, cfg.serve, lambda url: log.info("serving at %s (a chat page) and %s/v1 (OpenAI's API); Ctrl-C ends", url, url))
    return {"checkpoint": str(folder)}
