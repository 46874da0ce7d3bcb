"""The engine's process: its queue, its grammars, and what happens when it fails."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import socket
import threading
import time

import pytest
from conftest import ROOT  # noqa: F401  (puts the root on the path)
from serving import HTTP, Stub, ask, error_of, json_schema, running, until  # noqa: F401

from common import UserError
from engine.sampler import Sampling
from server import worker
from server.worker import Worker, message


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


def test_an_engine_that_fails_tells_every_caller_and_is_not_ready():
    with running(Stub("x" * 500, delay=0.01)) as server:
        got = []
        threads = [
            threading.Thread(target=lambda: got.append(ask(server))),
            threading.Thread(target=lambda: got.append(ask(server, stream=True))),
        ]
        for t in threads:
            t.start()
        until(lambda: len(server.engine.live) == 2)
        server.engine.fails = "out of memory"
        for t in threads:
            t.join()
        assert sorted(a.status_code for a in got) == [200, 500]
        assert all("out of memory" in a.text for a in got)
        assert error_of(ask(server), 503)
        assert error_of(HTTP.get(server.url + "/ready"), 503)
        assert error_of(ask(server, "/v1/embeddings", input="a"), 503)


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
                    for t in threads:
                        t.start()
                last = now
        for t in threads:
            t.join(20)
        assert len(refusals) == 3
        assert all("too much work" in error_of(r, 400)["message"] for r in refusals)
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
        assert error_of(ask(server, regex="a+"), 429)["code"] == "queue_full"
        assert ask(server).status_code == 200


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
