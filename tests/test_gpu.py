"""What only a GPU shows: the same training as on a CPU, resumed to the bit, on ranks, in bf16, in fp8, compiled.

`GPU_TESTS_DEVICE=cpu python -m pytest -m gpu tests/test_gpu.py` rehearses them where there is no GPU. They need nothing but
pytest, so that `make gpu-check` can run them on a bare machine.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import chattrain
from chattrain import runner
from chattrain.config.compose import compose
from chattrain.data.packing import cu_seqlens_of, positions_of
from chattrain.device import can_compile
from chattrain.errors import RunFailed
from chattrain.model.attention import attention, document_mask, varlen_attention
from chattrain.model.generate import generate_batch
from chattrain.model.gpt import GPT
from chattrain.parallel import launch
from chattrain.parallel.ranks import join
from chattrain.setup.data import open_data
from chattrain.setup.plan import setup_run
from tests.helpers import TINY, metrics, write_talk

DEVICE = torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a GPU, or takes too long on a CPU")

STEPS = 5
SETTINGS = [o for o in TINY if not o.startswith("train.device=")] + [f"train.max_steps={STEPS}", "init.from=scratch"]
SFT = ["stage=sft", "schedule.init_lr_frac=1.0"]


@pytest.fixture
def place(workplace):
    write_talk(workplace)
    return workplace


def run(name: str, *overrides: str, device: torch.device = DEVICE) -> dict:
    return chattrain.run([*SETTINGS, f"train.device={device.type}", f"run.name={name}", *overrides])


def losses(summary: dict, metric: str = "train/loss") -> list[float]:
    return [row[metric] for row in metrics(summary["run_dir"]) if metric in row]


def same_bits(one: dict, two: dict) -> bool:
    pairs = [[load_file(Path(s["checkpoint"]) / f"{file}.safetensors") for s in (one, two)] for file in ("model", "optimizer")]
    return all(a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) for a, b in pairs)


# --- the same numbers as on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("collator", ["packed", "masked", "best_fit"])
def test_in_fp32_a_run_has_the_losses_of_a_cpu(place, collator):
    ours, cpu = (
        run(f"{collator}-{i}", *SFT, f"collator={collator}", device=device)
        for i, device in enumerate([DEVICE, torch.device("cpu")])
    )
    assert losses(ours) == pytest.approx(losses(cpu), rel=5e-4)
    assert losses(ours, "val/bpb") == pytest.approx(losses(cpu, "val/bpb"), rel=5e-4)


@pytest.mark.parametrize("collator", ["packed", "masked", "best_fit"])
def test_in_bf16_losses_are_those_of_fp32_to_its_rounding(place, collator):
    """best_fit trains through variable-length FlashAttention here, whose isolation the run checks itself."""
    bf16, fp32 = (run(dtype, *SFT, f"collator={collator}", f"train.dtype={dtype}") for dtype in ("bf16", "fp32"))
    assert losses(bf16) == pytest.approx(losses(fp32), rel=2e-2)
    assert losses(bf16)[-1] < losses(bf16)[0]


@needs_cuda
@pytest.mark.skipif(not can_compile(DEVICE), reason="no compiler for torch.compile")
@pytest.mark.parametrize("collator", ["packed", "best_fit"])
def test_compiled_in_bf16_losses_are_those_of_the_uncompiled_model(place, collator):
    compiled, plain = (
        run(f"compile-{on}", *SFT, f"collator={collator}", "train.dtype=bf16", f"train.compile={on}") for on in ("true", "false")
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-2)


@needs_cuda
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_variable_length_attention_stays_within_documents(kv_heads):
    sizes = [[100, 3, 153], [256], [20] * 12]
    positions = torch.from_numpy(np.stack([positions_of(row, 256) for row in sizes]))
    begins = torch.from_numpy(cu_seqlens_of(positions.numpy())).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    *qkv, grad = (
        torch.randn(3, 256, heads, 64, generator=generator).to(DEVICE, torch.bfloat16) for heads in (4, kv_heads, kv_heads, 4)
    )
    mask = document_mask(positions.to(DEVICE))
    found = []
    for attend in (lambda q, k, v: varlen_attention(q, k, v, begins), lambda q, k, v: attention(q, k, v, mask)):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = attend(*leaves)
        out.backward(grad)
        found.append([out.detach(), *(x.grad for x in leaves)])
    for ours, masked in zip(*found, strict=True):
        assert (ours - masked).float().norm() <= 2e-2 * (1 + masked.float().norm())


def test_replies_to_several_prompts_are_those_of_a_cpu():
    model = GPT(vocab_size=97, n_layer=2, n_embd=64, n_head=2)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in (p for p in model.parameters() if not p.any()):
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    prompts = [[1, 2, 3], list(range(20)), [9] * 7]
    model.eval()
    cpu = generate_batch(model, prompts, 24, stop_ids={96})
    assert generate_batch(model.to(DEVICE), prompts, 24, stop_ids={96}) == cpu


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_a_model_of_transformers_has_the_losses_of_a_cpu(place):
    from tests.tiny_hf import write_model

    write_model(place / "llama")
    kept = [o for o in SETTINGS if not o.startswith(("model.", "tokenizer.", "init.from", "train.seq_len"))]
    ours, cpu = (
        chattrain.run(
            [
                *SFT,
                *kept,
                "model=hf",
                "init.from=llama",
                "train.seq_len=128",
                f"train.device={device.type}",
                f"run.name=hf-{number}",
            ]
        )
        for number, device in enumerate([DEVICE, torch.device("cpu")])
    )
    assert losses(ours) == pytest.approx(losses(cpu), rel=5e-4)


# --- fp8 ---------------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
def test_in_fp8_losses_are_near_those_of_bf16(place):
    if torch.cuda.get_device_capability(DEVICE) < (8, 9):
        pytest.skip("this GPU has no fp8")
    fp8, bf16 = (run(f"fp8-{on}", "stage=mid", "train.dtype=bf16", f"train.fp8={on}") for on in ("true", "false"))
    assert losses(fp8) == pytest.approx(losses(bf16), rel=5e-2)
    assert losses(fp8)[-1] < losses(fp8)[0]


# --- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [["train.dtype=fp32"], ["train.dtype=bf16"]], ids=["fp32", "bf16"])
def test_a_run_that_stopped_goes_on_to_the_same_bits(place, settings):
    whole = run("whole", *SFT, *settings)
    stopped = run("cut", *SFT, *settings, "train.stop_after=0.5")
    assert 0 < stopped["steps"] < STEPS
    resumed = run("cut", *SFT, *settings)
    assert resumed["steps"] == STEPS and losses(resumed) == losses(whole)
    assert same_bits(resumed, whole)


# --- two ranks on one GPU, over gloo: NCCL refuses two ranks on a device ------------------------------------------------


def test_two_ranks_on_one_gpu_train_the_run_of_one_rank(place):
    """Over gloo with either strategy. Skipped where this torch's gloo cannot move CUDA tensors."""
    settings = [*SFT, *SETTINGS, f"train.device={DEVICE.type}", "train.device_batch_size=2", "train.dtype=fp32"]
    planned = []
    for strategy in ("ddp", "fsdp"):
        cfg = compose([*settings, f"distributed.strategy={strategy}", f"run.name=two-{strategy}"])
        planned.append((cfg, setup_run(cfg, world_size=1)[0]))  # of one rank: two would need two GPUs
    alone = chattrain.run([*settings, "run.name=alone"])
    try:
        ran = launch.start(2, None, as_rank, planned)
    except RunFailed as error:
        if "gloo cannot" not in str(error):
            raise
        pytest.skip(str(error))
    for together in ran:
        assert losses(together) == pytest.approx(losses(alone), rel=5e-5)
        assert losses(together, "val/bpb") == pytest.approx(losses(alone, "val/bpb"), rel=5e-5)
        assert losses(together, "train/grad_norm") == pytest.approx(losses(alone, "train/grad_norm"), rel=1e-3)


def as_rank(planned: list) -> list[dict]:
    """The runs, in a process of a launch. Both ranks use the first GPU."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"
    ranks = join(120, cuda=False)
    try:
        if ON_CUDA:
            check_gloo()
        return [runner.train_on_rank(cfg, plan, ranks, open_data(cfg, plan.tokenizer_dir, 2)) for cfg, plan in planned]
    except BaseException as raised:
        raise ranks.report_failure(raised) from None
    finally:
        ranks.close()


def check_gloo() -> None:
    """Raises RunFailed where the collectives of a run do not work on CUDA tensors."""
    import torch.distributed as dist

    from chattrain import torch_compat

    torch.cuda.set_device(0)
    one, two = torch.ones(4, device=DEVICE), torch.zeros(8, device=DEVICE)
    try:
        dist.all_reduce(one)
        torch_compat.all_gather_single(two, one)
        torch_compat.reduce_scatter_single(one, two)
        dist.all_to_all_single(two, two.clone(), [4, 4], [4, 4])
    except Exception as error:  # what a backend raises for an operation that it lacks differs between releases
        raise RunFailed(f"this torch's gloo cannot move CUDA tensors between ranks: {error}") from error
    assert one.tolist() == [4.0] * 4
