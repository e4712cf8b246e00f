"""The server, through OpenAI's own client and by hand: replies, streams, limits, mistakes, and clients that leave."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from chattrain.config.serve import ServeConfig
from chattrain.errors import UserError
from chattrain.serving.server import Service
from chattrain.serving.speaker import Speaker
from chattrain.serving.worker import Worker
from tests import tiny_hf
from tests.serving.common import CONTEXT, Passes, reply_of, running, speaker_of

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "Hello, how many r are in strawberry?"}]


@pytest.fixture(scope="module")
def speaker(tokenizer) -> Speaker:
    return speaker_of(tokenizer)


@pytest.fixture(scope="module")
def url(speaker):
    with running(speaker) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return client_of(url)


def client_of(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


def ask(client: Any, messages: list[dict] = HELLO, max_tokens: int = 20, **more: Any) -> Any:
    more = {"temperature": 0, **more}
    return client.chat.completions.create(model="sft/small", messages=messages, max_tokens=max_tokens, **more)


def post(url: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON and headers of a request to /v1/chat/completions."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), answer.headers


def get(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.loads(answer.read())


# --- replies ---------------------------------------------------------------------------------------------------------


def test_a_reply_is_the_models_and_the_tokens_are_counted(client, speaker):
    done = ask(client)
    (choice,) = done.choices
    assert choice.message.content == reply_of(speaker, HELLO, 20) and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and done.object == "chat.completion" and done.model == "sft/small"
    prompt = len(speaker.prompt({"messages": HELLO}))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (prompt, 20, prompt + 20)


def test_a_stream_has_the_same_text_in_portions(client, speaker):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == reply_of(speaker, HELLO, 20) and sum(map(bool, texts)) > 5
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 20 and len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_a_drawn_reply_follows_from_its_seed(client, speaker):
    first, again = (ask(client, temperature=1.5, seed=7).choices[0].message.content for _ in range(2))
    assert first == again == reply_of(speaker, HELLO, 20, 1.5, seed=7)
    others = {ask(client, temperature=1.5).choices[0].message.content for _ in range(4)}
    assert len(others) == 4
    greedy = ask(client, temperature=1.5, extra_body={"top_k": 1}).choices[0].message.content
    assert greedy == ask(client, temperature=2, top_p=0).choices[0].message.content == reply_of(speaker, HELLO, 20)


def test_a_reply_ends_before_a_stop_text_wherever_the_tokens_end(client, speaker):
    whole = reply_of(speaker, HELLO, 60)
    for stop in (whole[20:23], whole[31:38]):
        for stream in (False, True):
            done = ask(client, max_tokens=60, stop=["no such text", stop], stream=stream)
            if stream:
                choices = [choice for chunk in done for choice in chunk.choices]
                text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
            else:
                text, reason = done.choices[0].message.content, done.choices[0].finish_reason
            assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_history_and_system_messages_reach_the_model(client, speaker):
    talk = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "3"}, *HELLO]
    assert ask(client, talk).choices[0].message.content == reply_of(speaker, talk, 20)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    said = [{"role": "user", "content": "Hello"}]
    assert ask(client, parts).choices[0].message.content == reply_of(speaker, said, 20)


def test_a_call_in_an_earlier_reply_is_read_as_the_model_has_written_it(client, speaker):
    def talk(content: Any) -> list[dict]:
        return [*HELLO, {"role": "assistant", "content": content}, *HELLO]

    call = [{"type": "python", "text": "1+2"}, {"type": "python_output", "text": "3"}, {"type": "text", "text": "3"}]
    shown = ask(client, talk("<<1+2=3>>3")).choices[0].message.content
    assert shown == reply_of(speaker, talk(call), 20) != reply_of(speaker, talk("<<1+2=3>>3"), 20)
    wrong = "<<1+2=4>>4"
    assert ask(client, talk(wrong)).choices[0].message.content == reply_of(speaker, talk(wrong), 20)


def test_without_a_length_a_reply_is_as_long_as_the_server_allows(speaker):
    with running(speaker, max_tokens=9) as url:
        done = client_of(url).chat.completions.create(model="sft/small", messages=HELLO, temperature=0)
        assert done.usage.completion_tokens == 9
        with pytest.raises(openai.BadRequestError, match="max_tokens=10 must be a whole number from 1 to 9"):
            ask(client_of(url), max_tokens=10)


def test_a_model_of_transformers_answers_with_its_own_template(tmp_path):
    transformers = pytest.importorskip("transformers")
    assert transformers
    from chattrain.model import hf
    from chattrain.tokenizer import Tokenizer

    folder = tiny_hf.write_model(tmp_path)
    tokenizer = Tokenizer.load(folder)
    speaker = Speaker("tiny", hf.build(tokenizer.vocab_size, folder, seed=0).eval(), tokenizer, 128, bf16=False)
    with running(speaker) as url:
        done = client_of(url).chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=12)
        assert done.choices[0].message.content == reply_of(speaker, HELLO, 12)
        with pytest.raises(openai.BadRequestError, match="im_end"):
            client_of(url).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "<|im_end|>"}])


def test_models_are_listed(client, url):
    assert [model.id for model in client.models.list()] == ["sft/small"]
    assert client.models.retrieve("sft/small").owned_by == "chattrain"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert get(f"{url}/health") == {"status": "ok", "requests": 0}


# --- many at once ----------------------------------------------------------------------------------------------------


def test_fifty_requests_at_once_get_each_its_own_reply(client, speaker):
    def asked(i: int) -> tuple[list[dict], dict[str, Any]]:
        settings = {"max_tokens": 5 + i % 17, "temperature": 1.2 * (i % 2), "seed": i}
        return [{"role": "user", "content": f"What is {i} + {i * i}? " * (1 + i % 3)}], settings

    def answered(i: int) -> str:
        messages, settings = asked(i)
        if i % 3:
            return ask(client, messages, **settings).choices[0].message.content
        chunks = ask(client, messages, stream=True, **settings)
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    with ThreadPoolExecutor(50) as threads:
        replies = list(threads.map(answered, range(50)))
    assert replies == [reply_of(speaker, messages, **settings) for messages, settings in map(asked, range(50))]
    assert len(set(replies)) > 40


def test_while_a_long_conversation_is_rendered_streams_go_on(tokenizer):
    begun, gate = threading.Event(), threading.Event()

    class Slow(Speaker):
        def prompt(self, conversation: dict[str, Any], max_tokens: int = 1) -> list[int]:
            if "slow" in str(conversation):
                begun.set()
                assert gate.wait(60)
            return super().prompt(conversation, max_tokens)

    speaker = Slow(**vars(speaker_of(tokenizer)))
    slow = [{"role": "user", "content": "slow"}]
    with running(speaker) as url, ThreadPoolExecutor(1) as threads:
        stream = ask(client_of(url), max_tokens=200, stream=True)
        next(stream)
        waiting = threads.submit(ask, client_of(url), slow)
        try:
            assert begun.wait(60)
            assert len(list(stream)) > 20 and get(f"{url}/health")["requests"] == 1
        finally:
            gate.set()
        assert waiting.result().choices[0].message.content == reply_of(speaker, slow, 20)


def test_requests_beyond_the_limit_are_told_to_come_back(tokenizer):
    speaker = speaker_of(tokenizer)
    passes = Passes(speaker.model)
    with running(speaker, max_requests=2, batch_size=1) as url, ThreadPoolExecutor(2) as threads:
        passes.gate.clear()
        waiting = [threads.submit(ask, client_of(url)) for _ in range(2)]
        while get(f"{url}/health")["requests"] < 2:
            pass
        status, body, headers = post(url, {"model": "sft/small", "messages": HELLO})
        assert (status, body["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_error", "1")
        passes.close()
        assert len({done.result().choices[0].message.content for done in waiting}) == 1
        assert ask(client_of(url)).choices


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row_and_disturbs_nobody(tokenizer, stream):
    speaker = speaker_of(tokenizer)
    expected = reply_of(speaker, HELLO, 30)
    passes = Passes(speaker.model)
    body = json.dumps({"model": "sft/small", "messages": HELLO, "temperature": 0, "stream": stream}).encode()
    with running(speaker, batch_size=1) as url:
        leaving = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        leaving.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        if stream:
            answer = leaving.getresponse()
            assert answer.readline().startswith(b"data: ")
            answer.close()
        while passes.count < 5:
            pass
        leaving.close()
        assert ask(client_of(url), max_tokens=30).choices[0].message.content == expected  # in the one row
        assert passes.count < CONTEXT / 2  # the reply that nobody waits for was not computed to its end
        assert get(f"{url}/health")["requests"] == 0
    passes.close()


def test_many_clients_that_hang_up_leave_the_others_their_replies(tokenizer):
    speaker = speaker_of(tokenizer)
    expected = reply_of(speaker, HELLO, 25)
    with running(speaker, batch_size=3) as url:
        client = client_of(url)

        def one(i: int) -> str | None:
            if i % 2:
                return ask(client, max_tokens=25).choices[0].message.content
            stream = ask(client, max_tokens=CONTEXT // 2, stream=True)
            for _ in range(i):
                next(stream, None)
            stream.close()
            return None

        with ThreadPoolExecutor(12) as threads:
            assert list(threads.map(one, range(12))) == [expected if i % 2 else None for i in range(12)]
        assert ask(client, max_tokens=25).choices[0].message.content == expected
        while get(f"{url}/health")["requests"]:
            pass


def test_a_reply_that_takes_too_long_ends_with_an_error(tokenizer):
    speaker = speaker_of(tokenizer)
    passes = Passes(speaker.model)
    with running(speaker, timeout_s=0.3) as url:
        with pytest.raises(openai.APIError, match="more than"):
            for chunk in ask(client_of(url), max_tokens=CONTEXT // 2, stream=True):
                assert chunk.object == "chat.completion.chunk"
                passes.gate.clear()
        status, body, _ = post(url, {"model": "sft/small", "messages": HELLO, "max_tokens": CONTEXT // 2})  # no pass ends
        passes.close()
        assert (status, body["error"]["type"]) == (504, "server_error")


def test_a_client_that_reads_nothing_keeps_no_place(tokenizer):
    config = ServeConfig(timeout_s=0.3, max_tokens=CONTEXT)
    speaker = speaker_of(tokenizer)
    worker = Worker(speaker, rows=1)
    service = Service(speaker, config, worker)
    body = json.dumps({"model": "sft/small", "messages": HELLO, "stream": True}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    sent: list[dict] = []

    async def ask_and_read_nothing() -> None:
        arrived = iter([{"type": "http.request", "body": body}])

        async def receive() -> dict:
            return next(arrived, None) or await asyncio.get_running_loop().create_future()

        async def send(message: dict) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                await asyncio.get_running_loop().create_future()

        await asyncio.wait_for(service.app()(scope, receive, send), 60)

    worker.start()
    asyncio.run(ask_and_read_nothing())
    worker.stop()
    assert sent[0]["status"] == 200 and len(sent) == 2 and service.open == 0


def test_where_the_device_fails_those_requests_fail_and_the_server_lives(tokenizer):
    speaker = speaker_of(tokenizer)
    expected = reply_of(speaker, HELLO, 20)
    passes = Passes(speaker.model)
    with running(speaker) as url:
        passes.fail = True
        with pytest.raises(openai.InternalServerError, match="the model has failed"):
            ask(client_of(url))
        passes.close()
        assert ask(client_of(url)).choices[0].message.content == expected
        assert get(f"{url}/health")["status"] == "ok"


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, param",
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"seed": 2**70}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": CONTEXT + 1}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"n": 2}, "n"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_p": 0.1}, "min_p"),
        ({"temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [3]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [*HELLO, *HELLO]}, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
        ({"model": 3}, "model"),
    ],
)
def test_a_parameter_that_is_unknown_or_out_of_range_is_named(url, given, param):
    status, body, _ = post(url, {"model": "sft/small", "messages": HELLO, **given})
    assert (status, body["error"]["param"], body["error"]["type"]) == (400, param, "invalid_request_error")
    assert body["error"]["message"]


def test_parameters_that_ask_for_nothing_are_taken(client):
    neutral: dict[str, Any] = {
        "n": 1,
        "frequency_penalty": 0,
        "logprobs": False,
        "user": "me",
        "response_format": {"type": "text"},
    }
    assert ask(client, **neutral).choices


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": ' * 60_000, b"[" * 100_000, b"9" * 10_000, b'"\\ud800"', b"null"]
)
def test_a_body_that_is_no_object_of_json_is_refused(url, body):
    status, answer, _ = post(url, body)
    assert status == 400 and "JSON" in answer["error"]["message"]


def test_a_text_that_is_lists_within_lists_is_refused(url):
    for depth in (100, 700, 900, 5000):
        content = b"[" * depth + b"]" * depth
        status, body, _ = post(url, b'{"model": "sft/small", "messages": [{"role": "user", "content": ' + content + b"}]}")
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")


def test_lone_surrogates_and_special_tokens_in_a_text_are_text(client, url, speaker):
    status, _, _ = post(url, b'{"model": "sft/small", "max_tokens": 4, "messages": [{"role": "user", "content": "\\ud800"}]}')
    assert status == 200
    said = [{"role": "user", "content": "<|assistant_end|><|python_start|>1+1<|python_end|>"}]
    assert ask(client, said).choices[0].message.content == reply_of(speaker, said, 20)


def test_another_model_another_path_and_another_method_are_answered_with_an_error(client, url):
    with pytest.raises(openai.NotFoundError, match="sft/small"):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="sft/small", input="x")
    with pytest.raises(urllib.request.HTTPError) as refused:
        get(f"{url}/v1/chat/completions")
    assert refused.value.code == 405 and json.loads(refused.value.read())["error"]["message"]


def test_a_large_body_is_refused_before_it_is_read(speaker):
    with running(speaker, max_request_bytes=1000) as url:
        large = {"model": "sft/small", "messages": [{"role": "user", "content": "x" * 1000}]}
        status, body, _ = post(url, large)
        assert status == 413 and "1000 bytes" in body["error"]["message"]
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        parts = iter([b"x" * 600, b"x" * 600])
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", parts, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        assert ask(client_of(url)).choices


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_with_a_key_only_those_who_have_it_are_answered(speaker):
    with running(speaker, api_key="right-key") as url:
        assert ask(client_of(url, "right-key")).choices
        for key in ("right-ke", "right-keys", "Right-key", "ünicode"):
            status, body, _ = post(url, {}, Authorization=f"Bearer {key}".encode().decode("latin-1"))
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        for wrong in ("", "right-key", "Basic right-key"):
            assert post(url, {}, Authorization=wrong)[0] == 401
        with pytest.raises(urllib.request.HTTPError, match="401"):
            get(f"{url}/v1/models")
        assert get(f"{url}/health")["status"] == "ok"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://["},
    ],
)
def test_without_a_key_other_hosts_and_pages_of_others_are_refused(url, headers):
    status, body, answer_headers = post(url, {"model": "sft/small", "messages": HELLO, "max_tokens": 2}, **headers)
    assert (status, body["error"]["type"]) == (403, "permission_error")
    assert not [name for name in answer_headers if name.lower().startswith("access-control")]


def test_a_page_of_others_cannot_send_what_needs_no_permission(url):
    body = {"model": "sft/small", "messages": HELLO, "max_tokens": 2}
    assert post(url, body, **{"Content-Type": "text/plain"})[0] == 415
    assert post(url, body, Origin=url)[0] == 200
    port = urlsplit(url).port
    assert post(url, body, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"host": "0.0.0.0"}, "serve.api_key"),
        ({"host": ""}, "serve.api_key"),
        ({"api_key": ""}, "serve.api_key"),
        ({"api_key": "a\nb"}, "serve.api_key"),
        ({"port": 70_000}, "serve.port=70000"),
        ({"batch_size": 0}, "serve.batch_size=0"),
        ({"timeout_s": float("nan")}, "serve.timeout_s"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys, named):
    with pytest.raises(UserError, match=named):
        ServeConfig(**keys).check()


def test_a_port_that_is_taken_is_named(url, speaker):
    with pytest.raises(UserError, match=f"serve.port={urlsplit(url).port}"), running(speaker, port=urlsplit(url).port):
        pass
