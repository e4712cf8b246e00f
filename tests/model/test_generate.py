"""Generation: replies are those of whole rows without a cache, whatever shares their batch and however a pass is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chattrain.model.decoder import Decoder
from chattrain.model.generate import generate, generate_batch
from chattrain.model.hf import HFModel
from chattrain.model.kv_cache import RUNG, attend_to_cache
from chattrain.model.thin import ThinProducts
from tests.model.test_gpt import random_gpt, tokens

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


def sharp_gpt(n_kv_head: int | None = None):
    """Logits far apart, so that rounding decides no token."""
    model = random_gpt(n_kv_head)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def of_transformers(kind: str, **settings: Any) -> HFModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
        return HFModel(transformers.AutoModelForCausalLM.from_config(config), {}).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "ours": sharp_gpt,
    "ours, grouped": lambda: sharp_gpt(2),
    "llama": lambda: of_transformers("llama"),
    "qwen3, tied": lambda: of_transformers("qwen3", head_dim=16, tie_word_embeddings=True),
    "gpt2, learned positions": lambda: of_transformers("gpt2", n_embd=48, n_layer=2, n_head=4, n_positions=512),
    # Those keep transformers' own caches: a window shorter than the reply, capped scores.
    "mistral, window 8": lambda: of_transformers("mistral", sliding_window=8),
    "gemma2, capped scores": lambda: of_transformers("gemma2", head_dim=12, attn_logit_softcapping=2.0),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def likeliest(model: Any, prompt: list[int], count: int) -> list[int]:
    """A reply token by token, each from a pass of the whole row."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


PROMPTS = [tokens(40)[a:b].tolist() for a, b in ((0, 6), (6, 7), (7, 20), (20, 38))]


# --- replies ---------------------------------------------------------------------------------------------------------


def test_greedy_replies_are_the_likeliest_tokens_of_whole_rows_alone_and_together(model):
    expected = [likeliest(model, prompt, 12) for prompt in PROMPTS]
    assert [list(generate(model, prompt, 12, set())) for prompt in PROMPTS] == expected
    assert generate_batch(model, PROMPTS, 12, set()) == expected


@pytest.mark.parametrize("kind, why", [("mistral, window 8", "attends to all"), ("gemma2, capped scores", "ours fails")])
def test_a_model_that_keeps_its_own_cache_is_slower_and_that_is_said_once(kind, why, caplog):
    model = MODELS[kind]()
    for _ in range(2):
        generate_batch(model, PROMPTS, 12, set())
    (said,) = [record.getMessage() for record in caplog.records if record.name == "chattrain"]
    assert why in said and "slower" in said


def test_a_reply_ends_before_a_stop_token_or_after_max_tokens_whatever_the_others_do(model):
    free = generate_batch(model, PROMPTS, 12, set())
    for stop in (free[0][3], free[1][0], free[3][11]):
        ended = generate_batch(model, PROMPTS, 12, {stop})
        assert ended == [reply[: reply.index(stop)] if stop in reply else reply for reply in free]
    assert generate_batch(model, PROMPTS, 5, set()) == [reply[:5] for reply in free]
    assert generate_batch(model, PROMPTS, 0, set()) == [[]] * 4 and generate_batch(model, [], 12, set()) == []


def test_sampled_replies_follow_from_the_seed_and_not_from_their_company(model):
    def drawn(prompts, seed=1):
        return generate_batch(model, prompts, 12, set(), temperature=5.0, top_k=50, seed=seed)

    replies = drawn(PROMPTS)
    assert drawn(PROMPTS) == replies and drawn(PROMPTS, seed=2) != replies
    assert drawn(PROMPTS[::-1]) == replies[::-1] and drawn(PROMPTS[1:3]) == replies[1:3]
    assert list(generate(model, PROMPTS[2], 12, set(), temperature=5.0, top_k=50, seed=1)) == replies[2]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    model = random_gpt()
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([PROMPTS[0]]))[0, -1] / 0.5, 0)
        top = p.topk(5)
    drawn = torch.tensor([next(iter(generate(model, PROMPTS[0], 1, set(), 0.5, top_k=5, seed=s))) for s in range(300)])
    shares = (drawn[:, None] == top.indices).float().mean(0)
    torch.testing.assert_close(shares, top.values / top.values.sum(), atol=0.1, rtol=0)


