"""Conversations in the format of a model's own chat template, with a loss mask derived from the rendered text.

The template (Jinja, as in a Hugging Face tokenizer) decides what is rendered; skeleton.py finds the texts of the messages in it, and
marking.py what the model must generate itself: everything from the end of the generation prompt of an assistant's message up to its
end-of-turn token, which is included. A conversation of which a text is missing there is refused by name, or counted where the
template leaves out thoughts of earlier turns by design.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from chattrain.chat import marking
from chattrain.chat.fields import THOUGHTS, refused_field
from chattrain.chat.format import DROPPED_THOUGHTS, ChatFormat, Encoded, Kind, Malformed, Segment, is_text
from chattrain.chat.messages import Conversation, conversation
from chattrain.chat.skeleton import FORMS, Form, Piece, Placeholders, as_dicts, locate, mark_for, tags_of
from chattrain.errors import UserError
from chattrain.tokenizer.huggingface import HFTokenizer
from chattrain.tokenizer.unicode import well_formed

log = logging.getLogger("chattrain")

PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
CALL = {"id": "call00001", "function": {"name": "lookup", "arguments": {"key": "value"}}}
PROBE_TOOL = [PROBE[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
PROBE_TOOL += [{"role": "tool", "name": "lookup", "tool_call_id": "call00001", "content": "finding"}]
PLACE = "the chat template"


class LeftOut(Malformed):
    """The template leaves out a text."""


class Located(NamedTuple):
    """A rendered conversation, and where its texts stand in it."""

    whole: str
    messages: list[dict[str, Any]]  # as the template was given them
    pieces: list[Piece]
    spans: list[tuple[int, int] | None]  # None: the template leaves the text out
    dropped_thoughts: int


class ChatTemplate(ChatFormat):
    """Renders conversations with the chat template of one tokenizer.

    The constructor raises UserError for a template without an end-of-turn token: a model trained with it would never stop.
    """

    version = 1

    def __init__(self, tokenizer: HFTokenizer):
        self.tokenizer = tokenizer
        self.ends: marking.Ends | None = None
        self._thought_fields: dict[str, str | None] = {}
        self._tags = tags_of(tokenizer.chat_template or "")
        if tokenizer.chat_template is not None:
            self._probe()

    def _probe(self) -> None:
        """Render a question and an answer to find the end-of-turn token and the text that opens an assistant turn."""
        try:
            question, whole = self._render(PROBE[:1]), self._render(PROBE)
            prompt = self._render(PROBE[:1], add_generation_prompt=True)
        except Malformed as error:
            raise UserError(f"the chat template of {self.tokenizer.source} refuses a question and its answer: {error}") from error
        generation_prompt = prompt.removeprefix(question) if prompt.startswith(question) else ""
        answer_at = whole.rfind("answer")
        # Text of the template between the generation prompt and the answer: the model must generate it.
        reply_prefix = whole[len(prompt) : answer_at] if whole.startswith(prompt) else ""
        tail = whole[answer_at + len("answer") :] if answer_at >= 0 else ""
        first_special = sorted((tail.index(token), -len(token), token) for token in self.tokenizer.special_texts if token in tail)
        if not first_special:
            raise UserError(
                f"the chat template of {self.tokenizer.source} ends an assistant turn without a special token: a "
                f"model trained on it would never stop. It renders {whole!r}"
            )
        end_of_turn = first_special[0][2]
        others = [text for text in self.tokenizer.eos_texts if text != end_of_turn]
        before = {"user": prompt.rpartition("question")[2]} if whole.startswith(prompt) else {}
        self.ends = marking.Ends(generation_prompt, before, reply_prefix, (end_of_turn, *others))
        if not whole.startswith(prompt):
            log.warning(
                "the chat template of %s prompts for a reply with %r, but renders a reply that was given as %r: what is "
                "trained on is not what the model will be prompted with",
                self.tokenizer.source,
                prompt[len(question) :],
                whole[len(question) :],
            )

    @property
    def stop_ids(self) -> set[int]:
        """The tokens of end of turn and end of text, and those of generation_config.json."""
        ends = {self.tokenizer.special(self.ends.stops[0])} if self.ends is not None else set()
        return ends | self.tokenizer.eos_ids

    def to_segments(self, document: dict[str, Any], left_out: Counter[str] | None = None) -> list[Segment]:
        """The segments of a conversation or of a text `{"text": ...}`. Raises Malformed that names the message."""
        if is_text(document):
            return self._text(well_formed(document["text"]))
        talk = conversation(document)
        found = self._find(talk)
        if left_out is not None and found.dropped_thoughts:
            left_out[DROPPED_THOUGHTS] += found.dropped_thoughts
        assert self.ends is not None  # `_render` refuses tokenizers without a template
        ends = self.ends
        if any(message.role == "tool" for message in talk.messages):
            ends = ends._replace(before_reply={**ends.before_reply, **self._before_reply_to_tool})
        blocks = marking.find_blocks(found.whole, talk.messages, found.pieces, found.spans, ends)
        return marking.to_segments(found.whole, talk.messages, found.pieces, found.spans, blocks)

    def prompt(self, conversation_: dict[str, Any]) -> list[int]:
        talk = conversation(conversation_)
        messages = self._find(talk).messages
        rendered = self._render(messages, talk.tools, add_generation_prompt=True)
        return self.tokenizer.encode_rendered([rendered])[0][0]

    def encode(self, documents: list[list[Segment]]) -> list[Encoded]:
        """The tokens of each document. A token is the assistant's if all of its characters are: the model never has to generate a
        token that begins in the context. It is off if one of its characters is, and belongs to the turn that it begins in."""
        rendered = []
        encoded = self.tokenizer.encode_rendered(["".join(segment.text for segment in document) for document in documents])
        for document, (ids, offsets) in zip(documents, encoded, strict=True):
            sizes = [len(segment.text) for segment in document]
            kinds = np.repeat([int(segment.kind) for segment in document], sizes)
            turns = np.repeat([segment.turn for segment in document], sizes)
            begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            replies = _count(kinds & Kind.ASSISTANT > 0, begin, end)
            is_reply, is_off = (end > begin) & (replies == end - begin), _count(kinds & Kind.OFF > 0, begin, end) > 0
            of_tokens = is_reply * int(Kind.ASSISTANT) + is_off * int(Kind.OFF)
            rendered.append(Encoded(ids, of_tokens.tolist(), turns[begin.clip(max=len(turns) - 1)].tolist()))
        return rendered

    def choices(self, conversation: dict[str, Any], replies: list[str]) -> tuple[list[int], list[int]]:
        messages = conversation["messages"]
        answered = [{**conversation, "messages": [*messages, {"role": "assistant", "content": reply}]} for reply in replies]
        rendered = [encoded.ids for encoded in self.encode([self.to_segments(document) for document in answered])]
        at = next((i for i, tokens in enumerate(zip(*rendered, strict=False)) if len(set(tokens)) > 1), 0)
        tokens = [ids[at] for ids in rendered]
        if len(set(tokens)) != len(replies) or any(ids[at + 1 :] != rendered[0][at + 1 :] for ids in rendered):
            raise Malformed(f"each of {replies} must be one token of the tokenizer")
        return rendered[0][:at], tokens

    def _text(self, text: str) -> list[Segment]:
        """A plain text after BOS or, if the tokenizer has no BOS, before the end-of-text token."""
        self._refuse_special_tokens("the text", text)
        bos, eos = self.tokenizer.bos_text, self.tokenizer.eos_text
        if bos is not None:
            return [Segment(bos, True, Kind.PROMPT), Segment(text, False, Kind.ASSISTANT)]
        return [Segment(text, False, Kind.ASSISTANT), *([Segment(eos, True, Kind.ASSISTANT)] if eos is not None else [])]

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {self.tokenizer.source} has no chat template, so conversations cannot be "
                "rendered; put a chat_template.jinja into that folder, or take the instruct model's"
            )
        try:
            return self.tokenizer.backend.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Malformed(f"the chat template refuses it: {error}") from None

    def _find(self, talk: Conversation) -> Located:
        """The conversation, rendered in the first form in which the template keeps all of it."""
        for message in talk.messages:
            for text in strings_of([message.text, message.thought, message.calls, message.links, message.rest]):
                self._refuse_special_tokens(f"message {message.index}", text)
        for text in strings_of(talk.tools):
            self._refuse_special_tokens("`tools`", text)
        errors: list[Malformed] = []
        for form in FORMS if any(message.calls for message in talk.messages) else FORMS[:1]:
            try:
                return self._find_in(talk, form)
            except Malformed as error:
                errors.append(error)
        raise next((error for error in errors if isinstance(error, LeftOut)), errors[0])

    def _find_in(self, talk: Conversation, form: Form) -> Located:
        given = next((m.thought_field for m in talk.messages if m.thought), None)
        thought_field = self._thought_field(given) if given else None
        messages = as_dicts(talk, form, thought_field, None)
        whole = self._render(messages, talk.tools)
        placeholders = Placeholders(mark_for(whole), self._tags)
        skeleton = self._render(as_dicts(talk, form, thought_field, placeholders), talk.tools)
        if re.search(f"'{placeholders.mark}\\d+x': ", skeleton):
            raise Malformed("the chat template writes the arguments of a call as Python, not as JSON")
        spans = locate(skeleton, placeholders, whole, talk)
        dropped = self._check_thoughts(talk, placeholders.pieces, spans)
        for piece, span in zip(placeholders.pieces, spans, strict=True):
            if span is None and not (piece.is_thought or piece.field in THOUGHTS):
                raise self._left_out(talk, piece)
        self._check_tools(talk, skeleton)
        self._check_other_fields(talk, messages, whole)
        return Located(whole, messages, placeholders.pieces, spans, dropped)

    def _left_out(self, talk: Conversation, piece: Piece) -> LeftOut:
        message = talk.messages[piece.message]
        if piece.field == "tool_calls":
            return LeftOut(
                f"{message}: the chat template leaves out its `tool_calls` ({piece.text!r:.80}), so it knows no tools, or not in this "
                "place; train such rows with a template that has them, or leave the rows out"
            )
        return LeftOut(f"the chat template leaves out {message}: {piece.text!r:.200}")

    def _check_thoughts(self, talk: Conversation, pieces: list[Piece], spans: list[tuple[int, int] | None]) -> int:
        """How many messages have a thought that the template leaves out by design: before the last user's message, if it keeps
        those behind it. Raises LeftOut for any other thought that is left out."""
        last_user = max((i for i, message in enumerate(talk.messages) if message.role == "user"), default=-1)
        dropped = {}
        for piece, span in zip(pieces, spans, strict=True):
            if span is None and (piece.is_thought or piece.field in THOUGHTS):
                dropped.setdefault(piece.message, piece)
        for i, piece in dropped.items():
            message, by_field = talk.messages[i], piece.field in THOUGHTS
            if i > last_user or not (self._thought_field(piece.field) if by_field else self._keeps_tagged_thoughts):
                if by_field:
                    raise LeftOut(str(refused_field(str(message), piece.field, message.thought, PLACE)))
                raise LeftOut(
                    f"{message}: the chat template leaves out the thought before </think> in its content ({piece.text!r:.80}); train "
                    "with a template that keeps it, or take it out of the data"
                )
        return len(dropped)

    def _thought_field(self, given: str) -> str | None:
        """The name under which the template renders the thought of a reply, if possible the given one; None: under none."""
        if given not in self._thought_fields:
            names = [name for name in dict.fromkeys((given, *THOUGHTS)) if self._renders({**PROBE[1], name: "pondering"})]
            self._thought_fields[given] = next(iter(names), None)
        return self._thought_fields[given]

    @cached_property
    def _keeps_tagged_thoughts(self) -> bool:
        """Does the template render a thought that stands in the content of a reply, between <think> and </think>?"""
        return self._renders({**PROBE[1], "content": "<think>\npondering\n</think>\n\nanswer"})

    def _renders(self, reply: dict[str, Any]) -> bool:
        try:
            return "pondering" in self._render([PROBE[0], reply])
        except Malformed:
            return False

    @cached_property
    def _before_reply_to_tool(self) -> dict[str, str]:
        """What stands between a tool's result and the reply to it; empty if the template knows no tools."""
        try:
            messages = self._find(conversation({"messages": PROBE_TOOL})).messages
            prompt = self._render(messages, add_generation_prompt=True)
        except Malformed:
            return {}
        return {"tool": prompt.rpartition("finding")[2]}

    def _check_tools(self, talk: Conversation, skeleton: str) -> None:
        """Raises LeftOut unless the names and descriptions in `tools` are in the rendered text."""
        for text in _names_and_descriptions(talk.tools):
            if not any(spelled in skeleton for spelled in (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])):
                raise LeftOut(str(refused_field("the conversation", "tools", talk.tools, f"{PLACE}, which leaves out {text!r:.80},")))

    def _check_other_fields(self, talk: Conversation, messages: list[dict[str, Any]], whole: str) -> None:
        """Raises LeftOut for a field that changes nothing in the rendered text."""
        for i, message in enumerate(talk.messages):
            for field, value in message.rest.items():
                without = [*messages[:i], {k: v for k, v in messages[i].items() if k != field}, *messages[i + 1 :]]
                if self._render(without, talk.tools) == whole:
                    raise LeftOut(str(refused_field(str(message), field, value, PLACE)))

    def _refuse_special_tokens(self, where: str, text: str) -> None:
        """Raises Malformed for a text that contains that of a special token: it would be encoded as that token."""
        found = self.tokenizer.control_pattern.search(text)
        if found:
            raise Malformed(f"{where} holds the text {found[0]!r}, which the tokenizer would take for the special token")


def strings_of(value: Any) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings_of([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


def _names_and_descriptions(schema: Any) -> Iterator[str]:
    """Texts of a tool's JSON schema that a template writes as they are: names of tools and parameters, and descriptions."""
    if isinstance(schema, list):
        for item in schema:
            yield from _names_and_descriptions(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("name", "description") and isinstance(value, str):
                yield value
            elif key == "properties" and isinstance(value, dict):
                yield from value
                yield from _names_and_descriptions(list(value.values()))
            else:
                yield from _names_and_descriptions(value)


def _count(marked: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(tokens,): how many of the characters begin to end of each token are marked; `marked`: (characters,) bool."""
    before = np.concatenate([[0], np.cumsum(marked)])
    return before[end] - before[begin]
