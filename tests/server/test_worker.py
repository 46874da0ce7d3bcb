"""The engine's process: its queue, its grammars, and what happens when it fails."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from conftest import ROOT
from serving import HTTP, Stub, ask, error_of, json_schema, real, running, until  # noqa: F401  (a fixture)

import generate
from common import UserError
from engine.sampler import Sampling
from engine.scheduler import Delta
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
    assert loop.take_orders()
    while loop.waiting or engine.live:
        loop.admit()
        loop.collect(engine.step())
    assert not loop.take_orders()  # nobody can ask any more
    assert engine.order == [1, 11, 21, 2, 12, 3]


@pytest.mark.parametrize("last, shown", [("", "a\ufffd"), ("\ufffd", "a\ufffd")])
@pytest.mark.parametrize("told", [0, math.inf], ids=["sent apart", "sent together"])
def test_half_a_character_at_the_end_is_dropped_however_deltas_are_sent(told, last, shown):
    """A byte that is no character is shown; what ends within one ends before it."""
    loop = Worker(Stub("x"), None, 1)
    loop.last_flush = told
    loop.unfinished[1] = 1
    said = []
    loop.tell = lambda names: said.extend(loop.outbox.pop(name).text for name in list(names))
    loop.collect([Delta(1, 0, "a\ufffd", [5])])
    loop.collect([Delta(1, 0, last, [], finish_reason="stop")])
    assert "".join(said) == shown


def test_ends_within_a_pause_go_out_together():
    loop = Worker(Stub("x"), None, 4)
    loop.unfinished = {1: 1, 2: 1, 3: 1}
    loop.last_flush = loop.last_message = math.inf
    sent = []
    loop.send = lambda what, stats, admitted, items: sent.append([item[0] for item in items])
    loop.collect([Delta(1, 0, "a", [5], finish_reason="stop")])
    loop.collect([Delta(2, 0, "b", [5], finish_reason="stop"), Delta(3, 0, "c", [5])])
    assert sent == []
    loop.last_message = 0.0  # long ago
    loop.collect([])
    assert [sorted(numbers) for numbers in sent] == [[1, 2]]


def test_the_longest_wait_between_steps_is_in_the_log_and_in_the_figures(capsys):
    class Waiting(Stub):
        def stats(self):
            return {**super().stats(), "longest_wait": 0.5 if self.made < 2 else 2.5}

    with running(Waiting()) as server:
        ask(server)
        shown = HTTP.get(server.url + "/metrics").text
    assert "llm:longest_wait_between_steps_seconds 2.5" in shown
    said = capsys.readouterr().err
    assert said.count("longest_wait_between_steps") == 1 and '"seconds":2.5' in said


def test_texts_that_are_only_read_take_turns_and_end_with_who_leaves():
    engine = Stub("x")
    read = []
    engine.read = lambda ids, count: iter([read.append((ids[0], i)) or [0.0] for i in range(2)])
    front, back = socket.socketpair()
    loop = Worker(engine, back, 1)
    for number, key, texts in ((1, "a", [[1], [2], [3]]), (2, "a", [[4], [5]]), (3, "b", [[6]])):
        loop.read(number, key, texts, None)
    loop.read_on()
    loop.cancel(1)
    while loop.texts or loop.reading:
        loop.read_on()
    assert [text for text, _ in read[::2]] == [1, 6, 4, 5]


def test_an_engine_that_fails_tells_every_caller_and_the_log_why(capsys):
    with running(Stub("x" * 500, delay=0.01)) as server:
        got = []
        threads = [
            threading.Thread(target=lambda: got.append(ask(server))),
            threading.Thread(target=lambda: got.append(ask(server, stream=True))),
        ]
        for t in threads:
            t.start()
        until(lambda: server.engine.made > 40)  # the stream has begun
        server.engine.fails = "out of memory"
        for t in threads:
            t.join()
        assert sorted(a.status_code for a in got) == [200, 503]
        assert all("the engine failed" in a.text for a in got)
        assert not any("out of memory" in a.text for a in got)
        assert '"error":"RuntimeError: out of memory"' in capsys.readouterr().err
        assert error_of(ask(server), 503)
        assert error_of(HTTP.get(server.url + "/ready"), 503)
        assert error_of(HTTP.get(server.url + "/health"), 503)
        assert error_of(ask(server, "/v1/embeddings", input="a"), 503)


def test_an_engine_that_hangs_is_not_ready_and_its_requests_end(monkeypatch):
    monkeypatch.setattr(worker, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(worker, "SILENT_SECONDS", 0.6)
    with running(Stub("x" * 9, delay=2.0), timeout=0.8) as server:
        got = []
        texts = {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 0}
        thread = threading.Thread(
            target=lambda: got.append(ask(server, "/v1/completions", **texts))
        )
        thread.start()
        assert HTTP.get(server.url + "/ready").status_code == 200
        assert error_of(ask(server), 504)
        assert error_of(HTTP.get(server.url + "/ready"), 503)
        assert error_of(ask(server), 503)
        assert HTTP.get(server.url + "/health").status_code == 200
        thread.join()
        assert error_of(got[0], 504)


def test_who_has_texts_read_is_one_of_many(real):
    """20 clients at once, each with 128 texts of 200 tokens, and one that streams."""
    flood = {"prompt": ["the quick brown fox " * 10] * 128, "echo": True, "logprobs": 5}
    flood |= {"max_tokens": 0}
    body = {"prompt": "a", "stream": True, "max_tokens": 200, "ignore_eos": True}
    before = HTTP.get(real.url + "/stats").json()["prompt_tokens"]

    def attack():
        with contextlib.suppress(httpx.ReadTimeout):
            HTTP.post(real.url + "/v1/completions", json=flood, timeout=1)

    def gaps():
        last, found = None, []
        with HTTP.stream("POST", real.url + "/v1/completions", json=body) as answer:
            for _ in answer.iter_bytes():
                now = time.monotonic()
                found.append(now - (last or now))
                last = now
        return max(found)

    threads = [threading.Thread(target=attack) for _ in range(20)]
    alone = gaps()
    for thread in threads:
        thread.start()
    until(lambda: len(real.service.client.jobs) > 10)
    beside = gaps()
    for thread in threads:
        thread.join()
    until(lambda: not real.service.client.jobs, 1)  # since the last one left
    until(lambda: real.service.client.stats["active"] == 0, 1)
    print(f"longest gap alone {alone:.3f} s, beside them {beside:.3f} s")
    assert beside < 2  # all 20 at once take longer than that
    assert HTTP.get(real.url + "/stats").json()["prompt_tokens"] > before + 500
    assert 'finished_reason="abort"' in HTTP.get(real.url + "/metrics").text


def test_a_text_that_is_read_in_chunks_is_the_text_read_at_once(real, monkeypatch):
    ids = [5 + i * 7 % 200 for i in range(100)]
    seen = []
    for size in (1000, 7):
        monkeypatch.setattr(generate, "READ_TOKENS", size)
        tokens = sum(real.engine.read(ids, 3), [])
        scores = [token.logprob for token in tokens[1:]]
        tops = [i for token in tokens for i, _ in token.top]
        seen.append(([token.id for token in tokens], tops, scores + sum(real.engine.read(ids), [])))
        assert len(list(real.engine.read(ids))) == {1000: 2, 7: 16}[size]
    assert seen[0][:2] == seen[1][:2] == (ids, seen[0][1])
    assert seen[0][2] == pytest.approx(seen[1][2], abs=1e-5)


def test_what_texts_are_read_for_has_a_bound(real):
    flood = {"prompt": [[5] * 200] * 128, "echo": True, "logprobs": 20}
    error = error_of(ask(real, "/v1/completions", **flood), 400)
    assert "25,600 tokens with 20 logprobs" in error["message"]
    real.service.draining = True
    try:
        assert error_of(ask(real, "/v1/embeddings", input="a"), 503)["type"] == "server_error"
    finally:
        real.service.draining = False


FAILING = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import serve, serving
from server import door

class Engine(serving.Stub):
    def warm_up(self, tune):
        print("warm-up", tune)

    def step(self):
        time.sleep(0.05)
        if {fails}:
            raise MemoryError("CUDA out of memory")
        return super().step()

serve.Engine = lambda *_, **__: Engine("x" * 2000)
sys.argv = ["serve.py", "model", "--port", "0", "--drain", "0.5"]
serve.main()
"""


