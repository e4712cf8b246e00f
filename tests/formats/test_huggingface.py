"""The exported folder: transformers computes the same logits, ids, masks and replies; and nothing is lost on the way back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chattrain.chat import Malformed, chat_format, render, render_prompt
from chattrain.errors import UserError
from chattrain.formats import huggingface
from chattrain.model.generate import generate
from chattrain.tokenizer import SPECIAL_TOKENS, Tokenizer
from chattrain.tokenizer.special_tokens import ASSISTANT_END, BOS
from tests.foreign import random_gpt

transformers = pytest.importorskip("transformers")

SIZES = {"n_layer": 3, "n_embd": 64, "n_head": 4}
SEQ_LEN = 128
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Grüße aus Köln, 東京 and 🙂🙂. ",
    "12 + 34 = 46\n",
    "def f(x):\n    return x",
]


@pytest.fixture(scope="module", params=[4, 2], ids=["all heads", "grouped heads"])
def model(request, tokenizer):
    return random_gpt(tokenizer.vocab_size, **SIZES, n_kv_head=request.param).eval()


def write(folder: Path, model, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    huggingface.write(folder, model.shape, model.weights(), tokenizer, SEQ_LEN)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, model, tokenizer):
    return write(tmp_path_factory.mktemp("hf") / "model", model, tokenizer)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder of its own, to be broken."""
    return write(tmp_path / "model", random_gpt(tokenizer.vocab_size, **SIZES, n_kv_head=2), tokenizer)


@pytest.fixture(scope="module")
def theirs(written):
    return transformers.AutoModelForCausalLM.from_pretrained(written).eval()


@pytest.fixture(scope="module")
def chatty(tmp_path_factory, tokenizer):
    """Their tokenizer, with the chat template."""
    place = write(tmp_path_factory.mktemp("chat") / "model", random_gpt(tokenizer.vocab_size, **SIZES), tokenizer)
    return transformers.AutoTokenizer.from_pretrained(place)


# --- the model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_transformers(model, theirs, tokenizer):
    assert type(theirs).__name__ == "NanoChatForCausalLM" and {p.dtype for p in theirs.parameters()} == {torch.float32}
    ids = torch.randint(tokenizer.vocab_size, (4, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    texts = [torch.tensor([[tokenizer.special(BOS), *tokenizer.encode(text)]]) for text in TEXTS]
    for inputs in [ids, *texts]:
        ours = model(inputs)
        assert ours.abs().max() > 5  # no flat logits, which would agree by chance
        assert (ours - theirs(inputs).logits).abs().max() <= 1e-4


def test_every_weight_is_loaded(written, caplog):
    _, info = transformers.AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_greedy_replies_are_those_of_transformers(model, theirs, tokenizer):
    lengths = []
    for text in [*TEXTS, "a", "x", "The", "How many r are in strawberry?"]:
        prompt = render_prompt({"messages": [{"role": "user", "content": text}]}, tokenizer)
        ours = list(generate(model, prompt, 24, chat_format(tokenizer).stop_ids))
        reply = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        assert ours == [token for token in reply if token not in chat_format(tokenizer).stop_ids]
        lengths.append(len(ours))
    assert max(lengths) == 24  # replies that ended at once would agree by chance


def test_a_reply_ends_at_the_end_of_the_turn(theirs, tokenizer):
    end, bos = tokenizer.special(ASSISTANT_END), tokenizer.special(BOS)
    settings = theirs.generation_config
    assert settings.eos_token_id == end
    assert (settings.pad_token_id, settings.bos_token_id, settings.do_sample) == (end, bos, False)
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id, theirs.config.bos_token_id) == (end, end, bos)


def test_the_config_says_what_the_model_is(theirs, model):
    config = theirs.config
    assert config.max_position_embeddings == SEQ_LEN and config.vocab_size == model.vocab_size
    assert config.rms_norm_eps == torch.finfo(torch.float32).eps and config.rope_parameters["rope_theta"] == 10_000
    assert config.num_key_value_heads == model.n_kv_head


# --- the tokenizer and the chat template -----------------------------------------------------------------------------


def test_the_tokenizer_adds_nothing_and_decodes_alike(chatty, tokenizer):
    assert (chatty.bos_token, chatty.eos_token, chatty.pad_token) == (BOS, ASSISTANT_END, ASSISTANT_END)
    assert chatty.model_max_length == SEQ_LEN and len(chatty) == tokenizer.vocab_size
    for text in [*TEXTS, " a , b . ", "\n\n x \n", ""]:
        ids = tokenizer.encode(text)
        assert chatty(text)["input_ids"] == ids and chatty.decode(ids) == tokenizer.decode(ids) == text
        marked = [tokenizer.special(BOS), *ids, tokenizer.special(ASSISTANT_END)]
        assert chatty.decode(marked) == tokenizer.decode(marked)
        assert chatty.decode(marked, skip_special_tokens=True) == text


WORDS = [
    "hello",
    " ",
    "\n",
    "  \n\n",
    "Grüße",
    "東京",
    "🙂",
    "🦄\u200d🏽",
    "\t",
    "{{ x }}",
    "{% if %}",
    "<|",
    "|>",
    "<b>&amp;</b>",
    "é\u0301",
    "\u2028",
    "'s",
    "12",
    "It's",
    "\r\n",
    "\xa0",
    "<|BOS|>",
    "\\n",
    '"',
    "\x00",
    "\U000f0000",
]


def text_of(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(0, 8)))


