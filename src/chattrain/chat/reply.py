"""The tokens of a reply as text for people, as they arrive: whole characters, and no special token.

A call of the calculator is shown as GSM8K writes it: `<<12/60=0.2>>`.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

from chattrain.chat.calculator import calculate
from chattrain.tokenizer import AnyTokenizer, HFTokenizer, Tokenizer
from chattrain.tokenizer.special_tokens import OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START

CALL = re.compile(r"<<([^<>]+)=([^<>=]*)>>")


class ReplyReader(ABC):
    """Give it the tokens of one reply, in any portions; it returns the text that is certain, and the rest at `finish`."""

    @abstractmethod
    def add(self, tokens: Iterable[int]) -> str:
        """The text that these tokens add."""

    @abstractmethod
    def finish(self) -> str:
        """The text that is left: a character that is not whole is U+FFFD. Nothing may be added then."""

    @property
    @abstractmethod
    def content(self) -> str | list[dict[str, str]]:
        """The reply as the `content` of a message, which is rendered as the model has written it."""


def reply_reader(tokenizer: AnyTokenizer) -> ReplyReader:
    return NativeReader(tokenizer) if isinstance(tokenizer, Tokenizer) else HFReader(tokenizer)


def reply_text(tokenizer: AnyTokenizer, tokens: list[int]) -> str:
    """A whole reply as text."""
    reader = reply_reader(tokenizer)
    return reader.add(tokens) + reader.finish()


def with_calls(text: str) -> str | list[dict[str, str]]:
    """The content of a message of the assistant whose text may hold calls as they are shown: those that the calculator confirms
    become calls again, so that the model reads what it has written.

    >>> with_calls("So <<12/60=0.2>>0.2."), with_calls("cout << a=b >> c")
    ([{'type': 'text', 'text': 'So '}, {'type': 'python', 'text': '12/60'}, {'type': 'python_output', 'text': '0.2'}, \
{'type': 'text', 'text': '0.2.'}], 'cout << a=b >> c')
    """
    parts, end = [], 0
    for call in CALL.finditer(text):
        if calculate(call[1]) == call[2]:
            parts += [_part("text", text[end : call.start()])] if end < call.start() else []
            parts += [_part("python", call[1]), _part("python_output", call[2])]
            end = call.end()
    if not parts:
        return text
    return [*parts, _part("text", text[end:])] if end < len(text) else parts


def _part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


class NativeReader(ReplyReader):
    """Of chattrain's own format. A special token that has no meaning in a reply is left out."""

    def __init__(self, tokenizer: Tokenizer):
        self.encoding = tokenizer.encoding
        self._special = set(tokenizer.encoding._special_tokens.values())
        names = (PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END)
        self._python, self._python_end, self._output, self._output_end = map(tokenizer.special, names)
        self._parts: list[dict[str, str]] = []
        self._kind = "text"
        self._shows_call = False  # is a << not closed yet?
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Iterable[int]) -> str:
        return "".join(self._special_token(token) if token in self._special else self._ordinary(token) for token in tokens)

    def finish(self) -> str:
        return self._begin("text") + self._close()

    @property
    def content(self) -> str | list[dict[str, str]]:
        parts = [part for part in self._parts if part["text"]]
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        return parts

    def _ordinary(self, token: int) -> str:
        try:
            text = self._utf8.decode(self.encoding.decode_single_token_bytes(token))
        except KeyError:  # an id that the tokenizer does not use
            return ""
        closing = self._close() if self._kind == "text" else ""
        return closing + self._append(text)

    def _special_token(self, token: int) -> str:
        if token == self._python:
            shown = self._begin("python") + self._close() + "<<"
            self._shows_call = True
        elif token == self._output:
            shown = self._begin("python_output") + ("=" if self._shows_call else "<<=")
            self._shows_call = True
        elif token == self._python_end:
            shown = self._begin("text")
        elif token == self._output_end:
            shown = self._begin("text") + self._close()
        else:
            shown = ""
        return shown

    def _begin(self, kind: str) -> str:
        """Go on with a part of this kind; the end of the text before it."""
        shown = self._append(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        self._kind = kind
        return shown

    def _append(self, text: str) -> str:
        if text:
            if not self._parts or self._parts[-1]["type"] != self._kind:
                self._parts.append(_part(self._kind, ""))
            self._parts[-1]["text"] += text
        return text

    def _close(self) -> str:
        shown, self._shows_call = (">>" if self._shows_call else ""), False
        return shown


class HFReader(ReplyReader):
    """Of a Hugging Face tokenizer. Thoughts and calls of tools are the text that the model writes them as."""

    def __init__(self, tokenizer: HFTokenizer):
        self.tokenizer = tokenizer
        self._hidden = hidden_ids(tokenizer)
        self._tokens: list[int] = []
        self._shown = ""
        self._begin, self._read = 0, 0  # tokens before `_read` are shown; those from `_begin` on are decoded with the next ones

    def add(self, tokens: Iterable[int]) -> str:
        self._tokens += [token for token in tokens if token not in self._hidden]
        return self._more(final=False)

    def finish(self) -> str:
        return self._more(final=True)

    @property
    def content(self) -> str:
        return self._shown

    def _more(self, final: bool) -> str:
        """The text of tokens that are not shown yet. How a token reads depends on those before it, so they are decoded too."""
        before = self.tokenizer.decode(self._tokens[self._begin : self._read])
        after = self.tokenizer.decode(self._tokens[self._begin :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        self._shown += after[len(before) :]
        return after[len(before) :]


def hidden_ids(tokenizer: HFTokenizer) -> set[int]:
    """Tokens that control a conversation: they are never shown."""
    ids = {tokenizer.backend.convert_tokens_to_ids(text) for text in tokenizer.special_texts}
    added = tokenizer.backend.added_tokens_decoder.items()
    return ids | {i for i, token in added if tokenizer.control_pattern.fullmatch(str(token))} | tokenizer.eos_ids
