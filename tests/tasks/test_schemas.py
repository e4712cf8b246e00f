"""Rows of the hub's data sets become documents; rows that do not fit are refused with the column that is wrong."""

from __future__ import annotations

import json
import re

import pytest

from chattrain.chat import Malformed, Rendered, chat_format, render
from chattrain.config.compose import compose
from chattrain.setup.tokenizer import choose_tokenizer
from chattrain.tasks import gsm8k, messages, multiple_choice, record_to_segments
from chattrain.tokenizer import Tokenizer
from tests.conftest import SHARED_DATA

MMLU = {"question": "Degree of Q(sqrt 2)?", "subject": "algebra", "choices": ["0", "4", "2", "6"], "answer": 2}
ARC = {
    "id": "x",
    "question": "What do plants need?",
    "answerKey": "B",
    "choices": {"text": ["Iron", "Light", "Sand"], "label": ["A", "B", "C"]},
}
GSM8K = {"question": "Eggs?", "answer": "She sells <<16-3-4=9>>9 eggs for $<<9*2=18>>18.\n#### 18"}


def arc(answer: str, labels: str, **changed) -> dict:
    """One choice a label: "the A", "the B", ..."""
    return {
        **ARC,
        "choices": {"text": [f"the {label}" for label in labels], "label": list(labels)},
        "answerKey": answer,
        **changed,
    }


def without(row: dict, column: str) -> dict:
    return {name: value for name, value in row.items() if name != column}


def text_of(row: dict, schema: str, tokenizer, supervised_only: bool = False) -> str:
    (rendered,) = masked([record_to_segments(row, schema)], tokenizer)
    return tokenizer.decode([i for i, m in zip(*rendered, strict=True) if m or not supervised_only])


def masked(documents, tokenizer) -> list[Rendered]:
    return [Rendered(encoded.ids, encoded.loss_mask) for encoded in chat_format(tokenizer).encode(documents)]


def shared_rows(file: str) -> list[dict]:
    if not (SHARED_DATA / file).is_file():
        pytest.skip(f"shared/data/{file} is not here")
    from pyarrow import parquet

    return parquet.read_table(SHARED_DATA / file).to_pylist()


def test_an_mmlu_row_becomes_a_lettered_question_and_the_letter_of_the_answer(tokenizer):
    assert text_of(MMLU, "multiple_choice", tokenizer) == (
        "<|bos|><|user_start|>Multiple Choice question: Degree of Q(sqrt 2)?\n- 0=A\n- 4=B\n- 2=C\n- 6=D\n\n"
        "Respond only with the letter of the correct answer.<|user_end|><|assistant_start|>C<|assistant_end|>"
    )
    assert text_of(MMLU, "multiple_choice", tokenizer, supervised_only=True) == "C<|assistant_end|>"


def test_the_wrapped_rows_of_auxiliary_train_are_the_same_question():
    assert record_to_segments({"train": MMLU}, "multiple_choice") == record_to_segments(MMLU, "multiple_choice")


@pytest.mark.parametrize("labels", ["AB", "ABC", "ABCD", "ABCDE", "123", "1234", "12345"])
def test_arc_keeps_its_own_labels_letters_or_digits_of_any_number(labels):
    for i, label in enumerate(labels):
        row = arc(label, labels)
        assert multiple_choice.question(row) == (ARC["question"], [f"the {x}" for x in labels], list(labels), i)
        user, assistant = multiple_choice.conversation(row)["messages"]
        assert re.findall(r"^- (.*)=(.)$", user["content"], re.M) == [(f"the {x}", x) for x in labels]
        assert assistant == {"role": "assistant", "content": label}


def test_the_answer_letter_is_the_very_token_that_stands_behind_its_choice(workplace):
    """Also with the tokenizer that is trained on these very questions, where `=A` is a frequent pair."""
    (workplace / "q.jsonl").write_text("\n".join(json.dumps(row) for row in [MMLU, ARC] * 100))
    tokenizer = Tokenizer.load(
        choose_tokenizer(
            compose(
                [
                    "stage=sft",
                    "data=local",
                    "data.train_path=q.jsonl",
                    "data.schema=multiple_choice",
                    "tokenizer.vocab_size=400",
                ]
            ),
            None,
        )
    )
    for row in (MMLU, ARC):
        ids, mask = masked([record_to_segments(row, "multiple_choice")], tokenizer)[0]
        answer = ids[mask.index(1)]
        assert answer in ids[: mask.index(1)]


