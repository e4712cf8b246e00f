"""Conversations in the format of a model's own chat template, with the loss mask found from the rendered turns.

The template (Jinja, as in a Hugging Face tokenizer) is rendered twice: with the conversation, and with a sign in place of
each message's text. The second says which text is the template's own and which a message's; the first must be the second
with the texts put in, or the conversation is refused. Supervised is what the model must produce itself: all that stands
between the generation prompt of an assistant turn and its end-of-turn token, and that token.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import numpy as np

from chattrain.chat.format import ChatFormat, Malformed, Rendered, Segment, check_turns, is_text, messages_of
from chattrain.errors import UserError
from chattrain.tokenizer.huggingface import HFTokenizer

log = logging.getLogger("chattrain")

PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
SIGN = "\ue000{}\ue001"  # characters of Unicode's private use, which no template treats in a special way


class ChatTemplate(ChatFormat):
    """Renders conversations by the template of one tokenizer.

    Raises UserError at once for a template whose assistant turns have no end-of-turn token: a model trained on them would
    never stop.
    """

    version = 1

    def __init__(self, tokenizer: HFTokenizer):
        self.tokenizer = tokenizer
        self.end_of_turn: str | None = None
        if tokenizer.chat_template is not None:
            self._probe()

    def _probe(self) -> None:
        """Find the end-of-turn token and what opens an assistant turn, on one question and answer."""
        try:
            question, whole = self._render(PROBE[:1]), self._render(PROBE)
            opened = self._render(PROBE[:1], add_generation_prompt=True)
        except Malformed as error:
            raise UserError(f"the chat template of {self.tokenizer.source} refuses a question and its answer: {error}") from error
        self.opening = opened.removeprefix(question) if opened.startswith(question) else ""
        answer_at = whole.rfind("answer")
        self.lead = whole[len(opened) : answer_at] if whole.startswith(opened) else ""  # what the reply itself begins with
        tail = whole[answer_at + len("answer") :] if answer_at >= 0 else ""
        found = sorted((tail.index(token), -len(token), token) for token in self.tokenizer.special_texts if token in tail)
        if not found:
            raise UserError(
                f"the chat template of {self.tokenizer.source} ends an assistant turn without a special token: a "
                f"model trained on it would never stop. It renders {whole!r}"
            )
        self.end_of_turn = found[0][2]
        if not whole.startswith(opened):
            log.warning(
                "the chat template of %s prompts for a reply with %r, but renders a reply that was given as %r: what is "
                "trained on is not what the model will be prompted with",
                self.tokenizer.source,
                opened[len(question) :],
                whole[len(question) :],
            )

    @property
    def stop_ids(self) -> set[int]:
        """The end of turn, the end of text, and what generation_config.json names."""
        ends = {self.tokenizer.special(self.end_of_turn)} if self.end_of_turn is not None else set()
        return ends | self.tokenizer.eos_ids

    def to_segments(self, document: dict[str, Any]) -> list[Segment]:
        """Pieces of a conversation or of a text `{"text": ...}`. Raises Malformed with the turn that does not fit."""
        if is_text(document):
            return self._text(document["text"])
        messages = messages_of(document)
        first = int(messages[0]["role"] == "system")
        check_turns(messages[first:], first)
        segments = [_segments(message["content"], i) for i, message in enumerate(messages)]
        texts = ["".join(text for text, _ in parts) for parts in segments]
        self._refuse_look_alikes(texts)
        literals, starts, whole = self._take_apart(messages, texts)
        supervised = np.zeros(len(whole), dtype=bool)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                self._mark(supervised, whole, literals, starts, i, segments[i], texts[i])
        return _to_segments(whole, supervised)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids up to where the reply to the messages begins."""
        contents = ["".join(text for text, _ in _segments(m["content"], i)) for i, m in enumerate(messages)]
        self._refuse_look_alikes(contents)
        filled = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
        return self.tokenizer.encode_rendered([self._render(filled, add_generation_prompt=True)])[0][0]

    def encode(self, documents: list[list[Segment]]) -> list[Rendered]:
        """(ids, loss mask) of each document. A token is supervised where all of its characters are: one that reaches over
        from what is given is no token that the model would have to say."""
        out = []
        encoded = self.tokenizer.encode_rendered(["".join(segment.text for segment in document) for document in documents])
        for document, (ids, offsets) in zip(documents, encoded, strict=True):
            marks = np.repeat([segment.supervised for segment in document], [len(segment.text) for segment in document])
            before = np.concatenate([[0], np.cumsum(marks)])  # supervised characters before each place
            first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            whole = (last > first) & (before[last] - before[first] == last - first)
            out.append(Rendered(ids, whole.astype(int).tolist()))
        return out

    def choices(self, messages: list[dict[str, Any]], replies: list[str]) -> tuple[list[int], list[int]]:
        rendered = [
            self.encode([self.to_segments({"messages": [*messages, {"role": "assistant", "content": reply}]})])[0].ids
            for reply in replies
        ]
        at = next((i for i, tokens in enumerate(zip(*rendered, strict=False)) if len(set(tokens)) > 1), 0)
        tokens = [ids[at] for ids in rendered]
        if len(set(tokens)) != len(replies) or any(ids[at + 1 :] != rendered[0][at + 1 :] for ids in rendered):
            raise Malformed(f"each of {replies} must be one token of the tokenizer")
        return rendered[0][:at], tokens

    def _text(self, text: str) -> list[Segment]:
        """Plain text behind BOS; with a tokenizer that has none, before the end of text."""
        self._refuse_look_alikes([text])
        bos, eos = self.tokenizer.bos_text, self.tokenizer.eos_text
        if bos is not None:
            return [Segment(bos, True, False), Segment(text, False, True)]
        return [Segment(text, False, True), *([Segment(eos, True, True)] if eos is not None else [])]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {self.tokenizer.source} has no chat template, so conversations cannot be "
                "rendered; put a chat_template.jinja into that folder, or take the instruct model's"
            )
        try:
            return self.tokenizer.backend.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise Malformed(f"the chat template refuses it: {error}") from None

    def _refuse_look_alikes(self, texts: list[str]) -> None:
        for i, text in enumerate(texts):
            for token in self.tokenizer.special_texts:
                if token in text:
                    raise Malformed(f"message {i} holds the text {token!r}, which the tokenizer would take for the special token")

    def _take_apart(self, messages: list[dict[str, Any]], texts: list[str]) -> tuple[list[str], list[int], str]:
        """(the template's own text before each message and after the last, where each message's text starts, the whole)."""
        whole = self._render([{**m, "content": text} for m, text in zip(messages, texts, strict=True)])
        signs = [SIGN.format(i) for i in range(len(messages))]
        skeleton = self._render([{**m, "content": sign} for m, sign in zip(messages, signs, strict=True)])
        literals = []
        for i, sign in enumerate(signs):
            literal, found, skeleton = skeleton.partition(sign)
            if not found:
                raise Malformed(f"the chat template leaves out message {i} ({messages[i]['role']}): {texts[i]!r:.200}")
            literals.append(literal)
        literals.append(skeleton)
        at, starts = 0, []
        for i, text in enumerate(texts):
            at += len(literals[i])
            as_rendered = next(
                (t for t in (text, text.strip(), text.rstrip(), text.lstrip()) if whole.startswith(t + literals[i + 1], at)), None
            )
            if as_rendered is not None and whole.startswith(literals[i], at - len(literals[i])):
                starts.append(at)
                at += len(as_rendered)
            else:
                raise Malformed(
                    f"the chat template changes message {i} ({messages[i]['role']}), so its place cannot be told: {text!r:.200}"
                )
        if at + len(literals[-1]) != len(whole):
            raise Malformed(f"the chat template adds text behind the last turn: {whole[at:]!r:.200}")
        return literals, starts, whole

    def _mark(
        self,
        supervised: np.ndarray,
        whole: str,
        literals: list[str],
        starts: list[int],
        i: int,
        segments: list[tuple[str, bool]],
        text: str,
    ) -> None:
        """Mark what assistant message i must produce in `supervised` (characters of `whole`,)."""
        ends = literals[i + 1].find(self.end_of_turn)
        length = (starts[i + 1] if i + 1 < len(starts) else len(whole)) - len(literals[i + 1]) - starts[i]
        if ends < 0:
            raise Malformed(
                f"assistant turn {i} has no end-of-turn token {self.end_of_turn!r}: "
                f"{whole[starts[i] - len(literals[i]) : starts[i] + length + len(literals[i + 1])]!r}"
            )
        begins = starts[i] - len(literals[i]) + self._given(literals[i])
        supervised[begins : starts[i] + length + ends + len(self.end_of_turn)] = True
        shift = text.find(whole[starts[i] : starts[i] + length])  # characters that the template stripped in front
        at = starts[i] - shift
        for part, carries_loss in segments:
            if not carries_loss:
                supervised[max(at, starts[i]) : min(at + len(part), starts[i] + length)] = False
            at += len(part)

    def _given(self, literal: str) -> int:
        """How much of the template's text before an answer is in the prompt of the reply: the rest is the model's to say."""
        if self.opening and self.opening in literal:
            return literal.rindex(self.opening) + len(self.opening)
        return len(literal) - (len(self.lead) if literal.endswith(self.lead) else 0)


