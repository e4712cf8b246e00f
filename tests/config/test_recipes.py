"""The committed recipes give nanochat's values of December 2025: its numbers stand here, not chattrain's defaults."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from chattrain.config import Config
from chattrain.config.compose import compose
from chattrain.config.instantiate import instantiate_config
from chattrain.model.gpt import GPT
from chattrain.optim.muon_adamw import momentum_at

FILES = ["data.identity_path=identity.jsonl", "data.words_path=words.txt"]
MID, SFT = "experiment=nanochat_mid_d20", "experiment=nanochat_sft_d20"
GPUS = 8
VOCABULARY = 65_536

BOTH = {
    "init.strict": True,
    "model.n_layer": 20,
    "model.n_embd": 1280,
    "model.n_head": 10,
    "tokenizer.vocab_size": VOCABULARY,
    "train.seq_len": 2048,
    "train.num_epochs": 1,
    "train.max_steps": None,
    "train.max_grad_norm": None,
    "train.dtype": "bf16",
    "optimizer._target_": "chattrain.optim.muon_adamw.build",
    "optimizer.lr_scale": 1.0,
    "optimizer.matrix_lr": 0.02,
    "optimizer.embed_lr": 0.2,
    "optimizer.lm_head_lr": 0.004,
    "optimizer.momentum": 0.95,
    "optimizer.ns_steps": 5,
    "optimizer.betas": [0.8, 0.95],
    "optimizer.eps": 1e-10,
    "optimizer.weight_decay": 0.0,
    "schedule.warmup_steps": 0,
    "schedule.min_lr_factor": 0.0,
    "eval.validation": True,
    "eval.split": "test",
    "eval.mmlu_path": "cais/mmlu",
    "eval.arc_path": "allenai/ai2_arc",
    "checkpoint.every": None,
}
MID_VALUES = BOTH | {
    "stage": "mid",
    "init.after": ["base"],
    "collator._target_": "chattrain.data.collators.Packed",
    "train.device_batch_size": 32,
    "train.total_batch_size": 524_288,
    "train.rows_per_step": None,
    "train.compile": True,
    "optimizer.momentum_start": 0.85,
    "optimizer.momentum_warmup_steps": 300,
    "schedule._target_": "chattrain.optim.schedules.constant_then_linear",
    "schedule.init_lr_frac": 1.0,
    "schedule.decay_ratio": 0.2,
    "eval.every": 150,
    "eval.max_tokens": 10_485_760,
    "eval.multiple_choice": False,
    "log.every": 10,
}
SFT_VALUES = BOTH | {
    "stage": "sft",
    "init.after": ["mid", "base"],
    "collator._target_": "chattrain.data.collators.Padded",
    "train.device_batch_size": 4,
    "train.total_batch_size": None,
    "train.rows_per_step": 32,
    "optimizer.momentum_warmup_steps": 0,  # only mid_train warms the momentum up
    "schedule._target_": "chattrain.optim.schedules.linear",
    "schedule.init_lr_frac": 0.02,
    "eval.every": 100,
    "eval.max_tokens": 6_553_600,
    "eval.multiple_choice": True,
    "eval.multiple_choice_every": 200,
    "eval.max_problems": 1024,
    "log.every": 1,
}

# source: (path, subset, split, schema, rows at most, times an epoch)
MID_TRAIN = {
    "smoltalk": ("HuggingFaceTB/smol-smoltalk", None, "train", "messages", None, 1),
    "mmlu": ("cais/mmlu", "auxiliary_train", "train", "multiple_choice", None, 1),
    "gsm8k": ("openai/gsm8k", "main", "train", "gsm8k", None, 1),
    "identity": ("identity.jsonl", None, "train", "messages", None, 2),
    "spelling": ("generate:spell_word", None, "train", "messages", 200_000, 1),
    "spelling_bee": ("generate:count_letters", None, "train", "messages", 80_000, 1),
}
MID_VAL = {
    "smoltalk": ("HuggingFaceTB/smol-smoltalk", None, "test", "messages", None, 1),
    "mmlu": ("cais/mmlu", "all", "test", "multiple_choice", 5_200, 1),
    "gsm8k": ("openai/gsm8k", "main", "test", "gsm8k", 420, 1),
}
SFT_TRAIN = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "train", "multiple_choice", None, 1),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "train", "multiple_choice", None, 1),
    "gsm8k": ("openai/gsm8k", "main", "train", "gsm8k", None, 1),
    "smoltalk": ("HuggingFaceTB/smol-smoltalk", None, "train", "messages", 10_000, 1),
    "identity": ("identity.jsonl", None, "train", "messages", None, 1),
    "spelling": ("generate:spell_word", None, "train", "messages", 300, 1),
    "spelling_bee": ("generate:count_letters", None, "train", "messages", 300, 1),
}
SFT_VAL = {"smoltalk": ("HuggingFaceTB/smol-smoltalk", None, "test", "messages", None, 1)}


def recipe(*overrides: str) -> Config:
    return compose([*overrides, *FILES])


def values(cfg: Config, keys) -> dict:
    """The values of dotted keys, enums by their names."""
    found = {}
    for key in keys:
        value = cfg
        for name in key.split("."):
            value = getattr(value, name)
        found[key] = getattr(value, "name", value)
    return found


def sources(mixture: dict) -> dict:
    return {name: (s.path, s.subset, s.split, s.schema.name, s.limit, s.epochs) for name, s in mixture.items()}


def accumulation(cfg: Config) -> float:
    return cfg.train.rows_a_step(GPUS) / (cfg.train.device_batch_size * GPUS)


def first_rates(cfg: Config) -> dict[str, float]:
    """Learning rates of the first step, as the optimizer holds them for a model of this recipe's shape."""
    with torch.device("meta"):
        model = GPT(VOCABULARY, cfg.model.n_layer, cfg.model.n_embd, cfg.model.n_head)
    optimizer = instantiate_config(cfg.optimizer, model)
    optimizer.set_lr_factor(instantiate_config(cfg.schedule)(0, 1000))
    return optimizer.learning_rates()


