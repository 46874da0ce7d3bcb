"""Keys, limits, logs and figures, and clients that are slow, large or hostile."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import ROOT  # noqa: F401  (puts the root on the path)
from serving import (  # noqa: F401  (a fixture)
    HTTP,
    SAID,
    Stub,
    ask,
    completion_head,
    error_of,
    events,
    post,
    raw,
    running,
    stub,
    until,
)

import serve
from common import UserError
from server import answers, door


def test_no_answer_waits_for_an_acknowledgement(stub):
    """Nagle's algorithm would hold an answer's second packet back until the client's delayed ACK,
    40 ms later."""
    seconds = []
    for _ in range(20):
        begin = time.monotonic()
        HTTP.get(stub.url + "/health")
        seconds.append(time.monotonic() - begin)
    assert sorted(seconds)[5] < 0.03


@pytest.mark.parametrize(
    "path, body", [("/v1/embeddings", {"input": "a"}), ("/v1/chat/completions", {})]
)
def test_an_internal_error_has_openais_shape_and_the_connection_stays(
    path, body, monkeypatch, capfd
):
    def fails(*_):
        raise RuntimeError("out of luck")

    with running(Stub()) as server:
        monkeypatch.setattr(serve, "encode_vector", fails)
        monkeypatch.setattr(answers.Generation, "whole", fails)
        error = error_of(ask(server, path, **body), 500)
        assert error["type"] == "server_error"
        assert "RuntimeError" in error["message"]
        assert "luck" not in error["message"]
        assert HTTP.get(server.url + "/health").status_code == 200  # on the same connection
        assert len(server.service.client.jobs) == 0
    log = capfd.readouterr().err  # says where it was, but not what: that may be a request's text
    assert '"at":' in log and "test_door.py" in log
    assert "luck" not in log


def test_a_body_that_is_too_large_or_too_slow_is_refused(monkeypatch):
    monkeypatch.setattr(door, "ARRIVAL_SECONDS", 0.3)
    monkeypatch.setattr(door, "LINGER_SECONDS", 0.1)
    with running(Stub(), max_body=1000) as server:
        error_of(ask(server, user="x" * 2000), 413)
        chunks = iter([b'{"user": "', *[b"x" * 100] * 20])
        error_of(post(server, "/v1/completions", chunks), 413)
        assert b"408" in raw(server, completion_head(10) + b"{")
        assert raw(server, b"POST /v1/compl") == b""  # the head does not come: hung up on
        assert raw(server, b"") == b""
        assert ask(server).status_code == 200


def test_ten_megabytes_are_refused_before_they_are_read(stub):
    body = json.dumps({"prompt": "x" * 10**7}).encode()
    error_of(post(stub, "/v1/completions", body), 413)
    chunks = (body[i : i + 65536] for i in range(0, len(body), 65536))
    error_of(post(stub, "/v1/completions", chunks), 413)


def test_garbage_and_half_closed_sockets_do_no_harm(stub):
    rng = random.Random(0)
    body = b'{"prompt": "a"}'
    head = completion_head(len(body))
    for _ in range(50):
        data = bytearray(head + body)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        answer = raw(stub, bytes(data) + b"\r\n\r\n", half_close=True)
        assert not answer.startswith(b"HTTP/1.1 5")
    raw(stub, head + body, half_close=True)
    assert ask(stub).status_code == 200
    until(lambda: len(stub.service.client.jobs) == 0 and not stub.engine.live)


def test_keys_are_asked_for_and_limited_and_never_logged(capfd):
    with running(Stub(), {"sk-secret-1": "ann", "sk-secret-2": "bob"}, rate_limit=3) as server:
        error_of(ask(server), 401)
        error_of(ask(server, headers={"Authorization": "Bearer sk-secret"}), 401)
        error_of(HTTP.get(server.url + "/stats", headers={"X-Request-Id": "guess"}), 401)
        assert HTTP.get(server.url + "/health").status_code == 200
        ann, bob = ({"Authorization": f"Bearer sk-secret-{i}"} for i in (1, 2))
        assert [ask(server, headers=ann).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert int(ask(server, headers=ann).headers["retry-after"]) <= 60
        assert ask(server, headers=bob).status_code == 200
        stats, metrics = (
            HTTP.get(server.url + path, headers=bob).text for path in ("/stats", "/metrics")
        )
    log = capfd.readouterr().err
    assert "ann" in log and "guess" in log
    assert "secret" not in log + stats + metrics


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
        assert "".join(c["text"] for c in rest).endswith("x" * 200)
        assert rest[-1]["finish_reason"] == "stop"
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
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert texts == {"k1": "cba" * 30, "k2": "zyx" * 30}


def test_a_log_line_says_how_long_and_why_and_no_prompt(capfd):
    with running(Stub()) as server:
        ask(server, "/v1/completions", {"X-Request-Id": "r-1"}, prompt="secret words")
    row = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert row["id"] == "r-1"
    assert row["status"] == 200
    assert row["reason"] == "stop"
    assert row["ttft_seconds"] >= 0
    assert row["tokens"] == len(server.engine.tok.encode(SAID))
    assert "secret words" not in str(row)


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
    assert families["llm:generation_tokens"].type == "counter"
    assert families["llm:num_requests_running"].samples[0].value == 0
    assert {"queue", "generated_tokens", "uptime", "models"} <= set(
        HTTP.get(stub.url + "/stats").json()
    )


def test_browsers_of_other_origins_are_let_in_only_when_named():
    ask_first = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
    for cors, allowed in (
        ("", False),
        ("http://b", False),
        ("http://b, http://a", True),
        ("*", True),
    ):
        with running(Stub("x"), {"k": "a"}, cors=cors) as server:
            first = HTTP.options(server.url + "/v1/chat/completions", headers=ask_first)
            answer = ask(server, headers={"Origin": "http://a", "Authorization": "Bearer k"})
            assert (
                ("access-control-allow-origin" in answer.headers)
                == allowed
                == (first.status_code == 200)
            )


def test_an_upgrade_to_another_protocol_leads_to_the_same_door():
    config, sock = door.listen(serve.Args(port=0))
    sock.close()
    assert config.ws == "none"


def test_bad_flags_are_one_clear_line(tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use"):
        door.listen(serve.Args(port=taken.getsockname()[1]))
    with pytest.raises(UserError, match="port 70000"):
        door.listen(serve.Args(port=70_000))
    (tmp_path / "a.pem").write_text("no certificate")
    with pytest.raises(UserError, match="do not open as a pair"):
        door.listen(
            serve.Args(certificate=str(tmp_path / "a.pem"), certificate_key=str(tmp_path / "a.pem"))
        )
    keys = tmp_path / "keys"
    keys.write_text("ann:k1\n# mine\nk2\n", encoding="utf-8-sig")  # begins with a BOM
    keys.chmod(0o644)
    found = door.read_keys(serve.Args(api_key_file=str(keys)))
    assert found["k1"] == "ann"
    assert found["k2"].startswith("key-")
    assert "chmod 600" in capsys.readouterr().err
    for adapters in ("x", "x=", "x=a, x=b", "base=a"):
        with pytest.raises(UserError, match="name=folder"):
            serve.adapter_folders(serve.Args("runs/base", adapters=adapters))
    for flag in ("--concurrency 0", "--queue -1", "--timeout nan", "--rate-limit -1"):
        monkeypatch.setattr("sys.argv", ["serve.py", "model", *flag.split()])
        with pytest.raises(UserError, match=f"{flag} must be at least"):
            serve.main()


# ----------------------------------------------------------------------------- hostile clients
def resident():
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def flood(server, head, piece, most=32 << 20):
    """Send a head and then a piece again and again, reading nothing -> bytes that the server took
    before it hung up, or `most`."""
    taken = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
        try:
            s.sendall(head)
            while taken < most:
                taken += s.send(piece)
        except OSError:  # also a time-out: it does not read any more
            return taken
    return taken


def hung_up(s, seconds=5):
    """Whether the server closes a connection in so many seconds, whatever it says before."""
    s.settimeout(seconds)
    try:
        while s.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("piece", [b"x-1: y\r\n" * 8192, b"x" * 65536], ids=["lines", "a name"])
def test_trailers_without_an_end_take_no_memory(piece):
    with running(Stub(), {"k": "a"}) as server:
        before = resident()
        assert flood(server, CHUNKED + b"0\r\n", piece) < 16 << 20  # in the kernel, most of it
        assert resident() - before < 8 << 20


def test_a_pipeline_holds_sixteen_requests_and_is_dropped_with_its_connection():
    one = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
    with running(Stub("x" * 3000, delay=0.005)) as server:
        before = resident()
        assert flood(server, b"", one * 2000) < 16 << 20
        assert resident() - before < 8 << 20
        last = one.replace(b"host", b"connection: close\r\nhost")
        assert raw(server, one * 12 + last).count(b"200 OK") == 13
        # Who leaves is noticed also if another request waits behind the one that runs.
        body = b'{"prompt": "a", "stream": true}'
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(completion_head(len(body)) + body + one)
            until(lambda: server.engine.live)
        until(lambda: not server.engine.live, 5)


def test_who_does_not_read_is_hung_up_on(monkeypatch, tmp_path):
    monkeypatch.setattr(door, "ARRIVAL_SECONDS", 0.3)
    (tmp_path / "page").write_text("x" * 10_000_000)
    monkeypatch.setattr(serve, "CHAT_PAGE", tmp_path / "page")
    with running(Stub()) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        time.sleep(1)
        assert hung_up(slow)


def test_who_reads_slowly_gets_it_all(monkeypatch, tmp_path):
    monkeypatch.setattr(door, "ARRIVAL_SECONDS", 0.3)
    (tmp_path / "page").write_text("x" * 12_000_000)
    monkeypatch.setattr(serve, "CHAT_PAGE", tmp_path / "page")
    seen = 0
    with running(Stub()) as server, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        while seen < 12_000_000:
            seen += len(slow.recv(120_000)) or pytest.fail(f"hung up after {seen:,} bytes")
            time.sleep(0.01)


@pytest.mark.parametrize("path", ["/v1/completions", "/nowhere"])
def test_who_sends_on_after_an_error_is_hung_up_on(path, monkeypatch):
    monkeypatch.setattr(door, "LINGER_SECONDS", 0.3)
    with running(Stub(), max_body=100) as server:
        head = CHUNKED.replace(b"/v1/completions", path.encode())
        head = head.replace(b"host", b"content-type: application/json\r\nhost")
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(head + b"80\r\n" + b" " * 0x80 + b"\r\n")
            begin = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() - begin < 5:
                    s.sendall(b"1\r\n \r\n")
                    time.sleep(0.02)


def test_who_sends_it_all_first_can_read_why_it_was_too_large(stub):
    """A connection that is closed on unread bytes is reset, and the answer is lost."""
    close = b"connection: close\r\ncontent-length"
    for _ in range(5):
        head = completion_head(8 << 20).replace(b"content-length", close)
        assert b"413" in raw(stub, head + b"x" * (8 << 20))


def test_who_leaves_within_a_body_has_asked_for_nothing(stub):
    """Even if what came is all of a JSON."""
    before = len(stub.engine.order)
    body = b'{"prompt": "a"}'
    raw(stub, completion_head(len(body) + 1) + body, half_close=True)
    assert ask(stub).status_code == 200
    assert len(stub.engine.order) == before + 1


def test_an_address_has_so_many_connections(monkeypatch):
    monkeypatch.setattr(door, "CONNECTIONS", 8)
    with running(Stub()) as server:
        many = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(12)]
        assert [hung_up(s, 0.2) for s in many].count(True) == 4
        for s in many:
            s.close()
        until(lambda: HTTP.get(server.url + "/health").status_code == 200)


def test_an_address_counts_by_what_one_client_has():
    same = ["2001:db8:1:2::1", "2001:db8:1:2:ffff::9%eth0"]
    assert {door.address_of((host, 1)) for host in same} == {"2001:db8:1:2::/64"}
    assert door.address_of(("::ffff:1.2.3.4", 1)) == door.address_of(("1.2.3.4", 1)) == "1.2.3.4"
    assert door.address_of(("2001:db8:1:3::1", 1)) == "2001:db8:1:3::/64"
    assert door.address_of(("no address", 1)) == "no address"


def test_a_key_may_hold_a_colon_and_is_never_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_API_KEYS", "alice:ab:cd, \nbare")
    keys = door.read_keys(serve.Args())
    assert keys["ab:cd"] == "alice"
    assert keys["bare"].startswith("key-")
    assert len(keys) == 2
    monkeypatch.setenv("LLM_API_KEYS", "#secret")
    assert [*door.read_keys(serve.Args())] == ["#secret"]  # only a file has comments
    (tmp_path / "keys").write_text("# nobody yet\n\n")
    with pytest.raises(UserError, match="keys holds no key"):
        door.read_keys(serve.Args(api_key_file=str(tmp_path / "keys")))
    for nothing in (",", " "):
        monkeypatch.setenv("LLM_API_KEYS", nothing)
        with pytest.raises(UserError, match="LLM_API_KEYS holds no key"):
            door.read_keys(serve.Args())
    for line in ("team:", "team: ", ":"):
        monkeypatch.setenv("LLM_API_KEYS", line)
        with pytest.raises(UserError, match="empty"):
            door.read_keys(serve.Args())
    monkeypatch.delenv("LLM_API_KEYS")
    (tmp_path / "keys").write_text("bob:secret\nalice:\n")
    with pytest.raises(UserError, match="'alice' is empty"):
        door.read_keys(serve.Args(api_key_file=str(tmp_path / "keys")))


@pytest.mark.parametrize(
    "flags, keys, foreign",
    [
        ({}, None, 403),
        ({}, {"k": "a"}, 200),
        ({"allowed_hosts": "*"}, None, 200),
        ({"allowed_hosts": "llm.example.com"}, None, 200),
        ({"allowed_hosts": "llm.example.com"}, {"k": "a"}, 200),
        ({"allowed_hosts": "a.example.com, llm.example.com"}, None, 200),
        ({"allowed_hosts": "other.example.com"}, {"k": "a"}, 403),
    ],
)
def test_a_page_cannot_reach_the_server_by_a_name_of_its_own(flags, keys, foreign):
    with running(Stub(), keys, **flags) as server:
        key = {"Authorization": "Bearer k"}
        for host in ("localhost", "127.0.0.1:8000", "[::1]:80", "10.0.0.7", "serve:8000"):
            assert ask(server, headers={**key, "Host": host}).status_code == 200
        for name in ("llm.example.com", "LLM.example.com:8000"):
            assert ask(server, headers={**key, "Host": name}).status_code == foreign
        origin = {**key, "Origin": "https://llm.example.com"}
        assert ask(server, headers=origin).status_code == foreign
        assert ask(server, headers={**key, "Origin": "null"}).status_code in (403, foreign)
        if foreign == 403:
            for headers in ({"Host": "[x.com"}, {"Host": "127.0.0.1.x.com"}, {"Host": "a.b:c"}):
                error_of(ask(server, headers={**key, **headers}), 403)
            assert HTTP.get(server.url, headers={"Host": "x.com"}).status_code == 403


def test_a_rate_limit_is_not_passed_by_a_header_or_by_guessing(monkeypatch):
    monkeypatch.setattr(door, "WRONG_KEYS", 3)

    def statuses(server, headers):
        return [HTTP.get(server.url + "/v1/models", headers=h).status_code for h in headers]

    claims = [{"X-Forwarded-For": f"6.6.6.{i}"} for i in range(4)]
    with running(Stub(), rate_limit=2) as server:
        assert statuses(server, claims) == [200, 200, 429, 429]
    with running(Stub(), rate_limit=2, trusted_proxy="127.0.0.1") as server:
        assert statuses(server, claims + claims[:1]) == [200] * 5
    with running(Stub(), {"k": "a"}) as server:
        wrong = [{"Authorization": f"Bearer {i}"} for i in range(5)]
        assert statuses(server, wrong) == [401, 401, 401, 429, 429]
        assert statuses(server, [{"Authorization": "Bearer k"}]) == [200]


def test_a_flood_of_addresses_forgets_the_one_that_asked_longest_ago(monkeypatch):
    monkeypatch.setattr(door, "WINDOWS", 3)
    there = door.Door.__new__(door.Door)
    there.windows = OrderedDict()
    for key in ("a", "b", "b", "b", "a", "c", "d"):
        there.check_rate(key, 9)
    assert list(there.windows) == ["a", "c", "d"]
    assert len(there.windows["a"]) == 2


@pytest.mark.parametrize("body", [
    b'{"messages": [' + b"1," * 900_000 + b"1]}",
    b'{"input": [' + b"{}," * 600_000 + b"{}]}",
    b'{"input": [[' + b'"a",' * 450_000 + b"1]]}",
    b'{"prompt": "a", "logit_bias": {' + b",".join(b'"%d":""' % i for i in range(150_000)) + b"}}",
    b'{"prompt": "a", "stop": [' + b"1," * 900_000 + b"1]}",
    b'{"messages": [], "tools": [' + b"[]," * 600_000 + b"[]]}",
    b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"a": '
    + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}]}",
    b'{"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": [null]}',
], ids=range(8))  # fmt: skip
def test_what_is_wrong_a_million_times_is_refused_at_the_first(body, stub):
    path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
    path = "/v1/embeddings" if b"input" in body else path
    begin = time.process_time()
    answer = post(stub, path, body)
    assert time.process_time() - begin < 0.6  # reading 2 MB of JSON is most of it
    if b'{"a":{"a":{' in body:
        assert answer.status_code in (200, 400)  # whether it is too deep, Python's stack decides
    else:
        assert len(error_of(answer, 400)["message"]) < 1000


def test_large_answers_do_not_keep_the_event_loop():
    """4 answers of 500 tokens with 20 logprobs each: 42,000 of them."""
    tok = Stub().tok
    tokens = [(i % 250, -1.5, [(j, -2.5) for j in range(20)]) for i in range(500)]
    choices = [{"logprobs": answers.chat_logprobs(tok, tokens)} for _ in range(2)]
    choices += [
        {"logprobs": answers.completion_logprobs(tok, tokens, [0] * 500, True)} for _ in range(2)
    ]
    gaps = []

    async def tick():
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            gaps.append(time.thread_time() - last)
            last = time.thread_time()

    async def both():
        ticking = asyncio.ensure_future(tick())
        answer = await door.json_later({"choices": choices})
        ticking.cancel()
        return json.loads(answer.body)["choices"]

    shown = asyncio.run(both())
    assert len(shown[0]["logprobs"]["content"]) == 500
    assert len(shown[2]["logprobs"]["top_token_ids"]) == 500
    assert max(gaps) < 0.05


def test_json_in_pieces_is_the_json_of_the_whole():
    def value():
        return {"a": [1.5, None, {}, []], "b": map(str, range(2)), "c": iter(['ü"', iter([1])])}

    whole = answers.json_bytes(value()).decode()
    assert whole == '{"a":[1.5,null,{},[]],"b":["0","1"],"c":["ü\\"",[1]]}'
    assert "".join(answers.json_pieces(value())) == whole


def test_half_a_character_in_json_is_replaced():
    assert answers.json_bytes({"a": ["ü\ud800", 1.5, None]}) == '{"a":["ü?",1.5,null]}'.encode()


@pytest.mark.slow
def test_honest_streams_do_not_feel_all_attacks_at_once():
    """What is printed: gaps between tokens, memory and descriptors of both processes."""
    command = [sys.executable, ROOT / "tests/soak.py", "--seconds", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_written_in_one_turn_goes_out_at_once():
    async def write():
        sent = []
        transport = SimpleNamespace(
            write=sent.append, is_closing=lambda: False, close=lambda: sent.append("closed")
        )
        gatherer = door.Gatherer(transport)
        gatherer.write(b"head ")
        gatherer.write(b"body")
        assert sent == []
        await asyncio.sleep(0)
        gatherer.write(b"last")
        gatherer.close()
        await asyncio.sleep(0)
        return sent

    assert asyncio.run(write()) == [b"head body", b"last", "closed"]
