"""command=chat as the user meets it: on a terminal and through pipes. The conversation behind it, by hand."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import chattrain
from chattrain.chat import render_prompt
from chattrain.commands.chat import Terminal
from chattrain.config.compose import compose
from chattrain.model import engine
from chattrain.model.sampling import GREEDY, Sampling
from chattrain.serving.conversation import Conversation
from chattrain.serving.speaker import TooLong
from chattrain.setup.speaker import open_speaker
from tests.helpers import TINY, train
from tests.serving.common import reply_of, speaker_of


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def speaker(tokenizer):
    return speaker_of(tokenizer, context=200)


def converse(speaker, max_tokens: int = 12, sampling: Sampling = GREEDY) -> Conversation:
    return Conversation(speaker, max_tokens, sampling, seed=0)


def legible(text: str) -> str:
    """As a terminal gets it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


# --- the conversation ------------------------------------------------------------------------------------------------


def test_each_reply_sees_all_that_was_said(speaker):
    talk = converse(speaker)
    first, second = "".join(talk.ask("Hello")), "".join(talk.ask("And you?"))
    assert first == reply_of(speaker, said("Hello"), 12)
    assert second == reply_of(speaker, [*talk.messages(0)[:2], *said("And you?")], 12) != reply_of(speaker, said("And you?"), 12)
    talk.system = "Be brief."
    system = {"role": "system", "content": "Be brief."}
    assert "".join(talk.ask("Why?")) == reply_of(speaker, [system, *talk.messages(0)[1:5], *said("Why?")], 12)


def test_another_reply_to_the_same_message_draws_other_tokens(speaker):
    talk = converse(speaker, sampling=Sampling(1.5))
    replies = ["".join(talk.ask("Hello")), *("".join(talk.ask_again()) for _ in range(3))]
    assert len(set(replies)) == 4 and len(talk.turns) == 1
    assert replies[0] == reply_of(speaker, said("Hello"), 12, 1.5, seed=0)
    greedy = converse(speaker)
    assert "".join(greedy.ask("Hello")) == "".join(greedy.ask_again())


def test_the_oldest_turns_leave_where_the_context_is_full_but_stay_in_what_is_saved(speaker, tmp_path):
    talk = converse(speaker, max_tokens=20)
    talk.system = "Be brief."
    while not talk.dropped:
        assert "".join(talk.ask("Tell me more of it, please, I want to hear all."))
    kept = talk.messages(talk.dropped)
    assert kept[0]["role"] == "system" and kept[1]["role"] == "user" and len(kept) < len(talk.messages(0))
    lengths = [
        len(render_prompt({"messages": talk.messages(dropped)[:-1]}, speaker.tokenizer))
        for dropped in (talk.dropped - 1, talk.dropped)
    ]
    assert lengths[0] > speaker.context - 20 >= lengths[1]
    assert talk.save(tmp_path / "talk.jsonl") == len(talk.messages(0)) == 1 + 2 * len(talk.turns)


def test_a_message_that_is_too_long_alone_is_refused_and_forgotten(speaker):
    talk = converse(speaker)
    list(talk.ask("Hello"))
    with pytest.raises(TooLong, match="200"):
        list(talk.ask("word " * 300))
    assert len(talk.turns) == 1 and "".join(talk.ask("And you?"))


def test_a_reply_that_is_stopped_stays_as_far_as_it_came(speaker):
    talk = converse(speaker, max_tokens=60)
    reply = talk.ask("Hello")
    shown = "".join(next(reply) for _ in range(4))
    reply.close()
    (turn,) = talk.turns
    assert turn[1]["content"].startswith(shown.rstrip("\ufffd")) and talk.ended == "cancelled"
    assert len("".join(talk.ask("Go on"))) > len(shown)


