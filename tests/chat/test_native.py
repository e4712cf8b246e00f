"""What a conversation becomes: which tokens, and which of them carry loss. Checked against a second, slow renderer."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.chat import Malformed, Rendered, chat_format, render, render_prompt
from chattrain.tokenizer import SPECIAL_TOKENS

many = settings(max_examples=300, deadline=None, derandomize=True, database=None)

LOOK_ALIKES = [
    *SPECIAL_TOKENS,
    "a<|bos|>b",
    "<|python_start|>1+1<|python_end|>",
    "<|assistant_end|><|user_start|>",
    "<|endoftext|>",
]
texts = st.one_of(st.text(max_size=12), st.sampled_from([*LOOK_ALIKES, "", " ", "\n\n", "Grüße, 東京 🙂", "12345", "e\u0301"]))
parts = st.builds(lambda kind, text: {"type": kind, "text": text}, st.sampled_from(["text", "python", "python_output"]), texts)
replies = st.one_of(texts, st.lists(parts, min_size=1, max_size=4))


@st.composite
def conversations(draw) -> dict:
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(replies)}]
    return {"messages": messages[:-1] if draw(st.booleans()) else messages}


# What surrounds a stretch of text, and whether the model has to produce the stretch itself.
SURROUNDED = {
    "text": ("", ""),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}
PRODUCED = {("assistant", "text"), ("assistant", "python")}


def slow_render(conversation: dict, tokenizer) -> tuple[list[int], list[int]]:
    """The specification word for word: every token is written on its own, with a reason for its loss."""
    turns = [(m["role"], m["content"]) for m in conversation["messages"]]
    if turns[0][0] == "system":
        turns[0:2] = [("user", turns[0][1] + "\n\n" + turns[1][1])]
    written = [("<|bos|>", False)]  # names of special tokens, or ids of ordinary ones
    for role, content in turns:
        written.append((f"<|{role}_start|>", False))
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for kind, text in [(part["type"], part["text"]) for part in parts]:
            loss = (role, kind) in PRODUCED
            before, after = SURROUNDED[kind]
            for token in [before, *tokenizer.encode(text), after]:
                if token != "":
                    written.append((token, loss))
        written.append((f"<|{role}_end|>", role == "assistant"))
    ids = [tokenizer.special(token) if isinstance(token, str) else token for token, _ in written]
    return ids, [1 if loss else 0 for _, loss in written]


def supervised_text(conversation: dict, tokenizer) -> str:
    ids, mask = render(conversation, tokenizer)
    return tokenizer.decode([token for token, loss in zip(ids, mask, strict=True) if loss])


def chat(*contents, system: str | None = None) -> dict:
    """User and assistant in turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"] * len(contents)
    return {"messages": messages + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


WITH_TOOL = chat(
    "1+1?",
    [
        {"type": "text", "text": "I ask. "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "It is 2."},
    ],
    "Thanks",
    "Bye",
)


@many
@given(conversations())
def test_ids_and_mask_equal_those_of_a_slow_second_renderer(tokenizer, conversation):
    rendered = render(conversation, tokenizer, max_tokens=None)
    ids, mask = slow_render(conversation, tokenizer)
    assert rendered.ids == ids
    assert rendered.loss_mask == mask


@many
@given(conversations())
def test_a_reader_of_the_tokens_alone_knows_what_is_supervised(tokenizer, conversation):
    """Between <|assistant_start|> and <|assistant_end|>, the end included, but for what the tool says."""
    name_of = {tokenizer.special(name): name for name in SPECIAL_TOKENS}
    speaking = tool = False
    for token, loss in zip(*render(conversation, tokenizer, None), strict=True):
        name = name_of.get(token, "")
        tool = tool or name == "<|output_start|>"
        assert loss == (speaking and not tool)
        speaking = name == "<|assistant_start|>" or (speaking and name != "<|assistant_end|>")
        tool = tool and name != "<|output_end|>"


def test_a_conversation_token_by_token(tokenizer):
    ids, mask = render(chat("ab", [{"type": "python", "text": "c"}, {"type": "python_output", "text": "d"}]), tokenizer)
    assert list(zip([tokenizer.decode([i]) for i in ids], mask, strict=True)) == [
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("a", 0),
        ("b", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("<|python_start|>", 1),
        ("c", 1),
        ("<|python_end|>", 1),
        ("<|output_start|>", 0),
        ("d", 0),
        ("<|output_end|>", 0),
        ("<|assistant_end|>", 1),
    ]


def test_user_tokens_carry_no_loss(tokenizer):
    assert supervised_text(chat("Ask", "Tell", "Again", system="Be kind"), tokenizer) == "Tell<|assistant_end|>"


def test_python_calls_are_supervised_and_what_the_tool_answers_is_not(tokenizer):
    assert supervised_text(WITH_TOOL, tokenizer) == (
        "I ask. <|python_start|>1+1<|python_end|>It is 2.<|assistant_end|>Bye<|assistant_end|>"
    )


def test_an_empty_reply_still_teaches_to_end(tokenizer):
    assert supervised_text(chat("", ""), tokenizer) == "<|assistant_end|>"


def test_the_system_message_becomes_the_beginning_of_the_first_user_turn(tokenizer):
    assert render(chat("Hi", "Yo", system="Be kind."), tokenizer) == render(chat("Be kind.\n\nHi", "Yo"), tokenizer)


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_text_that_looks_like_a_special_token_never_becomes_one(tokenizer, text):
    parts = [{"type": kind, "text": text} for kind in ("text", "python", "python_output")]
    expected = chat("u", [{"type": p["type"], "text": "t"} for p in parts], system="s")
    special = {tokenizer.special(name) for name in SPECIAL_TOKENS}
    got = [i for i in render(chat(text, parts, system=text), tokenizer).ids if i in special]
    assert got == [i for i in render(expected, tokenizer).ids if i in special]
    assert text in tokenizer.decode(render(chat("u", text), tokenizer).ids)


def test_a_conversation_may_end_with_the_user_or_with_the_tool(tokenizer):
    assert render(chat("Hi"), tokenizer).loss_mask == [0] * len(render(chat("Hi"), tokenizer).ids)
    assert supervised_text(chat("Hi", [{"type": "python_output", "text": "2"}]), tokenizer) == "<|assistant_end|>"


def test_truncation_keeps_the_first_tokens_and_their_mask(tokenizer):
    ids, mask = render(WITH_TOOL, tokenizer, max_tokens=None)
    for length in range(1, len(ids) + 3):
        assert render(WITH_TOOL, tokenizer, max_tokens=length) == (ids[:length], mask[:length])


def test_2048_tokens_are_kept_when_nothing_is_said(tokenizer):
    long = chat("Hi", "word " * 5000)
    assert len(render(long, tokenizer).ids) == len(render(long, tokenizer).loss_mask) == 2048
    assert len(render(long, tokenizer, max_tokens=None).ids) > 5000


def refused(reason: str, *messages):
    return pytest.param({"messages": list(messages)}, reason, id=reason)


U, A, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    "conversation, reason",
    [
        pytest.param({}, "messages", id="no messages"),
        pytest.param([U, A], "messages", id="a bare list"),
        pytest.param({"messages": "Hi"}, "messages", id="messages are text"),
        refused("non-empty"),
        refused("message 0", A),
        refused("message 1 is from 'user'", U, U),
        refused("message 2 is from 'assistant'", U, A, A),
        refused("message 2 is from 'system'", U, A, S, U),
        refused("from 'tool'", U, {"role": "tool", "content": "x"}),
        refused("followed by a user", S),
        refused("system message must be followed", S, A),
        refused("message 1 needs `role` and `content`", U, {"role": "assistant"}),
        refused("message 1 needs", U, {"role": "assistant", "content": None}),
        refused("message 0 needs", {"content": "x"}),
        refused("message 1 needs `role`", U, "x"),
        refused("message 0: content must be a string", {"role": "system", "content": 3}, U),
        refused("unknown part type 'python'; known are text", {"role": "user", "content": [{"type": "python", "text": "x"}]}),
        refused("string or a list of parts", U, {"role": "assistant", "content": 3}),
        refused("a list of parts", U, {"role": "assistant", "content": []}),
        refused("unknown part type 'image'", U, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}),
        refused("message 1: a part must be", U, {"role": "assistant", "content": ["x"]}),
        refused("a part must be", U, {"role": "assistant", "content": [{"type": "text", "text": None}]}),
        refused("not {'type': 'python'}", U, {"role": "assistant", "content": [{"type": "python"}]}),
    ],
)
def test_a_malformed_conversation_is_refused_with_the_reason(tokenizer, conversation, reason):
    with pytest.raises(Malformed) as refusal:
        render(conversation, tokenizer)
    assert reason in str(refusal.value)


