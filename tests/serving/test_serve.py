"""command=serve as the user starts and ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.helpers import command_line, train

COMMAND = [sys.executable, "-m", "chattrain", "command=serve", "stage=sft", "train.device=cpu", "init.from=talks", "serve.port=0"]


@pytest.fixture(scope="module")
def run(place):
    train("sft", "talks", "init.from=scratch", "train.max_steps=2", "eval=none")
    return place


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_interrupted_even_while_it_answers(run, ending):
    settings = ["train.seq_len=100000", "serve.max_tokens=90000", "serve.api_key=${oc.env:SERVE_KEY}"]
    process = subprocess.Popen(
        [*COMMAND, *settings], stderr=subprocess.PIPE, text=True, env={**os.environ, "SERVE_KEY": "a-secret-key"}
    )
    assert process.stderr
    log = ""
    while not (url := re.search(r"serving at (http://127\.0\.0\.1:\d+)", log)):
        line = process.stderr.readline()
        assert line, log
        log += line
    body = {"model": "sft/talks", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer a-secret-key"}
    request = urllib.request.Request(f"{url[1]}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.loads(answer.readline().removeprefix(b"data: "))["object"] == "chat.completion.chunk"
        process.send_signal(ending)
        events = [line for line in answer.read().decode().splitlines() if line]
    assert "the server is stopping" in events[-1]
    log += process.stderr.read()
    assert process.wait(60) == 130 and log.splitlines()[-1] == "chattrain: interrupted" and "Traceback" not in log
    assert "a-secret-key" not in log


@pytest.mark.parametrize(
    "typed, named",
    [
        (["serve.host=0.0.0.0"], "serve.api_key"),
        (["serve.host=no.such.host.invalid", "serve.api_key=secret-words"], "serve.host=no.such.host.invalid"),
        (["serve.port=-1"], "serve.port=-1"),
        (["init.from=gone"], "gone"),
    ],
)
def test_what_cannot_be_served_is_refused_with_one_message(run, capsys, typed, named):
    kept = [word for word in COMMAND[3:] if word.partition("=")[0] not in [t.partition("=")[0] for t in typed]]
    done = command_line(capsys, *kept, *typed)
    assert done.status == 2 and named in done.message and "secret-words" not in done.err
