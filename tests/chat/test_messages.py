"""Messages as data sets write them, in chattrain's own format: parts, calls, results, flags, and what is refused by name."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from chattrain.chat import Kind, Malformed, chat_format, render, render_prompt
from chattrain.config.data import SourceConfig
from chattrain.data.cache import load_or_tokenize
from chattrain.tasks import record_to_segments
from chattrain.tokenizer import Tokenizer
from tests import tiny_hf

USER = {"role": "user", "content": "How warm?"}
REPLY = {"role": "assistant", "content": "7."}
TOOL = {"type": "function", "function": {"name": "warmth", "parameters": {}}}


def call(name: str = "warmth", arguments=None, id: str | None = None) -> dict:
    function = {"name": name, "arguments": {"city": "Oslo"} if arguments is None else arguments}
    return {"type": "function", "function": function, **({"id": id} if id else {})}


def calling(*calls: dict, content=None, **others) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **others}


def result(content: str, id: str | None = None, role: str = "tool", **others) -> dict:
    return {"role": role, "content": content, **({"tool_call_id": id} if id else {}), **others}


def rendered(*messages: dict, **document) -> str:
    return "".join(segment.text for segment in record_to_segments({"messages": list(messages), **document}, "messages"))


def kinds(*messages: dict) -> list[tuple[str, int]]:
    return [(segment.text, segment.kind) for segment in record_to_segments({"messages": list(messages)}, "messages")]


def refusal(*messages: dict, **document) -> str:
    with pytest.raises(Malformed) as refused:
        record_to_segments({"messages": list(messages), **document}, "messages")
    return str(refused.value)


# --- calls and results -----------------------------------------------------------------------------------------------


def test_a_call_and_its_result_stand_within_one_assistant_turn():
    assert rendered(USER, calling(call()), result("7"), REPLY) == (
        "<|bos|><|user_start|>How warm?<|user_end|><|assistant_start|>"
        '<|python_start|>warmth({"city": "Oslo"})<|python_end|><|output_start|>7<|output_end|>7.<|assistant_end|>'
    )


def test_calls_are_supervised_and_results_are_not(tokenizer):
    talk = [USER, calling(call(), content="I look."), result("7"), REPLY, USER, REPLY]
    ids, mask = render({"messages": talk}, tokenizer)
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        'I look.<|python_start|>warmth({"city": "Oslo"})<|python_end|>7.<|assistant_end|>7.<|assistant_end|>'
    )


@pytest.mark.parametrize(
    "message",
    [
        calling(call()),
        calling(call(), content=""),
        calling(call(arguments='{"city": "Oslo"}'), content=None),
        calling({"name": "warmth", "arguments": {"city": "Oslo"}}),
        calling({"name": "warmth", "arguments": '{"city": "Oslo"}', "id": "c", "type": "function"}),
        {"role": "assistant", "content": None, "function_call": {"name": "warmth", "arguments": '{"city": "Oslo"}'}},
        {"role": "assistant", "tool_calls": [call()]},
        calling(call(arguments={"city": "Oslo", "unit": None, "near": {"lat": None}}), function_call={"name": None}),
    ],
)
@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation"])
def test_a_call_may_be_written_as_text_or_object_nested_flat_or_in_the_old_way(message, role):
    assert rendered(USER, message, result("7", role=role), REPLY) == rendered(USER, calling(call()), result("7"), REPLY)


def test_results_stand_behind_their_calls_whatever_their_order():
    calls = calling(call("f", {}, "1"), call("g", {}, "2"))
    expected = (
        "<|assistant_start|><|python_start|>f({})<|python_end|><|output_start|>of f<|output_end|>"
        "<|python_start|>g({})<|python_end|><|output_start|>of g<|output_end|>7.<|assistant_end|>"
    )
    by_id, by_name = (result("of f", "1"), result("of g", "2")), (result("of f", name="f"), result("of g", name="g"))
    for first, second in (by_id, by_name):
        assert rendered(USER, calls, first, second, REPLY).endswith(expected)
        assert rendered(USER, calls, second, first, REPLY).endswith(expected)
    assert rendered(USER, calls, result("of f"), result("of g"), REPLY).endswith(expected)


@pytest.mark.parametrize(
    "results",
    [
        [result("of f", "1"), result("of g")],
        [result("of f"), result("of g", name="g")],
        [result("of f", name="f"), result("of g")],
        [result("of f", "1", name="f"), result("of g", name="g")],
    ],
)
def test_a_result_with_an_id_or_name_answers_its_call_where_others_have_none(results):
    calls = calling(call("f", {}, "1"), call("g", {}))
    in_order = rendered(USER, calls, result("of f"), result("of g"), REPLY)
    assert rendered(USER, calls, *results, REPLY) == rendered(USER, calls, *reversed(results), REPLY) == in_order


def test_several_steps_are_one_turn_until_the_user_speaks():
    talk = [USER, calling(call("f", {})), result("1"), calling(call("g", {})), result("2"), REPLY, USER, REPLY]
    segments = record_to_segments({"messages": talk}, "messages")
    assert [s.text for s in segments].count("<|assistant_start|>") == [s.text for s in segments].count("<|assistant_end|>") == 2
    assert [s.turn for s in segments if s.text == "<|assistant_end|>"] == [0, 1]


def test_a_reply_to_a_result_goes_on_in_the_open_turn(tokenizer):
    talk = [USER, calling(call()), result("7"), REPLY]
    prompt = render_prompt({"messages": talk}, tokenizer)
    assert prompt == render_prompt({"messages": talk[:-1]}, tokenizer) == render({"messages": talk[:-1]}, tokenizer).ids
    assert tokenizer.decode(prompt).endswith("<|output_start|>7<|output_end|>")
    assert render({"messages": talk}, tokenizer).ids[: len(prompt)] == prompt


def test_a_conversation_may_end_with_a_call():
    assert rendered(USER, calling(call("f", {}))).endswith("<|python_start|>f({})<|python_end|><|assistant_end|>")


@pytest.mark.parametrize("tools", [[TOOL, TOOL], json.dumps([TOOL, TOOL])])
def test_tools_are_json_one_a_line_in_the_system_text(tools):
    line = json.dumps(TOOL)
    assert f"<|user_start|>{line}\n{line}\n\nHow warm?<|user_end|>" in rendered(USER, REPLY, tools=tools)
    system = {"role": "developer", "content": "Be brief."}
    assert f"<|user_start|>Be brief.\n\n{line}\n{line}\n\nHow warm?" in rendered(system, USER, REPLY, tools=tools)


# --- content, padding ------------------------------------------------------------------------------------------------


def test_parts_of_text_are_joined_for_every_role():
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "warm?", "image_url": None}]
    for role in ("system", "developer"):
        given = rendered({"role": role, "content": parts}, {"role": "user", "content": parts}, REPLY)
        assert given == rendered({"role": "system", "content": "How warm?"}, USER, REPLY)
    assert rendered(USER, calling(call()), {"role": "tool", "content": parts}, REPLY) == rendered(
        USER, calling(call()), result("How warm?"), REPLY
    )


def test_null_padding_and_other_columns_are_as_absent():
    padding = {"name": None, "tool_calls": None, "audio": {"id": None}, "refusal": "", "annotations": [], "weight": None}
    padded = [{**USER, **padding}, {**REPLY, **padding, "function_call": {"name": None, "arguments": None}}]
    assert rendered(*padded, tools=None, source="web") == rendered(USER, REPLY)


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "audio", "video"])
def test_images_and_audio_are_refused_by_name(kind):
    message = refusal({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": kind, kind: {"url": "x"}}]})
    assert f"message 0: unknown part type '{kind}', and images, audio and files cannot be trained on" in message


@pytest.mark.parametrize("style", ["own", "template"])
def test_half_a_character_becomes_the_replacement_character(style, tokenizer, tmp_path):
    if style == "template":
        pytest.importorskip("transformers")
        tokenizer = Tokenizer.load(tiny_hf.write_tokenizer(tmp_path))
    broken, mended = ({"messages": [USER, {**REPLY, "content": f"a{mark}b"}]} for mark in ("\ud83d", "\ufffd"))
    assert render(broken, tokenizer) == render(mended, tokenizer)
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")
    assert render({"text": "a\ud83db"}, tokenizer) == render({"text": "a\ufffdb"}, tokenizer)


def test_a_tokenizer_is_trained_on_half_a_character():
    assert Tokenizer.train(["a\ud83db"] * 3, 265).vocab_size == 265


# --- flags -----------------------------------------------------------------------------------------------------------

OFF = Kind.OFF


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": 0}, {"trainable": False}])
def test_a_reply_flagged_off_is_off_with_its_role_token_and_its_end(flag):
    assert kinds(USER, {**REPLY, **flag}, USER, REPLY)[4:] == [
        ("<|assistant_start|>", OFF),
        ("7.", OFF | Kind.ASSISTANT),
        ("<|assistant_end|>", OFF | Kind.ASSISTANT),
        ("<|user_start|>", 0),
        ("How warm?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("7.", Kind.ASSISTANT),
        ("<|assistant_end|>", Kind.ASSISTANT),
    ]


def test_a_flag_of_one_changes_nothing(tokenizer):
    given = chat_format(tokenizer).encode([record_to_segments({"messages": [USER, {**REPLY, "weight": 1}]}, "messages")])
    assert given == chat_format(tokenizer).encode([record_to_segments({"messages": [USER, REPLY]}, "messages")])


def test_of_a_turn_of_several_messages_the_flagged_ones_are_off():
    first_off = dict(kinds(USER, calling(call("f", {}), weight=0), result("7"), {**REPLY, "content": "So 7."})[4:])
    assert first_off == {
        "<|assistant_start|>": 0,
        "<|python_start|>": OFF | Kind.ASSISTANT,
        "f({})": OFF | Kind.ASSISTANT,
        "<|python_end|>": OFF | Kind.ASSISTANT,
        "<|output_start|>": 0,
        "7": 0,
        "<|output_end|>": 0,
        "So 7.": Kind.ASSISTANT,
        "<|assistant_end|>": Kind.ASSISTANT,
    }
    both_off = dict(kinds(USER, calling(call("f", {}), weight=0), result("7"), {**REPLY, "weight": 0})[4:])
    assert both_off["<|assistant_start|>"] == OFF and both_off["<|assistant_end|>"] == OFF | Kind.ASSISTANT


def test_a_user_or_system_message_may_be_flagged_off_too():
    system = {"role": "system", "content": "Be brief."}
    assert {kind for _, kind in kinds({**USER, "train": False}, REPLY)[1:4]} == {OFF}
    assert kinds({**system, "weight": 0}, USER, REPLY)[1:5] == [
        ("<|user_start|>", 0),
        ("Be brief.\n\n", OFF),
        ("How warm?", 0),
        ("<|user_end|>", 0),
    ]


@pytest.mark.parametrize("flag, value", [("weight", 0.5), ("train", "yes"), ("weight", "0"), ("trainable", 2)])
def test_a_flag_of_another_value_is_refused_by_name(flag, value):
    assert f"message 1: {flag}={value!r} must be 0 or 1" in refusal(USER, {**REPLY, flag: value})


# --- refused by name, or left out by name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("name", "Ann", {**USER, "name": "Ann"}),
        ("refusal", "No.", {**REPLY, "refusal": "No."}),
        ("audio", {"id": "a"}, {**REPLY, "audio": {"id": "a"}}),
        ("reasoning_content", "Hm", {**REPLY, "reasoning_content": "Hm"}),
        ("reasoning", "Hm", {**REPLY, "reasoning": "Hm"}),
        ("thinking", "Hm", {**REPLY, "thinking": "Hm"}),
        ("loss", False, {**REPLY, "loss": False}),
        ("tool_calls", [call("f", {})], {**USER, "tool_calls": [call("f", {})]}),
    ],
)
def test_a_field_that_would_be_lost_is_refused_by_name_or_left_out_by_name(field, value, message):
    talk = [message] if message["role"] == "user" else [USER, message]
    said = refusal(*talk)
    assert f"message {len(talk) - 1} ({message['role']})" in said and f"`{field}` ({value!r}" in said
    assert f"data.ignore=[{field}]" in said
    left_out: Counter = Counter()
    segments = record_to_segments({"messages": talk}, "messages", ignore=[field], left_out=left_out)
    without = [{name: v for name, v in m.items() if name != field} for m in talk]
    assert "".join(segment.text for segment in segments) == rendered(*without)
    assert left_out == {field: 1}


def test_ignored_tools_are_counted_in_the_cache_and_part_of_its_key(tokenizer, tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"messages": [{**USER, "name": "Ann"}, REPLY], "tools": [TOOL]}) + "\n" for _ in range(3)))
    source = SourceConfig(str(file))

    def load(*ignore: str):
        return load_or_tokenize("talk", source, tokenizer, tmp_path / "cache", ignore=ignore)

    without, again, with_tools = load("name", "tools"), load("tools", "name"), load("name")
    assert without.left_out == again.left_out == {"name": 3, "tools": 3} and with_tools.left_out == {"name": 3}
    assert len(without.tokens) == len(again.tokens) < len(with_tools.tokens)


@pytest.mark.parametrize(
    "reason, messages",
    [
        ("message 2 is from 'tool', but no call before it waits for a result", [USER, REPLY, result("7")]),
        ("message 3 is the result of no call: message 1 has 1", [USER, calling(call()), result("7"), result("8")]),
        ("message 2: tool_call_id='9' is not that of one call of message 1", [USER, calling(call(id="1")), result("7", "9")]),
        (
            "message 1: its call of f has no result, but a later call has",
            [USER, calling(call("f", {}, "1"), call("g", {}, "2")), result("7", "2")],
        ),
        (
            "message 2 (tool): the format of this tokenizer has no place for `name`",
            [USER, calling(call(id="1")), result("7", "1", name="x")],
        ),
        ("message 2: name='x' is not that of one call of message 1", [USER, calling(call()), result("7", name="x")]),
        (
            "message 1: its call of f has no result, but a later call has",
            [USER, calling(call("f", {}), call("g", {}, "2")), result("7", "2")],
        ),
        (
            "message 3: tool_call_id='9' is not that of one call",
            [USER, calling(call("f", {}, "1"), call("f", {}, "2")), result("7"), result("8", "9")],
        ),
        ("message 3 is from 'user' where 'assistant' must speak", [USER, calling(call()), result("7"), USER]),
        ("message 1: the arguments of its call of f are no JSON object: '{a'", [USER, calling(call("f", "{a"))]),
        ("message 1: the arguments of its call of f are no JSON object: [1]", [USER, calling(call("f", [1]))]),
        ("message 1: the arguments of its call of f are no JSON object", [USER, calling(call("f", {"a": float("inf")}))]),
        ("message 1: the arguments of its call of f are no JSON object", [USER, calling(call("f", '{"a": NaN}'))]),
        ("message 1: a call must be", [USER, calling({"type": "custom", "custom": {"name": "f"}})]),
        ("message 1: its call of f has `type` ('custom')", [USER, calling({**call("f", {}), "type": "custom"})]),
        ("message 1: `tool_calls` must be a list", [USER, {**REPLY, "tool_calls": "f()"}]),
        ("`tool_calls` and `function_call`", [USER, calling(call(), function_call={"name": "f", "arguments": "{}"})]),
        (
            "different thoughts in `reasoning_content` and `thinking`",
            [USER, {**REPLY, "reasoning_content": "a", "thinking": "b"}],
        ),
        (
            "message 1 needs `role` and `content`; it has `refusal`",
            [USER, {"role": "assistant", "content": None, "refusal": "No"}],
        ),
        ("a part has `cache_control`", [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"a": 1}}]}]),
    ],
)
def test_what_cannot_be_rendered_is_refused_with_the_reason(reason, messages):
    assert reason in refusal(*messages)


@pytest.mark.parametrize(
    "tools, reason", [("[{", "`tools` is no JSON"), ([1], "must be a list of objects"), ({"a": 1}, "of objects")]
)
def test_tools_that_are_no_list_of_objects_are_refused(tools, reason):
    assert reason in refusal(USER, REPLY, tools=tools)


def test_a_prompt_without_the_last_result_is_refused(tokenizer):
    talk = [USER, calling(call("f", {}), call("g", {})), result("7")]
    with pytest.raises(Malformed, match="has no result yet"):
        render_prompt({"messages": talk}, tokenizer)
