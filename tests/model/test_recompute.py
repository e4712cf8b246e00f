"""Activation checkpointing: less is kept for backward, and every number stays what it is."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chattrain.data.batch import Batch
from chattrain.errors import UserError
from chattrain.model.generate import generate
from chattrain.model.gpt import GPT
from tests.helpers import metrics, train, write_talk

MODES = ("none", "block", "selective")
IDS = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(12), torch.arange(20)]).expand(2, 32)  # two documents a row


def gpt(mode: str, n_kv_head: int | None = None) -> GPT:
    model = GPT(vocab_size=97, n_layer=3, n_embd=64, n_head=4, n_kv_head=n_kv_head)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():  # output projections and head begin at zero
                p.normal_(std=0.1, generator=generator)
    if mode != "none":
        model.checkpoint_activations(selective=mode == "selective")
    return model


def batch(positions: torch.Tensor | None = None) -> Batch:
    return Batch(IDS[:, :-1], IDS[:, 1:], 64, 64, positions)


class Watch(TorchDispatchMode):
    """Counts operations by name, and the bytes of what they made that are still held: the model's weights are not of it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}  # views of them are made all the time
        self.calls: dict[str, int] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        out = operation(*arguments, **(named or {}))
        name = operation.name()
        self.calls[name] = self.calls.get(name, 0) + 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._weights:
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def held(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["whole", "isolated"])
@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_loss_and_gradients_are_the_same_to_the_bit(n_kv_head, positions, bf16):
    losses, gradients = [], []
    for mode in MODES:
        model = gpt(mode, n_kv_head)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(batch(positions))
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == losses[1] == losses[2]
    for plain, *others in zip(*gradients, strict=True):
        assert plain.any() and all(torch.equal(plain, other) for other in others)


def test_what_forward_holds_for_backward_falls_by_the_mode():
    held = {}
    for mode in MODES:
        model = gpt(mode)
        with Watch(model) as watch:
            features = model.features(IDS[:, :-1])
        held[mode] = watch.held - features.untyped_storage().nbytes()
    block = 3 * 2 * 32 * 64 * 4  # the input of each block: layers x rows x tokens x channels x bytes
    assert block <= held["block"] < 2 * block  # and little beside it: embedding, rotary angles
    assert held["block"] < held["selective"] < 0.7 * held["none"]


def test_all_runs_twice_by_block_and_of_the_products_only_those_that_widen_selectively():
    counts = {}
    for mode in MODES:
        model = gpt(mode)
        with Watch(model) as watch:
            model.loss(batch()).backward()
        counts[mode] = {
            kind: sum(n for name, n in watch.calls.items() if kind in name and "backward" not in name)
            for kind in ("::mm", "attention", "rsqrt", "rms_norm", "::mul")
        }
    assert counts["none"]["attention"] == 3  # one a layer
    assert counts["selective"]["attention"] == counts["none"]["attention"] < counts["block"]["attention"]
    assert counts["selective"]["::mm"] == counts["none"]["::mm"] + 3 < counts["block"]["::mm"]  # the first of each MLP
    assert counts["selective"]["::mul"] > counts["none"]["::mul"]


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_passes_without_gradients_run_once_and_give_the_same(mode):
    plain, model = gpt("none"), gpt(mode)
    with torch.no_grad(), Watch(plain) as expected:
        losses = plain(IDS[:, :-1], IDS[:, 1:])
    with torch.no_grad(), Watch(model) as watch:
        assert torch.equal(model(IDS[:, :-1], IDS[:, 1:]), losses)
    watch.calls.pop("aten::equal")
    assert watch.calls == expected.calls
    prompt = IDS[0, :6].tolist()
    assert list(generate(model, prompt, 8, set())) == list(generate(plain, prompt, 8, set()))


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_weights_keep_their_names(mode):
    assert gpt(mode).weights().keys() == gpt("none").weights().keys()


def test_compiled_it_holds_less_too_and_gives_the_same_gradients():
    held, gradients = {}, {}
    for mode in MODES:
        torch.compiler.reset()
        model = gpt(mode)
        model.compile_blocks(dynamic=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, own=own, saved=saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model.features(IDS[:, :-1])
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        held[mode] = sum(saved.values())
        gradients[mode] = [p.grad for p in model.transformer.parameters()]
    torch.compiler.reset()
    assert held["block"] < held["selective"] < 0.8 * held["none"]
    for mode in ("block", "selective"):
        for plain, other in zip(gradients["none"], gradients[mode], strict=True):
            torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage, others", [("mid", []), ("sft", ["collator=best_fit"])])
def test_a_run_has_the_same_losses_with_and_without(stage, others, workplace):
    write_talk(workplace)
    runs = [
        train(stage, mode, "init.from=scratch", "train.max_steps=3", f"train.activation_checkpointing={mode}", *others)
        for mode in MODES
    ]
    losses = [[row[name] for row in metrics(run["run_dir"]) for name in ("train/loss", "val/bpb") if name in row] for run in runs]
    assert len(losses[0]) > 3 and losses[0] == losses[1] == losses[2]


def test_a_model_whose_layers_are_not_marked_is_refused():
    transformers = pytest.importorskip("transformers")
    from chattrain.model.hf import HFModel

    unmarked = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=0))
    with pytest.raises(UserError, match=r"train.activation_checkpointing=block.*llama.*activation_checkpointing=none"):
        HFModel(unmarked, {}).checkpoint_activations(selective=False)