def momenta(cfg: Config, steps: tuple[int, ...]) -> list[float]:
    o = cfg.optimizer
    return [momentum_at(step, o.momentum_start, o.momentum, o.momentum_warmup_steps) for step in steps]


# --- every field ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experiment", "expected"), [(MID, MID_VALUES), (SFT, SFT_VALUES)], ids=["mid", "sft"])
def test_a_recipe_has_every_value_of_the_reference(experiment, expected):
    assert values(recipe(experiment), expected) == expected


def test_mid_trains_and_validates_on_the_mixtures_of_the_reference():
    cfg = recipe(MID)
    mixture = cfg.data.mixture(cfg.stage)
    assert sources(mixture.train) == MID_TRAIN
    assert sources(mixture.val) == MID_VAL


def test_sft_trains_and_validates_on_the_mixtures_of_the_reference():
    cfg = recipe(SFT)
    mixture = cfg.data.mixture(cfg.stage)
    assert sources(mixture.train) == SFT_TRAIN
    assert sources(mixture.val) == SFT_VAL


# --- what follows from the fields -------------------------------------------------------------------------------------


def test_no_recipe_accumulates_on_eight_gpus():
    mid, sft = recipe(MID), recipe(SFT)
    assert (mid.train.rows_a_step(GPUS), accumulation(mid)) == (256, 524_288 / (32 * 2048 * 8)) == (256, 1)
    assert (sft.train.rows_a_step(GPUS), accumulation(sft)) == (32, 32 / (4 * 8)) == (32, 1)


def test_validation_measures_as_many_rows_as_the_reference_does_on_eight_gpus():
    mid, sft = recipe(MID), recipe(SFT)
    assert mid.eval.max_tokens // mid.train.seq_len == 20 * 32 * 8  # batches, rows, GPUs
    assert sft.eval.max_tokens // sft.train.seq_len == 100 * 4 * 8


def test_the_built_optimizer_has_the_learning_rates_of_the_reference():
    width = (1280 / 768) ** -0.5
    expected = {"lr/matrix": 0.02, "lr/embed": 0.2 * width, "lr/lm_head": 0.004 * width}
    assert expected == pytest.approx({"lr/matrix": 0.02, "lr/embed": 0.154919, "lr/lm_head": 0.00309839}, rel=1e-5)
    assert first_rates(recipe(MID)) == pytest.approx(expected)
    assert first_rates(recipe(SFT)) == pytest.approx({name: 0.02 * lr for name, lr in expected.items()})


def test_mid_stays_constant_for_four_fifths_and_then_falls_linearly():
    schedule = instantiate_config(recipe(MID).schedule)
    steps = [0, 1, 400, 799, 800, 801, 850, 900, 950, 999]
    factors = [1, 1, 1, 1, 1, 0.995, 0.75, 0.5, 0.25, 0.005]
    assert [schedule(step, 1000) for step in steps] == pytest.approx(factors)
    progress = [step / 1000 for step in steps]
    assert factors == pytest.approx([1 if p < 0.8 else 1 - (p - 0.8) / 0.2 for p in progress])


def test_sft_falls_linearly_from_a_fiftieth():
    schedule = instantiate_config(recipe(SFT).schedule)
    steps = [0, 1, 175, 350, 525, 699]
    assert [schedule(step, 700) for step in steps] == pytest.approx([0.02 * (1 - step / 700) for step in steps])
    assert [schedule(step, 700) for step in (0, 350, 525)] == pytest.approx([0.02, 0.01, 0.005])


def test_momentum_warms_up_in_mid_and_not_in_sft():
    steps = (0, 150, 300, 600)
    assert momenta(recipe(MID), steps) == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert momenta(recipe(SFT), steps) == pytest.approx([0.95, 0.95, 0.95, 0.95])


# --- how they are called ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experiment", "stage"), [(MID, "mid"), (SFT, "sft")])
def test_a_recipe_sets_its_stage_so_naming_it_changes_nothing(experiment, stage):
    assert asdict(recipe(experiment)) == asdict(recipe(experiment, f"stage={stage}"))


def test_the_command_line_wins_over_a_recipe():
    cfg = recipe(SFT, "train.device_batch_size=2", "optimizer.lr_scale=3", "schedule=cosine", "eval=none", "model=d12")
    assert (cfg.train.device_batch_size, cfg.optimizer.lr_scale, cfg.model.n_layer) == (2, 3, 12)
    assert cfg.schedule._target_ == "chattrain.optim.schedules.cosine"
    assert (cfg.eval.validation, cfg.eval.multiple_choice) == (False, False)


def test_the_tuned_recipe_of_the_demo_differs_from_the_reference_in_the_learning_rate_only():
    tuned, reference = compose(["experiment=demo_sft_tuned"]), compose(["experiment=quickstart", "stage=sft"])
    assert (tuned.optimizer.lr_scale, reference.optimizer.lr_scale) == (10.0, 1.0)
    assert tuned == compose(["experiment=quickstart", "stage=sft", "optimizer.lr_scale=10"])
