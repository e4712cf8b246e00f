"""nanochat's folders: read to the bit, and nothing that is unpickled does anything."""

from __future__ import annotations

import copyreg
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from chattrain.errors import UserError
from chattrain.formats import nanochat
from chattrain.tokenizer import Tokenizer
from chattrain.tokenizer.nanochat import read_encoding
from tests.foreign import random_gpt, write_nanochat
from tests.helpers import damage

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2}


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_gpt(tokenizer.vocab_size, **SIZES)


@pytest.fixture
def folder(tmp_path, model, tokenizer) -> Path:
    return write_nanochat(tmp_path / "d2", model, tokenizer)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- read ------------------------------------------------------------------------------------------------------------


def test_weights_sizes_and_tokenizer_come_back_as_they_were(folder, model, tokenizer):
    read = nanochat.read(nanochat.find(folder))
    assert read.sizes == model.shape and (read.step, read.seq_len) == (650, 64)
    assert same(read.weights, model.state_dict())
    assert read.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert read.tokenizer.encode("Grüße 🙂 <|bos|>") == tokenizer.encode("Grüße 🙂 <|bos|>")


def test_weights_of_a_compiled_model_and_in_bf16_are_read_exactly(folder, model):
    state = {f"_orig_mod.{name}": t.bfloat16() if "wte" in name else t for name, t in model.state_dict().items()}
    torch.save(state, folder / "model_000650.pt")
    weights = nanochat.read(nanochat.find(folder)).weights
    assert {t.dtype for t in weights.values()} == {torch.float32}
    expected = {name: t.bfloat16().float() if "wte" in name else t for name, t in model.state_dict().items()}
    assert same(weights, expected)


def test_fp16_is_read_exactly_and_formats_that_fp32_would_round_are_refused(folder, model):
    torch.save({name: t.half() for name, t in model.state_dict().items()}, folder / "model_000650.pt")
    assert same(nanochat.read(nanochat.find(folder)).weights, {name: t.half().float() for name, t in model.state_dict().items()})
    for dtype in (torch.float64, torch.int32, torch.complex64):
        torch.save({name: t.to(dtype) for name, t in model.state_dict().items()}, folder / "model_000650.pt")
        assert str(dtype) in refusal(folder)


def test_a_file_of_the_older_torch_save_is_read_too(folder, model):
    torch.save(model.state_dict(), folder / "model_000650.pt", _use_new_zipfile_serialization=False)
    assert same(nanochat.read(nanochat.find(folder)).weights, model.state_dict())


def test_a_folder_holds_a_model_where_a_numbered_file_lies(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_best.pt").touch()
    assert nanochat.find(folder) and nanochat.find(tmp_path / "other") is None and nanochat.find(tmp_path / "none") is None


def test_the_tokenizer_folder_that_is_named_wins(folder, model, tokenizer, tmp_path):
    write_nanochat(tmp_path / "other", model, tokenizer)
    (folder / "tokenizer.pkl").write_bytes(b"garbage")
    assert nanochat.read(nanochat.find(folder), tmp_path / "other").tokenizer.fingerprint() == tokenizer.fingerprint()


def test_the_newest_step_is_read(folder, model, tokenizer):
    later = random_gpt(tokenizer.vocab_size, seed=5, **SIZES)
    write_nanochat(folder, later, tokenizer, step=1000)
    write_nanochat(folder, model, tokenizer, step=999)
    read = nanochat.read(nanochat.find(folder))
    assert read.step == 1000 and same(read.weights, later.state_dict())


@pytest.mark.parametrize("place", ["base_checkpoints/d2", "base_checkpoints/d2/tokenizer", "tokenizer"])
def test_the_tokenizer_is_found_where_nanochat_and_the_hub_put_it(tmp_path, model, tokenizer, place):
    folder = write_nanochat(tmp_path / "base_checkpoints" / "d2", model, tokenizer, tokenizer_dir=tmp_path / place)
    assert nanochat.find(folder).tokenizer.resolve() == (tmp_path / place).resolve()
    assert nanochat.read(nanochat.find(folder)).tokenizer.fingerprint() == tokenizer.fingerprint()


def test_a_tokenizer_folder_is_one_for_tokenizer_load(folder, tokenizer):
    assert Tokenizer.load(folder).fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    "name, stage",
    [
        ("base_checkpoints/d20", "base"),
        ("mid_checkpoints/d20", "mid"),
        ("chatsft_checkpoints/d20", "sft"),
        ("downloads/d20", None),
    ],
)
def test_the_stage_is_told_by_nanochats_own_folders(tmp_path, name, stage):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "model_000001.pt").touch()
    assert nanochat.find(tmp_path / name).stage == stage


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_tokenizer_of_any_usual_pickle_protocol_is_read(folder, tokenizer, protocol):
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding, protocol))
    assert Tokenizer(read_encoding(folder)).fingerprint() == tokenizer.fingerprint()


