"""Real tokenizers and chat templates: ids are those of transformers, and the supervised text is what the model must write.

`make real` runs all of it, and prints the supervised texts; the slow tests run it for one family, where there is network.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from chattrain.chat import Malformed, chat_format, render, render_prompt
from chattrain.chat.format import DROPPED_THOUGHTS
from chattrain.tokenizer import Tokenizer
from tests.real import fetch

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

ALL = bool(os.environ.get("CHATTRAIN_REAL"))
FAMILIES = sorted(fetch.TOKENIZERS)
SHORT_FORM = "qwen3"
END = {"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>", "deepseek_v3": "<｜end▁of▁sentence｜>"}
NO_THOUGHT = {"qwen3": "<think>\n\n</think>\n\n"}  # before a last reply that has no thought
TRIMS = ("llama3_1", "gemma3")  # templates that strip a message's text


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None, **others) -> dict:
    return {"role": "assistant", "content": text, **others}


CODE = "```python\nif x:\n\n        A  =   12\n```\n\n<b>naïve</b> 🙂"
TALKS = {
    "plain": [user("Hi"), assistant("Grüße 🙂")],
    "multi-turn": [user("  What is 1 + 2?\n"), assistant("It is 3.\n"), user("Sure?"), assistant("Yes")],
    "system": [{"role": "system", "content": "Be brief. "}, user(" Hi "), assistant("Yo")],
    "code": [user("Code, please"), assistant(CODE)],
    "thought in the text": [
        user("1"),
        assistant("<think>\none\n</think>\n\na"),
        user("2"),
        assistant("<think>\ntwo\n</think>\n\nb"),
    ],
}
THOUGHTS = [user("1"), assistant("a", reasoning_content="one"), user("2"), assistant("b", reasoning_content="two\n\nmore")]
TOOL = {"name": "warmth", "description": "Degrees in a city", "parameters": {"type": "object", "properties": {"city": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "warmth", "arguments": {"city": 'Os"lo', "days": 2}}}
TOOLS = {
    "tools": [{"type": "function", "function": TOOL}],
    "messages": [
        user("How warm is it?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "tool_call_id": "c1", "name": "warmth", "content": "7 degrees"},
        assistant("It is 7."),
    ],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    if not ALL and request.param != SHORT_FORM:
        pytest.skip("the other families are for make real")
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family):
    try:
        return Tokenizer.load(fetch.tokenizer_folder(family))
    except fetch.Unreachable as error:
        pytest.skip(f"no real tokenizer: {error}")


def supervised(tokenizer, conversation: dict) -> str:
    ids, mask = render(conversation, tokenizer, None)
    text = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    print(f"\n{tokenizer.source.name}: {text!r}")
    return text


def by_transformers(tokenizer, conversation: dict, **how) -> list[int]:
    given = {"tools": conversation.get("tools"), "tokenize": True, "return_dict": True}
    return list(tokenizer.backend.apply_chat_template(conversation["messages"], **given, **how)["input_ids"])


def expected(family: str, *replies: str) -> str:
    """Replies with what the family writes around them."""
    written = [reply.strip() if family in TRIMS else reply for reply in replies]
    thought = "" if written[-1].startswith("<think>") else NO_THOUGHT.get(family, "")
    return "".join(reply + END[family] for reply in [*written[:-1], thought + written[-1]])


@pytest.mark.parametrize("kind", TALKS)
def test_ids_are_those_of_transformers_and_replies_are_supervised(tokenizer, family, kind):
    talk = {"messages": TALKS[kind]}
    assert render(talk, tokenizer, None).ids == by_transformers(tokenizer, talk)
    replies = [message["content"] for message in TALKS[kind] if message["role"] == "assistant"]
    if family == "qwen3" and kind == "thought in the text":
        replies[0] = "a"  # its thought is dropped once a user's message follows
    assert supervised(tokenizer, talk) == expected(family, *replies)


@pytest.mark.parametrize("kind", TALKS)
def test_the_prompt_of_a_reply_is_that_of_transformers(tokenizer, kind):
    talk = {"messages": TALKS[kind]}
    asked = {"messages": TALKS[kind][:-1]}
    assert render_prompt(talk, tokenizer) == by_transformers(tokenizer, asked, add_generation_prompt=True)


def test_thoughts_go_through_the_template_or_are_refused_by_name(tokenizer, family):
    talk, left_out = {"messages": THOUGHTS}, Counter()
    if family != "qwen3":
        with pytest.raises(Malformed, match=r"message 1 .*`reasoning_content`.*data.ignore=\[reasoning_content\]"):
            render(talk, tokenizer)
        return
    assert render(talk, tokenizer, None).ids == by_transformers(tokenizer, talk)
    assert supervised(tokenizer, talk) == "a<|im_end|><think>\ntwo\n\nmore\n</think>\n\nb<|im_end|>"
    chat_format(tokenizer).to_segments(talk, left_out)
    assert left_out == {DROPPED_THOUGHTS: 1}


def test_tools_go_through_the_template_or_are_refused_by_name(tokenizer, family):
    if family != "qwen3":
        with pytest.raises(Malformed, match="tool"):
            render(TOOLS, tokenizer)
        return
    assert render(TOOLS, tokenizer, None).ids == by_transformers(tokenizer, TOOLS)
    assert supervised(tokenizer, TOOLS) == (
        '<tool_call>\n{"name": "warmth", "arguments": {"city": "Os\\"lo", "days": 2}}\n</tool_call><|im_end|>'
        "<think>\n\n</think>\n\nIt is 7.<|im_end|>"
    )
    asked = {**TOOLS, "messages": TOOLS["messages"][:-1]}
    assert render_prompt(TOOLS, tokenizer) == by_transformers(tokenizer, asked, add_generation_prompt=True)


def test_deepseeks_template_takes_two_calls_of_a_reply_and_refuses_one_which_it_does_not_end(tokenizer, family):
    if family != "deepseek_v3":
        pytest.skip("of DeepSeek V3")
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("g", "f")]
    talk = {"messages": [user("Hi"), assistant(None, tool_calls=calls), *results, assistant("Done")]}
    assert supervised(tokenizer, talk) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        "<｜end▁of▁sentence｜>Done<｜end▁of▁sentence｜>"
    )
    with pytest.raises(Malformed, match=r"assistant turn 1 has no end-of-turn token .* behind its calls"):
        render({"messages": [user("Hi"), assistant(None, tool_calls=calls[:1])]}, tokenizer)
    with pytest.raises(Malformed, match="message 0 holds the text '<｜User｜>'"):
        render({"messages": [user("<｜User｜>")]}, tokenizer)
