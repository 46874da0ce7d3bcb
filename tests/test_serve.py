"""serve.py and api.py: what a client sees, whatever it sends; with a stub for the engine, and with a tiny real one."""

import asyncio
import base64
import contextlib
import json
import random
import re
import socket
import struct
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch
import uvicorn
from conftest import ROOT  # noqa: F401  (puts the root on the path)

import lora
import serve
from chat import CHATML_TEMPLATE
from common import UserError
from engine.sampler import Sampling
from engine.scheduler import Delta
from generate import Engine
from model import Config, Transformer
from server import answers, api, door, worker
from server.worker import Worker, message
from tokenizer import Tokenizer

HTTP = httpx.Client(
    timeout=60, verify=False
)  # a client of its own for every call would read the system's certificates each time
SAID = "Grüße 😀 漢字, 👩‍👩‍👧 done."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
            },
        },
    }
]
TEMPLATE_WITH_TOOLS = "{% if tools %}<tool_call>{{ tools|tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"


def make_tokenizer():
    tok = Tokenizer.train(
        ['the quick brown fox {"a": 1}'],
        266,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tok.chat_template = CHATML_TEMPLATE
    return tok


class Stub:
    """An engine that says what it is told to: one token a step for every request, with n answers of equal text."""

    max_model_len = 4096

    def __init__(self, said=SAID, delay=0.0, tok=None):
        self.tok, self.said, self.delay = tok or make_tokenizer(), said, delay
        self.live, self.order, self.cancelled, self.fails, self.made = {}, [], [], None, 0

    def submit(self, prompt, sampling, request_id=None, adapter=None):
        if request_id in self.live:
            raise UserError("request id in use")
        text = self.tok.decode(prompt, skip_special=True)[::-1] if self.said is None else self.said
        self.order.append(adapter or len(prompt))
        ids = self.tok.encode(text)
        self.live[request_id] = [
            sampling,
            ids[: sampling.max_tokens],
            len(ids) > sampling.max_tokens,
            self.tok.stream(skip_special=True),
            0,
        ]
        return request_id

    @property
    def has_work(self):
        return bool(self.live)

    def step(self):
        time.sleep(self.delay)
        if self.fails:
            raise RuntimeError(self.fails)
        deltas = []
        for number, request in list(self.live.items()):
            sampling, ids, cut, stream, at = request
            last = at == len(ids) - 1
            text = stream.push(ids[at]) + (stream.flush() if last else "")
            deltas += [
                Delta(
                    number,
                    i,
                    text,
                    [ids[at]],
                    None,
                    ("length" if cut else "stop") if last else None,
                )
                for i in range(sampling.n)
            ]
            request[4] += 1
            self.made += 1
            if last:
                del self.live[number]
        return deltas

    def cancel(self, number):
        self.cancelled.append(number)
        self.live.pop(number, None)

    def embed(self, ids):
        return [0.6, 0.8]

    def stats(self):
        return {
            "running": len(self.live),
            "waiting": 0,
            "blocks_total": 10,
            "blocks_used": len(self.live),
            "cache_hit_tokens": 0,
            "cache_query_tokens": 0,
            "preemptions": 0,
            "generated_tokens": self.made,
            "prompt_tokens": 0,
        }


@contextlib.contextmanager
def running(engine, keys=None, **flags):
    """A server on a free port -> its base URL, service and port; stopped at the end."""
    app = serve.create_app(engine, serve.Args(**{"model": "stub", **flags}), keys)
    config = uvicorn.Config(
        app,
        "127.0.0.1",
        0,
        http=door.Protocol,
        log_level="error",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=1,
    )
    server, sock = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    port = sock.getsockname()[1]
    until(lambda: server.started)
    try:
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}", port=port, service=app.state.service, engine=engine
        )
    finally:
        server.should_exit = True
        thread.join(10)


def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def stub():
    with running(Stub()) as server:
        yield server


def ask(server, path="/v1/chat/completions", headers=None, **body):
    if path.endswith("chat/completions"):
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
    return post(server, path, json.dumps(body), headers)


def post(server, path, content, headers=None):
    headers = {"content-type": "application/json", **(headers or {})}
    return HTTP.post(server.url + path, content=content, headers=headers)


def events(text):
    lines = [
        line.removeprefix("data: ")
        for line in text.split("\n\n")
        if line and not line.startswith(":")
    ]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# ------------------------------------------------------------------------------------------- shapes
def test_a_stream_is_role_text_one_finish_reason_usage_and_done(stub):
    answer = ask(stub, stream=True, n=2, stream_options={"include_usage": True})
    assert (
        answer.headers["content-type"].startswith("text/event-stream")
        and answer.headers["x-accel-buffering"] == "no"
    )
    *chunks, usage = events(answer.text)
    for i in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == SAID
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"] and mine[-1][
            "finish_reason"
        ]
    made = 2 * len(stub.engine.tok.encode(SAID))
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == made
    whole = ask(stub, n=2).json()
    assert [c["message"]["content"] for c in whole["choices"]] == [SAID, SAID] and whole[
        "usage"
    ] == usage["usage"]


