"""Memory of compiled blocks, as the compiler tells it without compiling, against a compiled run."""

from __future__ import annotations

import pytest
import torch
from torch.fx import symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from benchmarks import memory
from benchmarks.gpu import random_rows
from chattrain.data.batch import Batch
from chattrain.device import can_compile
from chattrain.model.hf import HFModel
from chattrain.planning import compiler
from chattrain.planning.liveness import liveness
from chattrain.planning.memory import Memory, MicroBatchSpec, step_memory
from tests.tiny_hf import tiny_model

CPU = torch.device("cpu")
DEEP = ["model.n_layer=8", "train.seq_len=128", "train.total_batch_size=512", "tokenizer.vocab_size=512"]


def memory_of(*overrides: str, ranks: int = 1, isolated: bool = False) -> Memory:
    cfg = memory.settings("tiny", ranks, *DEEP, f"train.total_batch_size={512 * ranks}", *overrides)
    return step_memory(cfg, 512, None, MicroBatchSpec(2, 128, partial=False, isolated=isolated, repeats=True), ranks)


@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["none", *(pytest.param(k, marks=pytest.mark.slow) for k in ("selective", "block"))])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_predicted_peak_of_a_compiled_run_is_within_a_tenth_of_the_measured_one(kind, dtype):
    overrides = [*DEEP, "train.compile=true", f"train.dtype={dtype}", f"train.activation_checkpointing={kind}"]
    assert memory.predict("tiny", 1, *overrides) == pytest.approx(memory.measure("tiny", 1, *overrides), rel=0.1)


@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")
def test_the_plan_knows_what_compiled_models_of_transformers_keep_for_backward(tmp_path):
    pytest.importorskip("transformers")
    inner = tiny_model("qwen3", hidden_size=128, head_dim=32)
    inner.config.save_pretrained(tmp_path)
    cfg = memory.settings("hf", 1, "stage=sft", f"init.from={tmp_path}", "train.dtype=bf16", "train.compile=true")
    shape = MicroBatchSpec(4, 128, partial=False, isolated=False, repeats=True)
    planned = step_memory(cfg, 340, tmp_path, shape).components

    model = HFModel(inner, {}).train()
    model.compile_blocks(dynamic=False)
    inputs, targets = random_rows(340, 4, 128)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(Batch(inputs, targets, num_tokens=512, num_supervised=512))
    measured = sum(size for address, size in kept.items() if address not in weights)
    assert loss.requires_grad and planned["blocks"] + planned["embedding and head"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("strategy, ranks, device", [("ddp", 1, "cpu"), ("ddp", 4, "cuda"), ("fsdp", 4, "cuda")])
def test_compiled_blocks_keep_less_and_recomputed_ones_still_less(strategy, ranks, device):
    bf16 = ["train.dtype=bf16", f"train.device={device}", f"distributed.strategy={strategy}"]
    peaks = [
        memory_of(*bf16, f"train.compile={compiled}", f"train.activation_checkpointing={kind}", ranks=ranks).peak
        for compiled, kind in (("false", "none"), ("true", "none"), ("true", "selective"), ("true", "block"))
    ]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4


def test_documents_within_a_row_are_planned_too():
    one, apart = (memory_of("train.device=cuda", "train.dtype=bf16", "train.compile=true", isolated=i) for i in (False, True))
    assert one.peak <= apart.peak < 1.1 * one.peak


def test_many_plans_in_one_process_ask_the_compiler_each_time():
    assert len({memory_of("train.compile=true", "model.n_layer=1").peak for _ in range(10)}) == 1


def test_a_compiler_that_cannot_be_asked_is_said_and_its_blocks_are_counted_uncompiled(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no such pass")

    monkeypatch.setattr(compiler, "traced", fail)
    blocks = [memory_of(f"train.compile={compiled}").components["blocks"] for compiled in ("true", "false")]
    assert blocks[0] == blocks[1] and "no such pass" in caplog.text and "uncompiled" in caplog.text


def test_only_what_a_kernel_writes_takes_memory():
    """Of a product, its squared ReLU and another product, the ReLU never gets a tensor."""

    def graph_of(x, w, v):
        hidden = torch.ops.aten.mm.default(x, w)
        squared = torch.ops.aten.pow.Tensor_Scalar(torch.ops.aten.relu.default(hidden), 2)
        return (torch.ops.aten.mm.default(squared, v),)

    graph = symbolic_trace(graph_of)
    tensors = torch.zeros(8, 4), torch.zeros(4, 16), torch.zeros(16, 4)
    ShapeProp(graph).propagate(*tensors)
    for node in graph.graph.nodes:
        if "tensor_meta" in node.meta and node.op != "output":
            node.meta["val"] = torch.empty(node.meta["tensor_meta"].shape)
    inputs, hidden, out = 4 * (8 * 4 + 4 * 16 + 16 * 4), 4 * 8 * 16, 4 * 8 * 4
    kept = liveness(graph, keeps_input=lambda node: True, workspace=lambda node: 0)
    assert kept.inputs() == inputs and kept.peak() == inputs + max(2 * hidden, hidden + out)
    released = liveness(graph, keeps_input=lambda node: False, workspace=lambda node: 0)
    assert released.peak() == max(inputs + hidden, 2 * hidden + 4 * 16 * 4)  # the first product's inputs are gone at the square
