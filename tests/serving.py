"""A server over a stub engine or a tiny real one, and how its tests ask it."""

import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch
import uvicorn
from conftest import ROOT  # noqa: F401  (puts the root on the path)

import serve
from chat import CHATML_TEMPLATE
from common import UserError
from engine.scheduler import Delta, TokenLogprob
from generate import Engine
from model import Config, Transformer
from server import door
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


TEMPLATE_WITH_TOOLS = (
    "{% if tools %}<tool_call>{{ tools|tojson }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def make_tokenizer():
    tok = Tokenizer.train(
        ['the quick brown fox {"a": 1}'],
        266,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tok.chat_template = CHATML_TEMPLATE
    return tok


class Stub:
    """Says what it is told to: a token a step for each request, in n equal answers."""

    max_model_len = 4096
    sampling_defaults: dict = {}

    def __init__(self, said=SAID, delay=0.0, tok=None):
        self.tok, self.said, self.delay = tok or make_tokenizer(), said, delay
        self.live, self.order, self.cancelled, self.fails, self.made = {}, [], [], None, 0

    def warm_up(self, tune):
        pass

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
                    number, i, text, [ids[at]], [], ("length" if cut else "stop") if last else None
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

    def read(self, ids, count=None):
        time.sleep(self.delay)
        yield [0.6, 0.8] if count is None else [TokenLogprob(i, -1.0, []) for i in ids]

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
            "longest_wait": 0.0,
        }


@contextlib.contextmanager
def running(engine, keys=None, **flags):
    """A server on a free port -> its base URL, service and port; stopped at the end."""
    args = serve.Args(**{"model": "stub", "port": 0, **flags})
    app = serve.create_app(engine, args, keys)
    config, sock = door.listen(args)
    config.app = app
    server = uvicorn.Server(config)
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
    with running(Engine(folder, "cpu", "float32")) as server:
        server.folder = str(folder)
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
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def completion_head(length):
    """The head of a POST of JSON to /v1/completions, as bytes."""
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % length
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