def test_no_answer_waits_for_an_acknowledgement(stub):
    """Nagle's algorithm would hold an answer's second packet back until the client's delayed ACK, 40 ms later."""
    seconds = []
    for _ in range(20):
        begin = time.monotonic()
        HTTP.get(stub.url + "/health")
        seconds.append(time.monotonic() - begin)
    assert sorted(seconds)[5] < 0.03


def test_usage_comes_only_when_asked_for(stub):
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        assert all(c["choices"] for c in events(ask(stub, stream=True, **options).text))


def test_text_cut_anywhere_never_shows_a_replacement_character(stub):
    total = len(stub.engine.tok.encode(SAID))
    for most in range(1, total + 1):
        chunks = events(ask(stub, stream=True, max_tokens=most).text)
        streamed = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        whole = ask(stub, max_tokens=most).json()["choices"][0]
        assert (
            streamed == whole["message"]["content"]
            and SAID.startswith(streamed)
            and "\ufffd" not in streamed
        )
        assert whole["finish_reason"] == ("stop" if most == total else "length")


def test_completions_echo_prompts_of_all_four_shapes(stub):
    tok = stub.engine.tok
    for prompt in ("ab", ["ab"], tok.encode("ab"), [tok.encode("ab")]):
        choice = ask(stub, "/v1/completions", prompt=prompt, echo=True).json()["choices"][0]
        assert choice["text"] == "ab" + SAID
    both = ask(stub, "/v1/completions", prompt=["ab", "the"], echo=True, n=2, stream=True).text
    texts = {}
    for c in events(both):
        texts[c["choices"][0]["index"]] = (
            texts.get(c["choices"][0]["index"], "") + c["choices"][0]["text"]
        )
    assert texts == {0: "ab" + SAID, 1: "ab" + SAID, 2: "the" + SAID, 3: "the" + SAID}


def test_every_documented_field_is_applied_ignored_or_refused(stub):
    models = {**api.ChatRequest.model_fields, **api.CompletionRequest.model_fields}
    assert set(api.FIELDS["applied"]) | set(api.FIELDS["extra"]) == set(models)
    for name in api.FIELDS["ignored"]:
        assert name not in models and ask(stub, **{name: {"a": 1}}).status_code == 200
    for name in api.FIELDS["refused"]:
        assert error_of(ask(stub, **{name: {"a": 1}}), 400)["param"] == name
    assert len(sum(api.FIELDS.values(), ())) == len(set(sum(api.FIELDS.values(), ())))


CALL = '{"name": "add", "arguments": {"x": 1}}'


@pytest.mark.parametrize(
    "said, content, calls",
    [
        (f"Sure.<tool_call>\n{CALL}\n</tool_call>", "Sure.", 1),
        (f"<tool_call>{CALL}</tool_call>\n" * 2, None, 2),
        (CALL, None, 1),
        (f"[{CALL}, {CALL}]", None, 2),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', 0),
        ("See [1] and {2}.", "See [1] and {2}.", 0),
        ("a < b <tool", "a < b <tool", 0),
        ("<tool_call>no", "<tool_call>no", 0),
    ],
)
def test_tool_calls_are_told_from_text_in_both_modes(said, content, calls):
    tok = make_tokenizer()
    tok.chat_template = TEMPLATE_WITH_TOOLS
    with running(Stub(said, tok=tok)) as server:
        whole = ask(server, tools=TOOLS).json()["choices"][0]
        chunks = [c["choices"][0] for c in events(ask(server, tools=TOOLS, stream=True).text)]
        single = ask(server, tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
        off = ask(server, tools=TOOLS, tool_choice="none").json()["choices"][0]
    assert whole["message"]["content"] == content and whole["finish_reason"] == (
        "tool_calls" if calls else "stop"
    )
    found = whole["message"].get("tool_calls", [])
    assert [json.loads(c["function"]["arguments"]) for c in found] == [{"x": 1}] * calls and len(
        {c["id"] for c in found}
    ) == calls
    assert "".join(c["delta"].get("content") or "" for c in chunks) == (content or "")
    assert sum(len(c["delta"].get("tool_calls", ())) for c in chunks) == calls
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    assert len(single["message"].get("tool_calls", ())) == min(calls, 1)
    assert off["message"]["content"] == said and "tool_calls" not in off["message"]


def test_embeddings_come_as_lists_and_as_base64(stub):
    plain = ask(stub, "/v1/embeddings", input=["a", "b"]).json()["data"]
    packed = ask(stub, "/v1/embeddings", input="a", encoding_format="base64").json()["data"][0][
        "embedding"
    ]
    assert [d["embedding"] for d in plain] == [[0.6, 0.8]] * 2
    assert struct.unpack("<2f", base64.b64decode(packed)) == pytest.approx((0.6, 0.8))


def test_tokenize_and_detokenize_are_inverse(stub):
    ids = ask(stub, "/tokenize", prompt=SAID).json()
    assert ids["count"] == len(ids["tokens"]) and "\ufffd" not in "".join(ids["token_strs"])
    assert ask(stub, "/detokenize", tokens=ids["tokens"]).json()["prompt"] == SAID
    chat = ask(stub, "/tokenize", messages=[{"role": "user", "content": "hi"}]).json()["tokens"]
    assert stub.engine.tok.decode(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


# ------------------------------------------------------------------------------------------- errors
def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"schema": schema}}


