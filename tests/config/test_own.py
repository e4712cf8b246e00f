"""A part of a user's own: the signature of its target is the schema of its keys."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import chattrain
from chattrain.commands.execute import execute
from chattrain.config.compose import compose
from chattrain.config.instantiate import instantiate_config
from chattrain.config.schema import to_yaml
from chattrain.errors import UserError
from chattrain.tracking.mlflow_store import connect
from tests.helpers import TINY, command_line, write_talk

CODE = """
from __future__ import annotations
import enum
from chattrain.data.collators import Padded
from chattrain.optim.adamw import build as adamw

class Mode(enum.Enum):
    slow = "slow"
    fast = "fast"

def build(model, strategy=None, *, alpha, lr_scale, betas: list[float] = (0.9, 0.95), beta: float = 0.5, steps: int | None = None,
          mode: Mode = Mode.slow, nesterov: bool = False, hook=print):
    assert type(betas) is list
    return adamw(model, strategy, lr=1e-3 * alpha, lr_scale=lr_scale, betas=betas, eps=1e-8, weight_decay=0.0)

def plain(model, strategy, lr: float):
    return adamw(model, strategy, lr=lr, lr_scale=1.0, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.0)

def anything(model, strategy, **kwargs):
    return adamw(model, strategy, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.0, **kwargs)

def bumpy(step, num_steps, period: int = 7):
    return 1.0 if step % period else 0.5

def shaped(step, num_steps, init_lr_frac, power: float = 2.0):
    return init_lr_frac * (1 - step / num_steps) ** power

class Sorted(Padded):
    def __init__(self, mixture, seq_len, pad_id, last_epoch=None, reverse: bool = False):
        super().__init__(mixture, seq_len, pad_id, last_epoch)
        self.reverse = reverse
"""
FILES = {
    "optimizer/own": "_target_: myparts.build\nalpha: 3\n",
    "optimizer/plain": "_target_: myparts.plain\nlr: 1e-3\n",
    "optimizer/anything": "_target_: myparts.anything\nlr: 1e-3\n",
    "optimizer/derived": "defaults: [adamw]\n_target_: myparts.plain\n",
    "optimizer/lost": "_target_: nowhere.build\n",
    "schedule/bumpy": "_target_: myparts.bumpy\n",
    "schedule/shaped": "_target_: myparts.shaped\n",
    "collator/sorted": "_target_: myparts.Sorted\n",
    "experiment/mine": "# @package _global_\ndefaults:\n  - override /optimizer: own\noptimizer: { alpha: 5 }\n",
}


@pytest.fixture
def mine(workplace, monkeypatch) -> list[str]:
    """Arguments that add the user's own folder of choices."""
    (workplace / "myparts.py").write_text(CODE)
    for name, text in FILES.items():
        (workplace / f"my/{name}.yaml").parent.mkdir(parents=True, exist_ok=True)
        (workplace / f"my/{name}.yaml").write_text(text)
    write_talk(workplace)
    monkeypatch.syspath_prepend(workplace)
    sys.modules.pop("myparts", None)
    return [f"hydra.searchpath=[file://{workplace}/my]"]


def test_the_signature_gives_keys_types_and_defaults(mine):
    optimizer = compose([*mine, "optimizer=own", "optimizer.mode=fast"]).optimizer
    values = {name: getattr(value, "name", value) for name, value in vars(optimizer).items()}
    assert values == {
        "_target_": "myparts.build",
        "alpha": 3,
        "lr_scale": 1.0,
        "betas": [0.9, 0.95],
        "beta": 0.5,
        "steps": None,
        "mode": "fast",
        "nesterov": False,
    }


REFUSED = {
    "optimizer.alhpa=4": ["no key optimizer.alhpa", "did you mean optimizer.alpha?"],
    "optimizer.beta=high": ["optimizer.beta", "high", "Float"],
    "optimizer.steps=1.5": ["optimizer.steps", "1.5", "Integer"],
    "optimizer.mode=medium": ["optimizer.mode", "medium", "slow"],
    "optimizer.hook=1": ["no key optimizer.hook"],
    "optimizer.matrix_lr=1": ["optimizer.matrix_lr", "optimizer=muon_adamw"],
    "+optimizer.gamma=1": ["optimizer.gamma"],
    "optimizer=plain optimizer.lr_scale=2": ["optimizer.lr_scale"],
    "optimizer=lost": ["nowhere", "PYTHONPATH"],
    "optimizer=derived": ["myparts.plain takes no", "leave it out"],
    "schedule=bumpy schedule.warmup_steps=3": ["schedule.warmup_steps"],
    "collator=sorted collator.revers=true": ["collator.revers", "did you mean collator.reverse?"],
}


@pytest.mark.parametrize("typed", REFUSED)
def test_a_mistake_in_an_own_part_is_answered_like_one_in_ours(mine, typed):
    with pytest.raises(UserError) as refused:
        compose([*mine, *(["optimizer=own"] if "=own" not in typed and "optimizer=" not in typed else []), *typed.split()])
    assert all(part in str(refused.value) for part in REFUSED[typed]), refused.value


def test_a_required_key_without_a_value_is_asked_for(mine, workplace):
    (workplace / "my/optimizer/own.yaml").write_text("_target_: myparts.build\n")
    with pytest.raises(UserError, match=r"optimizer\.alpha must be given: optimizer\.alpha=<value>"):
        compose([*mine, "optimizer=own"])


def test_an_experiment_of_ones_own_may_choose_it(mine):
    assert compose([*mine, "experiment=mine"]).optimizer.alpha == 5  # type: ignore


