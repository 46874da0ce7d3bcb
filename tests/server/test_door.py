"""Keys, limits, logs and figures, and clients that are slow, large or hostile."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import json
import random
import socket
import threading
import time

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
    "path, kind",
    [("/v1/embeddings", "application/json"), ("/v1/chat/completions", "application/json")],
)
def test_an_internal_error_has_openais_shape_and_the_connection_stays(
    path, kind, monkeypatch, capfd
):
    def fails(*_):
        raise RuntimeError("out of luck")

    with running(Stub()) as server:
        monkeypatch.setattr(serve, "encode_vector", fails)
        monkeypatch.setattr(answers.Generation, "whole", fails)
        error = error_of(ask(server, path, {"content-type": kind}, input="a"), 500)
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
        error_of(HTTP.get(server.url + "/stats"), 401)
        assert HTTP.get(server.url + "/health").status_code == 200
        ann, bob = ({"Authorization": f"Bearer sk-secret-{i}"} for i in (1, 2))
        assert [ask(server, headers=ann).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert int(ask(server, headers=ann).headers["retry-after"]) <= 60
        assert ask(server, headers=bob).status_code == 200
        stats, metrics = (
            HTTP.get(server.url + path, headers=bob).text for path in ("/stats", "/metrics")
        )
    log = capfd.readouterr().err
    assert "ann" in log
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
    for cors, allowed in (("", False), ("http://b", False), ("http://a", True), ("*", True)):
        with running(Stub("x"), {"k": "a"}, cors=cors) as server:
            first = HTTP.options(server.url + "/v1/chat/completions", headers=ask_first)
            answer = ask(server, headers={"Origin": "http://a", "Authorization": "Bearer k"})
            assert (
                ("access-control-allow-origin" in answer.headers)
                == allowed
                == (first.status_code == 200)
            )


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
    assert found["k1"] == "ann"
    assert found["k2"].startswith("key-")
    assert "chmod 600" in capsys.readouterr().err
    with pytest.raises(UserError, match="name=folder"):
        serve.adapter_folders(serve.Args(adapters="x"))
