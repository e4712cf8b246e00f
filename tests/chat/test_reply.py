"""Tokens of a reply as text: the same in any portions, whole characters, no special token, and back to what the model wrote."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.chat import render
from chattrain.chat.reply import CALL, reply_reader, reply_text, with_calls
from chattrain.tokenizer import Tokenizer
from tests import tiny_hf
from tests.conftest import TEXTS

many = settings(max_examples=200, deadline=None, derandomize=True, database=None)
OURS = Tokenizer.train(TEXTS * 50, 400)
SPECIAL = re.compile(r"<\|\w+\|>")
NAMES = ("python_start", "python_end", "output_start", "output_end", "assistant_end", "bos")
often = st.sampled_from([OURS.special(f"<|{name}|>") for name in NAMES])
tokens = st.lists(st.integers(0, OURS.vocab_size - 1) | often, max_size=30)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    pytest.importorskip("transformers")
    return Tokenizer.load(tiny_hf.write_model(tmp_path_factory.mktemp("theirs")))


@given(tokens, st.lists(st.integers(1, 5), max_size=30))
@many
def test_portions_change_no_text_and_special_tokens_are_no_text(ids, sizes):
    reader, shown, rest = reply_reader(OURS), [], list(ids)
    for size in [*sizes, len(ids)]:
        shown.append(reader.add(rest[:size]))
        rest = rest[size:]
    shown.append(reader.finish())
    assert "".join(shown) == reply_text(OURS, ids)
    written = OURS.decode([i for i in ids if i < OURS.vocab_size - 9])
    assert bool(SPECIAL.search("".join(shown))) <= bool(SPECIAL.search(written))  # letters that look like one may be written
    assert "\ufffd" not in "".join(shown) or "\ufffd" in OURS.decode(ids)


@given(st.text(max_size=30))
@many
def test_a_text_is_shown_as_it_is_by_whole_characters(text):
    text = text.encode("utf-8", "replace").decode()
    reader = reply_reader(OURS)
    portions = [reader.add([token]) for token in OURS.encode(text)]
    assert "".join(portions) + reader.finish() == text == reader.content
    assert not any("\ufffd" in portion for portion in portions if "\ufffd" not in text)


def test_half_a_character_waits_for_the_other_half_and_is_marked_if_it_never_comes():
    ids = OURS.encode("龍")
    assert len(ids) == 3
    reader = reply_reader(OURS)
    assert [reader.add([i]) for i in ids] == ["", "", "龍"] and reader.finish() == ""
    assert reply_text(OURS, ids[:2]) == "\ufffd"


def ids_of(*parts: str) -> list[int]:
    return [i for part in parts for i in ([OURS.special(part)] if SPECIAL.fullmatch(part) else OURS.encode(part))]


START, END, OUTPUT, OUTPUT_END = "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"


@pytest.mark.parametrize(
    "parts, shown",
    [
        (["It is ", START, "12/60", END, OUTPUT, "0.2", OUTPUT_END, "0.2."], "It is <<12/60=0.2>>0.2."),
        ([START, "1+", END, " no result"], "<<1+>> no result"),
        ([START, "1+1"], "<<1+1>>"),
        ([START, "1+1", END], "<<1+1>>"),
        ([START, "1+1", END, OUTPUT, "2"], "<<1+1=2>>"),
        ([START, "1", START, "2", END, OUTPUT, "2", OUTPUT_END], "<<1>><<2=2>>"),
        (["a", OUTPUT, "2", OUTPUT_END, "b"], "a<<=2>>b"),
        (["a", END, OUTPUT_END, "<|user_start|>", "b"], "ab"),
        (["<|bos|>"], ""),
    ],
)
def test_calls_are_shown_as_gsm8k_writes_them(parts, shown):
    assert reply_text(OURS, ids_of(*parts)) == shown


def test_content_is_rendered_as_the_model_has_written_it():
    written = ids_of("It is ", START, "12/60", END, OUTPUT, "0.2", OUTPUT_END, "0.2.")
    reader = reply_reader(OURS)
    shown = reader.add(written) + reader.finish()
    for content in (reader.content, with_calls(shown)):
        talk = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]}
        rendered = render(talk, OURS).ids
        assert rendered[-len(written) - 1 : -1] == written


@pytest.mark.parametrize("text", ["", "plain", "cout << a=b >> c", "<<1+1=3>>", "<<=2>>", "<<1+1>>", "<<print(1)=1>>"])
def test_what_the_calculator_does_not_confirm_stays_text(text):
    assert with_calls(text) == text and (CALL.search(text) is None or "=" in text)


@given(
    st.lists(st.sampled_from(["What", " is", "Grüße", " 🙂", "東京", "<think>", "\n\n", "<|im_end|>", "</think>"]), max_size=8)
)
@many
def test_of_a_hugging_face_tokenizer_too(theirs, texts):
    plain = [text for text in texts if text != "<|im_end|>"]
    ids = [i for text in texts for i in ([theirs.special(text)] if text == "<|im_end|>" else theirs.encode(text))]
    reader = reply_reader(theirs)
    portions = [reader.add([i]) for i in ids]
    whole = "".join(portions) + reader.finish()
    assert whole == reader.content == theirs.decode([i for i in ids if i not in theirs.eos_ids])
    assert "<|im_end|>" not in whole and (whole == "".join(plain) or "\ufffd" in whole)
