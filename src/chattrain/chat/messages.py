"""Conversations as data sets write them, in one form for every chat format: roles, text, calls, thoughts, flags, tools."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from chattrain.chat.fields import FLAGS, THOUGHTS, clean, has_content, is_off
from chattrain.chat.format import Malformed, messages_of
from chattrain.tokenizer.unicode import well_formed

ROLES = {"developer": "system", "function": "tool", "ipython": "tool", "observation": "tool"}  # other names of a role
PARTS = {"assistant": ("text", "python", "python_output")}  # types of the parts of a content; of other roles: text
# Role of a message -> roles that may follow; the first is the usual one.
EXPECTED = {
    "": ("user",),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
MEDIA = ("image", "audio", "video", "file")


class Part(NamedTuple):
    kind: str  # text, python, python_output
    text: str


class Call(NamedTuple):
    """A call of a tool. `arguments`: an object, or the text of one, as given."""

    name: str
    arguments: dict[str, Any] | str
    id: str | None

    @property
    def as_text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments, ensure_ascii=False)

    @property
    def as_object(self) -> dict[str, Any]:
        return json.loads(self.arguments) if isinstance(self.arguments, str) else self.arguments


@dataclass(slots=True)
class Message:
    """One message. `rest`: other fields with content; a chat format places or refuses them."""

    index: int  # in the conversation as given, for messages to users
    role: str  # system, user, assistant, tool
    parts: list[Part]
    content_is_null: bool = False
    thought: str = ""
    thought_field: str = THOUGHTS[0]
    calls: list[Call] = field(default_factory=list)
    off: bool = False
    links: dict[str, Any] = field(default_factory=dict)  # of a result: fields that only say which call it answers
    rest: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"message {self.index} ({self.role})"

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


class Conversation(NamedTuple):
    messages: list[Message]
    tools: list[dict[str, Any]]


def conversation(document: dict[str, Any]) -> Conversation:
    """The conversation of `{"messages": [...], "tools": [...]}`. Results stand in the order of their calls.

    Raises Malformed, which names the message, if the roles do not take turns or a field has a type or value that is not known.
    """
    messages = [_message(i, message) for i, message in enumerate(messages_of(document))]
    check_turns(messages)
    return Conversation(_in_order_of_calls(messages), _tools(document.get("tools")))


def check_turns(messages: list[Message]) -> None:
    """Raises Malformed unless, behind a system message, user and assistant alternate, the user first. Results of tools stand
    behind the assistant's message that calls them; the assistant goes on behind them."""
    before = ""
    for at, message in enumerate(messages):
        expected = EXPECTED[before]
        if message.role not in expected and (at or message.role != "system"):
            why = ": a system message must be followed by a user message" if before == "system" else ""
            raise Malformed(f"message {message.index} is from {message.role!r} where {expected[0]!r} must speak{why}")
        before = message.role


def _message(i: int, given: dict[str, Any]) -> Message:
    role, content = given["role"], given.get("content")
    if len(given) == 2 and isinstance(role, str) and isinstance(content, str):  # most messages
        return Message(i, ROLES.get(role, role), [Part("text", well_formed(content))])
    message = clean(given) or {}
    if not isinstance(role, str):
        raise Malformed(f"message {i} needs `role` and `content`")
    off = is_off(i, message)
    rest = {name: value for name, value in message.items() if name not in ("role", "content", *FLAGS) and has_content(value)}
    role = ROLES.get(role, role)
    calls, thought = [], ("", THOUGHTS[0])
    if role == "assistant":
        calls, thought = _calls(i, rest), _thought(i, rest)
    links = {"tool_call_id": rest.pop("tool_call_id")} if role == "tool" and "tool_call_id" in rest else {}
    content = message.get("content")
    if content is None and not calls and not thought[0]:
        others = f"; it has {', '.join(f'`{name}`' for name in rest)}" if rest else ""
        raise Malformed(f"message {i} needs `role` and `content`{others}")
    if not content and (calls or thought[0]):
        parts = []
    else:
        parts = _parts(i, role, content)
    return Message(i, role, parts, content is None, *thought, calls, off, links, rest)