# --- refused: pickles ------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda canary: Calls(os.system, f"touch {canary}"), "system"),
        (lambda canary: Calls(eval, f"open({str(canary)!r}, 'w')"), "eval"),
        (lambda canary: Calls(exec, f"open({str(canary)!r}, 'w')"), "exec"),
        (lambda canary: {"pat_str": Calls(os.mkdir, str(canary))}, "mkdir"),
        (lambda canary: Calls(Path, str(canary)), "Path"),
        (lambda canary: Calls(getattr, os, "system"), "getattr"),
    ],
)
def test_a_pickle_that_asks_for_anything_else_is_refused_by_name_and_does_nothing(folder, tmp_path, make, named):
    canary = tmp_path / "canary"
    (folder / "tokenizer.pkl").write_bytes(
        pickle.dumps(make(canary)) if named != "getattr" else b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."
    )
    with pytest.raises(UserError, match=f"asks for .*{named}.*refused"):
        read_encoding(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda state, canary: {**state, "name": Calls(os.mkdir, canary)},
        lambda state, canary: {**state, "mergeable_ranks": {**state["mergeable_ranks"], Calls(os.mkdir, canary): 7}},
        lambda state, canary: {**state, "special_tokens": {"<|bos|>": Calls(os.mkdir, canary)}},
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_hidden_in_a_tokenizers_state_is_refused_and_does_nothing(folder, tokenizer, tmp_path, make, protocol):
    canary = tmp_path / "canary"
    (folder / "tokenizer.pkl").write_bytes(faked(make(tokenizer.encoding.__getstate__(), str(canary)), protocol))
    with pytest.raises(UserError, match=r"asks for \w+\.mkdir.*refused"):
        read_encoding(folder)
    assert not canary.exists()


@pytest.fixture
def extension_code():
    """A code that the unpickler gives os.mkdir for without asking, once any pickle has used it."""
    copyreg.add_extension(os.mkdir.__module__, "mkdir", 5)
    pickle.loads(b"\x80\x02\x82\x05.")
    yield b"\x82\x05"
    copyreg.remove_extension(os.mkdir.__module__, "mkdir", 5)
    copyreg.clear_extension_cache()


def test_extension_codes_are_refused_and_do_nothing(folder, tmp_path, extension_code):
    canary = tmp_path / "canary"
    (folder / "tokenizer.pkl").write_bytes(b"\x80\x02" + extension_code + pickle.dumps((str(canary),), 2)[2:-1] + b"R.")
    with pytest.raises(UserError, match=r"extension code.*refused"):
        read_encoding(folder)
    assert not canary.exists()


@pytest.mark.parametrize("arguments", [("a", "rot13"), ("a", "utf-8"), (b"a", "hex"), ("a",), ("\u4eac", "latin1")])
def test_the_stand_in_for_codecs_writes_latin1_and_nothing_else(folder, arguments):
    (folder / "tokenizer.pkl").write_bytes(b"\x80\x04c_codecs\nencode\n" + pickle.dumps(arguments, 4)[2:-1] + b"R.")
    with pytest.raises(UserError, match="no pickle of a tokenizer"):
        read_encoding(folder)


@pytest.mark.parametrize("stand_in", [b"ctiktoken.core\nEncoding\n", b"c_codecs\nencode\n"], ids=["Encoding", "encode"])
@pytest.mark.parametrize("state", [{"changed": 1}, (None, {"changed": 1}), (None, {"__setstate__": 1, "__call__": 1})])
def test_a_pickle_changes_nothing_of_the_stand_ins(folder, tokenizer, stand_in, state):
    genuine = (folder / "tokenizer.pkl").read_bytes()
    (folder / "tokenizer.pkl").write_bytes(b"\x80\x04" + stand_in + pickle.dumps(state, 4)[2:-1] + b"b.")
    with pytest.raises(UserError, match="no pickle of a tokenizer"):
        read_encoding(folder)
    (folder / "tokenizer.pkl").write_bytes(genuine)
    assert Tokenizer(read_encoding(folder)).fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("raw", [b"\x80\x04Nr\xff\xff\xff\x7f.", b"Np99999999999\n."])
def test_a_short_pickle_takes_no_memory_for_places_far_away(folder, raw):
    (folder / "tokenizer.pkl").write_bytes(raw)
    with pytest.raises(UserError, match="memo index"):
        read_encoding(folder)


def test_a_tokenizer_file_that_is_not_there_is_named(folder):
    (folder / "tokenizer.pkl").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.pkl cannot be read"):
        read_encoding(folder)


def test_a_pickle_that_names_an_object_outside_is_refused(folder):
    (folder / "tokenizer.pkl").write_bytes(b"Pabc\n.")
    with pytest.raises(UserError, match="outside the file"):
        read_encoding(folder)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        pickle.dumps([1, 2]),
        pickle.dumps({"pat_str": "x"}),
        pickle.dumps("gpt2"),
        b"ctiktoken.core\nEncoding\n.",
        b"ctiktoken.core\nEncoding\n(I1\ntR.",
        b"ctiktoken.core\nEncoding\n)R.",
    ],
    ids=["empty", "garbage", "a list", "a dictionary", "a text", "the class", "a call", "no state"],
)
def test_a_pickle_of_something_else_is_refused(folder, raw):
    (folder / "tokenizer.pkl").write_bytes(raw)
    with pytest.raises(UserError, match=r"tokenizer\.pkl"):
        read_encoding(folder)


