"""The keys of command=serve: `serve.*`."""

from __future__ import annotations

from dataclasses import dataclass

from chattrain.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeConfig:
    host: str = "127.0.0.1"  # address to listen at; any other than this machine's own (127.0.0.1, localhost, ::1) needs api_key
    port: int = 8000  # 0: one that is free
    api_key: str | None = None  # what clients must send as `Authorization: Bearer <key>`; null: nothing
    batch_size: int = 16  # replies that are computed at once; further requests wait
    max_requests: int = 64  # requests at once, waiting ones counted; those beyond it are answered with status 429
    max_tokens: int = 1024  # tokens of a reply at most, and where a request does not say how many
    max_request_bytes: int = 1_000_000  # of the body of a request at most
    timeout_s: float = 600.0  # seconds that a request may take, waiting counted

    @property
    def is_loopback(self) -> bool:
        """Can only programs on this machine connect?"""
        return self.host in LOOPBACK

    def check(self) -> None:
        for name in ("batch_size", "max_requests", "max_tokens", "max_request_bytes", "timeout_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"serve.{name}={getattr(self, name)} must be more than 0")
        if not 0 <= self.port <= 65_535:
            raise UserError(f"serve.port={self.port} must be a port, from 0 to 65535")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("serve.api_key must have one character or more, all of them printable ASCII")
        if not self.is_loopback and self.api_key is None:
            raise UserError(
                f"serve.host={self.host} lets other machines connect, so it needs a key: serve.api_key='${{oc.env:NAME}}' takes "
                "it from an environment variable; or use serve.host=127.0.0.1"
            )