def reply_of(rng: random.Random) -> str | list[dict[str, str]]:
    """A string, or parts. No two plain texts in a row, and no tool output right behind text: see the template."""
    if rng.random() < 0.5:
        return text_of(rng)
    parts = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.7:
            parts.append({"type": "text", "text": text_of(rng)})
        parts.append({"type": "python", "text": text_of(rng)})
        if rng.random() < 0.7:
            parts.append({"type": "python_output", "text": text_of(rng)})
    return parts if rng.random() < 0.3 else [*parts, {"type": "text", "text": text_of(rng)}]


def conversation(seed: int) -> list[dict]:
    rng = random.Random(seed)
    system = [{"role": "system", "content": text_of(rng)}] if rng.random() < 0.4 else []
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": reply_of(rng) if i % 2 else text_of(rng)}
        for i in range(rng.randint(1, 6))
    ]
    return system + turns


def test_rendered_ids_and_masks_are_those_of_the_chat_template(chatty, tokenizer):
    for seed in range(300):
        messages = conversation(seed)
        ours = render({"messages": messages}, tokenizer, max_tokens=None)
        there = chatty.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert there["input_ids"] == ours.ids, messages
        assert there["assistant_masks"] == ours.loss_mask, messages


def with_tools(seed: int) -> dict:
    """A conversation with tools, of which some replies call some, also in the names that the roles have elsewhere."""
    rng = random.Random(seed)
    messages = [{"role": "developer", "content": text_of(rng)}] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": [{"type": "text", "text": text_of(rng)} for _ in range(2)]})
        for step in range(rng.randint(0, 2)):
            calls = [
                {"name": f"f{k}", "arguments": {"text": text_of(rng), "n": [k, None, True]}} for k in range(rng.randint(1, 3))
            ]
            given = [{"id": f"c{step}{k}", "type": "function", "function": call} for k, call in enumerate(calls)]
            messages.append({"role": "assistant", "content": rng.choice([None, "", text_of(rng)]), "tool_calls": given})
            results = [{"role": "tool", "tool_call_id": call["id"], "content": text_of(rng)} for call in given]
            messages += rng.sample(results, len(results))
        if rng.random() < 0.2:
            call = {"name": "g", "arguments": json.dumps({"x": text_of(rng)})}
            messages.append({"role": "assistant", "content": None, "function_call": call})
            messages.append({"role": "function", "name": "g", "content": text_of(rng)})
        messages.append({"role": "assistant", "content": text_of(rng)})
    tools = [{"type": "function", "function": {"name": f"f{k}", "description": text_of(rng)}} for k in range(rng.randint(0, 2))]
    return {"messages": messages[: rng.randint(max(2, len(messages) - 2), len(messages))], "tools": tools}


