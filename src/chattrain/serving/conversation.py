"""A conversation with a model, turn by turn: what command=chat holds."""

from __future__ import annotations

import json
from collections.abc import Generator
from itertools import chain
from pathlib import Path
from typing import Any

from chattrain.model.engine import Engine
from chattrain.model.sampling import Sampling
from chattrain.serving.speaker import Speaker, TooLong


class Conversation:
    """History, system message and sampling of one conversation. Replies arrive as text, in portions."""

    def __init__(self, speaker: Speaker, max_tokens: int, sampling: Sampling, seed: int):
        self.speaker, self.max_tokens, self.sampling, self.seed = speaker, max_tokens, sampling, seed
        self.system = ""
        self.turns: list[list[dict[str, Any]]] = []  # the user's message, and the reply unless it is still asked for
        self.dropped = 0  # turns at the beginning that had no room in the last prompt
        self.ended: str | None = None  # why the last reply has ended, see `Request`
        self._engine, self._attempt = Engine(speaker.model, 1, speaker.context), 0

    def ask(self, text: str, attempt: int = 0) -> Generator[str, None, None]:
        """The reply to a message. Raises Malformed or TooLong, and the message is then forgotten.

        A reply that is left unfinished, by `close` or an exception, stays as far as it came. Each attempt draws other tokens.
        """
        turn: list[dict[str, Any]] = [{"role": "user", "content": text}]
        self.turns.append(turn)
        try:
            prompt = self._prompt()
        except ValueError:
            self.turns.pop()
            raise
        self._attempt = attempt
        request = self.speaker.request(prompt, self.max_tokens, self.sampling, self.seed + attempt)
        reader, read = self.speaker.reader(), 0
        self._engine.submit(request)
        try:
            while not request.ended:
                with self.speaker.autocast():
                    self._engine.step()
                new, read = request.reply[read:], len(request.reply)
                if shown := reader.add(new):
                    yield shown
            if shown := reader.finish():
                yield shown
        finally:
            self._engine.cancel(request)
            reader.finish()
            self.ended = request.ended
            if request.reply or request.ended in ("stop", "length"):
                turn.append({"role": "assistant", "content": reader.content})
            else:
                self.turns.pop()

    def ask_again(self) -> Generator[str, None, None]:
        """Another reply to the last message. Raises IndexError where there is none."""
        return self.ask(self.turns.pop()[0]["content"], self._attempt + 1)

    def save(self, file: Path) -> int:
        """Append the conversation to a file as one line of JSON, as `data.schema=messages` reads it; the number of messages."""
        messages = self.messages(0)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        return len(messages)

    def messages(self, dropped: int) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *chain.from_iterable(self.turns[dropped:])]

    def _prompt(self) -> list[int]:
        """The prompt of the last message, with as much of what was said before as there is room for."""
        for dropped in range(len(self.turns)):
            try:
                prompt = self.speaker.prompt({"messages": self.messages(dropped)}, self.max_tokens)
            except TooLong:
                if dropped == len(self.turns) - 1:
                    raise
            else:
                self.dropped = dropped
                return prompt
        raise IndexError("nothing was said")
