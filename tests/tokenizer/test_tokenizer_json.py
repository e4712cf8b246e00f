"""tokenizer.json gives the ids of tiktoken for every text, and a tokenizer read back from it is the same."""

from __future__ import annotations

import copy
import json
import random

import pytest
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chattrain.errors import UserError
from chattrain.tokenizer import SPECIAL_TOKENS, Tokenizer, tokenizer_json
from chattrain.tokenizer.native import SPLIT_PATTERN
from tests.conftest import SHARED_DATA

tokenizers = pytest.importorskip("tokenizers")

# What Unicode has that engines for regular expressions disagree on.
SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u3000\u200b\u200c\u200d\u2060\ufeff"
FOLDS = "sStTdDmMlLvVeErRkK\u017f\u212a\u0130\u0131ßẞ\ufb05\ufb06ςσ"
MARKS = "\u0301\u0308\u064b\u20e3\ufe0f\u0e31\u1161\u11a8\u302a"
DIGITS = "019٠١९๙²½Ⅷ一\U0001d7d8\U00010d50"
OTHERS = "aé東京אבالع가\U0001f468\U0001f469\U0001f3fd\U0001f1e9\u202e\u202d\ue000\ufffd\U0010ffff\u1c89\ua7cb'’.,!?<|>\x00"
ALPHABET = SPACES + FOLDS + MARKS + DIGITS + OTHERS
BYTES = {bytes([b]): b for b in range(256)}


def theirs(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.write(tokenizer.encoding)))


def differing(tokenizer: Tokenizer, other: tokenizers.Tokenizer, texts: list[str]) -> list[str]:
    """The texts, escaped, that get other ids."""
    pairs = zip(texts, tokenizer.encode_batch(texts), other.encode_batch(texts, add_special_tokens=False), strict=True)
    return [ascii(text)[:200] for text, ids, encoding in pairs if ids != encoding.ids]


def special_from(first: int, step: int = 1) -> dict[str, int]:
    return {name: first + step * i for i, name in enumerate(SPECIAL_TOKENS)}


def make(ranks: dict[bytes, int], special: dict[str, int], pattern: str = SPLIT_PATTERN) -> Tokenizer:
    return Tokenizer(tiktoken.Encoding(name="x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


@pytest.fixture(scope="module")
def other(tokenizer):
    return theirs(tokenizer)


@pytest.fixture(scope="module")
def rich() -> Tokenizer:
    """Every pair of characters of ALPHABET often enough to be merged: its ids show where a text is split."""
    rng = random.Random(0)
    return Tokenizer.train(["".join(rng.choices(ALPHABET, k=200)) for _ in range(2000)], 20_000)


# --- the same ids ----------------------------------------------------------------------------------------------------


def every_character() -> list[int]:
    return [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s", r"(?i:[sdmt])", r"(?i:ll|ve|re)", r"[^\s\p{L}\p{N}]"])
def test_both_engines_know_the_same_characters_of_each_kind(kind):
    ours = tiktoken.Encoding(name="x", pat_str=kind, mergeable_ranks=BYTES, special_tokens={})  # drops what does not match
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(kind), "removed")
    characters = every_character()
    for i in range(0, len(characters), 10_000):
        text = "".join(map(chr, characters[i : i + 10_000]))
        dropped = "".join(part for part, _ in split.pre_tokenize_str(text))
        kept = ours.decode_bytes(ours.encode_ordinary(text)).decode()
        assert len(kept) + len(dropped) == len(text) and not set(kept) & set(dropped), hex(characters[i])


@pytest.mark.parametrize("place", ["a{}b ", "'{0}{0}\n"])
def test_every_character_of_unicode_gets_the_same_ids_in_any_place(rich, place):
    around = [place.format(chr(c)) for c in every_character()]
    texts = ["".join(around[i : i + 500]) for i in range(0, len(around), 500)]
    assert not differing(rich, theirs(rich), texts)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.text())
def test_any_text_gets_the_same_ids(tokenizer, other, text):
    assume(not any(name in text for name in SPECIAL_TOKENS))
    assert not differing(tokenizer, other, [text])


@pytest.mark.parametrize("seed", range(3))
def test_mixed_spaces_marks_digits_scripts_and_foldings_get_the_same_ids(rich, seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 40))) for _ in range(2000)]
    texts += ["".join(rng.choice(ALPHABET) * rng.choice([1, 2, 3, 7, 50]) for _ in range(5)) for _ in range(500)]
    assert not differing(rich, theirs(rich), texts)