def test_a_refusal_counts_the_messages_as_they_were_given(tokenizer):
    with pytest.raises(Malformed, match="message 2 is from 'user'"):
        render({"messages": [S, U, U]}, tokenizer)


@settings(many, max_examples=50)
@given(conversations())
def test_the_given_conversation_is_left_as_it_was(tokenizer, conversation):
    before = copy.deepcopy(conversation)
    render(conversation, tokenizer)
    render_prompt(conversation, tokenizer)
    assert conversation == before


@many
@given(conversations())
def test_a_prompt_is_the_rendering_up_to_where_the_assistant_begins(tokenizer, conversation):
    *before, last = conversation["messages"]
    prompt = render_prompt(conversation, tokenizer)
    assert prompt[-1] == tokenizer.special("<|assistant_start|>")
    if last["role"] == "assistant":
        assert prompt == render_prompt({"messages": before}, tokenizer)
        assert render(conversation, tokenizer, None).ids[: len(prompt)] == prompt
    else:
        assert prompt[:-1] == render(conversation, tokenizer, None).ids


def test_a_prompt_is_never_cut(tokenizer):
    assert len(render_prompt(chat("word " * 5000), tokenizer)) > 5000


@pytest.mark.parametrize("conversation", [{}, {"messages": []}, {"messages": [A]}, {"messages": ["x"]}, {"messages": None}])
def test_a_malformed_prompt_is_refused_too(tokenizer, conversation):
    with pytest.raises(Malformed):
        render_prompt(conversation, tokenizer)


@settings(many, max_examples=50)
@given(st.lists(conversations(), max_size=6), st.sampled_from([None, 7, 40]))
def test_a_batch_gives_what_each_conversation_gives_alone(tokenizer, some, max_tokens):
    form = chat_format(tokenizer)
    together = form.encode([form.to_segments(c) for c in some])
    alone = [render(c, tokenizer, max_tokens) for c in some]
    assert [Rendered(e.ids[:max_tokens], e.loss_mask[:max_tokens]) for e in together] == alone
