"""Text to ids and back without loss, the bytes behind each id, and a folder that gives the same ids again."""

from __future__ import annotations

import json
from itertools import product

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chattrain.errors import UserError
from chattrain.tokenizer import SPECIAL_TOKENS, Tokenizer

many = settings(max_examples=300, deadline=None, derandomize=True, database=None)
AWKWARD = [
    "",
    " ",
    "\n\n\t",
    "\r\n",
    "\x00",
    "\ufeff",
    "e\u0301 é",
    "🙂",
    "ﬁ",
    "漢字",
    "اللغة العربية",
    "\U0010ffff",
    "\U0001f469\u200d\U0001f469\u200d\U0001f466",
    "\u202eabc",
    "\u2028",
    "a" * 3000,
    "1234567890",
    "'s 'LL it's",
    "   def f():\n\n\n  return",
    "<|bos|>",
    "<|assistant_end|>",
]


def bytes_encoding(special: dict[str, int]) -> tiktoken.Encoding:
    """One token a byte: the smallest vocabulary that can hold every text."""
    return tiktoken.Encoding(
        name="bytes", pat_str=r"\s+|\S+", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens=special
    )


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@many
@given(st.text())
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("run", [" ", "\n", "!", "a", "1"])
def test_a_run_of_a_million_like_characters_is_encoded(tokenizer, run):
    text = f"x{run * 1_200_000}y"
    try:
        ids = tokenizer.encode(text)
    except BaseException as error:  # a panic of tiktoken is no Exception: it would end the run without a word
        pytest.fail(f"{type(error).__name__}: {error}")
    assert tokenizer.decode(ids) == text


@many
@given(st.lists(st.text(max_size=20)))
def test_a_batch_gives_what_each_text_gives_alone(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@many
@given(st.text())
@example("Grüße aus Köln, 東京 and 🙂🙂. <|user_end|>")
def test_the_bytes_of_the_tokens_add_up_to_those_of_the_text(tokenizer, text):
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


def test_every_token_counts_its_own_bytes_even_where_they_are_part_of_a_character(tokenizer):
    sizes = tokenizer.token_bytes()
    special = {tokenizer.special(name) for name in SPECIAL_TOKENS}
    assert sizes.shape == (tokenizer.vocab_size,)
    parts_of_characters = 0
    for token in range(tokenizer.vocab_size):
        if token in special:
            assert sizes[token] == 0
        else:
            raw = tokenizer.encoding.decode_single_token_bytes(token)
            parts_of_characters += "\ufffd" in raw.decode(errors="replace")
            assert sizes[token] == len(raw)
    assert parts_of_characters >= 128


def test_ids_that_stand_for_nothing_count_no_bytes():
    tokenizer = Tokenizer(bytes_encoding({name: 300 + i for i, name in enumerate(SPECIAL_TOKENS)}))
    assert tokenizer.vocab_size == 309
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0] * 53