def _parts(i: int, role: str, content: Any) -> list[Part]:
    """The content as parts: a string is one of text."""
    if isinstance(content, str):
        return [Part("text", content)]
    known = PARTS.get(role, ("text",))
    if not isinstance(content, list) or not content:
        raise Malformed(f"message {i}: content must be a string or a list of parts, not {content!r:.80}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in known:
            why = ", and images, audio and files cannot be trained on" if any(word in kind for word in MEDIA) else ""
            raise Malformed(f"message {i}: unknown part type {kind!r}{why}; known are {', '.join(known)}")
        if not isinstance(part, dict) or not isinstance(kind, str) or not isinstance(part.get("text"), str):
            raise Malformed(f"message {i}: a part must be {{'type': {' or '.join(known)}, 'text': str}}, not {part!r:.80}")
        others = [name for name, value in part.items() if name not in ("type", "text") and has_content(value)]
        if others:
            raise Malformed(f"message {i}: a part has `{others[0]}` ({part[others[0]]!r:.80}), which would not be trained on")
        parts.append(Part(kind, part["text"]))
    return parts if role == "assistant" else [Part("text", "".join(part.text for part in parts))]


def _thought(i: int, rest: dict[str, Any]) -> tuple[str, str]:
    """(thought, name of its field), taken from `rest`."""
    given = {name: rest.pop(name) for name in THOUGHTS if name in rest}
    for name, value in given.items():
        if not isinstance(value, str):
            raise Malformed(f"message {i}: `{name}` must be a string, not {value!r:.80}")
    if len(set(given.values())) > 1:
        raise Malformed(f"message {i} has different thoughts in {' and '.join(f'`{name}`' for name in given)}; keep one of them")
    return next(((value, name) for name, value in given.items()), ("", THOUGHTS[0]))


def _calls(i: int, rest: dict[str, Any]) -> list[Call]:
    """The calls of `tool_calls` or of the older `function_call`, taken from `rest`."""
    given, older = rest.pop("tool_calls", []), rest.pop("function_call", None)
    if older is not None and given:
        raise Malformed(f"message {i} has `tool_calls` and `function_call`; keep one of them")
    given = [older] if older is not None else given
    if not isinstance(given, list):
        raise Malformed(f"message {i}: `tool_calls` must be a list, not {given!r:.80}")
    return [_call(i, call) for call in given if call is not None]


def _call(i: int, given: Any) -> Call:
    """A call `{"function": {"name", "arguments"}}`, or flat `{"name", "arguments"}`."""
    function = given.get("function", given) if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise Malformed(f"message {i}: a call must be {{'function': {{'name': str, 'arguments': ...}}}}, not {given!r:.80}")
    nested = {"function.name", "function.arguments"} if function is not given else {"name", "arguments"}
    others = {f"function.{key}": value for key, value in function.items()} if function is not given else {}
    for key, value in {**others, **{key: value for key, value in given.items() if key != "function"}}.items():
        if key not in nested | {"id", "index"} and (key, value) != ("type", "function"):
            raise Malformed(f"message {i}: its call of {name} has `{key}` ({value!r:.80}), which would not be trained on")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str) and not arguments.strip():
        arguments = {}
    try:
        given_arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        json.dumps(given_arguments, allow_nan=False)  # NaN and numbers beyond a float's are no JSON
        known_object = isinstance(given_arguments, dict)
    except ValueError:
        known_object = False
    if not known_object:
        raise Malformed(f"message {i}: the arguments of its call of {name} are no JSON object: {arguments!r:.80}")
    return Call(name, arguments, given.get("id") or None)


def _tools(given: Any) -> list[dict[str, Any]]:
    """The tools of a row: a list of objects, or the JSON text of one."""
    if given is None:
        return []
    tools = given
    if isinstance(given, str) and given.strip():
        try:
            tools = json.loads(given)
        except ValueError as error:
            raise Malformed(f"`tools` is no JSON: {error}") from None
    if not has_content(tools):
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Malformed(f"`tools` must be a list of objects, or the JSON text of one, not {given!r:.80}")
    return [tool for tool in clean(tools) if tool is not None]