BAD = [
    dict(messages=[]),
    dict(messages="x"),
    dict(messages=[{"role": "user"}]),
    dict(messages=[1]),
    dict(messages=[{"role": "wizard", "content": "a"}]),
    dict(temperature=-1),
    dict(temperature="hot"),
    dict(n=0),
    dict(n=10**9),
    dict(max_tokens=-1),
    dict(max_tokens=0),
    dict(top_p=0),
    dict(stop=[1]),
    dict(stop=["a"] * 65),
    dict(logit_bias={"x": 1}),
    dict(regex="(" * 50),
    dict(logit_bias={"999999": 1}),
    dict(top_logprobs=2),
    dict(response_format={"type": "xml"}),
    dict(seed=1.5),
    dict(response_format={"type": "json_schema", "json_schema": []}),
    dict(stream_options=3),
    dict(response_format=json_schema(1)),
    dict(response_format=json_schema({"anyOf": [{"$ref": "#"}, {"type": "null"}]})),
    dict(tools=TOOLS, tool_choice="sub"),
    dict(tools=TOOLS, tool_choice={"function": "x"}),
    dict(tools=[{"type": "custom", "custom": {"name": "x"}}]),
    dict(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": {}}),
]


@pytest.mark.parametrize("body", BAD, ids=[str(b)[:50] for b in BAD])
def test_a_bad_field_is_a_400_in_openais_shape(stub, body):
    error_of(ask(stub, **body), 400)


def test_bad_bodies_and_unknown_places_are_errors_in_openais_shape(stub):
    for content in (
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"null",
        b'{"messages": [NaN]}',
        b'{"prompt": {}, "temperature": NaN}',
    ):
        for path in (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/embeddings",
            "/tokenize",
            "/detokenize",
        ):
            error_of(post(stub, path, content), 400)
    error_of(HTTP.get(stub.url + "/v1/nothing"), 404)
    error_of(HTTP.get(stub.url + "/v1/completions"), 405)
    assert "gpt-5" in error_of(ask(stub, model="gpt-5"), 404)["message"]
    assert error_of(ask(stub, "/v1/completions", prompt=[999_999]), 400)
    assert error_of(ask(stub, "/v1/completions", prompt="a", max_tokens=0), 400)
    error_of(ask(stub, model="\ud800"), 404)
    assert (
        ask(
            stub, messages=[{"role": "user", "content": "half a \ud800 pair"}], user="\ud800"
        ).status_code
        == 200
    )


def test_a_body_of_another_type_than_json_is_refused(stub):
    """A page of another origin may send text/plain without asking first."""
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert ask(stub, headers={"content-type": kind}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error = error_of(ask(stub, headers={"content-type": kind}), 400)
        assert "application/json" in error["message"]


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/v1/embeddings", "application/json"),
        ("/v1/chat/completions", "application/json"),
    ],
)
def test_an_internal_error_has_openais_shape_and_the_connection_stays(
    path, kind, monkeypatch, capfd
):
    def fails(*_):
        raise RuntimeError("out of luck")

    with running(Stub()) as server:
        monkeypatch.setattr(serve, "encode_vector", fails)
        monkeypatch.setattr(answers.Answer, "whole", fails)
        monkeypatch.setattr(server.engine, "embed", lambda ids: [0.6, 0.8])
        error = error_of(ask(server, path, {"content-type": kind}, input="a"), 500)
        assert (
            error["type"] == "server_error"
            and "RuntimeError" in error["message"]
            and "luck" not in error["message"]
        )
        assert HTTP.get(server.url + "/health").status_code == 200  # on the same connection
        assert len(server.service.client.jobs) == 0
    assert "out of luck" in capfd.readouterr().err


def test_a_long_prompt_is_refused_with_the_numbers_and_a_long_answer_is_clamped(stub):
    error = error_of(ask(stub, "/v1/completions", prompt=[5] * 4096), 400)
    assert "4,096" in error["message"] and error["code"] == "context_length_exceeded"
    assert (
        ask(stub, "/v1/completions", prompt=[5] * 4090, max_tokens=10**6).json()["usage"][
            "completion_tokens"
        ]
        == 6
    )


def test_a_body_that_is_too_large_or_too_slow_is_refused(monkeypatch):
    monkeypatch.setattr(door, "ARRIVAL_SECONDS", 0.3)
    with running(Stub(), max_body=1000) as server:
        error_of(ask(server, user="x" * 2000), 413)
        chunks = iter([b'{"user": "', *[b"x" * 100] * 20])
        error_of(post(server, "/v1/completions", chunks), 413)
        assert b"408" in raw(
            server,
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b"content-length: 10\r\n\r\n{",
        )
        assert raw(server, b"POST /v1/compl") == b""  # the head does not come: hung up on
        assert raw(server, b"") == b""
        assert ask(server).status_code == 200