def test_keys_are_those_of_the_yaml_file_where_the_target_takes_any(mine):
    cfg = compose([*mine, "optimizer=anything", "optimizer.lr=0.5", "optimizer.lr_scale=2"])
    assert (cfg.optimizer.lr, cfg.optimizer.lr_scale) == (0.5, 2.0)  # type: ignore


def test_the_recorded_configuration_composes_to_the_same_part(mine):
    cfg = compose([*mine, "optimizer=own", "optimizer.alpha=7", "schedule=shaped", "schedule.power=3", "collator=sorted"])
    recorded = yaml.safe_load(to_yaml(cfg))
    assert recorded["optimizer"]["alpha"] == 7 and recorded["schedule"]["power"] == 3
    assert recorded["collator"] == {"_target_": "myparts.Sorted", "reverse": False}


def test_ranks_get_the_same_part(mine):
    cfg = compose([*mine, "optimizer=own", "optimizer.alpha=7"])
    assert to_yaml(pickle.loads(pickle.dumps(cfg))) == to_yaml(cfg)


def test_init_lr_frac_multiplies_a_schedule_that_does_not_take_it(mine):
    for stage, expected in (("mid", 1.0), ("sft", 0.02)):
        schedule = compose([*mine, f"stage={stage}", "schedule=bumpy", "schedule.period=2"]).schedule
        factors = [instantiate_config(schedule)(step, 10) * schedule.outer_factor for step in (0, 1)]
        assert factors == pytest.approx([0.5 * expected, expected])
    taken = compose([*mine, "stage=sft", "schedule=shaped"]).schedule
    assert instantiate_config(taken)(0, 10) * taken.outer_factor == pytest.approx(0.02)


def test_the_peak_rates_in_mlflow_are_the_real_ones_with_a_schedule_of_ones_own(mine):
    typed = ["stage=sft", *TINY, "tracking=mlflow", "schedule=bumpy", "init.from=scratch", "train.max_steps=2"]
    summary = execute(compose([*mine, *typed]))
    params = connect(f"sqlite:///{Path('runs/mlflow.db').resolve()}").get_run(summary["mlflow_run_id"]).data.params
    recorded = {f"peak_lr/{group}": rate for group, rate in summary["learning_rates"].items()}
    assert {name: float(value) for name, value in params.items() if name.startswith("peak_lr/")} == pytest.approx(recorded)


def test_an_own_part_is_swept_recorded_and_resumed(mine, workplace, capsys):
    own = ["--config-dir", "my", "stage=sft", *TINY, "optimizer=own", "collator=sorted", "schedule=bumpy", "init.from=scratch"]
    done = command_line(capsys, "-m", *own, "train.max_steps=2", "optimizer.alpha=1,4", "run.name=own", "checkpoint.every=1")
    assert done.status == 0, done.err
    runs = sorted(Path("runs/sft").glob("own*alpha*"))
    assert [yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["alpha"] for run in runs] == [1, 4]
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert next(row["lr/matrix"] for row in rows if "lr/matrix" in row) == pytest.approx(4e-3 * 0.02 * 0.5)
    again = command_line(capsys, *own, "train.max_steps=3", "optimizer.alpha=4", f"run.dir={runs[1]}")
    assert again.status == 0, again.err
    assert "resuming from" in again.err and json.loads((runs[1] / "summary.json").read_text())["steps"] == 3
    changed = command_line(capsys, *own, "train.max_steps=4", "optimizer.alpha=5", f"run.dir={runs[1]}")
    assert "optimizer.alpha 4 -> 5" in changed.err
    found = chattrain.run([*mine, "command=evaluate", f"init.from={runs[1]}", "eval=bpb"])
    assert found["validation"]["targets"] == "assistant"
    with pytest.raises(UserError, match=r"no key collator\.isolate_documents: the collator of the run \(myparts\.Sorted\)"):
        chattrain.run([*mine, "command=evaluate", f"init.from={runs[1].name}", "collator.isolate_documents=true"])


def test_an_own_part_trains_on_two_ranks(mine, workplace):
    typed = ["stage=sft", *TINY, "optimizer=own", "init.from=scratch", "train.max_steps=1", "run.name=two", "distributed.nproc=2"]
    done = subprocess.run(
        [sys.executable, "-m", "chattrain", "--config-dir", "my", *typed, "train.device_batch_size=2"],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": f"{workplace}:{Path(chattrain.__file__).parents[1]}"},
    )
    assert done.returncode == 0, done.stderr


def test_a_measure_of_ones_own_is_called_at_every_evaluation(mine, workplace):
    (workplace / "mymeasure.py").write_text(
        "def words(tokenizer, ranks, plus: int = 0):\n    return lambda model: {'vocabulary': tokenizer.vocab_size + plus}\n"
    )
    typed = [*mine, "stage=sft", *TINY, "init.from=scratch", "train.max_steps=1"]
    own = "+eval.own.size={_target_: mymeasure.words, plus: 1}"
    assert chattrain.run([*typed, own])["metrics"]["eval/size_vocabulary"] == 321
    for wrong, said in (
        ("+eval.own.size={_target_: mymeasure.words, minus: 1}", "unexpected keyword argument 'minus'"),
        ("+eval.own.size={_target_: mymeasure.word}", "cannot be imported"),
        ("+eval.own.size=3", "must be {_target_"),
        ("+eval.own.spelling={_target_: mymeasure.words}", "give yours another one"),
    ):
        with pytest.raises(UserError, match=said):
            chattrain.run([*typed, wrong, "eval.spelling=true", "eval.max_problems=2", "run.resume=never"])


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"schedule\._target_=nowhere\.schedule cannot be imported: No module named 'nowhere'"):
        compose(["schedule._target_=nowhere.schedule"])
