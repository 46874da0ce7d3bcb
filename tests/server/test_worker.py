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
    assert loop.take_orders(None)
    while loop.waiting or engine.live:
        loop.admit()
        loop.collect(engine.step())
    assert not loop.take_orders(None)  # nobody can ask any more
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


def hostile_schemas():
    """One overflows a stack, and one is 2^40 parts if it is read as a tree."""
    shared = {"type": "integer"}
    for _ in range(40):
        shared = {"items": shared}
    definitions = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(3000)}
    return [{"$ref": "#/$defs/a0", "$defs": definitions | {"a3000": {}}}, shared]


def test_hostile_grammars_are_refused_soon_while_all_else_streams():
    with running(Stub("tick " * 100, delay=0.005)) as server:
        answers, gaps, last = [], [], None
        threads = [
            threading.Thread(
                target=lambda s=schema: answers.append(ask(server, response_format=json_schema(s)))
            )
            for schema in hostile_schemas()
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
        statuses = [answer.status_code for answer in answers]
        assert sorted(statuses) == [200, 400]
        refused = next(answer for answer in answers if answer.status_code == 400)
        assert "too deep a stack to build: simplify it" in error_of(refused, 400)["message"]
        assert max(gaps) < 2  # 0.1 on a quiet machine
        assert max(a.elapsed.total_seconds() for a in answers) < 10  # 2


def test_a_grammar_whose_client_has_left_is_not_built():
    _, back = socket.socketpair()
    worker = Worker(Stub(), back, 1)
    started, leave = threading.Event(), threading.Event()
    worker.constraint = lambda *what: (started.set(), leave.wait(10))
    for number in range(3):
        worker.submit(number, "a", [5], vars(Sampling()), None, ("json", (None,)))
    started.wait(10)
    futures = list(worker.building)
    for number in range(3):
        worker.cancel(number)
    assert not worker.building
    assert [future.cancelled() for future in futures] == [False, True, True]  # one had begun
    leave.set()
    worker.admit()
    assert not worker.waiting
    assert not worker.engine.live


def test_plain_requests_pass_those_whose_grammar_is_being_built():
    engine = Stub("x")
    front, back = socket.socketpair()
    worker = Worker(engine, back, 1)
    leave = threading.Event()
    worker.constraint = lambda *what: leave.wait(10) and None
    worker.submit(1, "a", [5], vars(Sampling()), None, ("json", (None,)))
    worker.submit(2, "a", [5] * 2, vars(Sampling()), None, None)
    assert worker.idle_seconds() == 0
    worker.admit()
    assert list(engine.live) == [2]
    engine.live.clear()
    worker.unfinished.clear()
    worker.waiting.clear()
    assert 0 < worker.idle_seconds() < 0.1  # looks again whether the grammar is built
    leave.set()
    until(lambda: all(future.done() for future in worker.building))
    worker.admit()
    assert list(engine.live) == [1]


def test_what_is_nested_too_deeply_for_a_message_is_refused():
    deep = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deeply"):
        message("submit", 1, "json", deep)