def ends_within_results(messages: list[dict]) -> bool:
    """Whether some calls of the last reply have results and others have none: that is no prompt, and no whole conversation."""
    last = max((i for i, message in enumerate(messages) if message.get("tool_calls")), default=len(messages))
    return last + 1 < len(messages) < last + 1 + len(messages[last]["tool_calls"])


def test_tools_calls_and_results_are_rendered_as_the_chat_template_renders_them(chatty, tokenizer):
    whole = [talk for talk in map(with_tools, range(200)) if not ends_within_results(talk["messages"])]
    for talk in whole:
        ours = render(talk, tokenizer, max_tokens=None)
        how = {"tools": talk["tools"] or None, "return_dict": True}
        there = chatty.apply_chat_template(talk["messages"], return_assistant_tokens_mask=True, **how)
        assert there["input_ids"] == ours.ids, talk
        assert there["assistant_masks"] == ours.loss_mask, talk
        if talk["messages"][-1]["role"] != "assistant":
            there = chatty.apply_chat_template(talk["messages"], add_generation_prompt=True, **how)
            assert there["input_ids"] == render_prompt(talk, tokenizer), talk


def test_the_generation_prompt_is_the_prompt_of_a_chat(chatty, tokenizer):
    ended_by_user = [m for m in map(conversation, range(300)) if m[-1]["role"] == "user"]
    assert len(ended_by_user) > 100
    for messages in ended_by_user:
        there = chatty.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert there["input_ids"] == render_prompt({"messages": messages}, tokenizer)


def test_many_conversations_at_once_get_the_ids_of_each(chatty, tokenizer):
    batch = [conversation(seed) for seed in range(20)]
    there = chatty.apply_chat_template(batch, return_dict=True)["input_ids"]
    assert there == [render({"messages": messages}, tokenizer, None).ids for messages in batch]


def test_text_before_tool_output_is_supervised_as_ours_where_its_last_character_is_one_token(chatty, tokenizer):
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": [{"type": "text", "text": "🙂 so"}, {"type": "python_output", "text": "🦄"}]},
    ]
    there = chatty.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert there["assistant_masks"] == render({"messages": messages}, tokenizer, None).loss_mask


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
@pytest.mark.parametrize("place", ["system", "user", "assistant", "text", "python", "python_output", "two parts"])
def test_text_that_looks_like_a_special_token_is_refused_with_its_name(chatty, name, place):
    text = f"a{name}b"
    reply = {
        "system": "a",
        "user": "a",
        "assistant": text,
        "two parts": [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}],
    }
    messages = [
        {"role": "system", "content": text if place == "system" else "s"},
        {"role": "user", "content": text if place == "user" else "u"},
        {"role": "assistant", "content": reply.get(place, [{"type": place, "text": text}])},
    ]
    with pytest.raises(Exception, match=r"message . holds the text ") as refused:
        chatty.apply_chat_template(messages)
    assert name in str(refused.value)


USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
MALFORMED = {
    "the assistant begins": ([REPLY], "message 0 is from .*assistant.* where .*user.* must speak"),
    "the user speaks twice": ([USER, USER], "message 1 is from .*user.* where .*assistant.* must speak"),
    "an unknown role": ([USER, {"role": "tool", "content": "x"}], "message 1 is from .*tool.* where"),
    "a late system message": ([USER, REPLY, {"role": "system", "content": "x"}], "message 2 is from .*system.* where"),
    "a lonely system message": ([{"role": "system", "content": "x"}], "a system message must be followed by a user message"),
    "the assistant after the system": ([{"role": "system", "content": "x"}, REPLY], "must be followed by a user message"),
    "a system message of a number": (
        [{"role": "system", "content": 7}, USER],
        "message 0: .* must be a string or a list of parts",
    ),
    "a user's image": ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], "message 0: unknown part type"),
    "a user's number": ([{"role": "user", "content": 7}], "message 0: .* must be a string or a list of parts"),
    "an assistant's number": ([USER, {"role": "assistant", "content": 7}], "message 1: .* must be a string or a list of parts"),
    "a result without a call": ([USER, REPLY, {"role": "tool", "content": "x"}], "message 2 is from .*tool.*, but no call"),
    "no parts": ([USER, {"role": "assistant", "content": []}], "message 1: .* must be a string or a list of parts"),
    "one part without a list": ([USER, {"role": "assistant", "content": {"type": "text", "text": "x"}}], "or a list of parts"),
    "a part that is text": ([USER, {"role": "assistant", "content": ["x"]}], "message 1: a part must"),
    "a part without text": ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "message 1: a part must"),
    "a part of a number": ([USER, {"role": "assistant", "content": [{"type": "python", "text": 7}]}], "message 1: a part must"),
    "an unknown part": ([USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "1: unknown part type"),
    "no content": ([USER, {"role": "assistant"}], "message 1 needs `role` and `content`"),
    "content of null": ([USER, {"role": "assistant", "content": None}], "message 1 needs `role` and `content`"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_chat_refuses_is_refused_by_the_template(chatty, tokenizer, what):
    messages, expected = MALFORMED[what]
    with pytest.raises(Malformed, match=expected):
        render({"messages": messages}, tokenizer)
    with pytest.raises(Exception, match=expected):
        chatty.apply_chat_template(messages, tokenize=False)


def test_a_generation_prompt_behind_a_reply_is_refused(chatty):
    with pytest.raises(Exception, match="the last message is from the assistant already"):
        chatty.apply_chat_template([USER, REPLY], add_generation_prompt=True)


# --- and back --------------------------------------------------------------------------------------------------------


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_a_round_trip_keeps_every_bit(written, model, tokenizer):
    read = huggingface.read(written)
    assert same(read.weights, {name: t.detach() for name, t in model.weights().items()}) and read.sizes == model.shape
    assert read.tokenizer.fingerprint() == tokenizer.fingerprint() and (read.step, read.seq_len) == (0, SEQ_LEN)


def test_what_transformers_saves_is_read_to_the_bit_also_in_shards(written, theirs, model, tokenizer, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    transformers.AutoTokenizer.from_pretrained(written).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
    read = huggingface.read(tmp_path)
    assert huggingface.find(tmp_path) and read.sizes == model.shape
    assert same(read.weights, {name: t.detach() for name, t in model.weights().items()})
    assert read.tokenizer.fingerprint() == tokenizer.fingerprint()


def test_weights_in_bf16_are_read_exactly(folder):
    before = {name: t.clone() for name, t in huggingface.read(folder).weights.items()}  # which may be the file itself
    save_file({name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
    assert same(huggingface.read(folder).weights, {name: t.bfloat16().float() for name, t in before.items()})


def test_a_folder_without_config_or_weights_holds_no_model(folder):
    assert huggingface.find(folder) and huggingface.model_type(folder) == "nanochat"
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert huggingface.find(folder) is None
    (folder / "model.safetensors.index.json").write_text("{}")
    assert huggingface.find(folder)
    (folder / "config.json").unlink()
    assert huggingface.find(folder) is None


def change(file: Path, **entries) -> None:
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


OTHER_MODELS = {
    "a cap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 instead of 15.0"),
    "no cap": ({"final_logit_softcapping": None}, "final_logit_softcapping=None instead of 15.0"),
    "an activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' instead of 'relu2'"),
    "a wider MLP": ({"intermediate_size": 300}, "intermediate_size=300 instead of 256"),
    "the default MLP": ({"intermediate_size": ...}, "intermediate_size=8192 instead of 256"),
    "biases": ({"attention_bias": True}, "attention_bias=True instead of False"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1 instead of 0.0"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings=True instead of False"),
    "an epsilon": ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 instead of 1.19.*e-07 or 1e-06"),
    "a head size": ({"head_dim": 32}, "head_dim=32 instead of 16"),
    "a rotary base": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "={.*1000000.0.*} instead of"),
    "a rotary base of old": ({"rope_parameters": ..., "rope_theta": 500.0}, "rope_parameters={.*500.0.*} instead of"),
    "a rotary scaling": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear.* instead of"),
    "a rotary scaling of old": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear.* instead of"),
    "half a rotation": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary.* instead of"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    "no number of heads": ({"num_attention_heads": ...}, "num_attention_heads=None.* must be whole numbers above 0"),
    "a broken size": ({"hidden_size": "64"}, "hidden_size='64' must be whole numbers above 0"),
    "heads that do not divide": ({"num_attention_heads": 3}, "hidden_size=64, num_attention_heads=3 and .* do not divide"),
    "groups that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads=3 do not divide"),
    "another type": ({"model_type": "llama"}, "is of model type llama, not nanochat"),
    "more tokens": ({"vocab_size": 500}, "the tokenizer in .* has .* tokens, its model 500"),
    "fewer layers": ({"num_hidden_layers": 2}, "does not fit the model: model.layers.2.* is unknown"),
    "more layers": ({"num_hidden_layers": 4}, "does not fit the model: transformer.h.3.* is missing"),
    "other groups": ({"num_key_value_heads": 4}, r"does not fit the model: .*c_k.weight is \(32, 64\), the model has \(64, 64\)"),
}


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_a_model_that_is_not_ours_is_refused_by_what_differs(folder, what):
    entries, expected = OTHER_MODELS[what]
    change(folder / "config.json", **entries)
    with pytest.raises(UserError, match=expected):
        huggingface.read(folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"rms_norm_eps": 1e-6},
        {"rms_norm_eps": ...},
        {"head_dim": 16},
        {"head_dim": None},
        {"rope_parameters": ...},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 10000}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        {"hidden_act": ..., "attention_bias": ..., "tie_word_embeddings": ..., "final_logit_softcapping": ...},
        {"dtype": "bfloat16"},
    ],
)
def test_a_config_that_says_the_same_in_other_words_is_read(folder, entries):
    before = huggingface.read(folder)
    change(folder / "config.json", **entries)
    read = huggingface.read(folder)
    assert read.sizes == before.sizes and same(read.weights, before.weights)