@pytest.mark.slow
def test_any_value_in_any_field_is_answered_or_refused():
    rng = random.Random(6)
    values = [
        None,
        True,
        0,
        1,
        -1,
        2**70,
        1.5,
        1e308,
        "",
        "x",
        "\u0000",
        [],
        {},
        [None],
        [[]],
        {"": {}},
        ["a"] * 99,
        "required",
        [{"role": "user"}],
        {"type": "function"},
        [{"type": "function", "function": {"name": "f", "parameters": 3}}],
        json_schema({"enum": []}),
    ]
    with running(Stub("x")) as server:
        for path, model in (
            ("/v1/chat/completions", api.ChatRequest),
            ("/v1/completions", api.CompletionRequest),
            ("/v1/embeddings", api.EmbeddingRequest),
            ("/tokenize", api.TokenizeRequest),
        ):
            names = [*model.model_fields, *api.FIELDS["refused"], *api.FIELDS["ignored"]]
            for _ in range(200):
                body = {
                    "messages": [{"role": "user", "content": "a"}],
                    "prompt": "a",
                    "input": "a",
                    "max_tokens": 5,
                }
                body |= {name: rng.choice(values) for name in rng.sample(names, rng.randint(1, 3))}
                answer = post(server, path, json.dumps(body))
                assert answer.status_code in (200, 400, 404), (body, answer.text)
                assert answer.status_code == 200 or error_of(answer, answer.status_code)
        until(lambda: len(server.service.client.jobs) == 0)


def test_ten_megabytes_are_refused_before_they_are_read(stub):
    body = json.dumps({"prompt": "x" * 10**7}).encode()
    error_of(post(stub, "/v1/completions", body), 413)
    error_of(
        post(stub, "/v1/completions", (body[i : i + 65536] for i in range(0, len(body), 65536))),
        413,
    )


