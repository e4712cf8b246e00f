"""The generated data keeps its promises: the same everywhere, train and val apart, every answer right."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import chattrain
from chattrain.tasks import demo_choice
from chattrain.tasks.generated import DEFAULT_SIZES, NAMES, records
from chattrain.tasks.prose import MIN_CHARACTERS
from chattrain.tasks.small_talk import EVERYDAY, POLITE, SHORT, identity
from chattrain.tasks.words import common_words, draw, split_of

CHATS = [name for name, schema in NAMES.items() if schema == "messages"]
DIGEST = """
import hashlib, json
from chattrain.tasks.generated import NAMES, records
text = json.dumps([records(name, split, size=60) for name in NAMES for split in ("train", "val")])
print(hashlib.sha256(text.encode()).hexdigest())
"""


def texts_of(message: dict) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def questions(name: str, split: str) -> set[str]:
    """What the user asks in the rows of a split; for prose, the documents."""
    found = records(name, split)
    if name == "prose":
        return {row["text"] for row in found}
    if name == "demo_choice":
        return {f"{row['question']} {sorted(row['choices'])}" for row in found}
    return {message["content"].lower() for row in found for message in row["messages"] if message["role"] == "user"}


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_rows_are_the_same_in_every_process(hash_seed):
    here = json.dumps([records(name, split, size=60) for name in NAMES for split in ("train", "val")])
    source = str(Path(chattrain.__file__).parents[1])
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": source}
    there = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_how_many_are_asked_for(name):
    assert records(name, "train", size=7) == records(name, "train", size=50)[:7]


@pytest.mark.parametrize("name", NAMES)
def test_the_splits_share_no_question(name):
    train, val, test = (questions(name, split) for split in ("train", "val", "test"))
    assert train and val and test
    assert not train & val and not train & test and not val & test


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prose"])
@pytest.mark.parametrize("split", DEFAULT_SIZES)
def test_without_a_size_each_split_has_its_usual_number_of_rows(name, split):
    assert len(records(name, split)) == DEFAULT_SIZES[split]


@pytest.mark.parametrize("name", CHATS)
def test_turns_alternate_from_user_to_assistant(name):
    for row in records(name, "train", size=500) + records(name, "val"):
        roles = [message["role"] for message in row["messages"]]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(text for message in row["messages"] for text in texts_of(message))


def test_prose_is_long_enough_and_each_document_is_there_once():
    texts = [row["text"] for split in ("train", "val") for row in records("prose", split)]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= MIN_CHARACTERS
    assert 1_000_000 < sum(map(len, texts)) < 4_000_000


def test_words_are_plain_lower_case_english():
    words = common_words()
    assert len(words) > 1_000
    assert list(words) == sorted(set(words))
    assert all(re.fullmatch("[a-z]{3,10}", word) for word in words)
    assert {"string", "number", "because"} <= set(words)


def test_a_spelled_word_has_the_letters_of_the_word():
    for row in records("spell_word", "train"):
        question, answer = (message["content"] for message in row["messages"])
        word, letters = answer.split(":")
        assert "".join(letters.split(",")) == word
        assert word in re.findall("[a-z]+", question)


def test_the_counted_letters_agree_by_hand_in_python_and_at_the_end():
    for row in records("count_letters", "train"):
        by_hand, call, output, end = row["messages"][1]["content"]
        kinds = [part["type"] for part in (by_hand, call, output, end)]
        assert kinds == ["text", "python", "python_output", "text"]
        word, letter = re.fullmatch(r"'([a-z]+)'\.count\('([a-z])'\)", call["text"]).groups()
        count = sum(each == letter for each in word)
        spelled = by_hand["text"].splitlines()[1]
        assert re.sub(r"[^a-z]", "", spelled) == word
        assert [int(n) for n in re.findall(r"\d+", spelled)] == list(range(1, count + 1))
        assert f"That makes {count}." in by_hand["text"]
        assert output["text"] == str(count)
        assert end["text"].endswith(f"\n#### {count}")
        assert {word, letter} <= set(re.findall("[a-z]+", row["messages"][0]["content"]))


def test_sums_are_right_and_ask_what_they_answer():
    with_tool = 0
    for row in records("arithmetic", "train"):
        question, answer = row["messages"][0]["content"], row["messages"][1]["content"]
        final = answer if isinstance(answer, str) else answer[-1]["text"]
        a, sign, b, value = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", final).groups()
        right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert int(value) == right
        assert sorted(re.findall(r"\d+", question)) == sorted([a, b])
        if not isinstance(answer, str):
            with_tool += 1
            assert [part["type"] for part in answer] == ["text", "python", "python_output", "text"]
            assert (answer[1]["text"], answer[2]["text"]) == (f"{a} {sign} {b}", value)
    assert 0.2 < with_tool / DEFAULT_SIZES["train"] < 0.8


def test_small_talk_has_many_conversations_of_one_to_three_turns():
    talks = [row["messages"] for row in records("small_talk", "train")]
    assert len({json.dumps(talk) for talk in talks}) >= 3_000
    turns = Counter(sum(message["role"] == "user" for message in talk) for talk in talks)
    assert set(turns) == {1, 2, 3} and min(turns.values()) > 200


def test_small_talk_replies_follow_the_system_message():
    for row in records("small_talk", "train"):
        if row["messages"][0]["role"] != "system":
            continue
        system = row["messages"][0]["content"]
        for reply in (message["content"] for message in row["messages"] if message["role"] == "assistant"):
            if system == SHORT:
                assert len(re.findall(r"[.!?]", reply)) == 1
            else:
                assert system == POLITE and reply.endswith("Have a nice day!")


def test_small_talk_recalls_the_name_that_the_user_gave():
    recalled = 0
    for row in records("small_talk", "train"):
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant" and (told := re.match(r"Your name is (\w+)", message["content"])):
                assert re.search(rf"\b{told[1]}\b", row["messages"][i - 3]["content"])
                recalled += 1
    assert recalled > 100


def test_everyday_phrases_belong_to_training():
    assert {split_of(identity(phrase)) for phrase in EVERYDAY} == {"train"}


def right_choices(question: str, choices: list[str]) -> list[str]:
    """Every choice that answers the question, worked out from the two alone."""
    if question == "Which of these is a number?":
        return [choice for choice in choices if choice.isdigit()]
    if kind := re.fullmatch(r"Which of these is (an? [a-z ]+)\?", question):
        return [choice for choice in choices if choice in demo_choice.KINDS[kind[1]]]
    if question == "Which word is the longest?":
        return [choice for choice in choices if len(choice) == max(map(len, choices))]
    if question == "Which number is the largest?":
        return [choice for choice in choices if int(choice) == max(map(int, choices))]
    if asked := re.fullmatch(r"Which (?:choice is the word|word is spelled) ([a-z,]+)\?", question):
        return [choice for choice in choices if choice == asked[1].replace(",", "")]
    if asked := re.fullmatch(r"Which word (starts|ends) with the letter ([a-z])\?", question):
        place = 0 if asked[1] == "starts" else -1
        return [choice for choice in choices if choice[place] == asked[2]]
    return [choice for choice in choices if choice == value_asked_for(question)]


def value_asked_for(question: str) -> str:
    if asked := re.fullmatch(r"What is the (first|last) letter of the word ([a-z]+)\?", question):
        return asked[2][0 if asked[1] == "first" else -1]
    if asked := re.fullmatch(r"What is (\d) \+ (\d)\?", question):
        return str(int(asked[1]) + int(asked[2]))
    if asked := re.fullmatch(r"How many letters has the word ([a-z]+)\?", question):
        return str(len(asked[1]))
    letter, word = re.fullmatch(r"How many ([a-z]) are in the word ([a-z]+)\?", question).groups()
    return str(sum(each == letter for each in word))


@pytest.mark.parametrize("split", DEFAULT_SIZES)
def test_a_question_with_choices_has_exactly_one_right_answer(split):
    for row in records("demo_choice", split):
        assert set(row) == {"question", "choices", "answer", "subject"}
        assert len(set(row["choices"])) == 4
        assert right_choices(row["question"], row["choices"]) == [row["choices"][row["answer"]]], row


def test_the_kinds_of_words_do_not_overlap():
    words = [*demo_choice.WORDS, *(word for kind in demo_choice.KINDS.values() for word in kind)]
    assert len(set(words)) == len(words)


def test_every_skill_is_asked_about_as_often_as_its_share_says():
    asked = Counter(row["subject"] for row in records("demo_choice", "train"))
    assert set(asked) == set(demo_choice.SHARES)
    total = sum(demo_choice.SHARES.values())
    for subject, share in demo_choice.SHARES.items():
        expected = DEFAULT_SIZES["train"] * share / total
        assert abs(asked[subject] - expected) < 5 * expected**0.5 + 0.1 * expected  # small pools part a little unevenly


def test_the_place_of_the_answer_is_uniform_and_tells_nothing():
    for split, found in ((split, records("demo_choice", split)) for split in DEFAULT_SIZES):
        for subject in [None, *demo_choice.SHARES]:
            places = Counter(row["answer"] for row in found if subject in (None, row["subject"]))
            n = sum(places.values())
            for place in range(4):  # five standard deviations of a fair draw
                assert abs(places[place] - n / 4) <= 5 * (n * 3 / 16) ** 0.5, (split, subject, places)


def test_a_words_file_replaces_the_words(tmp_path):
    words = [f"{a}{b}{c}" for a in "bcd" for b in "aeiou" for c in "lmnrst"]
    file = tmp_path / "words.txt"
    file.write_text("\n".join([*words, "Upper", "o'clock", ""]))
    for split in DEFAULT_SIZES:
        spelled = records("spell_word", split, words_file=str(file))
        assert {row["messages"][1]["content"].split(":")[0] for row in spelled} <= set(words)
        counted = records("count_letters", split, size=20, words_file=str(file))
        assert all(row["messages"][1]["content"][1]["text"][1:4] in words for row in counted)


def test_a_words_file_that_cannot_serve_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"words_file=.*cannot be read.*one word a line"):
        records("spell_word", "train", words_file=str(tmp_path / "absent.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("42\n")
    with pytest.raises(ValueError, match=r"words_file=.*no line that is one lower-case word"):
        records("spell_word", "train", words_file=str(empty))
    with pytest.raises(ValueError, match=r"arithmetic takes no words_file.*spell_word"):
        records("arithmetic", "train", words_file=str(empty))


def test_a_pool_too_small_for_a_validation_share_is_refused_instead_of_searched_forever():
    with pytest.raises(ValueError, match=r"no question for the split 'val'.*words_file"):
        draw(lambda: (next(i for i in ("a", "b", "c") if split_of(i) == "train"), 1), "val")


def test_an_unknown_name_is_refused_with_the_near_miss():
    with pytest.raises(ValueError, match=r"'spel_word'; did you mean 'spell_word'.*small_talk"):
        records("spel_word", "train")


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no split 'dev'; known are train, val, test"):
        records("prose", "dev")


def test_a_size_that_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match=r"size=-1"):
        records("small_talk", "train", size=-1)
    with pytest.raises(ValueError, match=r"prose has \d+ documents for val, not 1000000"):
        records("prose", "val", size=1_000_000)