def test_heads_without_groups_may_go_unsaid(tmp_path, tokenizer):
    place = write(tmp_path / "model", random_gpt(tokenizer.vocab_size, **SIZES), tokenizer)
    change(place / "config.json", num_key_value_heads=None)
    assert huggingface.read(place).sizes["n_kv_head"] == 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_file_that_is_broken_or_missing_is_named(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        huggingface.read(folder)
    if name == "config.json":
        with pytest.raises(UserError, match=name):
            huggingface.model_type(folder)


def test_a_config_without_a_type_is_named(folder):
    change(folder / "config.json", model_type=...)
    with pytest.raises(UserError, match=r"config.json names no model_type"):
        huggingface.model_type(folder)


def test_a_tokenizer_that_tiktoken_cannot_express_is_refused_with_the_way_out(folder):
    change(folder / "tokenizer.json", normalizer={"type": "NFC"})
    with pytest.raises(UserError, match=r"tokenizer.json is none that .* model=hf init.from="):
        huggingface.read(folder)


def test_tensors_that_are_missing_or_broken_are_named(folder):
    weights = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}  # which may be the file itself
    save_file({name: t for name, t in weights.items() if name != "lm_head.weight"}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        huggingface.read(folder)
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is torch.int8"):
        huggingface.read(folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        huggingface.read(folder)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"lm_head.weight": "gone.safetensors"}}, "gone.safetensors cannot be read"),
        ({"weight_map": {"lm_head.weight": "../model.safetensors"}}, "names files outside its folder: ../model.safetensors"),
        ({"weight_map": {"lm_head.weight": 1}}, "holds no weight_map"),
        ({}, "holds no weight_map"),
    ],
)
def test_a_broken_index_of_shards_is_named(folder, index, expected):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=expected):
        huggingface.read(folder)