@pytest.mark.parametrize("unit", [" ", "\n", "\r\n", " \n", "a", "ab", "1", "é", "🙂", "東", "'s", "\u2028", "!"])
def test_long_runs_get_the_same_ids(tokenizer, other, unit):
    texts = [
        f"{before}{unit * n}{after}" for n in [*range(1, 40), 1000, 5000] for before, after in [("", ""), ("x", "y"), (" ", " ")]
    ]
    assert not differing(tokenizer, other, texts)


@pytest.mark.parametrize("letters", ["a", "ab", "abc"])
def test_tokens_that_fall_into_halves_in_many_ways_are_merged_alike(letters):
    """Of equal ranks tiktoken takes the left one, a list of merges the one that it names first: they must not differ."""
    rng = random.Random(0)
    for size in (300, 400, 700):
        corpus = ["".join(rng.choices(letters, k=rng.randint(3, 60))) for _ in range(300)]
        dense = Tokenizer.train(corpus, size)
        texts = ["".join(rng.choices(letters, k=rng.randint(3, 200))) for _ in range(500)] + ["a" * n for n in range(1, 200)]
        assert not differing(dense, theirs(dense), texts)


def test_real_text_gets_the_same_ids(tokenizer, other):
    pq = pytest.importorskip("pyarrow.parquet")
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared data")
    texts = pq.read_table(SHARED_DATA / "text" / "tinyshakespeare.parquet").column("text").to_pylist()
    texts += pq.read_table(SHARED_DATA / "gsm8k" / "main" / "test.parquet").column("answer").to_pylist()
    assert len(texts) > 1000 and not differing(tokenizer, other, texts)


def test_ids_are_decoded_to_the_same_text(tokenizer, other):
    for ids in [*([i] for i in range(tokenizer.vocab_size)), tokenizer.encode("Grüße 🙂\n  東京 <|bos|>"), [0xF0, 0x9F, 65]]:
        assert other.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_special_tokens_get_their_ids_and_keep_the_spaces_around_them(tokenizer, other):
    for name in SPECIAL_TOKENS:
        expected = [*tokenizer.encode("a "), tokenizer.special(name), *tokenizer.encode(" b")]
        assert other.encode(f"a {name} b").ids == expected
    assert other.get_vocab_size() == tokenizer.vocab_size


def test_unused_ids_shift_nothing():
    gaps = make(BYTES | {b"ab": 300, b"abc": 310}, special_from(400, step=3))
    written = theirs(gaps)
    assert {name: written.token_to_id(name) for name in SPECIAL_TOKENS} == special_from(400, step=3)
    assert not differing(gaps, written, ["abc ab", "cab"])
    assert written.encode("ab<|bos|>").ids == [300, 400]
    assert Tokenizer(tokenizer_json.read(tokenizer_json.write(gaps.encoding))).fingerprint() == gaps.fingerprint()


def test_a_word_that_is_a_token_is_that_token_though_no_merges_lead_to_it():
    whole = make(BYTES | {b"abc": 256}, special_from(257))
    assert theirs(whole).encode("abc abcd").ids == whole.encode("abc abcd") == [256, *b" abcd"]


def test_an_ordinary_token_spelled_like_a_special_one_is_refused():
    with pytest.raises(UserError, match=r"an ordinary token spelled like the special token <\|bos\|>"):
        tokenizer_json.write(make(BYTES | {b"<|bos|>": 256}, special_from(257)).encoding)


# --- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, r"\s+|\S+", SPLIT_PATTERN.replace("{1,2}", "{1,3}")])
def test_a_round_trip_gives_the_same_tokenizer(tokenizer, pattern):
    there = make(tokenizer.encoding._mergeable_ranks, tokenizer.encoding._special_tokens, pattern)
    back = Tokenizer(tokenizer_json.read(json.loads(json.dumps(tokenizer_json.write(there.encoding)))))
    assert back.fingerprint() == there.fingerprint()
    assert back.encoding._pat_str == pattern and back.vocab_size == there.vocab_size


