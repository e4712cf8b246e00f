"""sft of our own model, sft of a model of transformers, TRL beside the latter, and nanochat beside our own model."""

from __future__ import annotations

import math
import time
from pathlib import Path

from benchmarks import gpu
from benchmarks.gpu_check.context import Context, Skipped, own_model, own_shape
from benchmarks.peers import nanochat as nanochat_side
from benchmarks.peers import ours
from benchmarks.peers import trl as trl_side
from benchmarks.peers.compare import Contest, Result
from benchmarks.peers.folders import model_folder, write_conversations
from benchmarks.peers.rounds import Missing
from chattrain import device as devices
from chattrain import loop
from chattrain.config.compose import compose
from chattrain.data.batch import Batch
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.signals import Signals
from chattrain.setup.build import build_components, build_model, in_context
from chattrain.setup.plan import setup_run
from chattrain.tracking.tracker import NullTracker

STEP_TOKENS = 65_536  # of sft, at least, without padding
MOST_WARM_UP = 12  # steps
SHAPE = "qwen3-0.6b"


def sft(context: Context) -> None:
    """d12 on conversations of the demo, against the same model on full rows."""
    tokens, steps = (2048, 2) if context.tiny else (STEP_TOKENS, 4)
    keys = [
        *("data=demo", "init.from=scratch", "eval=none", "tracking=none"),
        *(f"train.device={context.device}", "train.max_steps=1000", f"data.cache_dir={context.folder('cache')}"),
        *(
            ["model=tiny", "model.n_layer=2", "tokenizer.vocab_size=512", "train.compile=false"]
            if context.tiny
            else ["model=d12", "tokenizer.vocab_size=8192", "train.device_batch_size=32", "train.compile=true"]
        ),
    ]
    cfg = compose(["stage=sft", *keys, f"run.root={context.folder('sft')}/lengths"])
    _, data = setup_run(cfg, world_size=1)
    rows = rows_of(tokens, float(data.train.mixture.lengths.mean()), cfg.train.device_batch_size)
    cfg = compose(["stage=sft", *keys, f"run.root={context.folder('sft')}/runs", f"train.rows_per_step={rows}"])
    setup, data = setup_run(cfg, world_size=1)
    components, _ = build_components(cfg, setup, Ranks(), data, NullTracker(), Signals(), None)
    context.details["sft"] = {"rows_a_step": rows, "settings": ours.settings(cfg)}
    found, passes = rate(components, steps)
    components.loader.close()
    context.add("tokens_per_second", found)
    context.add("passes_a_step", passes)
    tokens_a_pass = cfg.train.device_batch_size * cfg.train.seq_len
    full = compose(["stage=base", *keys, f"train.total_batch_size={2 * tokens_a_pass}"])
    full.tokenizer.vocab_size = data.tokenizer.vocab_size
    of_full, _ = rate(gpu.build_components(full, lambda step, values: None, Ranks()), steps)
    context.add("tokens_per_second_of_full_rows", of_full)
    context.add("share_of_full_rows", found / of_full)


def rows_of(tokens: int, mean: float, multiple: int) -> int:
    """Rows of `mean` tokens that hold at least 1.05 x `tokens`, because rows vary, as a multiple.

    >>> rows_of(65_536, 100.0, 32)
    704
    """
    return math.ceil(1.05 * tokens / mean / multiple) * multiple


def rate(components: loop.TrainerComponents, steps: int) -> tuple[float, float]:
    """Tokens a second without padding, and passes a step, of `steps` steps after two in a row that compiled nothing."""
    number = tokens = passes = quiet = 0

    def step() -> None:
        nonlocal number, tokens, passes
        batches = components.loader.step(number)
        tokens += loop.train_step(components, batches, number).tokens
        passes += len(batches)
        number += 1

    while quiet < 2 and number < MOST_WARM_UP:
        step()
        quiet = 0 if components.meters()["train/compilations"] else quiet + 1
    gpu.wait_for_device()
    tokens, passes, begun = 0, 0, time.perf_counter()
    for _ in range(steps):
        step()
    gpu.wait_for_device()
    return tokens / (time.perf_counter() - begun), passes / steps


def hf(context: Context) -> None:
    """sft of a model of transformers on rows of 130 to 450 tokens, 32 a step; and one pass of 8 x 1,024 tokens alone."""
    folder = model_folder(context.folder("models"), "tiny" if context.tiny else SHAPE, context.device)
    result = tuned(context, "chattrain", folder)
    context.add("tokens_per_second", result.tokens_per_second[0])
    context.add("peak_memory", result.peak_memory_gib)
    context.add("start_to_first_step", result.start_to_first_step_s)
    context.details["ours"] = result._asdict()
    seconds, peak = one_pass(context, folder)
    context.add("pass_of_8x1024", 1e3 * seconds)
    context.add("memory_of_8x1024", peak)


