"""Which rows share a forward pass: few passes, few shapes, little padding, never more tokens than the limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.config.data import SourceConfig
from chattrain.config.words import Schema
from chattrain.data.cache import load_or_tokenize
from chattrain.data.collators import EMPTY, Padded
from chattrain.data.mixture import Mixture
from chattrain.data.passes import START_COST, PassLimits, largest_pass, micro_batch_sizes, padded_width
from chattrain.model.gpt import GPT
from tests.conftest import SHARED_DATA
from tests.data.test_loader import mixture

many = settings(max_examples=200, deadline=None, derandomize=True, database=None)
devices = st.sampled_from(sorted(START_COST))
PAD = 9_999


def shapes(widths: np.ndarray, limits: PassLimits) -> list[tuple[int, int]]:
    """(rows, width) of the passes of rows of these widths, empty rows counted."""
    counts = micro_batch_sizes(widths, limits)
    return [(limits.filled(count), int(widths[end - 1])) for count, end in zip(counts, np.cumsum(counts), strict=True)]


@many
@given(st.integers(0, 3000), st.integers(1, 3000))
def test_a_padded_width_holds_its_rows_and_adds_little(length, seq_len):
    length = min(length, seq_len)
    width = padded_width(length, seq_len)
    assert length <= width <= seq_len and width >= 1
    assert width == seq_len or width % 8 == 0
    assert width - max(length, 1) < max(8, length / 16)


def test_widths_are_few():
    widths = [padded_width(length, 1024) for length in range(1, 1025)]
    assert widths == sorted(widths) and len(set(widths)) == 64
    assert set(widths[:256]) == set(range(8, 257, 8))


@many
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 400), devices)
def test_no_split_of_the_rows_costs_less(lengths, tokens, device):
    widths, limits = np.sort(lengths), PassLimits(1, tokens, device)

    def cost(counts):
        ends = np.cumsum(counts)
        filled = [limits.filled(count) for count in counts]
        if any(n > 1 and n * widths[end - 1] > tokens for n, end in zip(filled, ends, strict=True)):
            return len(widths) + 1, 0
        return counts.count(1), sum(n * widths[end - 1] + START_COST[device] for n, end in zip(filled, ends, strict=True))

    def splits(n):
        return [[]] if n == 0 else [[*head, last] for last in range(1, n + 1) for head in splits(n - last)]

    counts = micro_batch_sizes(widths, limits)
    assert sum(counts) == len(widths)
    assert cost(counts) == min(map(cost, splits(len(widths))))


@many
@given(st.lists(st.integers(1, 1024), min_size=1, max_size=60), st.integers(1024, 9000), devices)
def test_a_pass_is_never_larger_than_the_limit_or_the_largest_that_is_planned_for(lengths, tokens, device):
    limits = PassLimits(1, tokens, device)
    made = shapes(np.sort([padded_width(length, 1024) for length in lengths]), limits)
    largest = largest_pass(max(lengths), len(lengths), 1024, limits)
    for rows, width in [*made, largest]:
        assert rows * width <= tokens
        assert rows * width <= largest[0] * largest[1]


def test_on_a_gpu_a_step_of_short_rows_is_one_or_two_passes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        widths = np.sort([padded_width(int(length), 1024) for length in rng.integers(130, 450, 32)])
        assert len(shapes(widths, PassLimits(8, 8 * 1024, "cuda"))) <= 2


def test_a_gpu_sees_few_shapes_again_and_again():
    rng, seen = np.random.default_rng(0), []
    for _ in range(200):
        lengths = np.clip(rng.lognormal(5.1, 0.45, 32), 20, 1024)
        seen += shapes(np.sort([padded_width(int(length), 1024) for length in lengths]), PassLimits(8, 8 * 1024, "cuda"))
    assert len(seen) >= 400 and len(set(seen)) < len(seen) / 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("tokens", [64, 200, 4096])
def test_a_step_keeps_its_rows_and_gives_all_ranks_passes_alike(device, world_size, tokens):
    collator = Padded(mixture(), 64, PAD)
    for step in range(3):
        rows = np.arange(44 * step, 44 * (step + 1))  # 44, 22 or 11 a rank, which CUDA's passes fill up with empty ones
        groups = collator.split_micro_batches(rows, PassLimits(1, tokens, device), world_size)
        assert sorted(row for group in groups for row in group.flatten() if row != EMPTY) == rows.tolist()
        for group in groups:
            assert len(group) == world_size and (group[:, 0] != EMPTY).all()
            batches = [collator.batch(rank_rows) for rank_rows in group]
            for batch in batches:
                count, width = batch.inputs.shape
                assert count == group.shape[1] and padded_width(width, 64) == width
                assert count == 1 or batch.inputs.numel() <= tokens


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(PAD + 1, n_layer=1, n_embd=32, n_head=2)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradient_of_a_step_are_those_of_its_rows_one_by_one(model, device, world_size):
    def step(passes):
        model.zero_grad()
        batches = [collator.batch(rows) for rows in passes]
        total = sum(model.loss(batch) / sum(b.num_supervised for b in batches) for batch in batches)
        total.backward()
        return total.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    collator, rows = Padded(mixture(), 64, PAD), np.arange(16)
    groups = collator.split_micro_batches(rows, PassLimits(1, 512, device), world_size)
    loss, gradient = step([rank_rows for group in groups for rank_rows in group])
    alone, expected = step(rows[:, None])
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
def test_real_questions_take_two_passes_a_step_on_a_gpu_and_little_padding_on_a_cpu(tmp_path, tokenizer):
    source = SourceConfig(str(SHARED_DATA / "gsm8k" / "main" / "test.parquet"), schema=Schema.gsm8k)
    documents = Mixture([load_or_tokenize("gsm8k", source, tokenizer, tmp_path)], [source], seed=0)
    collator = Padded(documents, 1024, PAD)

    def measure(device: str) -> tuple[list[int], float]:
        """Passes of each step, and the share of padding."""
        passes, tokens, padded = [], 0, 0
        for step in range(20):
            groups = collator.split_micro_batches(np.arange(32 * step, 32 * (step + 1)), PassLimits(8, 16 * 1024, device), 1)
            batches = [collator.batch(rows) for ((rows),) in groups]
            passes.append(len(groups))
            tokens, padded = tokens + sum(b.num_tokens for b in batches), padded + sum(b.inputs.numel() for b in batches)
        return passes, 1 - tokens / padded

    assert max(measure("cuda")[0]) <= 2
    assert measure("cpu")[1] < 0.08
