"""A user's mistake ends with one message (what, which value, the way out), exit status 2, no traceback, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import chattrain
from chattrain.tokenizer import Tokenizer
from tests.helpers import TINY, command_line, contents, damage, process, standing_in, train, write_talk


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """A folder with a base run, a damaged copy of it, data good and bad, and a tokenizer of other words."""
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        write_talk(folder)
        (folder / "empty.jsonl").write_text("\n")
        (folder / "broken.jsonl").write_text('{"messages": [{"role": "user",\n')
        (folder / "notes.pdf").write_text("not data")
        train("base", "start", "train.max_steps=1")
        shutil.copytree("runs/base/start", "damaged")
        damage(folder / "damaged/checkpoints/step_000001/model.safetensors")
        (folder / "hollow").mkdir()
        Tokenizer.train(["quite other words " * 50], 300).save(folder / "other_tokenizer")
        yield folder


# What is typed after TINY and stage=mid -> what the message must name: the key or thing, the value, the way out.
MISTAKES = {
    "a misspelt key": (["train.max_step=3"], ["train.max_step", "train.max_steps"]),
    "a misspelt key of a group": (["optimizer.lr_scal=1"], ["optimizer.lr_scal", "optimizer.lr_scale"]),
    "a key that nothing reads": (["+train.speed=3"], ["train.speed"]),
    "a misspelt group": (["optimiser=adamw"], ["optimiser", "optimizer"]),
    "a misspelt choice": (["optimizer=adamv"], ["optimizer=adamv", "adamw", "muon_adamw"]),
    "a misspelt stage": (["stage=stf"], ["stage=stf", "base, mid, sft"]),
    "a key of another optimizer": (["optimizer.lr=0.1"], ["optimizer.lr", "optimizer=adamw"]),
    "a key of another schedule": (
        ["schedule=linear", "schedule.decay_ratio=0.1"],
        ["schedule.decay_ratio", "constant_then_linear"],
    ),
    "a key of other data": (["data=demo", "data.train_path=x.jsonl"], ["data.train_path", "data=local"]),
    "a wrong type": (["train.seq_len=long"], ["train.seq_len", "long", "Integer"]),
    "a fraction of a step": (["train.max_steps=2.5"], ["train.max_steps", "2.5", "Integer"]),
    "a wrong value of few": (["run.resume=perhaps"], ["run.resume", "perhaps", "auto, never, must"]),
    "a number for a word": (["train.dtype=1"], ["train.dtype", "'1'", "auto, bf16, fp32"]),
    "no time to wait": (["distributed.timeout_s=0"], ["distributed.timeout_s=0", "1 second"]),
    "a command that is none": (["command=trian"], ["command", "trian", "train"]),
    "no value": (["train.max_steps"], ["'train.max_steps'", "train.max_steps=<value>"]),
    "a list without -m": (["stage=mid,sft"], ["stage=mid,sft", "--multirun"]),
    "a misspelt flag": (["--multirum"], ["--multirum", "--multirun", "--help"]),
    "a setting with dashes": (["--stage", "sft"], ["--stage", "without dashes", "stage=<value>"]),
    "a flag that is none": (["-x"], ["-x", "--help"]),
    "two flags of one kind": (["-m", "--cfg", "job"], ["-m and --cfg", "leave"]),
    "two keys for one thing": (["train.num_epochs=1", "train.max_steps=3"], ["train.num_epochs", "train.max_steps=3"]),
    "a batch in rows that does not divide": (["train.rows_per_step=6"], ["train.rows_per_step=6", "try 4"]),
    "a batch in tokens that does not divide": (
        ["train.rows_per_step=null", "train.total_batch_size=300"],
        ["train.total_batch_size=300", "256", "4 rows x 64", "try 256"],
    ),
    "heads that do not divide": (["model.n_embd=65"], ["model.n_embd=65", "2 heads", "multiple"]),
    "questions between evaluations": (
        ["eval.every=4", "eval.multiple_choice_every=6"],
        ["eval.multiple_choice_every=6", "eval.every=4"],
    ),
    "an impossible decay": (["schedule.decay_ratio=2"], ["schedule.decay_ratio=2", "at most 1"]),
    "no learning rate": (["optimizer.lr_scale=0"], ["optimizer.lr_scale=0", "above 0"]),
    "no data": (["data.train_path=null"], ["data.train_path="]),
    "a missing file": (["data.train_path=missing.jsonl"], ["missing.jsonl", "looked up from"]),
    "a file of no known kind": (["data.train_path=notes.pdf"], ["notes.pdf", ".jsonl"]),
    "an empty data set": (["data.train_path=empty.jsonl"], ["empty.jsonl", "empty"]),
    "a broken line": (["data.train_path=broken.jsonl"], ["broken.jsonl", "line 1", "JSON"]),
    "the wrong schema": (["data.schema=text"], ["talk.jsonl line 1", "'text'", "data.schema=messages"]),
    "a schema that is none": (["data.schema=chat"], ["data.schema=chat", "auto, messages, sharegpt"]),
    "rows shorter than any answer": (["stage=sft", "train.seq_len=8"], ["train.seq_len=8", "Raise"]),
    "a stage that the data lacks": (["data=demo", "~data.stages.mid"], ["stage=mid", "data.stages.mid"]),
    "a start that is nowhere": (["init.from=nowhere"], ["init.from=nowhere", "looked up from"]),
    "a start without a checkpoint": (["init.from=hollow"], ["init.from=hollow", "checkpoint"]),
    "a start of another shape": (
        ["init.from=runs/base/start", "model.n_layer=3"],
        ["init.from=runs/base/start", "n_layer=2", "3", "model=..."],
    ),
    "a start with other words": (
        ["init.from=runs/base/start", "tokenizer.path=other_tokenizer"],
        ["tokenizer.path=other_tokenizer", "runs/base/start", "leave tokenizer.path out"],
    ),
    "a damaged checkpoint": (
        ["init.from=damaged/checkpoints/step_000001"],
        ["damaged/checkpoints/step_000001", "model.safetensors", "another"],
    ),
    "a run whose checkpoints are damaged": (["init.from=damaged"], ["damaged", "valid"]),
    "a strict start and no base run": (
        ["init.strict=true", "run.root=elsewhere"],
        ["init.strict=true", "elsewhere", "stage=base", "init.from="],
    ),
    "a tokenizer that is none": (["init.from=scratch", "tokenizer.path=hollow"], ["hollow", "encoding.json"]),
    "a tokenizer too small": (["init.from=scratch", "tokenizer.vocab_size=100"], ["tokenizer.vocab_size=100", "265"]),
    "nothing to resume": (["run.resume=must", "run.name=new"], ["run.resume=must", "new", "run.resume=auto"]),
    "no processes": (["distributed.nproc=none"], ["distributed.nproc=none", "auto"]),
    "a folder for several runs": (["-m", "run.dir=one", "train.max_steps=1,2"], ["run.dir", "run.name"]),
    "parallel stages": (["-m", "stage=mid,sft", "hydra/launcher=joblib"], ["hydra/launcher=joblib", "leave"]),
}


def test_the_version_is_ours(capsys):
    done = command_line(capsys, "--version")
    assert done.status == 0 and re.fullmatch(rf"chattrain {chattrain.__version__} \(torch .+, hydra-core .+\)\n", done.out)


def test_flags_may_stand_between_overrides(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n  max_steps: 77\n")
    done = command_line(capsys, "stage=sft", "--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job", "run.name=a")
    assert done.status == 0 and "max_steps: 77" in done.out and "name: a\n" in done.out
    done = process("stage=sft", "--info", "run.name=a")  # it has Hydra log for good
    assert done.status == 0 and "Config search path" in done.out + done.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_one_message_before_anything_is_written(mistake, place, capsys):
    typed, named = MISTAKES[mistake]
    given = {o.split("=")[0] for o in typed}
    before = contents(place)
    settings = [o for o in TINY if o.split("=")[0] not in given and not ("data=demo" in typed and o.startswith("data."))]
    refused = command_line(capsys, *settings, *([] if "stage" in given else ["stage=mid"]), *typed)
    assert refused.status == 2
    assert all(part in refused.message for part in named), refused.message
    assert contents(place) == before


def test_the_near_miss_of_a_key_is_never_the_key_itself(place, capsys):
    refused = command_line(capsys, "optimizer=adamw", "optimizer.matrix_lr=0.1")
    assert "did you mean optimizer.matrix_lr" not in refused.message
    assert "optimizer=muon_adamw" in refused.message


def test_data_that_needs_paths_names_the_keys_to_type(place, capsys):
    for key in ("data.identity_path", "data.words_path"):
        other = {"data.identity_path": "data.words_path=w", "data.words_path": "data.identity_path=i"}[key]
        assert f"{key}=" in command_line(capsys, "data=nanochat", other).message


# Values that are of the right type and can do no work: each is refused like any other mistake.
SENSELESS = [
    "train.max_steps=0",
    "train.seq_len=0",
    "train.device_batch_size=-4",
    "train.max_grad_norm=-1",
    "train.num_epochs=nan",
    "run.seed=-1",
    "run.name=a/b",
    "run.dir=talk.jsonl",
    "eval.every=0",
    "eval.max_tokens=-5",
    "eval.max_problems=-1",
    "eval.batch_size=0",
    "checkpoint.keep=0",
    "checkpoint.every=0",
    "log.every=0",
    "optimizer.lr_scale=-1",
    "optimizer.matrix_lr=-1",
    "optimizer.betas=[0.9]",
    "optimizer.betas=[0.9,1.5]",
    "data.workers=-1",
    "data.train_path=5",
    "data.schema=5",
    "data.train_path=[]",
    "schedule.warmup_steps=-1",
    "schedule.init_lr_frac=0",
    "model.n_head=0",
]


@pytest.mark.parametrize("value", SENSELESS)
def test_a_value_that_can_do_no_work_is_refused_by_its_key(value, place, capsys):
    before = contents(place)
    refused = command_line(
        capsys, *TINY, "stage=mid", "train.max_steps=1", *(["train.max_steps=null"] if "epochs" in value else []), value
    )
    assert refused.status == 2
    key = value.partition("=")[0]
    assert key.rpartition(".")[2] in refused.message
    assert contents(place) == before


def test_a_device_that_is_not_here_is_refused_before_the_run_folder_exists(place, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = contents(place)
    refused = command_line(capsys, *TINY, "stage=mid", "train.max_steps=1", "train.device=cuda")
    assert refused.status == 2 and "train.device=cuda" in refused.message and "auto" in refused.message
    assert contents(place) == before


def test_a_home_folder_is_understood_where_the_shell_leaves_it_alone(place, capsys, monkeypatch):
    """Shells do not expand `key.with.dots=~/x`."""
    monkeypatch.setenv("HOME", str(place))
    done = command_line(capsys, *TINY, "stage=base", "data.train_path=~/talk.jsonl", "command=inspect")
    assert done.status == 0, done.err


def test_a_field_that_would_be_lost_is_refused_with_its_row_and_what_is_ignored_is_counted(place, capsys):
    talk = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "WRONG", "weight": 0}]
    talk += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "RIGHT"}]
    (place / "named.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(20)))
    asked = [*TINY, "stage=sft", "data.train_path=named.jsonl", "data.schema=messages", "inspect.rows=1", "command=inspect"]
    refused = command_line(capsys, *asked)
    assert refused.status == 2 and "line 1: message 0 (user)" in refused.err and "data.ignore=[name]" in refused.err
    done = command_line(capsys, *asked, "data.ignore=[name,nmae]")
    assert done.status == 0, done.err
    assert "`name` left out 19 times" in done.out and "data.ignore=[nmae] has no effect" in done.err
    shown = "".join(re.findall(r"\[(.*?)\]", next(line for line in done.out.splitlines() if "<|bos|>" in line)))
    assert shown == "RIGHT<|assistant_end|>"
    assert "data.ignore=['content']" in command_line(capsys, *asked, "data.ignore=[content]").err


# --- as the shell sees it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed, named",
    [
        (["train.max_step=3"], "train.max_steps"),
        (["optimizer=adamv"], "adamw"),
        (["data=local"], "data.train_path="),
        ([*TINY, "stage=mid", "init.strict=true", "run.root=elsewhere"], "stage=base"),
    ],
    ids=["key", "choice", "no data", "no base run"],
)
def test_the_process_ends_with_status_2_and_one_message_on_stderr(place, typed, named):
    before = contents(place)
    refused = process(*typed)
    assert refused.status == 2 and named in refused.message
    assert refused.out == ""
    assert contents(place) == before


def test_a_run_that_goes_wrong_ends_with_status_1_and_a_summary_that_says_so(place):
    failed = process(*TINY, "stage=mid", "run.name=burst", "train.max_steps=5", "optimizer.lr_scale=1e35")
    assert failed.status == 1
    assert "non-finite" in failed.message and "optimizer.lr_scale" in failed.message
    summary = json.loads((place / "runs/mid/burst/summary.json").read_text())
    assert summary["status"] == "failed" and "non-finite" in summary["error"]
    assert summary["checkpoint"] is None and summary["steps"] < 5
    assert (place / "runs/mid/burst/report.html").is_file()


def test_the_way_out_that_messages_name_works(place, capsys):
    shown = command_line(capsys, "--cfg", "job")
    assert shown.status == 0
    assert "lr_scale: 1.0" in shown.out and "max_steps: null" in shown.out
    assert list(Path.cwd().glob("outputs")) == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["inspect"], "command=inspect"),
        (["stage=sft", "data=local"], "data=local needs data.train_path="),
        (["command=lineage", "init.from=sft/nope"], "no run sft/nope"),
    ],
)
def test_what_a_newcomer_mistypes_is_answered_with_what_is_meant(workplace, capsys, typed, said):
    end = command_line(capsys, *typed)
    assert end.status == 2 and said in end.message


def test_a_choice_that_a_yaml_file_gives_as_a_key_is_answered_with_its_defaults_list(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndata: local\n")
    done = command_line(capsys, "stage=sft", "--config-dir", str(tmp_path), "experiment=mine")
    assert done.status == 2 and "experiment/mine.yaml" in done.message and "defaults: [override /data: local]" in done.message
