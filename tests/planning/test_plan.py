"""command=plan: memory against what torch's allocator sees in a real run, and facts that one can work out. No GPU is needed."""

from __future__ import annotations

import pytest

import chattrain
from benchmarks import memory
from chattrain.config.plan import PlanConfig
from chattrain.config.words import PlanDevice
from chattrain.errors import UserError
from chattrain.planning import cost
from chattrain.planning.hardware import hardware_of
from chattrain.planning.memory import MicroBatchSpec, largest, step_memory
from tests import tiny_hf
from tests.helpers import TINY, command_line, contents, write_talk

H100 = hardware_of(PlanConfig())


def plan(stage: str, *overrides: str) -> dict:
    return chattrain.run(["command=plan", f"stage={stage}", *TINY, "plan.world_size=2", "train.device_batch_size=2", *overrides])


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", memory.KINDS)
def test_the_predicted_peak_is_what_the_allocator_sees(kind):
    overrides = ["train.seq_len=64", "train.total_batch_size=256", f"train.activation_checkpointing={kind}"]
    assert memory.predict("tiny", 1, *overrides) == pytest.approx(memory.measure("tiny", 1, *overrides), rel=0.02)


# Three Newton-Schulz iterations take the memory of five; with short rows and a small vocabulary a d12 takes seconds.
SHORT = ["train.seq_len=128", "optimizer.ns_steps=3", "tokenizer.vocab_size=8192"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["d6", "d12"])
@pytest.mark.parametrize("kind", ["none", "block"])
@pytest.mark.parametrize("ranks, strategy", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(model, kind, ranks, strategy):
    overrides = [
        *SHORT,
        f"train.total_batch_size={512 * ranks}",
        f"train.activation_checkpointing={kind}",
        f"distributed.strategy={strategy}",
    ]
    assert memory.predict(model, ranks, *overrides) == pytest.approx(memory.measure(model, ranks, *overrides), rel=0.1)


def memory_of(ranks: int, *overrides: str):
    cfg = memory.settings("tiny", ranks, "train.seq_len=64", f"train.total_batch_size={256 * ranks}", *overrides)
    return step_memory(cfg, 512, None, MicroBatchSpec(2, 64, partial=False, isolated=False, repeats=True), ranks)


def test_optimizer_state_is_shared_by_ranks_and_weights_only_under_fsdp():
    deep = "model.n_layer=16"  # of which one block is gathered at a time
    one, ddp, fsdp = memory_of(1, deep), memory_of(4, deep), memory_of(4, deep, "distributed.strategy=fsdp")
    assert ddp.at_peak["optimizer"] < 0.4 * one.at_peak["optimizer"]
    assert ddp.at_peak["weights"] == one.at_peak["weights"]
    assert fsdp.at_peak["weights"] < 0.4 * one.at_peak["weights"]


def test_recomputed_blocks_keep_less_for_backward():
    assert memory_of(1, "train.activation_checkpointing=block").components["blocks"] < 0.3 * memory_of(1).components["blocks"]


@pytest.mark.parametrize("limit, most, fits", [(100, 64, 12), (9, 64, 0), (1000, 64, 64), (17, 64, 1)])
def test_the_largest_batch_is_the_last_that_was_seen_to_fit(limit, most, fits):
    assert largest(lambda rows: 10 + 7 * rows, limit, first=4, most=most) == fits
    assert largest(lambda rows: 10 + 7 * rows + max(0, 5 * (rows - 6)), limit, first=4, most=most) <= fits


# --- time and traffic --------------------------------------------------------------------------------------------------


def work(**changes) -> cost.Workload:
    settings = dict(
        weights=1_000_000,
        matrices=((500, 1000),),
        ns_steps=5,
        update_bytes=28,
        flops_a_token=6e6,
        block_share=0.9,
        recomputed=False,
        compute_bytes=2,
        num_tokens=64 * 100 * 512,
        rows=6400,
        rows_a_step=64,
        device_batch_size=8,
        strategy="ddp",
        sharing={n: n for n in cost.SCALES},
    )
    return cost.Workload(**{**settings, **changes})


def test_ddp_sends_gradients_and_weights_once_in_fp32():
    assert sum(cost.traffic(work(), 8, micro_batches=4).values()) == pytest.approx(2 * 7 / 8 * 4 * 1_000_000)


def test_one_device_sends_nothing():
    assert sum(cost.traffic(work(sharing={1: 1}), 1, 1).values()) == 0


def test_fsdp_gathers_weights_twice_a_micro_batch_in_the_compute_format_and_sums_gradients_in_each():
    sent = cost.traffic(work(strategy="fsdp"), 8, micro_batches=3)
    assert sent["weights"] == pytest.approx(6 * 7 / 8 * 2 * 1_000_000)
    assert sent["gradients"] == pytest.approx(3 * 7 / 8 * 4 * 1_000_000)
    assert sent["matrices"] == pytest.approx(2 * 7 / 8 * 2 * 500_000 / 8)


def test_the_traffic_of_ddp_is_what_its_collectives_count(workplace):
    write_talk(workplace)
    facts = plan("base")
    assert facts["bytes_sent_per_step"] == pytest.approx(facts["memory"]["moved"], rel=0.05)  # shares are filled up a little


def test_with_more_devices_communication_grows_until_it_dominates():
    steps = cost.scaling(work(), H100, mfu=0.4)
    assert [step.world_size for step in steps] == [2**n for n in range(11)]
    assert [step.communication_s for step in steps] == sorted(step.communication_s for step in steps)
    first = cost.dominated_from(steps)
    assert all((step.communication_s > step.compute_s) == (step.world_size >= first) for step in steps)
    assert all(0 <= step.exposed_s <= step.communication_s for step in steps)
    assert all(
        step.rows == max(64, step.world_size) == step.device_batch_size * step.grad_accum_steps * step.world_size
        for step in steps
    )


def test_the_utilization_is_the_given_one_else_the_devices_measured_one_else_assumed(workplace, capsys):
    write_talk(workplace)
    h100, a100, given = (plan("base", *keys) for keys in ([], ["plan.device=a100"], ["plan.mfu=0.2"]))
    assert h100["mfu"] == H100.mfu != a100["mfu"] and "measured" in h100["mfu_is"] and a100["mfu_is"] == "assumed"
    assert given["mfu"] == 0.2 and given["seconds_per_step"] > h100["seconds_per_step"]
    assert "within about 10 %" in capsys.readouterr().out


def test_half_the_price_is_half_the_cost_and_time_follows_the_peak(workplace):
    write_talk(workplace)
    dear, cheap = (plan("mid", f"plan.price_per_gpu_hour={price}") for price in (4, 2))
    assert dear["cost"] == pytest.approx(2 * cheap["cost"]) and dear["cost"] == pytest.approx(4 * 2 * dear["hours"])
    slow, fast = (cost.step_on(work(), hardware_of(PlanConfig(peak_tflops=peak)), 0.4, 1).compute_s for peak in (100, 200))
    assert slow == pytest.approx(2 * fast)


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plan_says_all_and_leaves_nothing_behind(workplace, stage, dtype):
    write_talk(workplace)
    before = contents(workplace)
    facts = plan(stage, f"train.dtype={dtype}", "train.max_steps=3")
    assert contents(workplace) == before
    assert facts["num_steps"] == 3 and facts["supervised_exact"] and 0 < facts["supervised_tokens"] <= facts["tokens"]
    assert facts["parameters_total"] == 2 * 12 * 64 * 64 + 2 * 320 * 64 == sum(facts["parameters"].values())
    assert facts["memory"]["peak"] == max(facts["memory"]["phases"].values()) and facts["fits"]
    assert facts["largest_device_batch_size"] == 2 and facts["grad_accum_steps"] == 1 and facts["cost"] is None


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_a_hugging_face_model_is_planned_from_its_config_and_tokenizer_alone(workplace, state):
    pytest.importorskip("transformers")
    write_talk(workplace)
    folder = tiny_hf.write_model(workplace / "llama", "llama")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    settings = [o for o in TINY if not o.startswith(("model.", "tokenizer."))]
    facts = chattrain.run(
        [
            "command=plan",
            "stage=mid",
            *settings,
            "model=hf",
            f"init.from={folder}",
            f"optimizer.state_dtype={state}",
            "plan.world_size=4",
            "distributed.strategy=fsdp",
            "train.device_batch_size=1",
        ]
    )
    moments = 2 * (4 if state == "fp32" else 2) * facts["parameters_total"] / 4
    assert facts["fits"] and facts["memory"]["at_peak"]["optimizer"] == pytest.approx(moments, rel=0.1)


def test_supervised_tokens_of_a_plan_are_those_that_the_run_trains_on(workplace):
    write_talk(workplace)
    facts = plan("sft", "train.max_steps=4", "plan.world_size=1", "init.from=scratch")
    trained = chattrain.run(["stage=sft", *TINY, "train.max_steps=4", "train.device_batch_size=2", "init.from=scratch"])
    assert (facts["tokens"], facts["supervised_tokens"]) == (trained["tokens_seen"], trained["supervised_tokens"])


def test_a_plan_of_padded_rows_follows_the_tokens_of_a_pass(workplace):
    write_talk(workplace)
    step = ["train.rows_per_step=32", "train.max_steps=4", "plan.world_size=1"]
    small, large = (plan("sft", *step, f"train.device_batch_tokens={tokens}") for tokens in (64, 1024))
    assert small["memory"]["phases"]["forward"] < large["memory"]["phases"]["forward"]
    assert small["tokens"] == large["tokens"] and small["largest_device_batch_tokens"] == 32 * 64
    passes = [facts["scaling"][0]["grad_accum_steps"] for facts in (small, large)]
    assert passes[0] > passes[1] and passes[0] > small["grad_accum_steps"] == large["grad_accum_steps"]


def test_a_device_that_is_too_small_is_said_to_be(workplace):
    write_talk(workplace)
    facts = plan("mid", "plan.device=custom", "plan.memory_gib=1.054", "plan.bandwidth_gb_s=500", "plan.peak_tflops=50")
    assert not facts["fits"] and facts["largest_device_batch_size"] < 2


def test_a_device_whose_name_is_a_number_can_be_typed(workplace, capsys):
    write_talk(workplace)
    done = command_line(capsys, "command=plan", "stage=mid", *TINY, "plan.device=4090", "plan.world_size=1")
    assert done.status == 0 and "1 x 4090" in done.out and "peak" in done.out


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["plan.device=custom"], "plan.memory_gib"),
        (["plan.mfu=2"], "plan.mfu=2"),
        (["plan.world_size=0"], "plan.world_size=0"),
        (["plan.world_size=3"], "train.rows_per_step=4"),
        (["train.fp8=true", "train.dtype=bf16"], "train.fp8=true"),
    ],
)
def test_what_cannot_be_planned_is_refused(workplace, overrides, words):
    write_talk(workplace)
    with pytest.raises(UserError, match=words):
        plan("mid", *overrides)


@pytest.mark.parametrize("device", [d for d in PlanDevice if d.name != "custom"])
def test_every_device_is_known_whole(device):
    found = hardware_of(PlanConfig(device=device))
    assert found.name == device.name and 20 * 2**30 < found.usable < found.memory and found.fp32 < found.bf16
    assert found.between(8) == found.link > found.between(9)


def test_a_plan_says_which_data_it_counts(workplace, capsys):
    write_talk(workplace)
    facts = plan("mid")
    assert "talk.jsonl" in facts["data"] and "demo" not in facts["data"]
    assert facts["data"] in " ".join(capsys.readouterr().out.split())
    assert "generated, for a demo" in plan("sft", "data.train_path=generate:small_talk", "eval=none")["data"]


def test_a_plan_opens_no_questions_and_no_prompts(workplace):
    """Which it would not ask: it needs neither their files nor a sandbox."""
    write_talk(workplace)
    asked = ["eval=[gsm8k,humaneval]", "eval.gsm8k_path=nowhere", "eval.humaneval_path=nowhere", "eval.prompts=nowhere.txt"]
    assert plan("sft", *asked)["num_steps"]
