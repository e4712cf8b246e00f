"""Tools, thoughts, flags and other fields through a model's own template: ids, what is supervised, what is refused by name."""

from __future__ import annotations

from collections import Counter

import pytest

from chattrain.chat import Kind, Malformed, chat_format, render, render_prompt
from chattrain.chat.format import DROPPED_THOUGHTS
from chattrain.tokenizer import Tokenizer
from tests import tiny_hf

pytest.importorskip("transformers")

TEMPLATES = {
    **{f"{form} arguments": tiny_hf.TOOLS.replace("ARGUMENTS", written) for form, written in tiny_hf.ARGUMENTS.items()},
    "null content": tiny_hf.NULL_CONTENT,
    "no thoughts": tiny_hf.NO_THOUGHTS,
    "chatml": tiny_hf.CHATML,
    "names": tiny_hf.CHATML.replace("m['role']", "m['role'] + (' ' + m['name'] if m['name'] else '')"),
}
TOOL_STYLES = [name for name in TEMPLATES if name.endswith("arguments")]

USER = {"role": "user", "content": "How warm?"}
REPLY = {"role": "assistant", "content": "It is 7."}
RESULT = {"role": "tool", "name": "warmth", "tool_call_id": "c1", "content": "7 <b>degrees</b>\n"}
TOOL = {"type": "function", "function": {"name": "warmth", "description": "of a city", "parameters": {"type": "object"}}}
AS_TEXT = '{"city": "Øs\\"lo\\n", "days": [1, 2]}'
AS_OBJECT = {"city": 'Øs"lo\n', "days": [1, 2]}
WRITTEN = f'\n<tool_call>\n{{"name": "warmth", "arguments": {AS_TEXT}}}\n</tool_call><|im_end|>'


def call(arguments, name: str = "warmth", id: str = "c1") -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict, content: str | None = "", **others) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **others}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    eos = {"null content": "<|eot|>"}
    return {
        name: Tokenizer.load(
            tiny_hf.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, eos=eos.get(name, "<|im_end|>"))
        )
        for name, template in TEMPLATES.items()
    }