@pytest.mark.parametrize(
    "row, reason",
    [
        (without(MMLU, "answer"), "no column 'answer' (it has question, subject, choices)"),
        (without(MMLU, "choices"), "no column 'choices'"),
        (without(MMLU, "question"), "no column 'question'"),
        (without(ARC, "answerKey"), "no column 'answer' (it has id, question, choices)"),
        ({**ARC, "choices": {"text": ["a", "b"]}}, "no column 'label'"),
        ({**MMLU, "answer": 4}, "answer 4"),
        ({**MMLU, "answer": -1}, "answer -1"),
        ({**MMLU, "answer": None}, "does not fit schema multiple_choice"),
        ({**MMLU, "choices": ["one"], "answer": 0}, "1 choices"),
        ({**MMLU, "choices": [str(i) for i in range(11)]}, "11 choices"),
        (arc("F", "ABC"), "does not fit schema multiple_choice"),
        ({**ARC, "choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}}, "3 choices, 2 letters"),
        ({**ARC, "choices": "ab", "answerKey": "C"}, "does not fit schema multiple_choice"),
        ({**ARC, "answerKey": 1}, "answer 1 is none of A, B, C"),
    ],
)
def test_a_question_that_does_not_fit_is_refused_with_what_is_wrong(row, reason):
    with pytest.raises(Malformed) as refusal:
        record_to_segments(row, "multiple_choice")
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    "row",
    [{**MMLU, "question": None}, {**MMLU, "choices": ["0", None, "2", "6"]}, {**ARC, "question": None}],
    ids=["question", "choice", "question of ARC"],
)
def test_a_question_with_an_empty_cell_never_teaches_the_word_none(row):
    with pytest.raises(Malformed):
        record_to_segments(row, "multiple_choice")


def test_gsm8k_calls_become_the_tool_and_its_output_and_the_rest_stays_text(tokenizer):
    assert gsm8k.conversation(GSM8K)["messages"][1]["content"] == [
        {"type": "text", "text": "She sells "},
        {"type": "python", "text": "16-3-4"},
        {"type": "python_output", "text": "9"},
        {"type": "text", "text": "9 eggs for $"},
        {"type": "python", "text": "9*2"},
        {"type": "python_output", "text": "18"},
        {"type": "text", "text": "18.\n#### 18"},
    ]
    assert text_of(GSM8K, "gsm8k", tokenizer, supervised_only=True) == (
        "She sells <|python_start|>16-3-4<|python_end|>9 eggs for $<|python_start|>9*2<|python_end|>18.\n#### 18<|assistant_end|>"
    )


@pytest.mark.parametrize(
    "answer, parts",
    [
        ("4", [("text", "4")]),
        ("<<2+2=4>>", [("python", "2+2"), ("python_output", "4")]),
        ("<<1=1>><<2=2>>!", [("python", "1"), ("python_output", "1"), ("python", "2"), ("python_output", "2"), ("text", "!")]),
        ("<<x=1+1=2>>", [("python", "x=1+1"), ("python_output", "2")]),
        ("<<7>>", [("python", "7"), ("python_output", "")]),
        ("1 < 2 << 3", [("text", "1 < 2 << 3")]),
    ],
)
def test_gsm8k_answers_of_other_shapes(answer, parts):
    content = gsm8k.conversation({"question": "?", "answer": answer})["messages"][1]["content"]
    assert [(part["type"], part["text"]) for part in content] == parts


@pytest.mark.parametrize(
    "row, reason",
    [
        (without(GSM8K, "answer"), "no column 'answer' (it has question)"),
        (without(GSM8K, "question"), "no column 'question'"),
        ({**GSM8K, "answer": None}, "does not fit schema gsm8k"),
        ({**GSM8K, "question": None}, "message 0"),
        ({**GSM8K, "answer": ""}, "message 1"),
    ],
)
def test_a_gsm8k_row_that_does_not_fit_is_refused(row, reason):
    with pytest.raises(Malformed) as refusal:
        record_to_segments(row, "gsm8k")
    assert reason in str(refusal.value)


def test_a_messages_row_is_the_conversation_without_other_columns(tokenizer):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}], "source": "web"}
    assert messages.conversation(row) == {"messages": row["messages"]}
    assert masked([record_to_segments(row, "messages")], tokenizer)[0] == render(row, tokenizer, None)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "x", "id": 1}, "no column 'messages' (it has text, id)"),
        ({"messages": []}, "non-empty"),
        ({"messages": None}, "non-empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "message 0"),
    ],
)
def test_a_messages_row_that_does_not_fit_is_refused(row, reason):
    with pytest.raises(Malformed) as refusal:
        record_to_segments(row, "messages")
    assert reason in str(refusal.value)


def test_a_text_row_is_a_document_with_every_token_but_bos_supervised(tokenizer):
    assert text_of({"text": "Once <|bos|> more", "id": 3}, "text", tokenizer) == "<|bos|>Once <|bos|> more"
    ((ids, mask),) = masked([record_to_segments({"text": "Once <|bos|> more"}, "text")], tokenizer)
    assert ids == [tokenizer.special("<|bos|>"), *tokenizer.encode("Once <|bos|> more")]
    assert mask == [0] + [1] * (len(ids) - 1)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"content": "x"}, "no column 'text' (it has content); schema text needs"),
        ({"text": ""}, "empty"),
        ({"text": None}, "empty"),
        ({"text": ["x"]}, "no string"),
    ],
)
def test_a_text_row_that_does_not_fit_is_refused(row, reason):
    with pytest.raises(Malformed) as refusal:
        record_to_segments(row, "text")
    assert reason in str(refusal.value)


@pytest.mark.parametrize("file", ["mmlu/test.parquet", "arc/ARC-Easy/test.parquet", "arc/ARC-Challenge/test.parquet"])
def test_every_real_question_becomes_a_conversation_that_ends_with_its_letter(tokenizer, file):
    rows = shared_rows(file)
    end = tokenizer.special("<|assistant_end|>")
    for start in range(0, len(rows), 500):
        some = rows[start : start + 500]
        rendered = masked([record_to_segments(row, "multiple_choice") for row in some], tokenizer)
        for row, (ids, mask) in zip(some, rendered, strict=True):
            letter = row["answerKey"] if "answerKey" in row else "ABCD"[row["answer"]]
            assert [i for i, m in zip(ids, mask, strict=True) if m] == [*tokenizer.encode(letter), end]


def test_every_real_gsm8k_answer_keeps_its_text_and_its_calls(tokenizer):
    rows = shared_rows("gsm8k/main/test.parquet")
    calls = 0
    for row in rows:
        ids, mask = render(gsm8k.conversation(row), tokenizer, None)
        said = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
        calls += said.count("<|python_start|>")
        bare = re.sub(r"<\|python_start\|>.*?<\|python_end\|>", "", said).removesuffix("<|assistant_end|>")
        assert bare == re.sub(r"<<[^>]*>>", "", row["answer"])
    assert calls > 2 * len(rows)
