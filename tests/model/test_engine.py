"""The engine: requests come and go, and each reply is the one that its request gets alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from chattrain.model import engine as engine_module
from chattrain.model.decoder import Decoder
from chattrain.model.engine import Engine, Request
from chattrain.model.generate import generate, generate_batch
from chattrain.model.kv_cache import RUNG
from chattrain.model.sampling import Sampling, draw
from tests.model.test_generate import MODELS, Recorder, sharp_gpt
from tests.model.test_gpt import random_gpt, tokens

LENGTHS = (6, 1, 13, 18, 3, 9, 25, 2)
STREAM = tokens(sum(LENGTHS) + 200).tolist()
PROMPTS = [STREAM[sum(LENGTHS[:i]) : sum(LENGTHS[: i + 1])] for i in range(len(LENGTHS))]
SAMPLINGS = [Sampling(), Sampling(3.0), Sampling(3.0, top_k=20), Sampling(3.0, top_p=0.8), Sampling(2.0, 30, 0.9)]


def requests_of(prompts: list[list[int]], count: int = 12, **settings: Any) -> list[Request]:
    """One of each prompt; every one has another sampling and seed, and replies of other lengths."""
    return [
        Request(prompt, count - i % 5, settings.get("stop_ids", set()), SAMPLINGS[i % len(SAMPLINGS)], seed=i)
        for i, prompt in enumerate(prompts)
    ]


def answered(model: Any, requests: list[Request], rows: int, max_tokens: int = 60) -> list[list[int]]:
    engine = Engine(model, rows, max_tokens)
    for request in requests:
        engine.submit(request)
    finish(engine)
    return [request.reply for request in requests]


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def alone(model: Any, requests: list[Request]) -> list[list[int]]:
    return [answered(model, [request], 1)[0] for request in requests]


@pytest.fixture(scope="module", params=["ours", "ours, grouped", "llama", "mistral, window 8"])
def model(request):
    return MODELS[request.param]()


# --- company ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_request_gets_the_reply_that_it_gets_alone_however_many_rows_there_are(model, rows):
    expected = alone(model, requests_of(PROMPTS))
    assert len({tuple(reply) for reply in expected}) == len(PROMPTS)
    requests = requests_of(PROMPTS)
    assert answered(model, requests, rows) == expected
    assert [request.ended for request in requests] == ["length"] * len(PROMPTS)


def test_replies_that_end_at_a_stop_token_make_room_for_others(model):
    free = alone(model, requests_of(PROMPTS))
    stop = {free[0][4], free[2][2], free[5][0]}
    requests = requests_of(PROMPTS, stop_ids=stop)
    ends = [next((i for i, token in enumerate(reply) if token in stop), None) for reply in free]
    assert answered(model, requests, 2) == [reply[:end] for reply, end in zip(free, ends, strict=True)]
    assert [request.ended for request in requests] == ["length" if end is None else "stop" for end in ends]


def test_requests_that_come_later_join_those_that_are_answered(model):
    expected = alone(model, requests_of(PROMPTS))
    requests, engine = requests_of(PROMPTS), Engine(model, 4, 60)
    for request in requests:
        engine.submit(request)
        for _ in range(3):
            engine.step()
    finish(engine)
    assert [request.reply for request in requests] == expected


def test_a_longer_request_than_any_before_finds_space_while_others_go_on(model):
    prompts = [PROMPTS[1], tokens(150).tolist(), PROMPTS[2], tokens(230).tolist()]
    expected = [generate_batch(model, [prompt], 12, set())[0] for prompt in prompts]
    requests, engine = [Request(prompt, 12) for prompt in prompts], Engine(model, 8, 250)
    for request in requests:
        engine.submit(request)
        engine.step()
    finish(engine)
    assert [request.reply for request in requests] == expected


def test_a_cancelled_request_ends_as_it_is_and_its_row_serves_the_next(model):
    expected = alone(model, requests_of(PROMPTS))
    requests, engine = requests_of(PROMPTS), Engine(model, 2, 60)
    for request in requests[:4]:
        engine.submit(request)
    for _ in range(4):
        engine.step()
    engine.cancel(requests[0])
    engine.cancel(requests[3])  # it waits
    finish(engine)
    assert [request.ended for request in requests[:4]] == ["cancelled", "length", "length", "cancelled"]
    assert requests[0].reply == expected[0][: len(requests[0].reply)] and requests[3].reply == []
    assert [request.reply for request in requests[1:3]] == expected[1:3]


def test_more_prompts_than_rows_get_the_same_replies_in_their_order(model):
    expected = [list(generate(model, prompt, 12, set(), 3.0, 30, seed=5)) for prompt in PROMPTS]
    assert generate_batch(model, PROMPTS, 12, set(), 3.0, 30, seed=5, batch_size=3) == expected


def test_prompts_that_are_too_many_for_one_pass_are_read_in_several(model, monkeypatch):
    expected = generate_batch(model, PROMPTS, 8, set())
    monkeypatch.setattr(engine_module, "PREFILL", 20)
    assert generate_batch(model, PROMPTS, 8, set()) == expected


def test_a_request_that_has_no_place_is_refused():
    engine = Engine(sharp_gpt(), 2, 20)
    for prompt, count in (([], 5), (tokens(16).tolist(), 5)):
        with pytest.raises(ValueError, match="at most 20"):
            engine.submit(Request(prompt, count))
    assert not engine.busy


# --- tools -----------------------------------------------------------------------------------------------------------


def test_what_a_tool_says_is_forced_and_the_reply_goes_on_from_it(model):
    free = [list(generate(model, prompt, 14, set())) for prompt in PROMPTS]
    call = free[2][3]

    def tool(reply: list[int]) -> list[int]:
        return [7, 8, 9] if reply[-1] == call and reply.count(call) == 1 else []

    def expected(prompt: list[int]) -> list[int]:
        reply = list(generate(model, prompt, 14, set()))
        if call not in reply:
            return reply
        begun = [*reply[: reply.index(call) + 1], 7, 8, 9]
        return [*begun, *generate(model, prompt + begun, 14 - len(begun), set())][:14]

    replies = generate_batch(model, PROMPTS, 14, set(), tool=tool, batch_size=3)
    assert replies == [expected(prompt) for prompt in PROMPTS]
    assert replies[2][4:7] == [7, 8, 9] and list(generate(model, PROMPTS[2], 14, set(), tool=tool)) == replies[2]


def test_a_tool_is_not_asked_about_its_own_words_and_never_makes_a_reply_longer_than_it_may_be():
    asked = []

    def tool(reply: list[int]) -> list[int]:
        asked.append(list(reply))
        return [1] * 4

    assert len(generate_batch(sharp_gpt(), PROMPTS[:1], 8, set(), tool=tool)[0]) == 8
    assert [len(reply) for reply in asked] == [1, 6]


# --- failures --------------------------------------------------------------------------------------------------------


def test_where_the_model_fails_the_requests_with_rows_fail_and_the_others_are_answered():
    model = sharp_gpt()
    expected = [list(generate(model, prompt, 6, set())) for prompt in PROMPTS]
    requests, engine, passes = [Request(prompt, 6) for prompt in PROMPTS[:4]], Engine(model, 2, 60), []

    def fail_at_third(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("out of memory")

    hook = model.transformer.wte.register_forward_pre_hook(fail_at_third)
    for request in requests:
        engine.submit(request)
    with pytest.raises(RuntimeError, match="out of memory"):
        finish(engine)
    assert [request.ended for request in requests] == ["failed", "failed", None, None]
    finish(engine)
    hook.remove()
    assert [request.reply for request in requests[2:]] == expected[2:4]


# --- recorded passes -------------------------------------------------------------------------------------------------


def recording(made: list[int]) -> Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]:
    def record(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        with Recorder() as recorder:
            logits = run()
        made.append(len(logits))

        def replay() -> torch.Tensor:
            logits.zero_()
            recorder.replay()
            return logits

        return replay

    return record


@pytest.mark.parametrize("kind", ["ours", "ours, grouped", "llama"])
def test_recorded_passes_serve_requests_that_come_and_go(kind, monkeypatch, caplog):
    model = MODELS[kind]()
    prompts = [*PROMPTS, tokens(RUNG - 6).tolist(), *PROMPTS[::-1]]
    expected = alone_of(model, prompts)
    made: list[int] = []
    monkeypatch.setattr(engine_module, "Decoder", partial(Decoder, record=recording(made)))
    requests, engine = requests_of(prompts), Engine(model, 4, RUNG + 20)
    for at, request in enumerate(requests):
        engine.submit(request)
        if at % 3 == 0:
            engine.step()
    finish(engine)
    assert [request.reply for request in requests] == expected
    assert len(made) < 12 < sum(len(reply) for reply in expected) / 4  # few of the passes
    assert not caplog.records  # none has failed


@pytest.mark.parametrize("lengths", [(RUNG - 1, 5), (10, 10)], ids=["rows as long as the window", "memory that has moved"])
def test_a_recorded_pass_is_not_replayed_where_it_does_not_fit(lengths, monkeypatch):
    model, stream = sharp_gpt(), tokens(RUNG).tolist()
    counts = (6, 6) if lengths[0] > RUNG // 2 else (RUNG + 30, 2 * RUNG)
    expected = [list(generate(model, stream[:length], count, set())) for length, count in zip(lengths, counts, strict=True)]
    monkeypatch.setattr(engine_module, "Decoder", partial(Decoder, record=recording([])))
    engine, replies = Engine(model, 1, 3 * RUNG), []
    for length, count in zip(lengths, counts, strict=True):
        request = Request(stream[:length], count)
        engine.submit(request)
        finish(engine)
        replies.append(request.reply)
    assert replies == expected


def alone_of(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [answered(model, [request], 1, RUNG + 20)[0] for request in requests_of(prompts)]


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(0.7, top_k=5), Sampling(0.7, top_p=0.6), Sampling(1.0, 300, 0.9)])
def test_tokens_are_drawn_as_often_as_their_sampling_says(sampling):
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(3)) * 3
    p = torch.softmax(logits[0].double() / sampling.temperature, 0)
    order = p.argsort(descending=True)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = p[order].cumsum(0) - p[order]
    p[order[before >= sampling.top_p]] = 0
    numbers = ((torch.arange(4000) + 0.5) / 4000).tolist()
    drawn = draw(logits.expand(4000, -1), [sampling] * 4000, numbers)
    shares = torch.bincount(drawn, minlength=700) / 4000
    torch.testing.assert_close(shares.double(), p / p.sum(), atol=3e-4, rtol=0)
    assert drawn.unique().numel() > 2 and (p[drawn] > 0).all()


def test_the_ends_of_the_line_are_tokens_that_may_be_drawn():
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, [300, 301, 640]] = 1.0
    for sampling in (Sampling(1.0), Sampling(1e-12), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.99)):
        ends = [int(draw(logits, [sampling], [number])) for number in (0.0, 1 - 2**-53)]
        assert ends == [300, 640]
    assert int(draw(logits, [Sampling(1.0, top_p=0.0)], [0.5])) in (300, 301, 640)


def test_rows_of_many_samplings_are_drawn_as_each_alone():
    logits = torch.randn(10, 97, generator=torch.Generator().manual_seed(3))
    samplings, numbers = SAMPLINGS * 2, [i / 10 for i in range(10)]
    alone = [int(draw(logits[i : i + 1], samplings[i : i + 1], numbers[i : i + 1])) for i in range(10)]
    assert draw(logits, samplings, numbers).tolist() == alone


def test_replies_of_one_seed_begin_alike_whatever_their_length():
    model = random_gpt()
    short, long = (list(generate(model, PROMPTS[0], count, set(), 1.0, seed=3)) for count in (5, 12))
    assert long[:5] == short


def test_a_model_with_a_window_keeps_short_requests_in_our_cache_and_answers_long_ones_too():
    model = MODELS["mistral, window 8"]()
    prompts = [PROMPTS[1], PROMPTS[7], PROMPTS[6], PROMPTS[4], PROMPTS[2]]
    expected = [generate_batch(model, [prompt], 5, set())[0] for prompt in prompts]
    requests, engine = [Request(prompt, 5) for prompt in prompts], Engine(model, 3, 60)
    for request in requests:
        engine.submit(request)
        engine.step()
    finish(engine)
    assert [request.reply for request in requests] == expected
