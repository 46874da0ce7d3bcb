"""serve.py: what a client sees, whatever it does; with a stub engine and a tiny real one."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from conftest import ROOT
from serving import (  # noqa: F401  (fixtures, and what test_deploy.py takes from here)
    HTTP,
    SAID,
    Stub,
    ask,
    completion_head,
    error_of,
    events,
    real,
    running,
    stub,
    until,
)

import lora
import serve
from generate import Engine
from model import Transformer


def test_a_stream_is_role_text_one_finish_reason_usage_and_done(stub):
    answer = ask(stub, stream=True, n=2, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    *chunks, usage = events(answer.text)
    for i in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == SAID
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
        assert mine[-1]["finish_reason"]
    made = 2 * len(stub.engine.tok.encode(SAID))
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == made
    whole = ask(stub, n=2).json()
    assert [c["message"]["content"] for c in whole["choices"]] == [SAID, SAID]
    assert whole["usage"] == usage["usage"]


def test_the_pages_load_nothing_from_elsewhere(stub):
    page = HTTP.get(stub.url + "/")
    assert not [word for word in ("<script src", "<link href=http", "@import") if word in page.text]
    page = HTTP.get(stub.url + "/docs")
    assert page.headers["content-type"].startswith("text/plain")  # no script runs in it
    assert "/v1/chat/completions" in page.text
    assert "/v1/embeddings" in HTTP.get(stub.url + "/openapi.json").json()["paths"]
    assert HTTP.get(stub.url + "/redoc").status_code == 404


def test_usage_comes_only_when_asked_for(stub):
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        assert all(c["choices"] for c in events(ask(stub, stream=True, **options).text))


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
        for t in threads:
            t.start()
        until(lambda: len(server.service.client.jobs) == 2)
        answer = ask(server)
        assert error_of(answer, 429)["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        server.service.draining = True
        assert error_of(ask(server), 503)
        assert error_of(HTTP.get(server.url + "/ready"), 503)
        assert HTTP.get(server.url + "/health").status_code == 200
        for t in threads:
            t.join()
        until(lambda: len(server.service.client.jobs) == 0)


def test_a_request_has_room_and_time_as_a_whole():
    """Also one that has its prompts read before it is answered; and one which is too large for all
    places at once would wait in vain."""
    body = dict(prompt="a", echo=True, logprobs=0)
    with running(Stub("x", delay=0.3), concurrency=1, queue=0, timeout=0.5) as server:
        assert error_of(ask(server, "/v1/completions", **body), 504)
        server.service.args.timeout = 9
        assert ask(server, "/v1/completions", **body).status_code == 200
        assert (
            "2 prompts"
            in error_of(ask(server, "/v1/completions", prompt=["a"] * 2), 400)["message"]
        )


def test_a_place_is_free_by_the_time_the_client_has_its_answer():
    """As many clients as places, each of which asks again at once: none ever meets a full queue."""
    places, seen = 6, []

    def asks_again_and_again(url, stream):
        with httpx.Client(base_url=url) as http:
            for _ in range(50):
                answer = http.post("/v1/completions", json={"prompt": "a", "stream": stream})
                seen.append(answer.status_code)

    with running(Stub("x"), concurrency=places - 2, queue=2) as server:
        threads = []
        for n in range(places):
            thread = threading.Thread(target=asks_again_and_again, args=(server.url, n % 2 == 0))
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [200] * 50 * places


@pytest.mark.parametrize(
    "model, name",
    [
        ("runs/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("Llama-3.2-1B/", "Llama-3.2-1B"),
        ("a/tiny.q8_0.gguf", "tiny.q8_0"),
        ("a/Q.GGUF", "Q"),
        ("..", ROOT.parent.name),
        (".", ROOT.name),
    ],
)
def test_a_model_is_named_as_its_folder_or_file(model, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert serve.Service(Stub(), serve.Args(model=model)).names == [name]


def test_a_model_can_be_asked_for_by_its_name():
    with running(Stub(), name="org/Qwen2.5-0.5B.v1") as server:
        (listed,) = HTTP.get(server.url + "/v1/models").json()["data"]
        for name in ("org/Qwen2.5-0.5B.v1", "org%2FQwen2.5-0.5B.v1"):
            assert HTTP.get(server.url + "/v1/models/" + name).json() == listed
        error = error_of(HTTP.get(server.url + "/v1/models/Qwen2.5-0"), 404)
        assert error["code"] == "model_not_found"
        assert ask(server, model="org/Qwen2.5-0.5B.v1").status_code == 200


def test_head_is_get_without_a_body(stub):
    for path in ("/", "/health", "/v1/models", "/v1/models/stub", "/metrics"):
        head, get = (HTTP.request(method, stub.url + path) for method in ("HEAD", "GET"))
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert HTTP.head(stub.url + "/v1/completions").status_code == 405
    assert HTTP.options(stub.url + "/v1/models").status_code == 405


def test_the_name_of_the_keys_scheme_has_no_case():
    with running(Stub(), {"k": "ann"}) as server:
        for given in ("Bearer k", "bearer k", "BEARER   k"):
            answer = HTTP.get(server.url + "/v1/models", headers={"authorization": given})
            assert answer.status_code == 200, given
        for given in ("bearer", "bearer x", "bearerk", "Basic k"):
            error_of(HTTP.get(server.url + "/v1/models", headers={"authorization": given}), 401)


def test_an_answer_that_takes_too_long_ends_in_an_error():
    with running(Stub("x" * 5000, delay=0.01), timeout=0.3) as server:
        assert error_of(ask(server), 504)["code"] == "timeout"
        *_, last = events(ask(server, stream=True).text)
        assert last["error"]["code"] == "timeout"
        until(lambda: not server.engine.live)


def test_one_slow_reader_slows_nobody_else():
    with running(Stub("x" * 2000)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:  # asks, and never reads
            body = json.dumps({"prompt": "a", "stream": True, "n": 16}).encode()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.sendall(completion_head(len(body)) + body)
            until(lambda: server.engine.made > 100)
            begin = time.monotonic()
            assert ask(server, stream=True).text.endswith("[DONE]\n\n")
            assert time.monotonic() - begin < 10
        until(lambda: len(server.service.client.jobs) == 0)


def test_quiet_streams_are_kept_alive(monkeypatch):
    monkeypatch.setattr(serve.Service, "keep_alive", 0.05)
    with running(Stub("xyz", delay=0.3)) as server:
        text = ask(server, stream=True).text
        assert text.count(": keep-alive\n\n") >= 2
        assert len(events(text)) == 5


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


def test_a_run_of_any_length_is_read_from_its_end_and_has_no_nan(tmp_path):
    (tmp_path / "long").mkdir()
    rows = "".join(f'{{"step": {i}, "loss": 1.5, "grad_norm": 2.25}}\n' for i in range(400_000))
    end = '{"step": 400000, "loss": NaN}\n[1]\n{"step": "x"}\n{"step": 400001, "lo'
    (tmp_path / "long" / "metrics.jsonl").write_text(rows + end)
    with running(Stub(), runs=str(tmp_path)) as server:
        begin = time.process_time()
        answer = HTTP.get(server.url + "/runs/long")
        assert time.process_time() - begin < 0.5  # for all 20 MB it is some seconds
    assert answer.status_code == 200
    found = answer.json()["rows"]
    assert found[-1] == {"step": 400_000, "loss": None}
    assert 4990 < len(found) <= 5000


def test_stop_ends_the_text_before_itself(real):
    body = dict(prompt="the quick", max_tokens=60, temperature=0, ignore_eos=True)
    whole = ask(real, "/v1/completions", **body).json()["choices"][0]["text"]
    stop = whole[10:13]
    cut = ask(real, "/v1/completions", **body, stop=stop).json()["choices"][0]
    assert cut["text"] == whole[: whole.find(stop)]
    assert cut["finish_reason"] == "stop"


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
    assert real.engine.stats()["blocks_used"] == 0
    assert not real.engine.requests


@pytest.fixture(scope="module")
def tuned(real, tmp_path_factory):
    """The tiny model with an adapter that changes much -> the folders of the adapter, and of the
    two merged."""
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
        assert ids[0] != ids[1] == ids[2]
        assert poet["model"] == "poet"
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
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-4)
    assert vectors[0] == vectors[2] != vectors[1]


def test_the_page_is_served_whatever_the_locale():
    program = "import asyncio, serve; print(len(asyncio.run(serve.page()).body))"
    latin = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | latin, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 10_000