@contextlib.contextmanager
def process(fails):
    """serve.py with a stub engine in processes of its own -> (Popen, URL)"""
    command = [sys.executable, "-c", FAILING.format(root=str(ROOT), fails=fails)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        before_it = next(line for line in child.stdout if line.startswith(("ready", "warm-up")))
        assert before_it == "warm-up True\n"
        ready = next(line for line in child.stdout if line.startswith("ready"))
        yield child, ready.split()[1]
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_a_server_whose_engine_failed_exits_with_a_status():
    with process(fails=True) as (child, url):
        error = HTTP.post(url + "/v1/completions", json={"prompt": "a"})
        assert error.status_code == 503
        assert child.wait(10) == 1
        log = child.stderr.read()
        assert "out of memory" in log
        assert "Traceback" not in log


@pytest.mark.slow
def test_a_stream_cut_at_the_end_of_the_drain_ends_with_an_error():
    with process(fails=False) as (child, url):
        body = {"prompt": "a", "stream": True}
        with (
            HTTP.stream("POST", url + "/v1/completions", json=body) as stream,
            socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))),
        ):
            lines = stream.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            *_, error, done = [line for line in lines if line]
        assert "shutting down" in error
        assert done == "data: [DONE]"
        assert child.wait(10) == 0
        log = child.stderr.read().splitlines()
        assert [line for line in log if not line.startswith('{"event":"request"')] == []


