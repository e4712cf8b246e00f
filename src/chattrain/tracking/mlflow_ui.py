"""`make ui`: MLflow's web pages, opened at the table of runs. MLflow itself would open at an empty page on traces.

python -m chattrain.tracking.mlflow_ui [--uri sqlite:///runs/mlflow.db] [--port 5000]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from contextlib import suppress
from pathlib import Path

from chattrain.tracking.mlflow_store import connect

START_SECONDS = 120  # longest wait for the server's first answer
END_SECONDS = 3  # longest wait for its end, before it is killed


def main() -> int:
    """Serve the store, print the address of each experiment's runs, open the one that ran last. Returns the exit status."""
    parser = argparse.ArgumentParser(description="MLflow's web pages, opened at the table of runs")
    parser.add_argument("--uri", default=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    arguments = parser.parse_args()
    uri: str = arguments.uri
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        print(f"no store {uri}; train a run first, or name another store with --uri or MLFLOW_TRACKING_URI", file=sys.stderr)
        return 2
    if uri.startswith("http"):
        _show(uri.rstrip("/"), uri, arguments.no_browser)
        return 0
    if not _is_free(arguments.port):
        print(f"port {arguments.port} is in use; name another with --port", file=sys.stderr)
        return 2
    address = f"http://127.0.0.1:{arguments.port}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server below ends with this process
    serve = ["-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(arguments.port)]
    quiet = ["--uvicorn-opts", "--log-level warning"]  # so that the addresses below are not scrolled away
    server = subprocess.Popen([sys.executable, *serve, *quiet], start_new_session=True)
    try:
        if _answers(address, server):
            _show(address, uri, arguments.no_browser)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(server)


def pages(address: str, uri: str) -> list[str]:
    """The address of the table of runs of each experiment that has runs; first the one whose newest run is the newest."""
    client = connect(uri)
    newest = {}
    for experiment in client.search_experiments():
        runs = client.search_runs([experiment.experiment_id], max_results=1, order_by=["attributes.start_time DESC"])
        if runs:
            newest[experiment.experiment_id] = runs[0].info.start_time
    view = "runs?workflowType=machine_learning"  # pages for training: runs and models, not traces and judges
    return [f"{address}/#/experiments/{i}/{view}" for i in sorted(newest, key=lambda i: newest[i], reverse=True)]


def _end(server: subprocess.Popen) -> None:
    """End the server and the workers that it started, which would stay. It does not always heed SIGTERM."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=END_SECONDS)
            return


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _show(address: str, uri: str, only_print: bool) -> None:
    links = pages(address, uri)
    print("\n".join(["Runs:", *(f"  {link}" for link in links)]) if links else f"{uri} has no run yet: {address}", flush=True)
    if links and not only_print:
        webbrowser.open(links[0])


def _answers(address: str, server: subprocess.Popen) -> bool:
    """Wait for the server's first answer; False if it ends before."""
    for _ in range(START_SECONDS * 2):
        if server.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return True
        except OSError:
            time.sleep(0.5)
    return False


if __name__ == "__main__":
    sys.exit(main())
