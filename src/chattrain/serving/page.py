"""The web page at /: one file, with nothing from elsewhere. Its policy (CSP) allows its own script, style and requests alone."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse


def response(model: str, needs_key: bool) -> HTMLResponse:
    """The page that talks to the model of this name."""
    text = _page().replace("{model}", html.escape(model)).replace("{key}", "yes" if needs_key else "no")
    policy = (
        f"default-src 'none'; script-src '{_hash('script')}'; style-src '{_hash('style')}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


@cache
def _page() -> str:
    return files("chattrain.serving").joinpath("page.html").read_text(encoding="utf-8")


def _hash(tag: str) -> str:
    """The hash of the page's script or style, as the policy names it."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", _page(), re.DOTALL)
    assert found
    return f"sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}"