def supervised(tokenizer, *messages: dict, **document) -> str:
    ids, mask = render({"messages": list(messages), **document}, tokenizer, None)
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def by_transformers(tokenizer, messages, **how) -> list[int]:
    return list(tokenizer.backend.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"])


def refusal(tokenizer, *messages: dict, **document) -> str:
    with pytest.raises(Malformed) as refused:
        render({"messages": list(messages), **document}, tokenizer)
    return str(refused.value)


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", TOOL_STYLES)
@pytest.mark.parametrize("arguments", [AS_TEXT, AS_OBJECT])
@pytest.mark.parametrize("content", [None, ""])
def test_a_call_is_given_in_the_form_that_the_template_wants(tokenizers, style, arguments, content):
    talk = [USER, calling(call(arguments), content=content), RESULT, REPLY]
    assert supervised(tokenizers[style], *talk, tools=[TOOL]) == WRITTEN + "It is 7.<|im_end|>"
    wanted = [USER, calling(call(AS_OBJECT if style == "object arguments" else AS_TEXT)), RESULT, REPLY]
    ids = render({"messages": talk, "tools": [TOOL]}, tokenizers[style], None).ids
    assert ids == by_transformers(tokenizers[style], wanted, tools=[TOOL])


@pytest.mark.parametrize("style", TOOL_STYLES)
def test_the_prompt_behind_a_result_is_that_of_transformers(tokenizers, style):
    talk = [USER, calling(call(AS_TEXT), content="I look."), RESULT]
    wanted = [USER, calling(call(AS_OBJECT if style == "object arguments" else AS_TEXT), content="I look."), RESULT]
    there = by_transformers(tokenizers[style], wanted, add_generation_prompt=True, tools=[TOOL])
    assert render_prompt({"messages": talk, "tools": [TOOL]}, tokenizers[style]) == there
    assert render_prompt({"messages": [*talk, REPLY], "tools": [TOOL]}, tokenizers[style]) == there


def test_several_calls_and_results_are_told_apart_and_put_in_order(tokenizers):
    calls = calling(call("{}", "f", "1"), call("{}", "g", "2"))
    results = [{"role": "tool", "tool_call_id": id, "content": f"of {id}"} for id in ("1", "2")]
    tokenizer = tokenizers["either arguments"]
    in_order, crossed = ({"messages": [USER, calls, *some, REPLY]} for some in (results, results[::-1]))
    assert render(crossed, tokenizer) == render(in_order, tokenizer)
    assert render(in_order, tokenizer).ids == by_transformers(tokenizer, in_order["messages"])
    assert supervised(tokenizer, *in_order["messages"]) == (
        '\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
        "<|im_end|>It is 7.<|im_end|>"
    )


@pytest.mark.parametrize("content", [None, ""])
def test_a_template_that_looks_for_a_null_content_gets_it(tokenizers, content):
    talk = [USER, calling(call({}), content=content), RESULT, REPLY, USER, REPLY]
    assert supervised(tokenizers["null content"], *talk) == "function:warmth{}<|eot|>It is 7.<|eot|>It is 7.<|eot|>"
    prompt = tokenizers["null content"].decode(render_prompt({"messages": talk[:3]}, tokenizers["null content"]))
    assert prompt.endswith("function:warmth{}<|eot|><|im_start|>7 <b>degrees</b>\n<|im_end|>")


def test_what_the_prompt_behind_a_result_lacks_is_supervised(tokenizers):
    """Behind a result this template prompts with nothing, and writes the mark of a role before a call."""
    talk = [USER, calling(call({})), RESULT, calling(call({})), {**RESULT, "content": "8"}, REPLY]
    once = "function:warmth{}<|eot|>"
    assert supervised(tokenizers["null content"], *talk) == once + "<|body|>" + once + "It is 7.<|eot|>"


def test_a_call_is_supervised_where_the_prompt_opens_a_thought_that_the_reply_lacks(tmp_path):
    opened = tiny_hf.TOOLS.replace("ARGUMENTS", tiny_hf.ARGUMENTS["either"]).replace(
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}",
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}",
    )
    tokenizer = Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, opened))
    talk = [USER, calling(call(AS_TEXT)), RESULT, {**REPLY, "reasoning_content": "Hm"}]
    assert supervised(tokenizer, *talk) == WRITTEN + "Hm\n</think>\n\nIt is 7.<|im_end|>"


def test_a_template_that_leaves_out_a_part_of_the_tools_refuses_them_with_the_part(tmp_path):
    template = tiny_hf.TOOLS.replace("ARGUMENTS", tiny_hf.ARGUMENTS["either"]).replace(
        "tool | tojson", "tool['function']['name']"
    )
    tokenizer = Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, template))
    assert "which leaves out 'of a city', has no place for `tools`" in refusal(tokenizer, USER, REPLY, tools=[TOOL])


def test_a_template_without_tools_refuses_them_by_name(tokenizers):
    tokenizer = tokenizers["chatml"]
    assert "message 1 (assistant): the chat template leaves out its `tool_calls` (warmth)" in refusal(
        tokenizer, USER, calling(call("{}")), RESULT, REPLY
    )
    assert "`tools`" in refusal(tokenizer, USER, REPLY, tools=[TOOL])
    assert "data.ignore=[tools]" in refusal(tokenizer, USER, REPLY, tools=[TOOL])
    assert "`tools`" in refusal(tokenizer, USER, REPLY, tools=[{"name": "s"}])  # a letter that is everywhere
    assert "`tools`" in refusal(tokenizer, USER, REPLY, tools=[{"kind": "search"}])


def test_a_template_that_refuses_the_role_of_tools_is_said_to_know_none(tmp_path):
    template = "{% for m in messages if m['role'] == 'tool' %}{{ raise_exception('what role?') }}{% endfor %}" + tiny_hf.CHATML
    template = template.replace("m['content'] +", "(m['content'] or m['tool_calls'] | tojson) +")
    tokenizer = Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, template))
    said = refusal(tokenizer, USER, calling(call("{}")), RESULT, REPLY)
    assert "message 1 (assistant) has `tool_calls`, and the chat template knows no tools" in said and "what role?" in said


