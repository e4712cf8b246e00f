"""A run asks nobody: no connection leaves the machine unless a name of a hub or a server was typed."""

from __future__ import annotations

import socket

import pytest

import chattrain
from tests.helpers import TINY


@pytest.fixture
def no_network(monkeypatch):
    """Connections to other hosts fail the test, whatever becomes of the error; so do look-ups of their names."""
    asked: list[str] = []

    def refuse(host) -> None:
        if str(host) not in ("localhost", "127.0.0.1", "::1", "", "None", socket.gethostname()):
            asked.append(str(host))
            raise OSError(f"a connection to {host}")

    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def connected(act):
        def checked(self, address):
            refuse(address[0] if isinstance(address, tuple) else "localhost")  # a path: a socket of this machine
            return act(self, address)

        return checked

    def looked_up(host, *arguments, **named):
        refuse(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *arguments, **named)

    monkeypatch.setattr(socket.socket, "connect", connected(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", connected(connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    for name in ("HF_HUB_OFFLINE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    yield asked
    assert asked == []


def test_three_stages_on_the_demo_data_reach_for_no_other_machine(workplace, no_network):
    """With MLflow, evaluation and the demo data, as in `make run`, in a few steps."""
    small = [word for word in TINY if not word.startswith(("data", "tracking"))]
    for stage in ("base", "mid", "sft"):
        run = chattrain.run([f"stage={stage}", *small, "data=demo", "train.max_steps=2", "run.name=offline"])
        assert run["status"] == "completed" and run["mlflow_run_id"]


def test_the_guard_sees_a_connection(no_network):
    with pytest.raises(OSError):
        socket.create_connection(("example.org", 80), timeout=1)
    assert no_network == ["example.org"]
    no_network.clear()
