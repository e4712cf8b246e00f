"""Every option in conf/ composes and can be built; the stages hold what DESIGN.md says; the command line wins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from chattrain.config import Config
from chattrain.config.compose import compose, conf_dir
from chattrain.config.data import SourceConfig
from chattrain.config.instantiate import instantiate_config
from chattrain.config.saved import with_saved
from chattrain.config.schema import to_yaml
from chattrain.data.cache import load_or_tokenize
from chattrain.data.mixture import Mixture
from chattrain.errors import UserError
from chattrain.model.gpt import GPT
from tests.helpers import TINY, train, write_talk


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


GROUPS = sorted(folder.name for folder in conf_dir().iterdir() if folder.is_dir())
NANOCHAT = ["data.identity_path=identity.jsonl", "data.words_path=words.txt"]
NEEDED = {
    "data=local": ["data.train_path=some.jsonl"],
    "data=nanochat": NANOCHAT,
    "experiment=nanochat_mid_d20": NANOCHAT,
    "experiment=nanochat_sft_d20": NANOCHAT,
}
STAGES = ("base", "mid", "sft")


@pytest.mark.parametrize("option", [f"{group}={choice}" for group in GROUPS for choice in choices(group)])
def test_every_option_composes(option):
    cfg = compose([option, *NEEDED.get(option, [])])
    assert isinstance(cfg, Config)
    assert "???" not in to_yaml(cfg) and "${" not in to_yaml(cfg)


def test_the_configuration_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import chattrain.config, sys; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.parametrize(
    "typed, answer",
    [
        ("traain.x=1", "did you mean train?"),
        ("train.seq_len=0", "must be above 0"),
        ("data.ignore=name", "must be a list: data.ignore=[name]"),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_without_torch(typed, answer):
    code = (
        "import sys; from chattrain.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "stage=sft", typed], capture_output=True, text=True)
    assert done.returncode == 0 and answer in done.stderr


def test_the_groups_are_those_of_the_design():
    assert {"stage", "model", "data", "collator", "optimizer", "schedule", "eval", "tracking", "experiment"} <= set(GROUPS)
    assert set(choices("stage")) == set(STAGES)


# --- every option can be built, the way the runner builds it ---------------------------------------------------------


@pytest.mark.parametrize("choice", choices("collator"))
def test_every_collator_yields_batches_of_shifted_rows(choice, workplace, tokenizer, cache):
    file = write_talk(workplace)
    documents = Mixture([load_or_tokenize("talk", SourceConfig(str(file)), tokenizer, cache)], [SourceConfig(str(file))], seed=1)
    collator = instantiate_config(
        compose([f"collator={choice}"]).collator, documents, 64, tokenizer.special("<|assistant_end|>"), last_epoch=None
    )
    assert collator.steps_in(1, rows_per_step=4) >= 1
    batch = collator.batch(torch.arange(4).numpy())
    assert batch.inputs.shape == batch.targets.shape and batch.inputs.shape[0] == 4
    supervised = batch.targets[:, :-1] >= 0
    if batch.positions is not None:
        supervised &= batch.positions[:, 1:] > 0  # a document's last target is no input
    assert supervised.any()
    assert batch.targets[:, :-1][supervised].equal(batch.inputs[:, 1:][supervised])


def small_model():
    return instantiate_config(
        compose(["model.n_layer=2", "model.n_embd=64", "model.n_head=2"]).model, vocab_size=300, start=None, seed=0
    )


@pytest.mark.parametrize("choice", choices("optimizer"))
def test_every_optimizer_holds_all_parameters_and_lr_scale_multiplies_every_rate(choice):
    model = small_model()
    one, three = (
        instantiate_config(compose([f"optimizer={choice}", f"optimizer.lr_scale={scale}"]).optimizer, model) for scale in (1, 3)
    )
    assert {p for group in one.param_groups for p in group["params"]} == set(model.parameters())
    assert {"lr/matrix", "lr/embed", "lr/lm_head"} <= one.learning_rates().keys()
    assert three.learning_rates() == pytest.approx({name: 3 * lr for name, lr in one.learning_rates().items()})


@pytest.mark.parametrize("choice", choices("schedule"))
def test_every_schedule_stays_within_its_init_lr_frac_and_never_wastes_a_step(choice):
    whole, half = (
        instantiate_config(compose([f"schedule={choice}", f"schedule.init_lr_frac={frac}"]).schedule) for frac in (1.0, 0.5)
    )
    for num_steps in (1, 10, 400):
        factors = [whole(step, num_steps) for step in range(num_steps)]
        assert all(0 < factor <= 1 for factor in factors)
        assert [half(step, num_steps) for step in range(num_steps)] == pytest.approx([f / 2 for f in factors])


@pytest.mark.parametrize("choice", [c for c in choices("model") if c != "hf"])
def test_every_model_builds_with_as_many_layers_as_its_name_says(choice):
    cfg = compose([f"model={choice}"]).model
    with torch.device("meta"):  # the largest would not fit otherwise
        model = GPT(65_536, **{name: value for name, value in vars(cfg).items() if not name.startswith("_")})
    assert sum(p.numel() for p in model.parameters()) > 0
    if choice.startswith("d"):
        assert cfg.n_layer == int(choice[1:]) and cfg.n_embd == 64 * cfg.n_layer


@pytest.mark.parametrize("choice", choices("data"))
def test_every_data_set_has_a_mixture_for_every_stage(choice):
    data = compose([f"data={choice}", *NEEDED.get(f"data={choice}", [])]).data
    for mixture in map(data.mixture, STAGES):
        assert mixture.train and mixture.val
        assert all(source.path for source in [*mixture.train.values(), *mixture.val.values()])


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", choices("model"))
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_composes_with_every_model_into_whole_batches(stage, model):
    cfg = compose([f"stage={stage}", f"model={model}"])
    assert cfg.stage == stage
    world_size = 1 if model == "tiny" else 8  # nanochat's node
    assert cfg.train.rows_a_step(world_size) % (cfg.train.device_batch_size * world_size) == 0


def facts(stage: str) -> dict:
    cfg = compose([f"stage={stage}"])
    return {
        "collator": cfg.collator._target_.rpartition(".")[2],
        "optimizer": cfg.optimizer._target_.split(".")[-2],
        "schedule": cfg.schedule._target_.rpartition(".")[2],
        "init_lr_frac": cfg.schedule.init_lr_frac,
        "bpb": cfg.eval.validation,
        "choices": cfg.eval.multiple_choice,
        "after": cfg.init.after,
        "from": cfg.init.source,
        "rows": cfg.train.rows_per_step,
    }


def test_stage_mid_is_the_packed_column_of_the_design():
    assert facts("mid") == {
        "collator": "Packed",
        "optimizer": "muon_adamw",
        "schedule": "constant_then_linear",
        "init_lr_frac": 1.0,
        "bpb": True,
        "choices": False,
        "after": ["base"],
        "from": "auto",
        "rows": None,
    }
    cfg = compose(["stage=mid"])
    assert cfg.schedule.decay_ratio == pytest.approx(0.2)  # constant for 80 % of the run
    assert cfg.schedule.min_lr_factor == 0
    momentum = cfg.optimizer.momentum_start, cfg.optimizer.momentum, cfg.optimizer.momentum_warmup_steps
    assert momentum == (0.85, 0.95, 300)


def test_stage_sft_is_the_masked_column_of_the_design():
    assert facts("sft") == {
        "collator": "Padded",
        "optimizer": "muon_adamw",
        "schedule": "linear",
        "init_lr_frac": 0.02,
        "bpb": True,
        "choices": True,
        "after": ["mid", "base"],
        "from": "auto",
        "rows": 32,
    }


def test_stage_base_is_packed_text_from_random_weights():
    assert facts("base") == facts("mid") | {"after": []}
    assert {s.schema.name for s in compose(["stage=base"]).data.mixture("base").train.values()} == {"text"}


# --- who wins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1], ids=["stage first", "stage last"])
def test_the_command_line_wins_over_the_stage(order):
    cfg = compose(
        ["stage=sft", "collator=packed", "schedule=cosine", "schedule.init_lr_frac=0.5", "eval=none", "train.rows_per_step=64"][
            ::order
        ]
    )
    assert cfg.collator._target_.endswith("Packed") and cfg.schedule._target_.endswith("cosine")
    assert (cfg.schedule.init_lr_frac, cfg.eval.validation, cfg.train.rows_per_step) == (0.5, False, 64)


@pytest.mark.parametrize("experiment", choices("experiment"))
@pytest.mark.parametrize("stage", STAGES)
def test_the_command_line_wins_over_an_experiment(experiment, stage):
    cfg = compose(
        [
            f"experiment={experiment}",
            f"stage={stage}",
            "model=d6",
            "init.strict=false",
            "train.seq_len=512",
            *NEEDED.get(f"experiment={experiment}", []),
        ]
    )
    assert (cfg.stage, cfg.model.n_layer, cfg.init.strict, cfg.train.seq_len) == (stage, 6, False, 512)


def test_the_recipe_for_real_runs_is_strict_about_its_start():
    assert compose(["experiment=quickstart"]).init.strict is True


@pytest.mark.parametrize(
    "given, cleared",
    [
        ("train.max_steps=7", "num_epochs"),
        ("train.num_epochs=2", "max_steps"),
        ("train.rows_per_step=64", "total_batch_size"),
        ("train.total_batch_size=8192", "rows_per_step"),
    ],
)
@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_of_two_keys_that_set_the_same_thing_the_one_typed_counts(given, cleared, stage):
    cfg = compose([f"stage={stage}", given])
    key, value = given.removeprefix("train.").split("=")
    assert getattr(cfg.train, key) == float(value)
    assert getattr(cfg.train, cleared) is None


def test_both_keys_typed_are_refused():
    words = "keep one, and write train.num_epochs=null .*num_epochs: null"
    with pytest.raises(UserError, match=rf"train.max_steps=3 and train.num_epochs=1.* set the same thing; {words}"):
        compose(["train.max_steps=3", "train.num_epochs=1"])


def test_both_keys_in_yaml_are_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "both.yaml").write_text("# @package _global_\ntrain: { max_steps: 5 }\n")
    ours = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=both"]
    with pytest.raises(UserError, match=r"train.max_steps=5 and train.num_epochs=1.* set the same thing"):
        compose(ours)
    assert compose([*ours, "train.num_epochs=2"]).train.max_steps is None


def test_a_batch_that_does_not_divide_names_its_parts_and_the_nearest_that_does():
    train = compose(["train.seq_len=1024", "train.device_batch_size=1", "train.total_batch_size=500000"]).train
    with pytest.raises(UserError) as refused:
        train.rows_a_step(world_size=3)
    assert str(refused.value) == (
        "train.total_batch_size=500000 tokens is not a multiple of 3072 (3 ranks x 1 row x 1024 tokens); try 497664"
    )


@pytest.mark.parametrize("rows, ways_out", [(9, "24, or train.device_batch_size=3"), (8, "24")])
def test_rows_that_do_not_divide_name_a_smaller_batch_only_where_one_divides(rows, ways_out):
    train = compose(["train.device_batch_size=8", "train.total_batch_size=null", f"train.rows_per_step={rows}"]).train
    with pytest.raises(UserError) as refused:
        train.rows_a_step(world_size=3)
    assert str(refused.value) == f"train.rows_per_step={rows} rows is not a multiple of 24 (3 ranks x 8 rows); try {ways_out}"


@pytest.mark.parametrize("key", ["rows_per_step=9", "total_batch_size=9216"])
def test_padded_rows_need_only_divide_over_ranks(key):
    train = compose(["stage=sft", "train.seq_len=1024", "train.device_batch_size=8", f"train.{key}"]).train
    assert train.rows_a_step(world_size=3, padded=True) == 9
    with pytest.raises(UserError, match=r"is not a multiple of \d+ \(2 ranks x 1 row.*\); try (8|8192)$"):
        train.rows_a_step(world_size=2, padded=True)


def test_a_padded_pass_holds_as_many_tokens_as_full_rows_would_unless_told():
    sizes = ["stage=sft", "train.seq_len=512", "train.device_batch_size=4"]
    assert compose(sizes).train.tokens_a_pass == 2048
    assert compose([*sizes, "train.device_batch_tokens=3000"]).train.tokens_a_pass == 3000


@pytest.mark.parametrize(
    "typed, words",
    [
        (["stage=mid"], "no effect on rows that are always full; use train.device_batch_size, or collator=masked"),
        (["stage=sft", "collator=best_fit"], "no effect on rows that are always full"),
        (["stage=sft", "train.seq_len=4096"], "less than one row of train.seq_len=4096; try 4096"),
    ],
)
def test_tokens_of_a_pass_that_have_no_effect_or_hold_no_row_are_refused(typed, words):
    with pytest.raises(UserError, match=f"train.device_batch_tokens=2048 .*{words}"):
        compose([*typed, "train.device_batch_tokens=2048"])


def test_an_evaluation_keeps_the_passes_of_its_run_unless_their_size_is_typed(tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(compose(["stage=sft", "train.device_batch_tokens=9000", "train.device_batch_size=7"])))
    asked = ["command=evaluate", "tracking=none"]
    own = with_saved(compose(asked), saved, asked, []).train
    assert (own.device_batch_tokens, own.device_batch_size) == (9000, 7)
    for typed, tokens in (("train.device_batch_size=2", 2 * own.seq_len), ("train.device_batch_tokens=5000", 5000)):
        assert with_saved(compose([*asked, typed]), saved, [*asked, typed], []).train.tokens_a_pass == tokens


# --- config.yaml -----------------------------------------------------------------------------------------------------


def leaves(tree: dict, prefix: str = "") -> list[str]:
    """Every value of a YAML tree as the override that sets it."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, list) or value:
            found.append(f"{prefix}{key}={json.dumps(value)}")
    return found


@pytest.mark.parametrize("groups", [["stage=mid"], ["stage=sft", "optimizer=adamw", "schedule=wsd"]], ids=["mid", "sft"])
def test_config_yaml_of_a_run_composes_to_the_same_run(groups, workplace):
    write_talk(workplace)
    typed = [*groups, "train.max_steps=1", "run.seed=7", "optimizer.lr_scale=0.3"]
    summary = train("mid", "noted", *typed)
    file = Path(summary["run_dir"]) / "config.yaml"
    noted = OmegaConf.to_container(OmegaConf.load(file))
    assert (noted["run"]["seed"], noted["optimizer"]["lr_scale"], noted["train"]["max_steps"]) == (7, 0.3, 1)
    again = compose([*groups, "data=local", *leaves(noted)])
    assert again == compose([*TINY, "run.name=noted", *typed])
    assert to_yaml(again) == file.read_text()
