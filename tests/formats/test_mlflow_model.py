"""command=export format=mlflow: a folder that MLflow loads and serves, and that answers as command=chat does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import chattrain
from tests.helpers import TINY, standing_in, train, write_talk

QUESTION = "What is 3 + 9?"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, cache):
    """The export of a run that has learnt a little, and the reply of command=chat to QUESTION."""
    with standing_in(tmp_path_factory.mktemp("served"), cache) as folder:
        write_talk(folder)
        summary = train("sft", "chat", "train.max_steps=30", "init.from=scratch", "schedule.init_lr_frac=1")
        of_run = [*TINY, "stage=sft", f"init.from={summary['run_dir']}"]
        told = chattrain.run([*of_run, "command=chat", f"chat.prompt={QUESTION}", "chat.max_tokens=12"])
        done = chattrain.run([*of_run, "command=export", "format=mlflow"])
        assert Path(done["folder"]) == Path(summary["run_dir"]) / "mlflow" / "step_000030"
        yield Path(done["folder"]), told["replies"][0]


def request(text: str = QUESTION) -> dict:
    return {"input": [{"role": "user", "content": text}], "max_output_tokens": 12}


def text_of(response: dict) -> str:
    (message,) = response["output"]
    assert message["role"] == "assistant"
    return message["content"][0]["text"]


def test_the_model_answers_as_command_chat_does(exported):
    import mlflow.pyfunc

    folder, reply = exported
    assert text_of(mlflow.pyfunc.load_model(str(folder)).predict(request())) == reply != ""


def test_the_folder_holds_no_pickle_and_no_optimizer_state_and_export_may_replace_it(exported):
    folder, _ = exported
    names = {file.name for file in folder.rglob("*") if file.is_file()}
    assert "model.safetensors" in names and "MLmodel" in names
    assert not names & {"optimizer.safetensors", "manifest.json"} and not [n for n in names if n.endswith((".pkl", ".pickle"))]
    again = chattrain.run(["command=export", "format=mlflow", "stage=sft", "tracking=none", f"init.from={folder.parents[1]}"])
    assert Path(again["folder"]) == folder and (folder / "MLmodel").is_file()


@pytest.mark.slow
def test_mlflow_models_serve_answers_over_http(exported, tmp_path):
    folder, reply = exported
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", folder, "--env-manager", "local", "--port", str(port)]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow calls uvicorn by its name
    env = {**os.environ, "PATH": tools, "PYTHONPATH": os.pathsep.join(sys.path)}
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path / 'traces.db'}"
    server = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True)
    try:
        answer = ask(port, request(), wait_s=60)
        assert text_of(answer) == reply
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(port, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, wait_s=30)
        assert refused.value.code == 400
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def ask(port: int, body: dict, wait_s: float) -> dict:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    until = time.monotonic() + wait_s
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError:
            raise
        except OSError:  # it does not listen yet
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