def test_under_autocast_generation_is_that_of_bf16_weights_and_the_model_keeps_its_own():
    model, cast = sharp_gpt(2), sharp_gpt(2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        logits, replies = Decoder(model, 4, 20).read(PROMPTS), generate_batch(model, PROMPTS, 12, set())
    with torch.inference_mode():
        assert torch.equal(logits, Decoder(cast, 4, 20).read(PROMPTS))
    assert replies == generate_batch(cast, PROMPTS, 12, set())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_the_key_value_cache_changes_no_feature(n_kv_head):
    model, x = random_gpt(n_kv_head), tokens(2, 20)
    cache, parts = model.new_cache(2, max_tokens=20), []
    for part in (x[:, :7], x[:, 7:8], x[:, 8:]):  # prompt, one token, a chunk
        parts.append(model.decode(part, cache))
        cache.advance([part.size(1)] * 2)
    torch.testing.assert_close(torch.cat(parts, dim=1), model.features(x), rtol=1e-4, atol=1e-5)


def test_what_pads_a_row_is_never_seen_and_rows_go_on_from_their_own_lengths():
    model, x, counts = random_gpt(2), tokens(3, 16), [12, 7, 3]

    def logits(rows: torch.Tensor) -> torch.Tensor:
        cache = model.new_cache(3, 20)
        first = model.next_logits(rows[:, :12], cache, torch.tensor(counts))
        cache.advance(counts)
        second = model.next_logits(x[:, 12:15], cache, torch.tensor([3, 1, 2]))
        cache.advance([3, 1, 2])
        return torch.stack([first, second, model.next_logits(x[:, 15:], cache)])

    real = torch.arange(16) < torch.tensor(counts)[:, None]
    assert torch.equal(logits(x), logits(torch.where(real, x, (x + 1) % 97)))
    for row, (count, more) in enumerate(zip(counts, [3, 1, 2], strict=True)):
        whole = torch.cat([x[row, :count], x[row, 12 : 12 + more], x[row, 15:]])
        expected = model(whole[None])[0, [count - 1, count + more - 1, count + more]]
        torch.testing.assert_close(logits(x)[:, row], expected, rtol=1e-4, atol=1e-5)


def test_rows_leave_the_cache_and_the_others_go_on():
    model, x = random_gpt(), tokens(5, 9)
    cache = model.new_cache(5, 16)
    model.next_logits(x[:, :8], cache)
    cache.advance([8] * 5)
    order = cache.keep([1, 2, 4])
    assert sorted(order) == [1, 2, 4]
    torch.testing.assert_close(model.next_logits(x[order, 8:], cache), model(x)[order, -1], rtol=1e-4, atol=1e-5)


class Watch(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes in memory of its own."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, made.numel())
        return out


@pytest.mark.parametrize("kind", ["ours", "ours, grouped", "llama", "qwen3, tied", "gpt2, learned positions"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_copies_neither_keys_nor_weights(kind, bf16):
    model = MODELS[kind]()
    smallest_weight = min(p.numel() for p in model.parameters() if p.ndim == 2 and p.numel() > 1000)
    prompts = tokens(2, 300).tolist()  # keys of a layer: at least 2 x 300 x 24 elements
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.inference_mode():
        decoder = Decoder(model, 2, 310)
        following = decoder.read(prompts).argmax(1)
        with Watch() as watch:
            decoder.step(following)
    assert watch.largest < min(smallest_weight, 2 * 300 * 24)


@pytest.mark.parametrize("knows_groups", [False, True])
def test_heads_that_share_keys_attend_alike_with_and_without_a_kernel_for_it(knows_groups):
    q, keys, values = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 10, 8), torch.randn(3, 2, 10, 8)
    mask = (torch.arange(10) < torch.tensor([[4], [10], [7]]))[:, None, None]
    repeated = (x.repeat_interleave(3, dim=1) for x in (keys, values))
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(attend_to_cache(q, keys, values, mask, 0.3, knows_groups), expected)


# --- recorded passes -------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations of a pass run again on the same memory, without their Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded_replies(model: Any, prompts: list[list[int]], count: int, keep: list[int]) -> tuple[list[list[int]], int]:
    """Greedy replies of recorded passes, of which only those of `keep` go on in the second half, and the number of recordings."""
    recordings = 0

    def record(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        nonlocal recordings
        recordings += 1
        with Recorder() as recorder:
            logits = run()

        def replay() -> torch.Tensor:
            logits.zero_()
            recorder.replay()
            return logits

        return replay

    replies: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        decoder = Decoder(model, len(prompts), max(map(len, prompts)) + count, record)
        following, rows = decoder.read(prompts).argmax(1), list(range(len(prompts)))
        for done in range(count):
            for row, token in zip(rows, following.tolist(), strict=True):
                replies[row].append(token)
            if done == count // 2:
                order = decoder.keep(keep)
                rows, following = [rows[i] for i in order], following[order]
            following = decoder.step(following).argmax(1)
    return replies, recordings


@pytest.mark.parametrize("kind", ["ours", "ours, grouped", "llama", "qwen3, tied", "gpt2, learned positions"])
def test_a_recorded_pass_serves_many_tokens_and_changes_none(kind):
    model = MODELS[kind]()
    prompts = [*PROMPTS[:3], tokens(RUNG - 6).tolist()]
    free = generate_batch(model, prompts, 24, set())
    replies, recordings = recorded_replies(model, prompts, 24, keep=[1, 3])
    assert replies == [reply if row in (1, 3) else reply[:13] for row, reply in enumerate(free)]
    assert recordings == 3  # windows of RUNG tokens and of all, then half as many rows


def test_where_a_pass_cannot_be_recorded_replies_go_on_unrecorded_with_one_warning(caplog):
    model, expected, tried = sharp_gpt(), generate_batch(sharp_gpt(), PROMPTS, 12, set()), []

    def record(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        tried.append(run())  # what a recording has done before it fails
        raise RuntimeError("operation not permitted when stream is capturing\nand what torch says of it")

    for _ in range(2):
        with torch.inference_mode():
            decoder = Decoder(model, len(PROMPTS), 30, record)
            following, replies = decoder.read(PROMPTS).argmax(1), []
            for _ in range(12):
                replies.append(following.tolist())
                following = decoder.step(following).argmax(1)
        assert [list(reply) for reply in zip(*replies, strict=True)] == expected
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(tried) == 1 and "operation not permitted" in warnings[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["ours", "ours, grouped", "llama", "qwen3, tied", "gpt2, learned positions"])
def test_cuda_graphs_change_no_token(kind):
    model = MODELS[kind]()
    prompts = [*PROMPTS[:3], tokens(RUNG - 6).tolist()]
    free = generate_batch(model, prompts, 24, set())
    stop = {free[0][5], free[1][9], free[2][12]}
    ended = generate_batch(model, prompts, 24, stop)
    model.cuda()
    assert generate_batch(model, prompts, 24, set()) == free
    assert generate_batch(model, prompts, 24, stop) == ended
    assert list(generate(model, prompts[0], 24, stop)) == ended[0]


# --- products of few rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (9, 1), (2, 16), (64,), (3, 100)])
@pytest.mark.parametrize("outputs, bias", [(64, True), (96, False), (50, True)])
def test_products_of_few_rows_are_linear_layers(dtype, tolerance, shape, outputs, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(s, generator=generator).to(dtype) for s in ((*shape, 48), (outputs, 48), (outputs,)))
    with ThinProducts():
        found = F.linear(x, weight, b if bias else None)
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_products_may_lie_in_any_order_in_memory(dtype):
    x, weight = torch.randn(4, 2, 48).to(dtype).transpose(0, 1), torch.randn(64, 48).to(dtype)
    with ThinProducts():
        found = F.linear(x, weight)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().t(), rtol=0.02, atol=0.4)
