"""Find all texts of a conversation in what a chat template renders of it, or refuse it by the name of what is missing.

Templates differ in what they want: a content of null or "" beside calls, arguments as text or as an object, the name of the field
for thoughts. A conversation is given as it is, then in the other forms, until the template keeps all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from chattrain.chat.fields import THOUGHTS, refused_field
from chattrain.chat.format import Malformed
from chattrain.chat.jinja import render_template
from chattrain.chat.messages import Conversation, conversation
from chattrain.chat.skeleton import FORMS, Form, Piece, Placeholders, as_dicts, locate, mark_for, spellings, tags_of
from chattrain.tokenizer.huggingface import HFTokenizer

QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
CALL = {"id": "call00001", "function": {"name": "lookup", "arguments": {"key": "value"}}}
RESULT = {"role": "tool", "name": "lookup", "tool_call_id": "call00001", "content": "finding"}
WITH_TOOL = {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]}
PLACE = "the chat template"
MOST_FIELDS = 1000  # of the messages of one conversation, beside those that every template knows


class LeftOut(Malformed):
    """The template leaves out a text."""


class Located(NamedTuple):
    """A rendered conversation, and where its texts stand in it."""

    whole: str
    messages: list[dict[str, Any]]  # as the template was given them
    keep_null: bool  # how it was given them
    pieces: list[Piece]
    spans: list[tuple[int, int] | None]  # of each piece; None: the template leaves it out
    dropped_thoughts: int  # messages whose thought is left out by design


class Finder:
    """Finds the texts of conversations in the renderings of one tokenizer's chat template."""

    def __init__(self, tokenizer: HFTokenizer):
        self.tokenizer = tokenizer
        self._tags = tags_of(str(tokenizer.chat_template or ""))
        self._thought_fields: dict[str, str | None] = {}

    def find(self, talk: Conversation) -> Located:
        """The conversation, rendered in the first form in which the template keeps all of it. Raises Malformed."""
        for message in talk.messages:
            parsed = [call.as_object for call in message.calls]  # a template may write them without JSON's escapes
            for text in strings_of([message.text, message.thought, message.calls, parsed, message.links, message.rest]):
                self.refuse_special_tokens(f"message {message.index}", text)
        for text in strings_of(talk.tools):
            self.refuse_special_tokens("`tools`", text)
        try:
            return self._in_a_form(talk)
        except LeftOut:
            raise
        except Malformed as error:
            of_tools = [message for message in talk.messages if message.calls or message.role == "tool"]
            if of_tools and self._with_tool is None:
                what = "`tool_calls`" if of_tools[0].calls else "the result of a tool"
                raise Malformed(f"{of_tools[0]} has {what}, and the chat template knows no tools: {error}") from None
            raise

    def prompt_after_tool(self) -> str | None:
        """What stands between a tool's result and the reply to it; None: the template knows no tools."""
        found = self._with_tool
        if found is None:
            return None
        prompt = render_template(self.tokenizer, found.messages, add_generation_prompt=True, keep_null=found.keep_null)
        return prompt.rpartition(RESULT["content"])[2]

    def refuse_special_tokens(self, where: str, text: str) -> None:
        """Raises Malformed for a text that contains that of a special token: it would be encoded as that token."""
        found = self.tokenizer.control_pattern.search(text)
        if found:
            raise Malformed(f"{where} holds the text {found[0]!r}, which the tokenizer would take for the special token")

    @cached_property
    def _with_tool(self) -> Located | None:
        """A question, a call and its result, rendered; None: the template knows no tools."""
        try:
            return self._in_a_form(conversation(WITH_TOOL))
        except Malformed:
            return None

    def _in_a_form(self, talk: Conversation) -> Located:
        """As `find`. Of the reasons of all forms, the one is raised that came nearest."""
        errors: list[Malformed] = []
        for form in FORMS if any(message.calls for message in talk.messages) else FORMS[:1]:
            try:
                return self._find_in(talk, form)
            except Malformed as error:
                errors.append(error)
        raise next((error for error in reversed(errors) if isinstance(error, LeftOut)), errors[0])

    def _find_in(self, talk: Conversation, form: Form) -> Located:
        given = next((m.thought_field for m in talk.messages if m.thought), None)
        thought_field = self._thought_field(given) if given else None
        messages = as_dicts(talk, form, thought_field, None)
        keep_null = form.empty_content == "null"
        whole = render_template(self.tokenizer, messages, talk.tools, keep_null=keep_null)
        placeholders = Placeholders(mark_for(whole), self._tags)
        with_placeholders = as_dicts(talk, form, thought_field, placeholders)
        skeleton = render_template(self.tokenizer, with_placeholders, talk.tools, keep_null=keep_null)
        if re.search(f"'{placeholders.mark}\\d+x': ", skeleton):
            raise Malformed("the chat template writes the arguments of a call as Python, not as JSON")
        spans = locate(skeleton, placeholders, whole, talk)
        dropped = self._check_thoughts(talk, placeholders.pieces, spans)
        for piece, span in zip(placeholders.pieces, spans, strict=True):
            if span is None and not (piece.is_thought or piece.field in THOUGHTS):
                raise self._left_out(talk, piece)
        located = Located(whole, messages, keep_null, placeholders.pieces, spans, dropped)
        self._check_tools(talk, located, skeleton)
        self._check_other_fields(talk, located)
        return located

    def _left_out(self, talk: Conversation, piece: Piece) -> LeftOut:
        message = talk.messages[piece.message]
        if piece.field == "tool_calls":
            names = ", ".join(call.name for call in message.calls)
            return LeftOut(
                f"{message}: the chat template leaves out its `tool_calls` ({names}), so it knows no tools, or not in this "
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
                    f"{message}: the chat template leaves out the thought before </think> in its content ({piece.text!r:.80}); "
                    "train with a template that keeps it, or take it out of the data"
                )
        return len(dropped)

    def _thought_field(self, given: str) -> str | None:
        """The name under which the template renders the thought of a reply, if possible the given one; None: under none."""
        if given not in self._thought_fields:
            names = [name for name in dict.fromkeys((given, *THOUGHTS)) if self._renders({**ANSWER, name: "pondering"})]
            self._thought_fields[given] = next(iter(names), None)
        return self._thought_fields[given]

    @cached_property
    def _keeps_tagged_thoughts(self) -> bool:
        """Does the template render a thought that stands in the content of a reply, between <think> and </think>?"""
        return self._renders({**ANSWER, "content": "<think>\npondering\n</think>\n\nanswer"})

    def _renders(self, reply: dict[str, Any]) -> bool:
        try:
            return "pondering" in render_template(self.tokenizer, [QUESTION, reply])
        except Malformed:
            return False

    def _check_tools(self, talk: Conversation, located: Located, skeleton: str) -> None:
        """Raises LeftOut unless `tools` change the rendered text, and their names and descriptions are in it."""
        if not talk.tools:
            return
        texts = [text for text in map(str.strip, _names_and_descriptions(talk.tools)) if text]
        lost = [text for text in texts if not any(spelled in skeleton for spelled in spellings(text))]
        without = render_template(self.tokenizer, located.messages, keep_null=located.keep_null)
        if lost or without == located.whole:
            where = PLACE + (f", which leaves out {lost[0]!r:.80}," if lost else "")
            raise LeftOut(str(refused_field("the conversation", "tools", talk.tools, where)))

    def _check_other_fields(self, talk: Conversation, located: Located) -> None:
        """Raises LeftOut for a field that changes nothing in the rendered text."""
        messages = located.messages
        count = sum(len(message.rest) for message in talk.messages)
        if count > MOST_FIELDS:  # each costs a rendering of the whole conversation
            name = next(field for message in talk.messages for field in message.rest)
            raise Malformed(
                f"its messages have {count:,} fields such as `{name}` beside role and content, of which at most {MOST_FIELDS:,} "
                f"can be checked; leave them out with data.ignore=[{name}]"
            )
        for i, message in enumerate(talk.messages):
            for field, value in message.rest.items():
                without = [*messages[:i], {k: v for k, v in messages[i].items() if k != field}, *messages[i + 1 :]]
                if render_template(self.tokenizer, without, talk.tools, keep_null=located.keep_null) == located.whole:
                    raise LeftOut(str(refused_field(str(message), field, value, PLACE)))


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