def raw(server, data, half_close=False):
    """Send bytes, read to the end of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
        s.sendall(data)
        if half_close:
            s.shutdown(socket.SHUT_WR)
        out = b""
        with contextlib.suppress(ConnectionResetError):
            while part := s.recv(65536):
                out += part
                if out.endswith(b"0\r\n\r\n"):
                    break
        return out


def test_garbage_and_half_closed_sockets_do_no_harm(stub):
    rng = random.Random(0)
    body = b'{"prompt": "a"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n"
    for _ in range(50):
        data = bytearray(head + body)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        answer = raw(stub, bytes(data) + b"\r\n\r\n", half_close=True)
        assert not answer.startswith(b"HTTP/1.1 5")
    raw(stub, head + body, half_close=True)
    assert ask(stub).status_code == 200
    until(lambda: len(stub.service.client.jobs) == 0 and not stub.engine.live)


# ---------------------------------------------------------------------------------- many and unruly
def test_who_leaves_is_cancelled_in_both_modes():
    with running(Stub("x" * 3000, delay=0.005)) as server:
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(server.url + "/v1/completions", json={"prompt": "a"}, timeout=0.5)
        until(lambda: not server.engine.live and len(server.service.client.jobs) == 0)
        with HTTP.stream(
            "POST", server.url + "/v1/completions", json={"prompt": "a", "stream": True}
        ) as answer:
            next(answer.iter_lines())
        until(lambda: not server.engine.live and len(server.service.client.jobs) == 0)
        until(lambda: not server.service.client.jobs and server.service.client.stats["active"] == 0)
        assert len(server.engine.cancelled) == 2


def test_a_full_queue_is_429_and_draining_is_503():
    with running(Stub("x" * 150, delay=0.01), concurrency=1, queue=1) as server:
        threads = [threading.Thread(target=ask, args=(server,)) for _ in range(2)]
        [t.start() for t in threads]
        until(lambda: len(server.service.client.jobs) == 2)
        answer = ask(server)
        assert (
            error_of(answer, 429)["code"] == "queue_full"
            and int(answer.headers["retry-after"]) >= 1
        )
        server.service.draining = True
        assert error_of(ask(server), 503) and error_of(HTTP.get(server.url + "/ready"), 503)
        assert HTTP.get(server.url + "/health").status_code == 200
        [t.join() for t in threads]  # what runs finishes
        until(lambda: len(server.service.client.jobs) == 0)


def test_keys_take_turns_in_the_queue():
    engine = Stub("x")
    front, back = socket.socketpair()
    for number, (key, length) in enumerate(
        [("a", 1), ("a", 2), ("a", 3), ("b", 11), ("c", 21), ("b", 12)]
    ):
        front.sendall(message("submit", number, key, [5] * length, vars(Sampling()), None, None))
    front.shutdown(socket.SHUT_WR)
    loop = Worker(engine, back, 1)
    assert loop.take_orders(wait=True)
    while loop.waiting or engine.live:
        loop.admit()
        loop.collect(engine.step())
    assert not loop.take_orders(wait=True)  # nobody can ask any more
    assert engine.order == [1, 11, 21, 2, 12, 3]


def test_an_answer_that_takes_too_long_ends_in_an_error():
    with running(Stub("x" * 5000, delay=0.01), timeout=0.3) as server:
        assert error_of(ask(server), 504)["code"] == "timeout"
        *_, last = events(ask(server, stream=True).text)
        assert last["error"]["code"] == "timeout"
        until(lambda: not server.engine.live)


def test_an_engine_that_fails_tells_every_caller_and_is_not_ready():
    with running(Stub("x" * 500, delay=0.01)) as server:
        got = []
        threads = [
            threading.Thread(target=lambda: got.append(ask(server))),
            threading.Thread(target=lambda: got.append(ask(server, stream=True))),
        ]
        [t.start() for t in threads]
        until(lambda: len(server.engine.live) == 2)
        server.engine.fails = "out of memory"
        [t.join() for t in threads]
        assert sorted(a.status_code for a in got) == [200, 500] and all(
            "out of memory" in a.text for a in got
        )
        assert error_of(ask(server), 503) and error_of(HTTP.get(server.url + "/ready"), 503)
        assert error_of(ask(server, "/v1/embeddings", input="a"), 503)


def test_one_slow_reader_slows_nobody_else():
    with running(Stub("x" * 2000)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:  # asks, and never reads
            body = json.dumps({"prompt": "a", "stream": True, "n": 16}).encode()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: "
                + str(len(body)).encode()
                + b"\r\n\r\n"
                + body
            )
            until(lambda: server.engine.made > 100)
            begin = time.monotonic()
            assert ask(server, stream=True).text.endswith("[DONE]\n\n")
            assert time.monotonic() - begin < 10
        until(lambda: len(server.service.client.jobs) == 0)


def test_quiet_streams_are_kept_alive(monkeypatch):
    monkeypatch.setattr(serve.Service, "keep_alive", 0.05)
    with running(Stub("xyz", delay=0.3)) as server:
        text = ask(server, stream=True).text
        assert text.count(": keep-alive\n\n") >= 2 and len(events(text)) == 5


def test_a_hostile_grammar_is_refused_soon_while_all_else_streams():
    hostile = ["(((?:){1000}){1000}){1000}", "(a{1000}){1000}", "(.{0,300}x){30}"]
    with running(Stub("tick " * 100, delay=0.005)) as server:
        refusals, gaps, last = [], [], None
        threads = [
            threading.Thread(target=lambda p=p: refusals.append(ask(server, regex=p)))
            for p in hostile
        ]
        with HTTP.stream(
            "POST", server.url + "/v1/completions", json={"prompt": "a", "stream": True}
        ) as answer:
            for line in answer.iter_lines():
                now = time.monotonic()
                gaps.append(now - (last or now))
                if last is None:
                    [t.start() for t in threads]
                last = now
        [t.join(20) for t in threads]
        assert len(refusals) == 3 and all(
            "too much work" in error_of(r, 400)["message"] for r in refusals
        )
        assert (
            max(gaps) < 4 and max(r.elapsed.total_seconds() for r in refusals) < 30
        )  # 0.1 and 2 on a quiet machine


def test_what_is_nested_too_deeply_for_a_message_is_refused():
    deep = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deeply"):
        message("call", 1, "grammar", "json", deep)


def test_grammars_that_wait_to_be_built_have_a_limit_and_plain_requests_none():
    with running(Stub("x")) as server:
        server.service.building = 32
        assert (
            error_of(ask(server, regex="a+"), 429)["code"] == "queue_full"
            and ask(server).status_code == 200
        )


def test_a_repeated_schema_is_built_once(monkeypatch):
    built, make = [], worker.json_grammar
    monkeypatch.setattr(worker, "json_grammar", lambda *a: built.append(a) or make(*a))
    with running(Stub()) as server:
        for _ in range(3):
            assert (
                ask(
                    server, response_format=json_schema({"type": "object", "properties": {"a": {}}})
                ).status_code
                == 200
            )
    assert len(built) == 1


# ------------------------------------------------------------------------------ keys, logs, figures
def test_keys_are_asked_for_and_limited_and_never_logged(capfd):
    with running(Stub(), {"sk-secret-1": "ann", "sk-secret-2": "bob"}, rate_limit=3) as server:
        error_of(ask(server), 401)
        error_of(ask(server, headers={"Authorization": "Bearer sk-secret"}), 401)
        error_of(HTTP.get(server.url + "/stats"), 401)
        assert HTTP.get(server.url + "/health").status_code == 200
        ann, bob = ({"Authorization": f"Bearer sk-secret-{i}"} for i in (1, 2))
        assert [ask(server, headers=ann).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert (
            int(ask(server, headers=ann).headers["retry-after"]) <= 60
            and ask(server, headers=bob).status_code == 200
        )
        stats, metrics = (
            HTTP.get(server.url + path, headers=bob).text for path in ("/stats", "/metrics")
        )
    log = capfd.readouterr().err
    assert "ann" in log and "secret" not in log + stats + metrics
    assert not any("hi" in row.get("prompts", ()) for row in map(json.loads, log.splitlines()))


def test_one_key_cannot_reach_or_read_about_another_ones_requests(capfd):
    ann, bob = ({"Authorization": f"Bearer {key}"} for key in ("sk-ann-secret", "sk-bob-secret"))
    with running(
        Stub("x" * 300, delay=0.005), {"sk-ann-secret": "ann", "sk-bob-secret": "bob"}
    ) as server:
        with HTTP.stream(
            "POST",
            server.url + "/v1/completions",
            headers={**ann, "X-Request-Id": "mine"},
            json={"prompt": "the diary of ann", "stream": True, "user": "ann@home"},
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            seen = [
                HTTP.get(server.url + path, headers=bob).text
                for path in ("/stats", "/metrics", "/runs", "/v1/models")
            ]
            same = {
                **bob,
                "X-Request-Id": "mine",
            }  # leaving under the same id changes nothing for its first owner
            with pytest.raises(httpx.ReadTimeout):
                HTTP.post(
                    server.url + "/v1/completions", headers=same, json={"prompt": "b"}, timeout=0.3
                )
            for method, path in (
                ("GET", "/v1/completions/mine"),
                ("DELETE", "/v1/completions/mine"),
                ("POST", "/v1/cancel"),
            ):
                assert HTTP.request(method, server.url + path, headers=bob).status_code in (
                    404,
                    405,
                )
            rest = [
                json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")
            ]
        assert (
            "".join(c["text"] for c in rest).endswith("x" * 200)
            and rest[-1]["finish_reason"] == "stop"
        )
        until(lambda: len(server.service.client.jobs) == 0)
    for text in [*seen, capfd.readouterr().err]:
        assert not any(word in text for word in ("diary", "secret", "ann@home"))
    assert not any("ann" in text for text in seen)


def test_two_requests_with_one_id_stay_two():
    with running(Stub(None, delay=0.002), {"k1": "a", "k2": "b"}) as server:
        texts = {}

        def client(key, prompt):
            headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "same"}
            answer = ask(server, "/v1/completions", headers, prompt=prompt, stream=True)
            assert answer.headers["x-request-id"] == "same"
            texts[key] = "".join(c["choices"][0]["text"] for c in events(answer.text))

        threads = [
            threading.Thread(target=client, args=a)
            for a in (("k1", "abc" * 30), ("k2", "xyz" * 30))
        ]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert texts == {"k1": "cba" * 30, "k2": "zyx" * 30}


def test_a_log_line_says_how_long_and_why_and_no_prompt_unless_asked(capfd):
    for wanted in (False, True):
        with running(Stub(), log_prompts=wanted) as server:
            ask(server, "/v1/completions", {"X-Request-Id": "r-1"}, prompt="secret words")
        row = json.loads(capfd.readouterr().err.splitlines()[-1])
        assert (
            row["id"] == "r-1"
            and row["status"] == 200
            and row["reason"] == "stop"
            and row["ttft_seconds"] >= 0
        )
        assert (
            row["tokens"] == len(server.engine.tok.encode(SAID))
            and ("secret words" in str(row)) == wanted
        )


def test_figures_are_in_prometheus_format(stub):
    from prometheus_client.parser import text_string_to_metric_families

    ask(stub)
    families = {
        f.name: f for f in text_string_to_metric_families(HTTP.get(stub.url + "/metrics").text)
    }
    for name in (
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
        "e2e_request_latency_seconds",
    ):
        assert families[f"llm:{name}"].type == "histogram"
    assert (
        families["llm:generation_tokens"].type == "counter"
        and families["llm:num_requests_running"].samples[0].value == 0
    )
    assert {"queue", "tokens_per_second", "memory", "models"} <= set(
        HTTP.get(stub.url + "/stats").json()
    )


def test_browsers_of_other_origins_are_let_in_only_when_named():
    ask_first = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
    for cors, allowed in (("", False), ("http://b", False), ("http://a", True), ("*", True)):
        with running(Stub("x"), {"k": "a"}, cors=cors) as server:
            first = HTTP.options(server.url + "/v1/chat/completions", headers=ask_first)
            answer = ask(server, headers={"Origin": "http://a", "Authorization": "Bearer k"})
            assert (
                ("access-control-allow-origin" in answer.headers)
                == allowed
                == (first.status_code == 200)
            )


def test_runs_are_listed_and_read_from_a_step_on(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": 1.5}}\n' for i in range(10))
    )
    with running(Stub(), runs=str(tmp_path)) as server:
        assert HTTP.get(server.url + "/runs").json() == {"runs": ["one"]}
        assert [r["step"] for r in HTTP.get(server.url + "/runs/one?after=7").json()["rows"]] == [
            8,
            9,
        ]
        for name in ("two", "%2e%2e", "..%2fone"):  # a plain .. the client itself resolves
            error_of(HTTP.get(server.url + f"/runs/{name}"), 404)


def test_bad_flags_are_one_clear_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use"):
        door.listen(serve.Args(port=taken.getsockname()[1]))
    (tmp_path / "a.pem").write_text("no certificate")
    with pytest.raises(UserError, match="do not open as a pair"):
        door.listen(
            serve.Args(certificate=str(tmp_path / "a.pem"), certificate_key=str(tmp_path / "a.pem"))
        )
    keys = tmp_path / "keys"
    keys.write_text("# mine\nann:k1\nk2\n")
    keys.chmod(0o644)
    found = door.read_keys(serve.Args(api_key_file=str(keys)))
    assert (
        found["k1"] == "ann"
        and found["k2"].startswith("key-")
        and "chmod 600" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="name=folder"):
        serve.read_adapters(serve.Args(adapters="x"))


# -------------------------------------------------------------------------------- a tiny real model
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    text = ['{"name": "value", "x": [1, 2, 3]} 😀 漢字 naïve the quick brown fox'] * 3
    tok = Tokenizer.train(text, 300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    model = Transformer(
        Config(
            "qwen3",
            tok.vocab_size,
            32,
            64,
            2,
            4,
            2,
            8,
            256,
            bos_token_id=tok.bos_id,
            eos_token_id=tok.eos_id,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5 if p.ndim == 2 else 0.1)
    model.save_pretrained(folder)
    tok.save(folder)
    with running(Engine(folder, "cpu", "float32", debug_invariants=True)) as server:
        server.folder = str(folder)
        yield server


def test_a_model_without_a_chat_template_says_so_and_completes(tmp_path):
    tok = Tokenizer.train(["abc"], 260, special_tokens=["<|endoftext|>"])
    with running(Stub(tok=tok)) as server:
        assert error_of(ask(server), 400)["code"] == "no_chat_template"
        assert ask(server, "/v1/completions", prompt="a").status_code == 200


def test_echoed_logprobs_are_those_the_model_wrote_with(real):
    ids = real.engine.tok.encode("the quick")
    made = ask(
        real,
        "/v1/completions",
        prompt=ids,
        max_tokens=20,
        temperature=0,
        logprobs=3,
        ignore_eos=True,
        return_token_ids=True,
    ).json()["choices"][0]
    again = ask(
        real, "/v1/completions", prompt=ids + made["token_ids"], max_tokens=0, echo=True, logprobs=3
    ).json()["choices"][0]
    assert again["logprobs"]["token_logprobs"][0] is None and len(made["token_ids"]) == 20
    assert again["logprobs"]["token_logprobs"][len(ids) :] == pytest.approx(
        made["logprobs"]["token_logprobs"], abs=1e-3
    )
    assert again["logprobs"]["tokens"][len(ids) :] == made["logprobs"]["tokens"]


def test_a_prompt_cut_within_a_character_goes_on_with_the_whole_one():
    tok = make_tokenizer()
    data = "ab 😀 é".encode()
    ids = [next(i for i in range(tok.vocab_size) if tok.token_bytes(i) == bytes([b])) for b in data]

    class Cut(Stub):
        def submit(self, prompt, sampling, request_id=None, adapter=None):
            rest = ids[len(prompt) :]
            self.live[request_id] = [sampling, rest, False, self.tok.stream(skip_special=True), 0]
            return request_id

    with running(Cut(tok=tok)) as server:
        for cut in range(1, len(ids)):
            body = dict(prompt=ids[:cut], return_token_ids=True)
            begun = data[:cut].decode("utf-8", "ignore")
            for echo in (True, False):
                whole = ask(server, "/v1/completions", echo=echo, **body).json()["choices"][0][
                    "text"
                ]
                chunks = events(ask(server, "/v1/completions", echo=echo, stream=True, **body).text)
                parts = [c["choices"][0]["text"] for c in chunks]
                assert whole == "".join(parts) == data.decode()[0 if echo else len(begun) :], cut


def test_completions_logprobs_tell_places_and_ids_of_every_token(real):
    body = dict(
        prompt="naïve 😀",
        max_tokens=25,
        seed=5,
        echo=True,
        logprobs=4,
        ignore_eos=True,
        return_token_ids=True,
    )
    choice, tok = ask(real, "/v1/completions", **body).json()["choices"][0], real.engine.tok
    l = choice["logprobs"]
    assert (
        len(
            set(
                map(
                    len,
                    (
                        l["tokens"],
                        l["token_logprobs"],
                        l["top_logprobs"],
                        l["text_offset"],
                        l["top_token_ids"],
                    ),
                )
            )
        )
        == 1
    )
    ids, data = tok.encode("naïve 😀") + choice["token_ids"], b""
    for i, token, at, top, top_ids in zip(
        ids, l["tokens"], l["text_offset"], l["top_logprobs"], l["top_token_ids"]
    ):
        assert token == answers.spell(tok, i)[0] and "\ufffd" not in token and at <= len(choice["text"])
        if len(data.decode("utf-8", "ignore").encode()) == len(data):
            assert at == len(data.decode())
        assert not top or (
            list(top) == list(top_ids)
            and all(answers.spell(tok, k)[0] == text for text, k in top_ids.items())
        )
        data += tok.token_bytes(i)
    streamed = [
        c["choices"][0]["logprobs"]
        for c in events(ask(real, "/v1/completions", stream=True, **body).text)
    ]
    assert sum((s["text_offset"] for s in streamed if s), []) == l["text_offset"]


def test_chat_logprobs_of_parts_of_a_character_join_to_it(real):
    tok = real.engine.tok
    wanted = tok.encode("漢😀")
    bias = {str(i): 100 for i in wanted}
    answer = ask(real, logit_bias=bias, max_tokens=30, logprobs=True, top_logprobs=3, seed=3).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert any(t["token"].startswith("bytes:") for t in content) or all(
        len(tok.token_bytes(i)) > 1 for i in wanted
    )
    for t in content:
        for entry in (t, *t["top_logprobs"]):
            data = tok.token_bytes(entry["id"]) or tok.decode([entry["id"]]).encode()
            assert (
                bytes(entry["bytes"]) == data and entry["token"] == answers.spell(tok, entry["id"])[0]
            )


def test_chat_logprobs_and_seeds_and_n_on_a_real_model(real):
    body = dict(max_tokens=12, n=3, seed=7, logprobs=True, top_logprobs=2)
    one, two = (ask(real, **body).json()["choices"] for _ in range(2))
    assert one == two and len({c["message"]["content"] for c in one}) == 3
    for token in one[0]["logprobs"]["content"]:
        assert len(token["top_logprobs"]) == 2 and "\ufffd" not in token["token"] and token["bytes"]
    streamed = {}
    for chunk in events(ask(real, stream=True, **body).text):
        c = chunk["choices"][0]
        streamed.setdefault(c["index"], []).extend((c["logprobs"] or {"content": []})["content"])
    assert [streamed[i] for i in range(3)] == [c["logprobs"]["content"] for c in one]


def test_json_schema_and_regex_and_json_object_bind_a_real_model(real):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for i in range(5):
        answer = json.loads(
            ask(real, response_format=form, max_tokens=60, seed=i).json()["choices"][0]["message"][
                "content"
            ]
        )
        assert isinstance(answer["a"], int) and answer["b"] in ("x", "y") and len(answer) == 2
    assert isinstance(
        json.loads(
            ask(real, response_format={"type": "json_object"}, max_tokens=40).json()["choices"][0][
                "message"
            ]["content"]
        ),
        dict,
    )
    assert (
        ask(real, "/v1/completions", prompt="a", regex="(ab){3}").json()["choices"][0]["text"]
        == "ababab"
    )


def test_stop_ends_the_text_before_itself(real):
    body = dict(prompt="the quick", max_tokens=60, temperature=0, ignore_eos=True)
    whole = ask(real, "/v1/completions", **body).json()["choices"][0]["text"]
    stop = whole[10:13]
    cut = ask(real, "/v1/completions", **body, stop=stop).json()["choices"][0]
    assert cut["text"] == whole[: whole.find(stop)] and cut["finish_reason"] == "stop"


def test_random_clients_that_leave_leave_no_block_behind(real):
    async def client(http, rng):
        body = {
            "prompt": rng.choice("abc") * rng.randint(1, 40),
            "max_tokens": 30,
            "stream": rng.random() < 0.5,
            "n": rng.choice([1, 2]),
        }
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(
                http.post(real.url + "/v1/completions", json=body), rng.choice([0.01, 0.05, 60])
            )

    async def all_of_them():
        rng, limits = random.Random(1), httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=60, limits=limits) as http:
            await asyncio.gather(*(client(http, rng) for _ in range(60)))

    asyncio.run(all_of_them())
    until(lambda: len(real.service.client.jobs) == 0 and not real.engine.has_work)
    assert real.engine.stats()["blocks_used"] == 0 and not real.engine.requests


@pytest.fixture(scope="module")
def tuned(real, tmp_path_factory):
    """The tiny model with an adapter that changes much, and the two merged -> (adapter's folder, merged folder)"""
    folder, model = (
        tmp_path_factory.mktemp("tuned"),
        lora.apply(Transformer.from_pretrained(real.folder), r=4, alpha=16),
    )
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data.normal_(std=0.5)
    lora.save_adapter(model, folder / "adapter")
    lora.merge(model).save_pretrained(folder / "merged")
    real.engine.tok.save(folder / "merged")
    return folder / "adapter", folder / "merged"


def test_an_adapter_is_a_model_that_answers_as_the_merged_one(real, tuned):
    body = dict(temperature=0, max_tokens=24, ignore_eos=True, return_token_ids=True)
    engine = Engine(real.folder, "cpu", "float32", adapters={"poet": str(tuned[0])})
    with (
        running(engine, adapters=f"poet={tuned[0]}") as server,
        running(Engine(str(tuned[1]), "cpu", "float32")) as merged,
    ):
        listed = HTTP.get(server.url + "/v1/models").json()["data"]
        assert [(m["id"], m["parent"]) for m in listed] == [("stub", None), ("poet", "stub")]
        before = ask(server, "/v1/embeddings", input="the fox").json()
        base, poet = (ask(server, model=name, **body).json() for name in (None, "poet"))
        ids = [r["choices"][0]["token_ids"] for r in (base, poet, ask(merged, **body).json())]
        assert ids[0] != ids[1] == ids[2] and poet["model"] == "poet"
        assert (
            ask(server, "/v1/embeddings", input="the fox").json() == before
        )  # the adapter stays with its own requests
        for path, more in (
            ("/v1/embeddings", dict(input="a")),
            ("/v1/completions", dict(prompt="ab", echo=True, logprobs=1)),
        ):
            assert "adapter" in error_of(ask(server, path, model="poet", **more), 400)["message"]


def test_embeddings_of_a_real_model_have_length_one(real):
    vectors = [
        d["embedding"]
        for d in ask(real, "/v1/embeddings", input=["the fox", "the quick", "the fox"]).json()[
            "data"
        ]
    ]
    assert (
        sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-4)
        and vectors[0] == vectors[2] != vectors[1]
    )
