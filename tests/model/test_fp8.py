"""fp8 through torchao: what is refused, and what torchao is asked for. A stand-in has its interface: no GPU is needed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from chattrain.config.compose import compose
from chattrain.errors import UserError
from chattrain.model import fp8
from chattrain.model.gpt import GPT
from tests.helpers import TINY, command_line, write_talk

CUDA = torch.device("cuda", 0)


class Float8Linear(nn.Linear):
    """As torchao's: a Linear of the same weight."""


def convert_to_float8_training(module: nn.Module, *, module_filter_fn=None, config=None) -> nn.Module:
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and module_filter_fn(layer, name):
            with torch.device("meta"):
                swapped = Float8Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            swapped.weight, swapped.bias = layer.weight, layer.bias
            module.set_submodule(name, swapped)
    return module


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (9, 0))
    torchao = ModuleType("torchao.float8")
    torchao.convert_to_float8_training = convert_to_float8_training
    torchao.Float8LinearConfig = SimpleNamespace
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", torchao)


def gpt(n_embd: int = 32) -> GPT:
    model = GPT(vocab_size=96, n_layer=2, n_embd=n_embd, n_head=2)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_linear_layers_are_swapped_but_the_head_and_weights_stay_what_they_are(h100):
    model = gpt()
    before = model.weights()
    fp8.convert(model, CUDA)
    swapped = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert swapped == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    after = model.weights()
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_layers_whose_sides_are_no_multiples_of_16_stay(h100):
    model = gpt()
    model.odd = nn.Linear(32, 24)
    fp8.convert(model, CUDA)
    assert type(model.odd) is nn.Linear


def test_a_model_of_such_layers_alone_is_refused(h100):
    with pytest.raises(UserError, match=r"train.fp8=true has no effect.* multiples of 16; use train.fp8=false"):
        fp8.convert(gpt(n_embd=36), CUDA)


def test_a_gpu_that_has_no_fp8_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(UserError, match=r"8\.9 or more .*NVIDIA A100-SXM4-80GB; use train.fp8=false"):
        fp8.convert(gpt(), CUDA)


def test_without_torchao_its_name_is_given(h100, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match="pip install torchao"):
        fp8.convert(gpt(), CUDA)


def test_a_run_on_a_cpu_is_refused(workplace, capsys):
    write_talk(workplace)
    outcome = command_line(capsys, "stage=base", "init.from=scratch", *TINY, "train.dtype=bf16", "train.fp8=true")
    assert outcome.status == 2
    assert "train.fp8=true needs a GPU" in outcome.message and "the device is cpu; use train.fp8=false" in outcome.message
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize("override, message", [("train.dtype=fp32", "use bf16 or auto"), ("train.seq_len=1000", "try 992")])
def test_settings_that_do_not_go_with_fp8_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        compose(["train.fp8=true", override])