def test_a_truncated_pickle_is_refused(folder):
    whole = (folder / "tokenizer.pkl").read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        (folder / "tokenizer.pkl").write_bytes(whole[:length])
        with pytest.raises(UserError, match="no pickle of a tokenizer"):
            read_encoding(folder)


def faked(state, protocol: int = 4) -> bytes:
    """What pickle writes for an Encoding of this state, assembled by hand: the class, no arguments, the state."""
    return b"\x80\x04ctiktoken.core\nEncoding\n)\x81" + pickle.dumps(state, protocol)[2:-1] + b"b."


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: "gpt2", "names tiktoken's encoding 'gpt2'"),
        (lambda s: s | {"pat_str": 3}, "another type"),
        (lambda s: {"pat_str": "x"}, "no pattern, ranks"),
        (lambda s: s | {"pat_str": "("}, "tiktoken refuses it"),
        (lambda s: s | {"mergeable_ranks": {"a": 1}}, "another type"),
        (lambda s: s | {"mergeable_ranks": {b"a": True}}, "another type"),
        (lambda s: s | {"mergeable_ranks": {k: v for k, v in s["mergeable_ranks"].items() if k != b"A"}}, "1 of the 256"),
        (lambda s: s | {"mergeable_ranks": s["mergeable_ranks"] | {b"A": 0}}, "two tokens have one id"),
        (lambda s: s | {"mergeable_ranks": s["mergeable_ranks"] | {b"A": -1}}, "below 0"),
        (lambda s: s | {"special_tokens": {"<|bos|>": 399}}, "lacks the special tokens"),
    ],
)
def test_a_state_that_is_no_tokenizers_is_refused(folder, tokenizer, change, named):
    state = pickle.loads(pickle.dumps(tokenizer.encoding)).__getstate__()
    (folder / "tokenizer.pkl").write_bytes(faked(change(state)))
    with pytest.raises(UserError, match=rf"tokenizer\.pkl.*{named}"):
        read_encoding(folder)


