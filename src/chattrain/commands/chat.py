"""command=chat: talk to a trained model, or have it answer chat.prompt."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chattrain.chat import Malformed
from chattrain.chat.reply import reply_text
from chattrain.config import Config
from chattrain.config.commands import ChatConfig
from chattrain.errors import UserError
from chattrain.model.generate import answer
from chattrain.model.sampling import Sampling
from chattrain.serving.conversation import Conversation
from chattrain.serving.speaker import Speaker, TooLong
from chattrain.setup.speaker import open_speaker

HELP = """\
/system TEXT      what the model is told before the conversation; without a text: nothing
/temperature X    0 takes the likeliest tokens, 1 samples from the model's distribution
/regenerate       another reply to your last message; at temperature 0 the same one
/save FILE        append the conversation to a file, as a line of JSON that data.schema=messages reads
/new              begin a new conversation
/help             this list
quit, exit or Ctrl-D ends, Ctrl-C stops a reply. A message that begins with / is sent with a space before it."""
ROWS = 32  # replies to chat.prompt that are computed at once
ENDINGS = ("quit", "exit")


def main(cfg: Config) -> dict:
    """Print a reply to each text of chat.prompt, or, without it, talk with the user on the terminal.

    Each text is a conversation of its own. Returns the checkpoint and the replies to chat.prompt.
    """
    speaker, folder = open_speaker(cfg)
    print(f"model {folder}", file=sys.stderr)
    given = cfg.chat.prompt if isinstance(cfg.chat.prompt, list) else [cfg.chat.prompt]
    prompts = [str(text) for text in given if text is not None]
    replies = _answers(cfg.chat, cfg.run.seed, speaker, prompts)
    for text, reply in zip(prompts, replies, strict=True):
        print(f"> {text}\n{_printable(reply)}\n")
    if not prompts:
        sampling = Sampling(cfg.chat.temperature, cfg.chat.top_k)
        with _sigterm_ends():
            Terminal(Conversation(speaker, cfg.chat.max_tokens, sampling, cfg.run.seed)).run()
    return {"checkpoint": str(folder), "replies": replies}


def _answers(config: ChatConfig, seed: int, speaker: Speaker, prompts: list[str]) -> list[str]:
    """The reply to each text, as a conversation of its own."""
    try:
        rendered = [speaker.prompt({"messages": [{"role": "user", "content": text}]}) for text in prompts]
    except (Malformed, TooLong) as error:
        raise UserError(f"the prompt cannot be rendered: {error}") from error
    sampling = Sampling(config.temperature, config.top_k)
    requests = [speaker.request(ids, config.max_tokens, sampling, seed) for ids in rendered]
    with speaker.autocast():
        answer(speaker.model, requests, ROWS)
    for text, request in zip(prompts, requests, strict=True):
        if request.ended == "length":
            cut = f"the reply to {text[:40]!r} is cut after {len(request.reply)} tokens (chat.max_tokens, or the model's context)"
            print(cut, file=sys.stderr)
    return [reply_text(speaker.tokenizer, request.reply) for request in requests]


class _Terminated(BaseException):
    """The process is asked to end, by SIGTERM."""


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Tell SIGTERM from Ctrl-C within, which both are a KeyboardInterrupt elsewhere, and where it ends here."""

    def end(*_: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    except _Terminated:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminal:
    """The conversation on stdin and stdout. What is not the model's goes to stderr."""

    def __init__(self, conversation: Conversation):
        self.conversation, self._dropped = conversation, 0
        self.is_interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Read turns and commands until the end."""
        self._say("/help lists the commands, Ctrl-D ends.")
        if self.is_interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines and remembers them)
        while (line := self._read()) is not None:
            text = line.strip()
            if text.lower() in ENDINGS:
                return
            if line.startswith("/"):
                self._command(*text[1:].split(maxsplit=1))
            elif text:
                self._print(self.conversation.ask(text))

    def _read(self) -> str | None:
        """The next line; None at the end of input. Ctrl-C leaves the line that is typed."""
        while True:
            try:
                return input("> ")
            except EOFError:
                print()
                return None
            except UnicodeDecodeError:
                self._say("that line is no UTF-8; it is left out")
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                self._say("\nCtrl-D ends.")

    def _print(self, reply: Generator[str, None, None]) -> None:
        """Show a reply as it arrives. Ctrl-C stops it, and what was said stays said."""
        conversation = self.conversation
        try:
            for text in reply:
                sys.stdout.write(_printable(text))
                sys.stdout.flush()
        except (Malformed, TooLong) as error:
            self._say(f"this cannot be answered: {error}")
            return
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            reply.close()
            self._say("\n(stopped)")
        print("\n")
        if conversation.dropped != self._dropped:
            self._dropped = conversation.dropped
            if self._dropped:
                self._say(
                    f"(the context of {conversation.speaker.context} tokens is full: the model no longer sees the first "
                    f"{self._dropped} of {len(conversation.turns)} turns; /new begins anew)"
                )
        if conversation.ended == "length":
            self._say("(the reply was cut: chat.max_tokens, or the end of the model's context)")

    def _command(self, name: str = "", argument: str = "") -> None:
        commands = {
            "system": self._system,
            "temperature": self._temperature,
            "regenerate": self._regenerate,
            "save": self._save,
            "new": self._new,
            "help": lambda _: self._say(HELP),
        }
        if name in commands:
            commands[name](argument)
        else:
            self._say(f"there is no command /{name}; /help lists them, and a space before the / sends it as a message")

    def _system(self, text: str) -> None:
        self.conversation.system = text
        self._say("(system message set)" if text else "(no system message)")

    def _temperature(self, text: str) -> None:
        try:
            value = float(text)
            if not 0 <= value < float("inf"):
                raise ValueError
        except ValueError:
            self._say(f"/temperature {text}: give a number, 0 or more")
            return
        self.conversation.sampling = self.conversation.sampling._replace(temperature=value)
        self._say(f"(temperature {value:g})")

    def _regenerate(self, _: str) -> None:
        if not self.conversation.turns:
            self._say("there is no message to answer yet")
            return
        if self.conversation.sampling.temperature == 0:
            self._say("(temperature 0 gives the same reply again; /temperature 1 draws another)")
        self._print(self.conversation.ask_again())

    def _save(self, name: str) -> None:
        if not name or not self.conversation.turns:
            self._say("/save FILE: name a file" if not name else "nothing was said yet")
            return
        try:
            count = self.conversation.save(Path(name).expanduser())
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ of nobody
            self._say(f"/save {name}: {error}")
            return
        self._say(f"({count} messages appended to {name})")

    def _new(self, _: str) -> None:
        self.conversation.turns, self._dropped = [], 0
        self._say("(a new conversation)")

    def _say(self, text: str) -> None:
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """Without control characters, with which a reply could move the cursor or name the window.

    >>> _printable("a\\tb\\n\\x1b[2Jc")
    'a\\tb\\n[2Jc'
    """
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))