def _in_order_of_calls(messages: list[Message]) -> list[Message]:
    """The messages, with the results behind each message that calls tools in the order of its calls."""
    if not any(message.calls for message in messages):
        return messages
    ordered = list(messages)
    for at, message in enumerate(messages):
        if message.calls:
            end = next((i for i in range(at + 1, len(ordered)) if ordered[i].role != "tool"), len(ordered))
            ordered[at + 1 : end] = _paired(message, ordered[at + 1 : end])
    return ordered


def _paired(caller: Message, results: list[Message]) -> list[Message]:
    """The results of a message's calls in the order of the calls: by id, else by name, else as they stand. Where only some have
    an id or a name, these are placed first.

    Raises Malformed for a result without a call, and for a result where that of a call before it is missing.
    """
    calls = caller.calls
    if len(results) > len(calls):
        raise Malformed(f"message {results[len(calls)].index} is the result of no call: message {caller.index} has {len(calls)}")
    ids, names = [call.id for call in calls], [call.name for call in calls]
    given_ids = [result.links.get("tool_call_id") for result in results]
    given_names = [result.rest.get("name") for result in results]
    if None not in ids and None not in given_ids:
        results = _sorted(caller, results, ids, given_ids, "tool_call_id")
    elif len(set(names)) == len(names) and None not in given_names:
        results = _sorted(caller, results, names, given_names, "name")
    elif any(key is not None for key in (*given_ids, *given_names)):
        results = _sorted_where_named(caller, results)
    return [_linked(call, result) for call, result in zip(calls, results, strict=False)]


def _sorted(caller: Message, results: list[Message], keys: list, given: list, what: str) -> list[Message]:
    """The results in the order of `keys`, those of the calls; `given`: the key of each result."""
    asked, answered = Counter(map(repr, keys)), Counter(map(repr, given))  # they may be of any type
    for result, key in zip(results, given, strict=True):
        if asked[repr(key)] != 1 or answered[repr(key)] != 1:
            raise Malformed(f"message {result.index}: {what}={key!r:.80} is not that of one call of message {caller.index}")
    result_of = dict(zip(map(repr, given), results, strict=True))
    for call, key in zip(caller.calls, keys[: len(given)], strict=False):
        if repr(key) not in result_of:
            raise Malformed(f"message {caller.index}: its call of {call.name} has no result, but a later call has")
    return [result_of[repr(key)] for key in keys[: len(given)]]


def _sorted_where_named(caller: Message, results: list[Message]) -> list[Message]:
    """The results with an id or a name of one call in its place, the others in the places that are left."""
    slots: list[Message | None] = [None] * len(caller.calls)
    others = []
    for result in results:
        key, name = result.links.get("tool_call_id"), result.rest.get("name")
        places = [k for k, call in enumerate(caller.calls) if key is not None and call.id == key]
        if key is not None and not places and all(call.id is not None for call in caller.calls):
            raise Malformed(f"message {result.index}: tool_call_id={key!r:.80} is not that of one call of message {caller.index}")
        places = places or [k for k, call in enumerate(caller.calls) if name is not None and call.name == name]
        if len(places) == 1 and slots[places[0]] is None:
            slots[places[0]] = result
        else:
            others.append(result)
    waiting = iter(others)
    slots = [next(waiting, None) if slot is None else slot for slot in slots]
    if None in slots[: len(results)]:
        name = caller.calls[slots.index(None)].name
        raise Malformed(f"message {caller.index}: its call of {name} has no result, but a later call has")
    return [slot for slot in slots if slot is not None]


def _linked(call: Call, result: Message) -> Message:
    """The result with a `name` that is its call's among its links."""
    if result.rest.get("name") != call.name:
        return result
    rest = {name: value for name, value in result.rest.items() if name != "name"}
    return replace(result, rest=rest, links={**result.links, "name": call.name})
