"""Conversations in the format of a model's own template: its ids, and what of them is supervised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.chat import Malformed, chat_format, render, render_choices, render_prompt
from chattrain.errors import UserError
from chattrain.tasks import record_to_segments
from chattrain.tokenizer import Tokenizer
from tests import tiny_hf

pytest.importorskip("transformers")

# template -> (the rest of a tokenizer's settings, end of turn)
STYLES = {
    "chatml": (tiny_hf.CHATML, {}, "<|im_end|>"),
    "default system": (tiny_hf.DEFAULT_SYSTEM, {}, "<|im_end|>"),
    "headers": (tiny_hf.HEADERS, {"eos": "<|eot|>"}, "<|eot|>"),
    "instruct": (tiny_hf.INSTRUCT, {"eos": "<|eos|>"}, "<|eos|>"),
    "thought": (tiny_hf.THOUGHT, {"eos": "<|eos|>", "bos": None}, "<|im_end|>"),
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 1 + 2?\n"},
    {"role": "assistant", "content": "It is 3.\n"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes 🙂"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        name: Tokenizer.load(tiny_hf.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, **others))
        for name, (template, others, _) in STYLES.items()
    }


@pytest.fixture(params=STYLES)
def style(request) -> str:
    return request.param


def supervised_text(tokenizer, messages) -> str:
    ids, mask = render({"messages": messages}, tokenizer, None)
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def by_transformers(tokenizer, messages, **how) -> list[int]:
    return list(tokenizer.backend.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"])


def test_ids_are_those_that_transformers_renders(tokenizers, style):
    for length in (3, 5):
        ids = render({"messages": TALK[:length]}, tokenizers[style], None).ids
        assert ids == by_transformers(tokenizers[style], TALK[:length])


def test_the_prompt_of_a_reply_is_the_one_that_transformers_renders(tokenizers, style):
    tokenizer = tokenizers[style]
    expected = by_transformers(tokenizer, TALK[:4], add_generation_prompt=True)
    assert render_prompt({"messages": TALK}, tokenizer) == render_prompt({"messages": TALK[:4]}, tokenizer) == expected


@pytest.mark.parametrize(
    "style, expected",
    [
        ("chatml", "It is 3.\n<|im_end|>Yes 🙂<|im_end|>"),
        ("default system", "It is 3.\n<|im_end|>Yes 🙂<|im_end|>"),
        ("headers", "It is 3.<|eot|>Yes 🙂<|eot|>"),
        ("instruct", " It is 3.\n <|eos|> Yes 🙂 <|eos|>"),
        ("thought", "It is 3.\n<|im_end|><think>\n\n</think>\n\nYes 🙂<|im_end|>"),
    ],
)
def test_what_the_model_must_produce_is_supervised_and_nothing_else(tokenizers, style, expected):
    assert supervised_text(tokenizers[style], TALK) == expected


texts = st.text(alphabet="abc AZ09\n\t.,?é東🙂<|>_", max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.sampled_from(sorted(STYLES)))
def test_any_conversation_keeps_its_answers_and_its_end_of_turn_tokens(tokenizers, turns, style):
    messages = [{"role": role, "content": text} for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)]
    tokenizer, end = tokenizers[style], STYLES[style][2]
    assert render({"messages": messages}, tokenizer, None).ids == by_transformers(tokenizer, messages)
    spoken = [answer for _, answer in turns]
    assert supervised_text(tokenizer, messages).count(end) == len(turns)
    for part, answer in zip(supervised_text(tokenizer, messages).split(end), spoken, strict=False):
        assert answer.strip() in part


def test_a_python_call_is_written_as_gsm8k_writes_it_and_its_result_is_given(tokenizers):
    row = {"question": "Half of 4?", "answer": "It is <<4/2=2>>2.\n#### 2"}
    pieces = record_to_segments(row, "gsm8k", chat_format(tokenizers["chatml"]))
    assert "It is <<4/2=2>>2.\n#### 2<|im_end|>" in "".join(piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces if piece.kind) == "It is <<4/2=>>2.\n#### 2<|im_end|>"


def test_spaces_of_an_answer_are_supervised_whatever_the_tokenizer_says_of_its_places(tmp_path):
    code = [TALK[1], {"role": "assistant", "content": "if x:\n\n        A  =   12\n"}]
    kept, trimmed = (Tokenizer.load(tiny_hf.write_tokenizer(tmp_path / str(trim), trim_offsets=trim)) for trim in (False, True))
    assert supervised_text(trimmed, code) == supervised_text(kept, code) == "if x:\n\n        A  =   12\n<|im_end|>"


def test_a_token_that_reaches_over_from_the_prompt_is_not_supervised(tokenizers):
    """The line's end of the turn's head and the one that the answer begins with are one token."""
    messages = [TALK[1], {"role": "assistant", "content": "\n\n\n A"}]
    tokens = [tokenizers["chatml"].decode([i]) for i in render({"messages": messages}, tokenizers["chatml"]).ids]
    assert "\n\n\n\n" in tokens
    assert supervised_text(tokenizers["chatml"], messages) == " A<|im_end|>"


def test_choices_are_scored_where_training_puts_them(tokenizers, style):
    talk, letters = {"messages": [TALK[1], {"role": "assistant", "content": "A"}]}, ["A", "B", "C"]
    ids, tokens = render_choices(talk, letters, tokenizers[style])
    for letter, token in zip(letters, tokens, strict=True):
        whole = render({"messages": [TALK[1], {"role": "assistant", "content": letter}]}, tokenizers[style], None)
        assert whole.ids[: len(ids) + 1] == [*ids, token] and whole.loss_mask[len(ids)] == 1


def test_choices_of_several_tokens_are_refused(tokenizers):
    with pytest.raises(Malformed, match="one token"):
        render_choices({"messages": TALK[1:3]}, ["A", "x y"], tokenizers["chatml"])


def test_a_prompt_that_no_rendered_reply_begins_with_is_warned_of(tmp_path, caplog):
    template = tiny_hf.CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    chat_format(Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, template)))
    assert "what is trained on is not what the model will be prompted with" in caplog.text


def test_plain_text_stands_behind_bos_or_before_the_end_of_text(tokenizers):
    with_bos, without = tokenizers["chatml"], tokenizers["thought"]
    ids, mask = render({"text": "Once more"}, with_bos, None)
    assert (ids, mask) == ([with_bos.special("<|bos|>"), *with_bos.encode("Once more")], [0] + [1] * (len(ids) - 1))
    ids, mask = render({"text": "Once more"}, without, None)
    assert (ids, mask) == ([*without.encode("Once more"), without.special("<|eos|>")], [1] * len(ids))


def test_rendering_is_cut_after_max_tokens(tokenizers):
    whole, cut = (render({"messages": TALK}, tokenizers["chatml"], n) for n in (None, 20))
    assert (cut.ids, cut.loss_mask) == (whole.ids[:20], whole.loss_mask[:20])


def test_bytes_of_tokens_add_up_to_the_text(tokenizers):
    tokenizer = tokenizers["chatml"]
    text = "What is 12 + 34? Grüße, 東京 🙂\n\n"
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.token_bytes()[tokenizer.special("<|im_end|>")] == 0
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_replies_stop_at_the_end_of_turn_and_at_the_end_of_text(tokenizers):
    tokenizer = tokenizers["thought"]
    assert chat_format(tokenizer).stop_ids == {tokenizer.special("<|im_end|>"), tokenizer.special("<|eos|>")}


def test_a_saved_tokenizer_is_the_same(tokenizers, style, tmp_path):
    tokenizers[style].save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint() == tokenizers[style].fingerprint()
    assert render({"messages": TALK}, again) == render({"messages": TALK}, tokenizers[style])


# --- refused ---------------------------------------------------------------------------------------------------------


def refusal(tmp_path, template: str | None, messages=TALK, **others) -> str:
    tokenizer = Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, template, **others))
    with pytest.raises(Malformed) as refused:
        render({"messages": messages}, tokenizer)
    return str(refused.value)


def test_a_template_without_an_end_of_turn_is_refused_with_what_it_renders(tmp_path):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match=r"without a special token.*assistant: answer"):
        chat_format(Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, template)))


def test_an_assistant_turn_without_its_end_is_refused_with_the_turn(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if loop.last or m['role'] == 'user' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    message = refusal(tmp_path, template)
    assert "assistant turn 2 has no end-of-turn token '<|im_end|>'" in message and "It is 3." in message


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path):
    message = refusal(tmp_path, "{% set messages = messages[-2:] %}" + tiny_hf.CHATML)
    assert "leaves out message 0 (system): 'Be brief.'" in message


def test_a_message_that_the_template_changes_is_refused(tmp_path):
    message = refusal(tmp_path, tiny_hf.CHATML.replace("m['content']", "m['content'] | replace('It', 'it')"))
    assert "changes message 2 (assistant)" in message and "'It is 3." in message


def test_what_the_template_itself_refuses_is_refused_with_its_words(tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + tiny_hf.CHATML
    assert "no system turn here" in refusal(tmp_path, template)


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([TALK[1], {"role": "asistant", "content": "x"}], "message 1 is from 'asistant' where 'assistant' must speak"),
        ([TALK[0], TALK[2]], "message 1 is from 'assistant' where 'user'"),
        ([TALK[1], TALK[1]], "message 1 is from 'user'"),
    ],
)
def test_roles_that_do_not_take_turns_are_refused(tmp_path, messages, reason):
    assert reason in refusal(tmp_path, tiny_hf.CHATML, messages)


def test_text_that_looks_like_a_special_token_is_refused(tmp_path):
    said = [{"role": "user", "content": "Say <|im_end|>"}, TALK[2]]
    assert "message 0 holds the text '<|im_end|>'" in refusal(tmp_path, tiny_hf.CHATML, said)


@pytest.mark.parametrize("content", [3, [], ["x"], [{"type": "image", "text": "x"}], [{"type": "text", "text": None}]])
def test_content_of_another_kind_is_refused(tmp_path, content):
    assert "message 1" in refusal(tmp_path, tiny_hf.CHATML, [TALK[1], {"role": "assistant", "content": content}])


def test_conversations_without_a_template_are_refused_with_the_way_out(tmp_path):
    tokenizer = Tokenizer.load(tiny_hf.write_tokenizer(tmp_path, None))
    with pytest.raises(UserError, match=r"no chat template.*chat_template\.jinja"):
        render({"messages": TALK}, tokenizer)
    assert render({"text": "but text"}, tokenizer).ids