def test_calls_without_an_end_of_turn_are_refused(tmp_path):
    template = tiny_hf.NULL_CONTENT.replace("{% endfor %}{{ '<|eot|>' }}", "{% endfor %}")
    tokenizer = Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, template, eos="<|eot|>"))
    assert "assistant turn 1 has no end-of-turn token '<|eot|>' behind its calls" in refusal(tokenizer, USER, calling(call("{}")))


# --- thoughts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_reach_the_template_under_the_name_it_knows(tokenizers, field):
    talk = [USER, {**REPLY, field: "7 is\n\nwarm?"}]
    assert supervised(tokenizers["either arguments"], *talk) == "<think>\n7 is\n\nwarm?\n</think>\n\nIt is 7.<|im_end|>"


@pytest.mark.parametrize("thought", [{"reasoning_content": "Hm"}, {"content": "<think>\nHm\n</think>\n\nIt is 7."}])
def test_thoughts_of_earlier_turns_that_the_template_drops_are_counted(tokenizers, thought):
    tokenizer, left_out = tokenizers["either arguments"], Counter()
    talk = [USER, {**REPLY, **thought}, USER, calling(call("{}"), reasoning_content="I look"), RESULT, {**REPLY, **thought}]
    assert supervised(tokenizer, *talk) == (
        "It is 7.<|im_end|><think>\nI look\n</think>\n\n"
        + WRITTEN.replace(AS_TEXT, "{}")
        + "<think>\nHm\n</think>\n\nIt is 7.<|im_end|>"
    )
    chat_format(tokenizer).to_segments({"messages": talk}, left_out)
    assert left_out == {DROPPED_THOUGHTS: 1}


@pytest.mark.parametrize(
    "content", ["<think>\nHm\n</think>\n\nSeven", "<think>\n\n</think>\n\nSeven", "Hm</think>Seven", "<think>Hm"]
)
def test_a_thought_in_the_text_of_the_last_reply_is_trained_on(tokenizers, content):
    talk = [{**USER, "content": "What does <think> mean?"}, {**REPLY, "content": content}]
    for style in ("chatml", "either arguments"):
        ids, mask = render({"messages": talk}, tokenizers[style])
        assert ids == by_transformers(tokenizers[style], talk)
        spoken = tokenizers[style].decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert spoken.endswith(content.split("</think>")[-1].strip() + "<|im_end|>") and ("Hm" in spoken) == ("Hm" in content)


def test_a_thought_that_would_be_lost_is_refused_by_name(tokenizers):
    for talk in ([USER, {**REPLY, "reasoning_content": "Hm"}], [USER, {**REPLY, "reasoning_content": "Hm"}, USER, REPLY]):
        said = refusal(tokenizers["chatml"], *talk)
        assert (
            "message 1 (assistant)" in said and "`reasoning_content` ('Hm')" in said and "data.ignore=[reasoning_content]" in said
        )
    inline = {**REPLY, "content": "<think>\nHm\n</think>\n\nIt is 7."}
    for talk in ([USER, inline], [USER, inline, USER, REPLY]):
        assert "message 1 (assistant): the chat template leaves out the thought before </think>" in refusal(
            tokenizers["no thoughts"], *talk
        )


def test_a_thought_that_is_dropped_behind_the_last_question_is_refused(tmp_path):
    template = tiny_hf.TOOLS.replace("ARGUMENTS", tiny_hf.ARGUMENTS["either"]).replace("loop.index0 > last.user", "loop.last")
    tokenizer = Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, template))
    assert "message 1 (assistant): the chat template has no place for `reasoning_content` ('Hm')" in refusal(
        tokenizer, USER, calling(call("{}"), reasoning_content="Hm"), RESULT, REPLY
    )


# --- other fields ----------------------------------------------------------------------------------------------------


def test_a_field_that_changes_nothing_in_the_template_is_refused_by_name(tokenizers):
    for field, value in (("name", "Ann"), ("refusal", "No"), ("loss", False), ("audio", {"id": "x"})):
        said = refusal(tokenizers["chatml"], USER, {**REPLY, field: value})
        assert f"message 1 (assistant): the chat template has no place for `{field}` ({value!r})" in said
        assert f"data.ignore=[{field}]" in said
    named = [{**USER, "name": "Ann"}, REPLY]
    assert render({"messages": named}, tokenizers["names"]).ids == by_transformers(tokenizers["names"], named)