def _segments(content: Any, i: int) -> list[tuple[str, bool]]:
    """Content as (text, supervised) in order: parts become text, Python calls in GSM8K's own notation `<<12/60=0.2>>`."""
    if isinstance(content, str):
        return [(content, True)]
    if not isinstance(content, list) or not content:
        raise Malformed(f"message {i}: content must be a string or a list of parts")
    out: list[tuple[str, bool]] = []
    for part, following in zip(content, [*content[1:], None], strict=True):
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if not isinstance(text, str) or kind not in ("text", "python", "python_output"):
            raise Malformed(
                f"message {i}: a part must be {{'type': text, python or python_output, 'text': str}}, not {part!r:.80}"
            )
        if kind == "text":
            out.append((text, True))
        elif kind == "python":
            answered = isinstance(following, dict) and following.get("type") == "python_output"
            out.append((f"<<{text}=" if answered else f"<<{text}>>", True))
        else:
            out += [(text, False), (">>", True)]
    return out


def _to_segments(whole: str, supervised: np.ndarray) -> list[Segment]:
    """Stretches of equal supervision.

    >>> [(s.text, s.supervised) for s in _to_segments("abcd", np.array([False, True, True, False]))]
    [('a', False), ('bc', True), ('d', False)]
    """
    cuts = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(whole)]
    return [Segment(whole[a:b], False, bool(supervised[a])) for a, b in pairwise(cuts)]
