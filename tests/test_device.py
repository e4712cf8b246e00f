"""What a device can do: its peak by its name, memory, what fp32 means on it, and the benchmark for a GPU. None is needed."""

from __future__ import annotations

import json
import os

import pytest
import torch

from benchmarks import gpu
from chattrain import device
from chattrain.errors import UserError
from tests.helpers import metrics, train, write_talk

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_dense_bf16_rate(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: name)
    assert device.peak_flops(CUDA) == teraflops * 1e12


def test_attention_that_plans_anew_for_each_shape_is_not_used_where_shapes_vary():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for varying, where, enabled in ((True, CUDA, False), (False, CPU, False), (False, CUDA, True), (True, CPU, True)):
            device.choose_attention_kernels(where, varying)
            assert torch.backends.cuda.cudnn_sdp_enabled() is enabled
        with device.varying_shapes(CUDA):  # questions of a run whose batches have one shape
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H20",
        "NVIDIA A10",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "Tesla T4",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM-64GB",
        "AMD Instinct MI300X",
    ],
)
def test_a_gpu_that_only_resembles_a_known_one_has_no_peak(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: name)
    assert device.peak_flops(CUDA) is None


def test_a_cpu_has_no_peak():
    assert device.peak_flops(CPU) is None


def test_on_a_cpu_peak_memory_is_what_the_process_had_resident():
    peak = device.peak_memory(CPU)
    before = peak()
    assert 0.05 < before < 200  # GiB: torch alone takes hundreds of MiB
    held = torch.ones(int(before * 2**30) // 4 + (1 << 26))  # more than the process ever had, by 256 MiB
    assert peak() >= before + 0.2
    del held
    assert peak() >= before + 0.2


def test_on_cuda_peak_memory_is_what_tensors_took_since_the_start(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda where: asked.append(("reset", where)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: asked.append(("read", where)) or 3 << 29)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *where: pytest.fail("it waits for the device"))
    peak = device.peak_memory(CUDA)
    assert asked == [("reset", CUDA)]
    assert peak() == 1.5 and asked[1:] == [("read", CUDA)]


@pytest.mark.parametrize("load, threads, says", [(8.0, 2, True), (1.0, 2, False), (8.0, 1, False)])
def test_a_run_says_what_busy_cores_do_to_it(workplace, monkeypatch, caplog, load, threads, says):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    write_talk(workplace)
    train("sft", "beside", "init.from=scratch", "train.max_steps=1")
    assert ("OMP_NUM_THREADS=1" in caplog.text) == says


def test_a_run_tracks_its_peak_memory(workplace):
    write_talk(workplace)
    summary = train("base", "watched", "init.from=scratch", "train.max_steps=2")
    peaks = [row["train/peak_memory_gib"] for row in metrics(summary["run_dir"]) if "train/loss" in row]
    assert len(peaks) == 2 and 0.05 < peaks[0] <= peaks[1] == summary["metrics"]["train/peak_memory_gib"]


@pytest.mark.skipif(not device.can_compile(CPU), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("collator", ["masked", "best_fit"])
def test_all_shapes_of_all_jobs_of_a_sweep_share_what_is_compiled(workplace, collator):
    lines = [
        {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "again " * (1 + i % 29)}]}
        for i in range(120)
    ]
    (workplace / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compiled = []
    for scale in (1.0, 3.0):
        summary = train(
            "sft",
            f"scale{scale}",
            "init.from=scratch",
            "train.compile=true",
            "model.n_layer=1",
            f"collator={collator}",
            "train.rows_per_step=8",
            "train.max_steps=6",
            f"optimizer.lr_scale={scale}",
        )
        compiled.append([row["train/compilations"] for row in metrics(summary["run_dir"]) if "train/loss" in row])
    assert compiled[0][-2:] == [0, 0]
    assert collator == "best_fit" or sum(compiled[0]) > 0  # best_fit compiles before the first step, to see that it isolates
    assert compiled[1] == [0] * 6


@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_run_computes_in_fp32_is_fp32_whatever_was_set_before(bf16):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.backends.cuda.matmul.allow_tf32
        device.autocast(bf16, CPU)
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


# --- benchmarks/gpu.py -------------------------------------------------------------------------------------------------


TINY = [
    "--model",
    "tiny",
    "--device",
    "cpu",
    "model.n_layer=1",
    "model.n_embd=32",
    "model.n_head=2",
    "train.seq_len=32",
    "train.device_batch_size=2",
    "train.total_batch_size=128",
    "tokenizer.vocab_size=300",
    "train.compile=false",
]


def test_the_gpu_benchmark_prints_and_writes_speed_mfu_and_memory(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu.main([*TINY, "--steps", "2", "--out", str(out), "train.activation_checkpointing=selective"])
    found = json.loads(out.read_text())
    assert found["tokens_per_second"] > 0 and found["peak_memory_gib"] > 0.05 and found["mfu"] is None
    assert found["device"] == "cpu" and found["steps"] == 2 and found["tokens_a_step"] == 128
    assert found["settings"]["activation_checkpointing"] == "selective"
    said = capsys.readouterr().out
    assert "tokens/s" in said and "MFU n/a" in said and "GiB" in said


def test_with_a_known_peak_mfu_is_the_share_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "peak_flops", lambda where: 1e12)
    found = gpu.measure("tiny", "cpu", 2, TINY[4:])
    flops = 6 * (12 * 32 * 32 + 300 * 32) + 12 * 1 * 32 * 32  # a token: weights of matmuls, attention
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops / 1e12)


def test_without_a_gpu_the_benchmark_says_so_and_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2 and "--device cpu" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing"):
        gpu.measure("tiny", "cpu", 2, ["train.nothing=1"])