def test_the_nine_special_tokens_are_the_last_ids_and_have_their_names(tokenizer):
    ids = [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert len(SPECIAL_TOKENS) == 9
    assert ids == list(range(tokenizer.vocab_size - 9, tokenizer.vocab_size))
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)
    with pytest.raises(KeyError):
        tokenizer.special("<|system_start|>")


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_that_looks_like_a_special_token_is_ordinary_text(tokenizer, name):
    ids = tokenizer.encode(f"a {name}{name} b")
    assert not {tokenizer.special(special) for special in SPECIAL_TOKENS} & set(ids)


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_an_encoding_without_one_of_the_special_tokens_is_refused(name):
    rest = {other: 256 + i for i, other in enumerate(SPECIAL_TOKENS) if other != name}
    with pytest.raises(UserError) as refusal:
        Tokenizer(bytes_encoding(rest))
    assert f"lacks the special tokens {name};" in str(refusal.value)


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode_batch(AWKWARD) == tokenizer.encode_batch(AWKWARD)
    assert [loaded.special(name) for name in SPECIAL_TOKENS] == [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert loaded.token_bytes().tolist() == tokenizer.token_bytes().tolist()
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_the_saved_files_are_plain_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    files = {file.name: file.read_bytes().decode("ascii") for file in tmp_path.iterdir()}
    assert sorted(files) == ["encoding.json", "ranks.tiktoken"]
    assert json.loads(files["encoding.json"])["special_tokens"]["<|bos|>"] == tokenizer.special("<|bos|>")
    assert len(files["ranks.tiktoken"].splitlines()) == tokenizer.vocab_size - 9


def test_a_run_or_checkpoint_folder_stands_for_the_tokenizer_in_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    assert Tokenizer.load(tmp_path).fingerprint() == tokenizer.fingerprint()
    assert Tokenizer.load(str(tmp_path)).vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_folder_without_tokenizer_is_a_users_mistake(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"no tokenizer in .*{folder}"):
        Tokenizer.load(tmp_path / folder)


@pytest.mark.parametrize(
    "file, damage",
    [
        pytest.param("encoding.json", lambda raw: raw[:60], id="half the description"),
        pytest.param("encoding.json", lambda raw: b"", id="an empty description"),
        pytest.param("encoding.json", lambda raw: b"{}", id="a description of nothing"),
        pytest.param("encoding.json", lambda raw: b"[]", id="a description of another kind"),
        pytest.param("encoding.json", lambda raw: raw.replace(b"(?i:", b"(?i", 1), id="a broken pattern"),
        pytest.param("encoding.json", lambda raw: raw.replace(b"<|user_end|>", b"<|bye|>"), id="a special token short"),
        pytest.param("ranks.tiktoken", None, id="no ranks"),
        pytest.param("ranks.tiktoken", lambda raw: b"", id="empty ranks"),
        pytest.param("ranks.tiktoken", lambda raw: b"\x00\xff" * 99, id="ranks of rubbish"),
        pytest.param("ranks.tiktoken", lambda raw: raw[:-5], id="ranks torn within a line"),
        pytest.param("ranks.tiktoken", lambda raw: b"".join(raw.splitlines(True)[:300]), id="ranks torn between lines"),
        pytest.param("ranks.tiktoken", lambda raw: b"".join(raw.splitlines(True)[:100]), id="bytes missing"),
        pytest.param("ranks.tiktoken", lambda raw: raw.replace(b" 300\n", b" 301\n"), id="a rank twice"),
    ],
)
def test_a_damaged_folder_is_a_users_mistake(tokenizer, tmp_path, file, damage):
    tokenizer.save(tmp_path)
    if damage is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    try:
        Tokenizer.load(tmp_path)
    except UserError:
        return
    except BaseException as error:  # tiktoken's panics are no Exception
        pytest.fail(f"{type(error).__name__}: {error}")
    pytest.fail("the damaged tokenizer was loaded")


def test_training_twice_gives_the_same_tokenizer():
    texts = [f"{word} and {word} are {n}" for n in range(60) for word in ("apples", "pears", "Äpfel", "林檎")]
    one, two = Tokenizer.train(texts, 330), Tokenizer.train(iter(texts), 330)
    assert one.fingerprint() == two.fingerprint()
    assert one.encode_batch(texts) == two.encode_batch(texts)
    assert Tokenizer.train(texts, 331).fingerprint() != one.fingerprint()


def test_the_vocabulary_has_the_size_that_was_asked_for_special_tokens_included():
    texts = [" ".join("".join(pair) for pair in product("abcdefgh", repeat=4))]
    assert [Tokenizer.train(texts, size).vocab_size for size in (265, 300, 400)] == [265, 300, 400]


@pytest.mark.parametrize("size", [264, 9, 0])
def test_a_vocabulary_too_small_for_all_bytes_is_a_users_mistake(size):
    with pytest.raises(UserError, match=f"tokenizer.vocab_size={size} .*265"):
        Tokenizer.train(["text"], size)


def test_no_text_at_all_leaves_the_bytes():
    tokenizer = Tokenizer.train([], 400)
    assert tokenizer.vocab_size == 265
    assert tokenizer.decode(tokenizer.encode("Grüße 🙂")) == "Grüße 🙂"
