"""Mixtures whose shares are of tokens: weights by tokens, base text that is replayed, and what an epoch holds by source."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chattrain
from chattrain.config.data import SourceConfig
from chattrain.config.words import WeightBy
from chattrain.data.collators import BestFit, Packed, Padded
from chattrain.data.mixture import Mixture
from chattrain.data.shares import Shares
from chattrain.errors import UserError
from tests.documents import tokenized
from tests.helpers import TINY, metrics, train, write_talk

many = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SEQ_LEN = 32


def source(name: str, count: int, longest: int, seed: int):
    """Documents of 2 to `longest` tokens, all but the first token the assistant's."""
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    kinds = np.ones(offsets[-1], np.uint8)
    kinds[offsets[:-1]] = 0
    return tokenized(name, np.zeros(offsets[-1]), kinds, offsets)


def mixture(shares: Shares, weights=(None, None, None), seed: int = 0, count: int = 200) -> Mixture:
    caches = [source("a", count, 30, 1), source("b", count, 90, 2), source("base", count, 120, 3)]
    sources = [SourceConfig(c.name, weight=w) for c, w in zip(caches, weights, strict=True)]
    return Mixture(caches, sources, seed, shares=shares)


@many
@given(st.floats(0.02, 0.8), st.integers(0, 50))
@pytest.mark.parametrize("make", [Packed, Padded, BestFit])
def test_replay_is_the_share_of_tokens_in_rows_and_leaves_the_other_documents_as_they_are(make, share, seed):
    found = make(mixture(Shares(replay=share, num_replay=1), seed=seed), SEQ_LEN, 0).by_source()
    tokens = {name: counts.tokens for name, counts in found.items()}
    documents = found["base"].documents
    assert abs(tokens["base"] / sum(tokens.values()) - share) < 0.002 + 0.6 / documents
    assert found["a"].documents == found["b"].documents == 200


@many
@given(st.floats(0.1, 10.0), st.integers(0, 50))
@pytest.mark.parametrize("make", [Packed, Padded])
def test_weights_by_tokens_are_shares_of_the_tokens_in_rows(make, weight, seed):
    shares = Shares(WeightBy.tokens)
    found = make(mixture(shares, (1.0, weight, 1.0), seed), SEQ_LEN, 0).by_source()
    tokens, total = [found[name].tokens for name in ("a", "b", "base")], sum(f.tokens for f in found.values())
    for part, share in zip(tokens, (1.0, weight, 1.0), strict=True):
        assert part / total == pytest.approx(share / (2 + weight), abs=0.03)
    assert max(found[n].documents for n in found) == 200  # the one that runs short first is used whole


@pytest.mark.parametrize("make", [Padded, BestFit, Packed])
def test_sources_together_hold_what_the_rows_of_an_epoch_hold(make):
    collator = make(mixture(Shares(replay=0.3, num_replay=1)), SEQ_LEN, 0)
    rows = collator.batch(np.arange(collator.rows_in(1)))
    counted = collator.by_source().values()
    if make is Packed:  # each document's first token is a target too, and the last row goes on into the next epoch
        assert abs(rows.num_tokens - sum(c.tokens for c in counted)) <= SEQ_LEN
    else:
        assert rows.num_tokens == sum(c.tokens for c in counted)
        assert rows.num_supervised == sum(c.supervised_tokens for c in counted)
    assert sum(c.documents for c in counted) == collator.counts.documents


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    lines = [json.dumps({"text": f"It was night number {i} and it rained on the old town. " * 3}) for i in range(60)]
    (workplace / "base.jsonl").write_text("\n".join(lines) + "\n")
    return workplace


def test_a_training_replays_base_text_and_measures_what_is_forgotten(place):
    replay = ["data.replay=0.25", "data.replay_path=base.jsonl", "eval.also=[base]"]
    summary = train("sft", "replays", "init.from=scratch", "train.max_steps=2", *replay)
    sources = summary["data"]["sources"]
    tokens = {name: counts["tokens"] for name, counts in sources.items()}
    assert tokens["base/base.jsonl"] / sum(tokens.values()) == pytest.approx(0.25, abs=0.03)
    assert sources["base/base.jsonl"]["supervised_tokens"] == tokens["base/base.jsonl"]
    last = metrics(summary["run_dir"])[-1]
    assert {f"val/{name}/base" for name in ("loss", "loss_all", "bpb")} <= last.keys()
    alone = chattrain.run(
        [
            "command=evaluate",
            "stage=sft",
            "run.name=replays",
            "data=local",
            "data.val_path=base.jsonl",
            "data.schema=text",
            "eval=bpb",
        ]
    )
    assert alone["metrics"]["val/loss"] == pytest.approx(last["val/loss/base"], rel=0.05)  # all 60 texts, not the 3 held out


@pytest.mark.parametrize(
    "stage, given, words",
    [
        ("sft", ["data.replay=1"], "data.replay=1.0"),
        ("sft", ["data.replay=0.1"], "data.replay_path"),
        ("base", ["data.replay=0.1", "data.replay_path=base.jsonl"], "no effect with stage=base"),
        ("sft", ["eval.also=[base]"], "data.replay_path"),
        ("sft", ["eval.also=[sft]"], "measured anyway"),
        ("sft", ["data.weight_by=tokens"], "data.weights"),
        ("sft", ["data.weights=[1,2]"], "a list of 1 numbers"),
    ],
)
def test_shares_that_cannot_be_are_refused(place, stage, given, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        chattrain.run([f"stage={stage}", *TINY, "init.from=scratch", "train.max_steps=1", *given])
    assert not Path("runs").exists()


def test_weights_of_paths_are_shares_of_tokens(place):
    write_talk(place, "more.jsonl", count=40)
    paths = ["data.train_path=[talk.jsonl,more.jsonl]", "data.weights=[3,1]", "data.weight_by=tokens"]
    summary = train("sft", "weighed", "init.from=scratch", "train.max_steps=1", "eval=none", *paths)
    one, other = (summary["data"]["sources"][name]["tokens"] for name in ("talk.jsonl", "more.jsonl"))
    assert one / other == pytest.approx(3, rel=0.1)
