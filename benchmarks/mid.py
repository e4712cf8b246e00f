"""A whole mid step (forward, backward, optimizer, data) against the same step written plainly with stock parts.

Same model and batch: 8,192 tokens a step, rows of 512, in bf16 and in fp32, compiled on both sides. The reference tokenises into
a deque during training, computes all logits and the mean loss of each micro-batch, and steps torch.optim.Muon and
torch.optim.AdamW. It has its own process, which waits during our steps, because chattrain changes how its process allocates
memory.
"""

from __future__ import annotations

import tempfile
from collections import deque

import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.timing import in_own_process, row, show, time_both
from chattrain import loop
from chattrain.config.compose import compose
from chattrain.device import autocast, keep_freed_memory, pick_device, use_bf16
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.signals import Signals
from chattrain.setup.build import build_components
from chattrain.setup.plan import setup_run
from chattrain.tasks import generated, record_to_segments
from chattrain.tracking.tracker import NullTracker

ROWS, SEQ_LEN, TOKENS = 8, 512, 8192
MODEL = ["model.n_layer=6", "model.n_embd=384", "model.n_head=3"]


def measure() -> list[dict]:
    return [_measure(dtype) for dtype in ("bf16", "fp32")]


def _measure(dtype: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose(
            [
                "stage=mid",
                "init.from=scratch",
                f"run.root={folder}",
                "eval=none",
                "tracking=none",
                *MODEL,
                f"train.seq_len={SEQ_LEN}",
                f"train.device_batch_size={ROWS}",
                "train.max_steps=1000",
                "train.compile=true",
                f"train.total_batch_size={TOKENS}",
                f"train.dtype={dtype}",
                "tokenizer.vocab_size=8192",
            ]
        )
        setup, data = setup_run(cfg, world_size=1)
        device = pick_device(cfg.train.device)
        keep_freed_memory(device)  # as the runner does
        components, _ = build_components(cfg, setup, Ranks(), data, NullTracker(), Signals(), None)
        step = iter(range(10**9))

        def ours() -> None:
            number = next(step)
            loop.train_step(components, components.loader.step(number), number)

        with in_own_process(Reference, cfg, data.tokenizer) as reference:
            seconds = time_both(ours, reference, rounds=3)
        components.loader.close()
        products = roofline.step_seconds(
            components.model, ROWS, SEQ_LEN, TOKENS // (ROWS * SEQ_LEN), use_bf16(cfg.train.dtype, device)
        )
    return row(f"mid step, d6, 8,192 tokens, {dtype}", TOKENS, "tokens", *seconds, products)


def stock_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """torch's own Muon on the blocks and AdamW on embeddings and head."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("transformer.h")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("transformer.h")]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0),
    ]


class Reference:
    """What a careful user would write with stock parts."""

    def __init__(self, cfg, tokenizer):
        from chattrain.model.gpt import GPT

        self.device = pick_device(cfg.train.device)
        self.autocast = autocast(use_bf16(cfg.train.dtype, self.device), self.device)
        self.model = GPT(tokenizer.vocab_size, n_layer=6, n_embd=384, n_head=3)
        self.model.init_weights(torch.Generator().manual_seed(0))
        self.model.to(self.device)
        self.compiled = torch.compile(self.model, dynamic=False)
        self.optimizers = stock_optimizers(self.model)
        self.tokenizer, self.tokens = tokenizer, deque()
        self.rows = iter(generated.records("count_letters", "train", 4000) * 100)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        from chattrain.chat import chat_format

        while len(self.tokens) < ROWS * SEQ_LEN + 1:
            self.tokens.extend(chat_format(self.tokenizer).encode([record_to_segments(next(self.rows), "messages")])[0].ids)
        taken = torch.tensor([self.tokens.popleft() for _ in range(ROWS * SEQ_LEN + 1)], device=self.device)
        return taken[:-1].view(ROWS, SEQ_LEN), taken[1:].view(ROWS, SEQ_LEN)

    def __call__(self) -> None:
        micro = TOKENS // (ROWS * SEQ_LEN)
        for _ in range(micro):
            inputs, targets = self.batch()
            with self.autocast:
                logits = self.compiled(inputs)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / micro
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    show(measure())