@pytest.mark.slow
def test_an_http_process_without_its_engine_does_not_wait_for_readers():
    with process(fails=False) as (child, url):
        body = {"prompt": "a", "stream": True, "n": 16}
        with HTTP.stream("POST", url + "/v1/completions", json=body) as stream:
            next(stream.iter_raw())
            children = f"/proc/{child.pid}/task/{child.pid}/children"
            front = int(open(children).read().split()[0])
            child.kill()
            child.wait()
            until(lambda: not os.path.exists(f"/proc/{front}") or b"Z" in state_of(front), 10)


def state_of(pid):
    with contextlib.suppress(FileNotFoundError):
        return open(f"/proc/{pid}/stat", "rb").read().rpartition(b")")[2].split()[0]
    return b"Z"


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
    built = []
    worker.constraint = lambda number: (built.append(number), started.set(), leave.wait(10))
    for number in range(3):
        worker.submit(number, "a", [5], vars(Sampling()), None, (number,))
    worker.admit()
    started.wait(10)
    for number in range(3):
        worker.cancel(number)
        worker.admit()
    assert not worker.building
    leave.set()
    worker.builder.shutdown()
    assert built == [0]  # it had begun
    worker.admit()
    assert not worker.waiting
    assert not worker.engine.live


def test_keys_take_turns_with_grammars_too():
    _, back = socket.socketpair()
    worker = Worker(Stub(), back, 4)
    built = []
    worker.constraint = built.append
    for number, key in enumerate("aaab"):
        worker.submit(number, key, [5], vars(Sampling()), None, (key,))
    until(lambda: worker.admit() or len(worker.engine.live) == 4)
    assert built == ["a", "b", "a", "a"]


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
    worker.waiting.cancel(2)
    assert 0 < worker.idle_seconds() < 0.1  # looks again whether the grammar is built
    leave.set()
    until(worker.building[-1].done)
    worker.admit()
    assert list(engine.live) == [1]


def test_what_is_nested_too_deeply_for_a_message_is_refused():
    deep = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deeply"):
        message("submit", 1, "json", deep)