def test_what_is_saved_is_read_as_training_data(speaker, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("Hello", "Grüße, 東京 🙂"):
        talk = converse(speaker)
        list(talk.ask(text))
        list(talk.ask("And <|assistant_end|>?"))
        talk.turns[0][1]["content"] = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
        talk.save(tmp_path / "saved.jsonl")
    settings = [o for o in TINY if not o.startswith("data")]
    data = ["data=local", "data.train_path=saved.jsonl", "data.val_path=saved.jsonl", "data.schema=messages"]
    done = chattrain.run(["stage=sft", *settings, *data, "init.from=scratch", "train.max_steps=1", "eval=none"])
    assert done["status"] == "completed" and len((tmp_path / "saved.jsonl").read_text().splitlines()) == 2


# --- the terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(speaker, monkeypatch, capsys) -> Any:
    """Types lines, and returns what was printed and what was said of it."""

    def type_lines(*lines: str | type[BaseException], talk: Conversation | None = None) -> tuple[str, str]:
        entered: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

        def enter(_: str) -> str:
            line = next(entered)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", enter)
        Terminal(talk or converse(speaker)).run()
        return capsys.readouterr()

    return type_lines


@pytest.mark.parametrize("ending", ["quit", "exit", " QUIT ", EOFError])
def test_the_conversation_ends_on_request(terminal, ending):
    out, _ = terminal("Hello", ending, "never")
    assert out.count("\n\n") == 1


def test_commands_do_what_help_says(terminal, speaker, tmp_path):
    talk, file = converse(speaker), tmp_path / "talk.jsonl"
    lines = [
        "/help",
        "/system Be brief.",
        "Hello",
        "/temperature 1.5",
        "/regenerate",
        f"/save {file}",
        "/new",
        "Hello",
        "/system",
    ]
    out, err = terminal(*lines, talk=talk)
    (saved,) = map(json.loads, file.read_text().splitlines())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    system = {"role": "system", "content": "Be brief."}
    greedy = reply_of(speaker, [system, *said("Hello")], 12)
    assert out.startswith(legible(greedy)) and saved["messages"][2]["content"] not in (greedy, "")
    assert talk.turns[0][0]["content"] == "Hello" and len(talk.turns) == 1 and talk.system == ""
    for command in ("/system TEXT", "/temperature X", "/regenerate", "/save FILE", "/new", "/help"):
        assert command in err


@pytest.mark.parametrize(
    "line",
    ["/", "/bye", "/temperature", "/temperature hot", "/temperature -1", "/temperature nan", "/regenerate", "/save", "/save x"],
)
def test_a_command_that_cannot_be_obeyed_is_explained_and_nothing_is_answered(terminal, speaker, line):
    talk = converse(speaker)
    out, err = terminal(line, talk=talk)
    assert len(err.splitlines()) == 2 and not talk.turns and out.strip() == ""
    assert talk.sampling == GREEDY


def test_a_folder_that_takes_no_file_does_not_end_the_conversation(terminal, tmp_path):
    out, err = terminal("Hello", f"/save {tmp_path}", "And you?")
    assert str(tmp_path) in err and out.count("\n\n") == 2


def test_no_special_token_and_no_control_character_is_printed(tokenizer, terminal):
    shown = ""
    for seed in range(6):
        speaker = speaker_of(tokenizer, context=1000)
        talk = Conversation(speaker, 120, Sampling(3.0), seed)  # hot enough for every token
        out, _ = terminal("Hello", talk=talk)
        shown += out
    assert len(shown) > 300 and not re.search(r"<\|\w+\|>", shown)
    assert not set(shown) & {chr(c) for c in (*range(9), 11, 12, *range(14, 32), 127)}


def test_the_calculator_is_run_and_shown(speaker, terminal, tokenizer, monkeypatch):
    end = tokenizer.special("<|assistant_end|>")
    call = [tokenizer.special("<|python_start|>"), *tokenizer.encode("12/60"), tokenizer.special("<|python_end|>")]
    result = tokenizer.encode("0.2")
    drawn = iter([*call, *[end] * (len(result) + 2), *tokenizer.encode(" So 0.2."), end])
    monkeypatch.setattr(engine, "draw", lambda *_: torch.tensor([next(drawn)]))
    talk = converse(speaker, max_tokens=60)
    out, _ = terminal("What is 12/60?", talk=talk)
    assert out == "<<12/60=0.2>> So 0.2.\n\n\n"
    parts = [("python", "12/60"), ("python_output", "0.2"), ("text", " So 0.2.")]
    assert talk.turns[0][1]["content"] == [{"type": kind, "text": text} for kind, text in parts]


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(place):
    train("sft", "talks", "init.from=scratch", "train.max_steps=2", "eval=none")
    return place


COMMAND = [sys.executable, "-m", "chattrain", "command=chat", "stage=sft", "train.device=cpu", "init.from=talks"]


def test_it_works_through_pipes(run):
    done = subprocess.run(
        [*COMMAND, "chat.max_tokens=4"],
        input="Hello\n/temperature 1\nGrüße 東京\n\n/save saved.jsonl\nquit\nnever\n".encode(),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"/help" in done.stderr
    (line,) = (run / "saved.jsonl").read_text().splitlines()
    users = [message["content"] for message in json.loads(line)["messages"] if message["role"] == "user"]
    assert users == ["Hello", "Grüße 東京"]


class Typist:
    """A terminal with the program behind it."""

    def __init__(self, *overrides: str):
        self.fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *overrides],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.poller = select.poll()  # takes descriptors over 1,023, which select does not
        self.poller.register(self.fd, select.POLLIN)
        self.shown = ""

    def until(self, pattern: str, interrupts: bool = False) -> str:
        """What is shown up to and with the pattern, from where the last call ended."""
        while not (found := re.search(pattern, self.shown)):
            ready = self.poller.poll(1_000 if interrupts else 60_000)
            if interrupts and not ready:
                os.kill(self.process.pid, signal.SIGINT)
                continue
            try:
                read = os.read(self.fd, 65_536) if ready else b""
            except OSError:  # the program has ended
                read = b""
            assert read, f"{pattern!r} does not come: {self.shown!r}"
            self.shown += read.decode(errors="replace")
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def end(self) -> int:
        status = self.process.wait(60)
        os.close(self.fd)
        return status


def test_ctrl_c_stops_a_reply_and_ctrl_d_ends_the_conversation(run):
    typist = Typist("chat.max_tokens=100000", "chat.temperature=1.5", "train.seq_len=100000")
    typist.until("> ")
    typist.type("Hello\n")
    typist.until(r"Hello\r\n[^\n]{3}")
    os.kill(typist.process.pid, signal.SIGINT)
    typist.until(r"\(stopped\)[^>]*> ")
    typist.type("half a line")
    typist.until("half a line")
    typist.until("Ctrl-D ends", interrupts=True)  # readline may miss a signal between two keys
    typist.type("/help\n")
    typist.until("/regenerate")
    typist.until("> ")
    typist.type("\x04")
    assert typist.end() == 0


def test_sigterm_ends_it_even_while_it_replies(run):
    typist = Typist("chat.max_tokens=100000", "chat.temperature=1.5", "train.seq_len=100000")
    typist.until("> ")
    typist.type("Hello\n")
    typist.until(r"Hello\r\n[^\n]{3}")
    os.kill(typist.process.pid, signal.SIGTERM)
    typist.until("interrupted")
    assert typist.end() == 130


def test_a_prompt_that_the_context_cannot_hold_is_refused(run, capsys):
    with pytest.raises(chattrain.errors.UserError, match="64"):
        chattrain.run(["command=chat", "stage=sft", "init.from=talks", "train.device=cpu", f"chat.prompt={'word ' * 80}"])


def test_no_control_character_of_a_reply_to_chat_prompt_is_printed(run, capsys):
    hot = ["chat.temperature=9", "chat.top_k=null", "chat.max_tokens=40", "chat.prompt=Hello"]
    said = chattrain.run(["command=chat", "stage=sft", "init.from=talks", "train.device=cpu", *hot])["replies"]
    controls = {chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))}
    assert set("".join(said)) & controls and not set(capsys.readouterr().out) & controls


def test_a_reply_to_chat_prompt_ends_where_the_context_does(run):
    """As one to what is typed: a model that has learnt vectors of positions has none beyond."""
    typed = ["command=chat", "stage=sft", "init.from=talks", "train.device=cpu", "chat.max_tokens=400"]
    (reply,) = chattrain.run([*typed, "chat.prompt=Hello"])["replies"]
    talk = Conversation(open_speaker(compose(typed))[0], 400, GREEDY, seed=0)
    assert reply == "".join(talk.ask("Hello")) and talk.ended == "length"