def test_what_the_tokenizers_library_saves_is_read(tokenizer, other):
    assert Tokenizer(tokenizer_json.read(json.loads(other.to_str()))).fingerprint() == tokenizer.fingerprint()


def test_a_tiktoken_encoding_that_transformers_converted_is_read(tokenizer, tmp_path):
    """As nanochat's models come to the hub."""
    converters = pytest.importorskip("transformers.convert_slow_tokenizer")
    tokenizer.save(tmp_path)
    converted = converters.TikTokenConverter(
        str(tmp_path / "ranks.tiktoken"), tokenizer.encoding._pat_str, extra_special_tokens=list(SPECIAL_TOKENS)
    ).converted()
    assert Tokenizer(tokenizer_json.read(json.loads(converted.to_str()))).fingerprint() == tokenizer.fingerprint()


def test_merges_written_as_one_string_are_read(tokenizer):
    content = tokenizer_json.write(tokenizer.encoding)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    assert Tokenizer(tokenizer_json.read(content)).fingerprint() == tokenizer.fingerprint()


CHANGES = {
    "another model": lambda c: c["model"].update(type="WordPiece"),
    "whole words are merged too": lambda c: c["model"].update(ignore_merges=False),
    "dropout": lambda c: c["model"].update(dropout=0.1),
    "a fallback to bytes": lambda c: c["model"].update(byte_fallback=True),
    "a merge less": lambda c: c["model"]["merges"].pop(),
    "a merge twice": lambda c: c["model"]["merges"].append(c["model"]["merges"][-1]),
    "merges in another order": lambda c: c["model"]["merges"].reverse(),
    "a merge of unknown tokens": lambda c: c["model"]["merges"].append(["Ġ", "Ā"]),
    "a byte less": lambda c: c["model"]["vocab"].pop("Ā"),
    "an id twice": lambda c: c["model"]["vocab"].update(a=5),
    "an id below 0": lambda c: c["model"]["vocab"].update(a=-1),
    "a token that is no bytes": lambda c: c["model"]["vocab"].update({"東": 9999}),
    "a normalizer": lambda c: c.update(normalizer={"type": "NFC"}),
    "no pre-tokenizer": lambda c: c.update(pre_tokenizer=None),
    "another pre-tokenizer": lambda c: c.update(pre_tokenizer={"type": "ByteLevel", "use_regex": True}),
    "one pre-tokenizer more": lambda c: c["pre_tokenizer"]["pretokenizers"].append({"type": "Digits", "individual_digits": True}),
    "a space before": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "GPT-2's splits too": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    "splits that are removed": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    "a plain string to split at": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "}),
    "a broken pattern": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}),
    "another decoder": lambda c: c.update(decoder={"type": "Metaspace"}),
    "no decoder": lambda c: c.update(decoder=None),
    "a template that adds tokens": lambda c: c.update(post_processor={"type": "TemplateProcessing"}),
    "a special token less": lambda c: c["added_tokens"].pop(),
    "an added token that strips": lambda c: c["added_tokens"][0].update(lstrip=True),
    "an added token that is not special": lambda c: c["added_tokens"][0].update(special=False),
    "no vocabulary": lambda c: c.pop("model"),
    "no added tokens": lambda c: c.update(added_tokens=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_says_more_or_less_than_an_encoding_is_not_read(tokenizer, change):
    content = copy.deepcopy(tokenizer_json.write(tokenizer.encoding))
    CHANGES[change](content)
    assert tokenizer_json.read(content) is None


def test_a_vocabulary_without_a_byte_is_not_read():
    """tiktoken would panic at the first text that holds it."""
    content = tokenizer_json.write(make({token: i for token, i in BYTES.items() if i != 7}, special_from(256)).encoding)
    assert tokenizer_json.read(content) is None


@pytest.mark.parametrize("content", [{}, [], None, {"model": []}, {"added_tokens": [], "model": {"vocab": {}}}])
def test_a_file_of_another_kind_is_not_read(content):
    assert tokenizer_json.read(content) is None
