"""Conversations in the columns that others use become the same messages; the columns of a data set tell which they are."""

from __future__ import annotations

import json

import pytest

from chattrain.chat import Malformed, render
from chattrain.tasks import multiple_choice, record_to_document, record_to_segments
from chattrain.tasks.schemas import no_schema, told_by

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
ALPACA = {"instruction": "Hi", "output": "Yo"}
PROMPT = {"prompt": "Hi", "completion": "Yo"}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def messages_of(record: dict, schema: str) -> list[dict]:
    return record_to_document(record, schema)["messages"]


def reason(record: dict, schema: str) -> str:
    with pytest.raises(Malformed) as refused:
        record_to_segments(record, schema)
    return str(refused.value)


@pytest.mark.parametrize("schema, record", [("sharegpt", SHAREGPT), ("alpaca", ALPACA), ("prompt_completion", PROMPT)])
def test_the_same_talk_in_any_columns_is_the_same_conversation(schema, record, tokenizer):
    assert messages_of(record, schema) == TALK
    assert render(record_to_document(record, schema), tokenizer) == render({"messages": TALK}, tokenizer)
    assert messages_of({**record, "system": "Be brief."}, schema) == [SYSTEM, *TALK]
    assert messages_of({**record, "system": None, "id": 7}, schema) == TALK
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert record_to_document({**record, "tools": tools}, schema)["tools"] == tools
    assert record_to_document({**record, "tools": json.dumps(tools)}, schema)["tools"] == tools


@pytest.mark.parametrize(
    "role, names",
    {
        "user": ["human", "user", "Human"],
        "assistant": ["gpt", "chatgpt", "assistant", "bing", "bard", "model", "GPT"],
        "system": ["system"],
        "tool": ["tool", "function", "observation", "function_response"],
    }.items(),
)
def test_speakers_of_sharegpt_are_known_by_their_usual_names(role, names):
    for name in names:
        for turn in ({"from": name, "value": "x"}, {"role": name, "content": "x"}):
            assert messages_of({"conversations": [turn]}, "sharegpt") == [{"role": role, "content": "x"}]


def test_calls_and_flags_of_sharegpt_reach_the_message():
    call = {"name": "add", "arguments": {"a": 1}}
    for value in (call, [call], json.dumps(call)):
        (message,) = messages_of({"conversations": [{"from": "function_call", "value": value}]}, "sharegpt")
        assert message["role"] == "assistant" and message["tool_calls"] == [{"type": "function", "function": call}]
    (message,) = messages_of({"conversations": [{"from": "gpt", "value": "x", "weight": 0}]}, "sharegpt")
    assert message == {"role": "assistant", "content": "x", "weight": 0}


@pytest.mark.parametrize("lost", [{"parameters": {"a": 1}}, {"arguments": {}, "why": "to add"}])
def test_what_a_call_of_sharegpt_has_beside_name_and_arguments_is_refused(lost):
    turns = [*SHAREGPT["conversations"][:1], {"from": "function_call", "value": json.dumps({"name": "add", **lost})}]
    assert f"`function.{list(lost)[-1]}`" in reason({"conversations": turns}, "sharegpt")


def test_the_first_column_of_turns_with_a_value_is_taken():
    assert messages_of({"conversations": None, "conversation": TALK}, "sharegpt") == TALK
    same = [{**turn, "content": turn["value"], "role": None} for turn in SHAREGPT["conversations"]]
    assert messages_of({"conversations": same}, "sharegpt") == TALK


def test_a_system_text_beside_the_messages_stands_before_them():
    assert messages_of({"messages": TALK, "system": "Be brief."}, "messages") == [SYSTEM, *TALK]
    for record in ({"messages": TALK, "system": None}, {"messages": TALK, "system": ""}):
        assert messages_of(record, "messages") == TALK
    assert messages_of({"messages": [SYSTEM, *TALK], "system": "Be brief."}, "messages") == [SYSTEM, *TALK]


def test_an_input_of_alpaca_follows_the_instruction_and_a_history_goes_before():
    (user, _) = messages_of({**ALPACA, "input": "there"}, "alpaca")
    assert user["content"] == "Hi\n\nthere"
    for nothing in (None, "", "  "):
        assert messages_of({**ALPACA, "input": nothing}, "alpaca") == TALK
    record = {**ALPACA, "history": [["a", "b"], ["c", "d"]], "system": "Be brief."}
    assert [m["content"] for m in messages_of(record, "alpaca")] == ["Be brief.", "a", "b", "c", "d", "Hi", "Yo"]


