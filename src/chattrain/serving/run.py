"""Opens the socket, runs the server until it is interrupted, and ends what it has begun."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from chattrain.config.serve import ServeConfig
from chattrain.errors import UserError
from chattrain.serving.server import Service
from chattrain.serving.speaker import Speaker
from chattrain.serving.worker import Worker

SHUTDOWN_S = 5  # seconds that clients have to take the end of their replies


class Server(uvicorn.Server):
    """uvicorn's, which ends all replies first where it is asked to end: it would wait for them."""

    def __init__(self, speaker: Speaker, config: ServeConfig):
        self.worker = Worker(speaker, config.batch_size)
        app = Service(speaker, config, self.worker).app()
        settings = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        super().__init__(settings)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.worker.stop()
        super().handle_exit(sig, frame)

    def run_at(self, listening: socket.socket) -> None:
        """Answer until interrupted. Raises KeyboardInterrupt then, on the main thread."""
        self.worker.start()
        try:
            self.run(sockets=[listening])
        finally:
            self.worker.stop()
            self.worker.join(SHUTDOWN_S)


def listen(config: ServeConfig) -> tuple[socket.socket, str]:
    """A socket at serve.host and serve.port, and its URL. Raises UserError where there can be none."""
    where = f"serve.host={config.host} serve.port={config.port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where}: cannot listen there: {error}; serve.port=0 takes a port that is free") from error
    port = listening.getsockname()[1]
    name = f"[{config.host}]" if family == socket.AF_INET6 else config.host
    return listening, f"http://{name}:{port}"


def serve(speaker: Speaker, config: ServeConfig, ready: Callable[[str], None]) -> None:
    """Serve until interrupted. `ready` is told the URL once clients can connect."""
    listening, url = listen(config)
    with listening:
        server = Server(speaker, config)
        ready(url)
        server.run_at(listening)