def tuned(context: Context, name: str, folder: Path, variant: str | None = None) -> Result:
    """One turn of chattrain, or of TRL as `variant`, on rows that are the same for both. Raises Missing."""
    rows, steps = (8, 2) if context.tiny else (32, 10)
    shared = context.folder("sft-hf")
    compiled = ["train.compile=false"] if context.tiny else ["train.compile=true"]
    with Contest(rounds=1, steps=steps, together=False) as contest:
        if variant is None:
            talk = write_conversations(shared / "talk.jsonl", contest.num_steps * rows)
            facts = contest.add(name, ours.sft, folder, talk, context.device, rows, contest.num_steps, shared, compiled)
            context.details["facts"] = {key: facts[key] for key in ("tokens", "supervised", "bf16", "adamw")}
        else:
            facts = context.details["facts"]
            contest.add(
                name, trl_side.train, folder, shared / "rows.jsonl", context.device, facts["bf16"], facts["adamw"], variant
            )
        (result,) = contest.results(context.details["facts"]["tokens"], context.details["facts"]["supervised"])
    return result


def one_pass(context: Context, folder: Path) -> tuple[float, float]:
    """Seconds, and peak GiB, of forward and backward of 8 x 1,024 tokens, all of them targets, without optimizer state."""
    B, T = (2, 64) if context.tiny else (8, 1024)
    keys = ["stage=sft", "model=hf", "eval=none", "tracking=none", f"train.device={context.device}", f"train.seq_len={T}"]
    cfg = compose(
        [*keys, f"train.device_batch_size={B}", "train.rows_per_step=32", f"train.compile={str(not context.tiny).lower()}"]
    )
    device = devices.pick_device(cfg.train.device)
    bf16 = devices.use_bf16(cfg.train.dtype, device)
    model, _ = build_model(cfg, 8, folder, device, Ranks(), bf16, cfg.train.compile is True)
    loss_of, vocab_size = in_context(devices.autocast(bf16, device), model.loss), model.vocab_size
    inputs, targets = (x.to(device) for x in gpu.random_rows(vocab_size, B, T))
    batch = Batch(inputs, targets, num_tokens=B * T, num_supervised=B * T)
    seconds, peak = 0.0, devices.peak_memory(device)
    for _ in range(3):
        gpu.wait_for_device()
        begun = time.perf_counter()
        (loss_of(batch) / (B * T)).backward()
        gpu.wait_for_device()
        seconds = time.perf_counter() - begun
    return seconds, peak()


def trl(context: Context) -> None:
    """TRL on the rows of `hf`, in each of its variants."""
    try:
        trl_side.check()
    except Missing as error:
        raise Skipped(str(error)) from None
    earlier = context.read("hf")
    if "facts" not in earlier["details"]:
        raise Skipped("its rows are those of the part hf, which has not been measured")
    context.details["facts"] = earlier["details"]["facts"]
    folder = context.folder("models") / ("tiny" if context.tiny else SHAPE)
    best, measured = 0.0, earlier["measured"]["tokens_per_second"]
    for variant in trl_side.DEFAULT_VARIANTS[context.device]:
        result = tuned(context, f"TRL, {variant}", folder, variant)
        context.details[variant] = result._asdict()
        context.add(f"tokens_per_second_{variant.removesuffix('+compiled')}", result.tokens_per_second[0])
        best = max(best, result.tokens_per_second[0])
        context.add("ours_to_its_best", measured / best)


def nanochat(context: Context) -> None:
    """nanochat's own step on the shapes and rows of `own`."""
    try:
        nanochat_side.check(context.nanochat)
    except Missing as error:
        raise Skipped(str(error)) from None
    assert context.nanochat is not None
    cfg = compose([f"model={own_model(context)}", "stage=base", *own_shape(context)])
    facts = ours.shape_facts(cfg)
    steps = 2 if context.tiny else 5
    with Contest(rounds=1, steps=steps, together=False) as contest:
        contest.add("nanochat", nanochat_side.train, context.nanochat, context.device, facts)
        tokens = [facts["tokens"]] * contest.num_steps
        (result,) = contest.results(tokens, tokens)
    context.details["nanochat"] = result._asdict()
    context.add("tokens_per_second", result.tokens_per_second[0])
    if measured := context.earlier("own", "tokens_per_second"):
        context.add("ours_to_it", measured / result.tokens_per_second[0])
    context.add("peak_memory", result.peak_memory_gib)
    context.add("first_step", result.first_step_s)