def test_replies_within_a_prompt_are_context():
    record = {"prompt": [*TALK, {"role": "user", "content": "More"}], "completion": [{"role": "assistant", "content": "Done"}]}
    first, reply, second, completion = messages_of(record, "prompt_completion")
    assert reply == {**TALK[1], "weight": 0}
    assert (first, second["content"], completion) == (TALK[0], "More", {"role": "assistant", "content": "Done"})
    assert messages_of({"prompt": TALK[:1], "completion": "Yo"}, "prompt_completion") == TALK


@pytest.mark.parametrize("schema, column", [("messages", "messages"), ("sharegpt", "conversations")])
def test_a_struct_of_lists_is_the_list_of_messages_that_it_was(schema, column):
    names, texts = (["human", "gpt"], ["Hi", "Yo"]) if schema == "sharegpt" else (["user", "assistant"], ["Hi", "Yo"])
    keys = ("from", "value") if schema == "sharegpt" else ("role", "content")
    assert messages_of({column: dict(zip(keys, (names, texts), strict=True))}, schema) == TALK


@pytest.mark.parametrize(
    "schema, record, said",
    [
        ("sharegpt", {"conversations": None}, "`conversations` is null"),
        ("sharegpt", {"conversations": "Hi"}, "`conversations` is a text"),
        ("sharegpt", {"conversations": ["Hi"]}, "turn 0 is a text"),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": "x"}]}, "turn 0 is from 'narrator'"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "turn 0 is an object of value, without `from`"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x", "content": "y"}]}, "turn 0 has two texts"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "", "content": "y"}]}, "turn 0 has two texts"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "turn 0 (from human) has no `value`"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "add(1)"}]}, "is not JSON"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}]}, "message 0"),
        ("sharegpt", {"messages_": []}, "no column 'conversations' (it has messages_)"),
        ("alpaca", {**ALPACA, "output": ""}, "`output` is empty"),
        ("alpaca", {**ALPACA, "instruction": None}, "`instruction` is null"),
        ("alpaca", {**ALPACA, "input": 5}, "`input` is a number"),
        ("alpaca", {**ALPACA, "history": [["a"]]}, "`history` 0"),
        ("alpaca", {"instruction": "Hi"}, "no column 'output' (it has instruction)"),
        ("prompt_completion", {"prompt": "Hi"}, "no column 'completion' (it has prompt)"),
        ("prompt_completion", {"prompt": [], "completion": "Yo"}, "`prompt` is empty"),
        ("prompt_completion", {"prompt": "Hi", "completion": ["Yo"]}, "`completion` is a list"),
        ("messages", {"messages": None}, "`messages` is null, not a non-empty list of messages"),
        ("messages", {"messages": json.dumps(TALK)}, "`messages` is a text"),
        ("messages", {"messages": {"role": ["user"], "content": []}}, "`messages` is an object of role, content"),
        ("messages", {"messages": TALK, "system": 5}, "`system` is a number"),
        ("messages", {"messages": [SYSTEM, *TALK], "system": "b"}, "two system messages"),
        ("messages", {}, "no column 'messages' (it has none)"),
        ("messages", {"messages": [{**TALK[0], "x": nested(700)}, TALK[1]]}, "nested too deep"),
        ("messages", {"messages": [*TALK, {"role": "user", "content": [nested(700)]}]}, "nested too deep"),
        ("messages", {"messages": [{"role": "user", "content": "half \ud83d"}]}, "message 0 holds \\ud83d"),
        ("messages", {"messages": [*TALK, {"role": "user", "content": "a\0b"}]}, "message 2 holds a NUL character"),
        ("text", {"text": "half \udc00"}, "the text holds \\udc00"),
        ("alpaca", {**ALPACA, "system": 5}, "`system` is a number"),
        ("sharegpt", {"conversations": [{"from": "system", "value": "a"}], "system": "b"}, "two system messages"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_wrong(schema, record, said):
    assert said in reason(record, schema)


@pytest.mark.parametrize(
    "answer, index",
    [("B", 1), (" b ", 1), ("b", 1), ("1", 1), (1, 1), (1.0, 1), ("D", 3), ("four", 1), ("0", 0)],
)
def test_an_answer_is_an_index_a_letter_or_the_choice_itself(answer, index):
    row = {"question": "2 + 2?", "choices": ["three", "four", "five", "six"], "answer": answer}
    assert multiple_choice.question(row)[3] == index


def test_labelled_choices_are_answered_by_their_label_in_either_column():
    choices = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    for column, answer in (("answerKey", "2"), ("answer", " 2 ")):
        assert multiple_choice.question({"question": "?", "choices": choices, column: answer})[3] == 1
    padded = {"question": "?", "choices": {**choices, "label": list("ABC")}, "answerKey": None, "answer": "c"}
    assert multiple_choice.question(padded)[3] == 2
    assert multiple_choice.question({"question": "?", "choices": ["a", "b"], "answerKey": "B", "answer": None})[3] == 1
    assert multiple_choice.question({"question": "?", "options": ["a", "b"], "answer": "B"}) == ("?", ["a", "b"], ["A", "B"], 1)
    assert "object of A, B" in reason({"question": "?", "options": {"A": "a", "B": "b"}, "answer": "A"}, "multiple_choice")


@pytest.mark.parametrize("answer", ["E", "", "4", -1, 1.5, True, float("inf"), None, ["B"], "seven"])
def test_an_answer_that_names_no_choice_is_refused(answer):
    row = {"question": "2 + 2?", "choices": ["three", "four", "five", "six"], "answer": answer}
    assert "multiple_choice" in reason(row, "multiple_choice")


def test_an_answer_that_may_mean_two_choices_is_refused():
    assert "may mean" in reason({"question": "?", "choices": ["1", "2", "3"], "answer": "2"}, "multiple_choice")
    assert "letter" in reason({"question": "?", "choices": ["B", "A", "C"], "answer": "A"}, "multiple_choice")
    assert multiple_choice.question({"question": "?", "choices": ["1", "2", "3"], "answer": 2})[3] == 2


@pytest.mark.parametrize(
    "row, schema",
    [
        ({"messages": TALK, "id": 1}, "messages"),
        ({"messages": TALK, "text": "x", "prompt": "Hi"}, "messages"),
        ({"messages": TALK, "system": "x"}, "messages"),
        ({"messages": SHAREGPT["conversations"]}, "sharegpt"),
        ({"messages": [SYSTEM, {"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yo"}]}, "sharegpt"),
        (SHAREGPT, "sharegpt"),
        ({"conversation": TALK}, "sharegpt"),
        ({**SHAREGPT, "text": "x", "id": 1}, "sharegpt"),
        ({**ALPACA, "input": "", "text": "Below is"}, "alpaca"),
        ({**ALPACA, "input": None}, "alpaca"),
        (PROMPT, "prompt_completion"),
        ({**PROMPT, "text": "x"}, "prompt_completion"),
        ({"question": "?", "choices": ["a", "b"], "answer": 1, "subject": "m"}, "multiple_choice"),
        ({"question": "?", "choices": {"text": [], "label": []}, "answerKey": "A"}, "multiple_choice"),
        ({"question": "?", "options": ["a", "b"], "answer": "A"}, "multiple_choice"),
        ({"question": "?", "A": "a", "B": "b", "answer": "A"}, None),
        ({"question": "?", "answer": "4"}, "gsm8k"),
        ({"train": {"question": "?", "choices": ["a", "b"], "answer": 1}}, "multiple_choice"),
        ({"train": [{"messages": TALK}], "test": []}, None),
        ({"text": "x", "url": "y"}, "text"),
        ({"messages": None, "text": "x"}, "text"),
        ({"prompt": "Hi", "response": "Yo"}, None),
        ({"id": 1}, None),
    ],
)
def test_the_columns_tell_the_schema_that_uses_most_of_them(row, schema):
    assert told_by(row) == schema


def test_columns_of_no_schema_are_compared_with_the_nearest():
    assert "most like prompt_completion, without completion" in no_schema(["prompt", "response"])
    assert "most like gsm8k, without answer" in no_schema(["system_prompt", "question", "response"])
    assert "most like messages, but hold no values" in no_schema(["messages"])
    assert "better" in no_schema(["prompt", "chosen", "rejected"])
