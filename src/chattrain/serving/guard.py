"""Who may ask the server what, decided before a request is read.

Without a key, only programs of this machine can connect, and a web page that the user visits could be one of them. So a request
must name this machine as its host (a name that another's DNS answers with 127.0.0.1 does not), and come from our own page if it
comes from any. No header allows other sites to read answers (CORS).
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from chattrain.config.serve import LOOPBACK
from chattrain.serving.answers import error


class Guard:
    """The app behind it gets requests that may be answered; others get an error."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope), scope["path"]) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, headers: Headers, path: str):
        if self.api_key is not None:
            if path.startswith("/v1/") and not _has_key(headers.get("authorization", ""), self.api_key):
                return error(
                    401, "the header `Authorization: Bearer <key>` must have the key of this server", code="invalid_api_key"
                )
            return None
        host = headers.get("host", "")
        if _hostname(host) not in LOOPBACK:
            return error(403, f"without serve.api_key, only {', '.join(LOOPBACK)} are answered, not the host {host[:100]!r}")
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            return error(403, f"pages of other sites are not answered: {origin[:100]!r}")
        return None


def _has_key(header: str, key: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    scheme, _, given = header.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())


def _netloc(origin: str) -> str:
    """The host and port of a page's address; "" of what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    """
    >>> [_hostname(host) for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "evil.example:8000", "[", "")]
    ['localhost', '127.0.0.1', '::1', 'evil.example', '', '']
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
