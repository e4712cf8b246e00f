"""Hides credentials in what leaves the process: messages, recorded configurations, what MLflow is told."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
SHORTEST = 6  # characters of an environment variable's value that is looked for in texts
WORDS = r"(?:token(?!s)|password|passwd|secret|signature|credential|api[_-]?key|access[_-]?key)"
KEYS = r"(?:password|passwd|secret|api_?key|auth_?token|access_?token|access_?key|secret_?key)"
VARIABLE = re.compile(r"(?:TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|SECRET_KEY|ACCESS_KEY|ACCESS_KEY_ID|PRIVATE_KEY)$")
SECRET_KEY = re.compile(KEYS + "$", re.IGNORECASE)
PATTERNS = (  # (what is found, what takes its place)
    # A password in a URI; `host:5000/` is a port. An `@` in the password is taken for part of it, but no other URI.
    (re.compile(r"(://[^/\s:@\"'<>]*):(?!\d+(?:[/?#\s,;\"')\]]|$))(?:(?!://)[^\s\"'<>])*@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"://(?![^/\s@]*:\*\*\*@)[^/\s:@\"'<>]+@"), f"://{HIDDEN}@"),  # a token in place of user and password
    (re.compile(rf"([?&](?:[\w.-]*{WORDS}[\w.-]*|sig)=)[^&\s\"'<>#]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"((?:^|[\s,{{\[+'\"])[\w.]*{KEYS}=)(?!null\b)[^\s,\"'}}\]]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?(?:bearer |basic )?)[^\s\"',}]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|dapi[0-9a-f]{32})\b"), HIDDEN),
)


def redact(text: str) -> str:
    """The text without passwords and tokens: those of URIs and of keys such as `api_key=`, and what the environment's variables
    for secrets hold (MLFLOW_TRACKING_PASSWORD, HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...).

    >>> redact("tracking.uri=postgresql://me:secret@host/db")
    'tracking.uri=postgresql://me:***@host/db'
    >>> redact("http://host:5000/x?token=abc&step=1"), redact("https://key@host"), redact("http://127.0.0.1:5000")
    ('http://host:5000/x?token=***&step=1', 'https://***@host', 'http://127.0.0.1:5000')
    """
    for pattern, hidden in PATTERNS:
        text = pattern.sub(hidden, text)
    secrets = {value for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= SHORTEST}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redact_tree(value: Any) -> Any:
    """The same for all texts in nested dicts and lists, and for the values of keys such as `api_key`.

    >>> redact_tree({"uri": "http://me:secret@host", "serve": {"api_key": "k", "port": 80}})
    {'uri': 'http://me:***@host', 'serve': {'api_key': '***', 'port': 80}}
    """
    if isinstance(value, dict):
        return {k: HIDDEN if isinstance(v, str) and SECRET_KEY.search(str(k)) else redact_tree(v) for k, v in value.items()}
    if isinstance(value, list):
        return [redact_tree(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def without_user(uri: str) -> str:
    """The URI without user, password and tokens: what stays the same where a password changes.

    >>> without_user("http://me:secret@host:5000/path"), without_user("sqlite:////runs/mlflow.db")
    ('http://host:5000/path', 'sqlite:////runs/mlflow.db')
    """
    return redact(re.sub(r"://[^/]*@", "://", uri))