def test_the_state_assembled_by_hand_is_read(folder, tokenizer):
    (folder / "tokenizer.pkl").write_bytes(faked(tokenizer.encoding.__getstate__()))
    assert Tokenizer(read_encoding(folder)).fingerprint() == tokenizer.fingerprint()


def test_token_bytes_of_another_tokenizer_are_refused_and_may_be_missing(folder, tokenizer):
    counts = torch.load(folder / "token_bytes.pt")
    for other in (
        counts + 1,
        counts[:-1],
        counts[None],
        counts.float(),
        counts.to(torch.complex64),
        counts > 0,
        counts.to_sparse(),
        counts.to("meta"),
        {"a": counts},
    ):
        torch.save(other, folder / "token_bytes.pt")
        with pytest.raises(UserError, match="belongs to another tokenizer"):
            read_encoding(folder)
    torch.save(counts[:-1], folder / "token_bytes.pt")
    with pytest.raises(UserError, match=f"no {tokenizer.vocab_size} whole numbers, one a token"):
        read_encoding(folder)
    (folder / "token_bytes.pt").unlink()
    assert read_encoding(folder).n_vocab == tokenizer.vocab_size


def test_token_bytes_are_counted_on_the_decoded_token_as_nanochat_does(folder, tokenizer):
    saved = torch.load(folder / "token_bytes.pt")
    assert saved[tokenizer.encoding._mergeable_ranks[b"\xff"]] == 3  # of U+FFFD
    own = torch.from_numpy(tokenizer.token_bytes())
    assert not torch.equal(saved, own)
    torch.save(own, folder / "token_bytes.pt")
    with pytest.raises(UserError, match="belongs to another tokenizer"):
        read_encoding(folder)


# --- refused: models -------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        nanochat.read(nanochat.find(folder))
    return str(refused.value)


def change(folder: Path, weights=lambda w: w, config=lambda c: c) -> Path:
    torch.save(weights(torch.load(folder / "model_000650.pt")), folder / "model_000650.pt")
    meta = json.loads((folder / "meta_000650.json").read_text())
    (folder / "meta_000650.json").write_text(json.dumps(meta | {"model_config": config(meta["model_config"])}))
    return folder


@pytest.mark.parametrize(
    "name, kind",
    [
        ("value_embeds.1.weight", "value embeddings"),
        ("transformer.h.0.attn.ve_gate.weight", "gates of value embeddings"),
        ("resid_lambdas", "residual scalars"),
        ("x0_lambdas", "first embedding"),
        ("smear_gate.weight", "smeared"),
        ("backout_lambda", "backed-out"),
    ],
)
def test_a_newer_architecture_is_named(folder, name, kind):
    message = refusal(change(folder, weights=lambda w: w | {name: torch.zeros(2)}))
    assert "newer nanochat" in message and kind in message and name in message


def test_a_newer_configuration_is_named(folder):
    assert "window_pattern" in refusal(change(folder, config=lambda c: c | {"window_pattern": "SSSL"}))


def test_one_refusal_names_all_that_is_newer(folder):
    newer = {"value_embeds.1.weight": torch.zeros(2), "resid_lambdas": torch.zeros(2), "x0_lambdas": torch.zeros(2)}
    message = refusal(change(folder, weights=lambda w: w | newer, config=lambda c: c | {"window_pattern": "SSSL"}))
    assert all(name in message for name in [*newer, "window_pattern", "December 2025", "model_000650.pt"])


def test_missing_unknown_and_misshapen_tensors_are_named(folder, model):
    head = "lm_head.weight"
    assert f"{head} is missing" in refusal(change(folder, weights=lambda w: {k: v for k, v in w.items() if k != head}))
    assert "odd is unknown" in refusal(change(folder, weights=lambda w: model.state_dict() | {"odd": torch.zeros(1)}))
    assert f"{head} is (5, 64)" in refusal(change(folder, weights=lambda w: model.state_dict() | {head: torch.zeros(5, 64)}))