def test_special_tokens_are_refused_wherever_they_stand(tokenizers):
    tokenizer, said = tokenizers["either arguments"], "holds the text '<|im_end|>'"
    assert f"message 1 {said}" in refusal(tokenizer, USER, calling(call({"a": ["<|im_end|>"]})))
    assert f"message 1 {said}" in refusal(tokenizer, USER, {**REPLY, "reasoning_content": "<|im_end|>"})
    assert f"`tools` {said}" in refusal(tokenizer, USER, REPLY, tools=[{"name": "<|im_end|>"}])


def test_text_like_a_placeholder_is_text(tokenizers):
    talk = [{**USER, "content": "Zqxj0x Zqxj1x"}, {**REPLY, "content": "Zqxjqz0x"}]
    assert supervised(tokenizers["chatml"], *talk) == "Zqxjqz0x<|im_end|>"
    tools = [{"name": "Zqxj0x", "description": "Zqxj1x"}]
    assert supervised(tokenizers["either arguments"], USER, REPLY, tools=tools) == "It is 7.<|im_end|>"


def test_a_token_that_the_template_writes_is_refused_in_a_text_though_it_is_not_called_special(tmp_path):
    folder = tiny_hf.write_tokenizer(tmp_path, tiny_hf.CHATML.replace("<|im_start|>", "<|turn|>"))
    backend = Tokenizer.load(folder).backend
    backend.add_tokens(["<|turn|>", "<think>", "<|other|>"])
    backend.save_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    assert "message 0 holds the text '<|turn|>'" in refusal(tokenizer, {**USER, "content": "a<|turn|>b"}, REPLY)
    assert supervised(tokenizer, USER, {**REPLY, "content": "<think>a</think><|other|>"}).startswith("<think>a</think><|other|>")


# --- turns and flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["chatml", "either arguments", "null content"])
def test_a_reply_and_its_end_are_of_the_turn_that_its_question_begins(tokenizers, style):
    (encoded,) = chat_format(tokenizers[style]).encode(
        [chat_format(tokenizers[style]).to_segments({"messages": [USER, REPLY] * 3})]
    )
    end = tokenizers[style].special(tokenizers[style].eos_text)
    ends = [
        t for i, t, kind in zip(encoded.ids, encoded.turns, encoded.kinds, strict=True) if i == end and kind == Kind.ASSISTANT
    ]
    assert ends == [0, 1, 2] and encoded.turns == sorted(encoded.turns)
    segments = chat_format(tokenizers[style]).to_segments({"messages": [USER, REPLY] * 3})
    assert [segment.turn for segment in segments if "How warm?" in segment.text] == [0, 1, 2]


@pytest.mark.parametrize("style", ["chatml", "either arguments", "null content"])
def test_a_flagged_reply_is_off_with_what_the_template_writes_around_it(tokenizers, style):
    talk = [USER, {**REPLY, "content": "WRONG", "weight": 0}, USER, REPLY]
    segments = chat_format(tokenizers[style]).to_segments({"messages": talk})
    off = "".join(segment.text for segment in segments if segment.kind & Kind.OFF)
    prompt = {"chatml": "\n<|im_start|>assistant\n", "either arguments": "\n<|im_start|>assistant\n", "null content": "<|body|>"}
    assert off == prompt[style] + "WRONG" + tokenizers[style].eos_text
    assert supervised(tokenizers[style], *talk) == "It is 7." + tokenizers[style].eos_text
    assert render({"messages": talk}, tokenizers[style]).ids == by_transformers(
        tokenizers[style], [{k: v for k, v in message.items() if k != "weight"} for message in talk]
    )


def test_a_flagged_call_is_off_and_its_turns_other_messages_are_not(tokenizers):
    talk = [USER, calling(call("{}"), train=False), RESULT, REPLY]
    segments = chat_format(tokenizers["either arguments"]).to_segments({"messages": talk})
    assert "7 <b>degrees</b>" not in "".join(segment.text for segment in segments if segment.kind & Kind.OFF)
    assert supervised(tokenizers["either arguments"], *talk) == "It is 7.<|im_end|>"