@pytest.mark.parametrize(
    "config, named",
    [
        (lambda c: {k: v for k, v in c.items() if k != "n_head"}, "lacks n_head"),
        (lambda c: c | {"n_layer": 0}, "n_layer=0"),
        (lambda c: c | {"n_layer": "2"}, "n_layer='2'"),
        (lambda c: c | {"n_head": 3, "n_kv_head": 3}, "n_head=3"),
        (lambda c: c | {"n_kv_head": 3}, "n_kv_head=3"),
        (lambda c: None, "model_config"),
        (lambda c: c | {"vocab_size": 500}, "500"),
        (lambda c: c | {"n_layer": True}, "n_layer=True"),
        (lambda c: c | {"n_embd": 2**40}, "n_embd=1099511627776"),
        (lambda c: c | {"n_layer": 10_000}, "n_layer=10000"),
        (lambda c: [{}], "a list"),
        (lambda c: "abc", "a str"),
    ],
)
def test_sizes_that_cannot_be_are_refused(folder, config, named):
    assert named in refusal(change(folder, config=config))


def test_a_tokenizer_of_another_size_than_the_model_is_refused_with_both_sizes(folder, tokenizer):
    write_nanochat(folder, random_gpt(tokenizer.vocab_size + 64, **SIZES), tokenizer)
    message = refusal(folder)
    assert f"{tokenizer.vocab_size} tokens" in message and str(tokenizer.vocab_size + 64) in message
    assert "tokenizer.path=" in message


def test_a_missing_or_broken_meta_file_is_refused(folder):
    for broken in ("{", "[" * 100_000, "[]", "{}"):
        (folder / "meta_000650.json").write_text(broken)
        assert "meta_000650.json holds no model_config" in refusal(folder)
    (folder / "meta_000650.json").unlink()
    assert "meta_000650.json cannot be read" in refusal(folder)


def test_weights_that_are_code_or_garbage_are_refused_and_do_nothing(folder, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"a": Calls(os.system, f"touch {canary}")}, folder / "model_000650.pt")
    message = refusal(folder)
    assert "more than tensors" in message and ".system" in message and not canary.exists()
    assert "weights_only" not in message  # torch's own message advises to switch the protection off
    (folder / "model_000650.pt").write_bytes(pickle.dumps(Calls(os.system, f"touch {canary}")))
    assert "model_000650.pt" in refusal(folder) and not canary.exists()
    (folder / "model_000650.pt").write_bytes(b"garbage")
    assert "model_000650.pt" in refusal(folder)
    (folder / "model_000650.pt").write_bytes(b"")
    assert "cannot be read as tensors" in refusal(folder)
    torch.save([1, 2], folder / "model_000650.pt")
    assert "holds no weights" in refusal(folder)


def test_a_truncated_file_of_weights_is_refused(folder):
    whole = (folder / "model_000650.pt").read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        (folder / "model_000650.pt").write_bytes(whole[:length])
        assert "model_000650.pt cannot be read as tensors" in refusal(folder)


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t.tolist(), lambda t: None])
def test_weights_that_are_no_dense_tensors_are_refused(folder, make):
    head = "lm_head.weight"
    assert "holds no weights" in refusal(change(folder, weights=lambda w: w | {head: make(w[head])}))


def test_a_tensor_with_and_without_the_prefix_is_refused(folder):
    twice = {"_orig_mod.lm_head.weight": torch.zeros(1)}
    assert "_orig_mod." in refusal(change(folder, weights=lambda w: w | twice))


def test_one_flipped_byte_of_the_weights_is_found(folder):
    damage(folder / "model_000650.pt")
    assert "is damaged" in refusal(folder)


def test_a_folder_without_a_tokenizer_names_the_places_and_the_way_out(folder):
    (folder / "tokenizer.pkl").unlink()
    message = refusal(folder)
    assert str(folder / "tokenizer") in message and "tokenizer.path=" in message
