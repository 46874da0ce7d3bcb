"""The server against the clients people have: openai's own, curl, schemathesis; and under load,
killed, drained."""

# ruff: noqa: F811 (a fixture's name is also the argument's)

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from serving import (  # noqa: F401  (a fixture)
    HTTP,
    SAID,
    TEMPLATE_WITH_TOOLS,
    TOOLS,
    Stub,
    ask,
    make_tokenizer,
    real,
    running,
    until,
)

from server import api

pytestmark = pytest.mark.peers
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 41}}\n</tool_call>'


@pytest.fixture(scope="module")
def client(real):
    import openai

    return openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0)


HI = [{"role": "user", "content": "hi"}]


# -------------------------------------------------------------------------------- the openai client
def test_every_field_of_the_openai_client_is_in_our_table():
    from openai.types import completion_create_params as text
    from openai.types import embedding_create_params as embedding
    from openai.types.chat import completion_create_params as chat

    for theirs, ours in (
        (chat.CompletionCreateParamsBase, api.ChatRequest),
        (text.CompletionCreateParamsBase, api.CompletionRequest),
        (embedding.EmbeddingCreateParams, api.EmbeddingRequest),
    ):
        known = {*ours.model_fields, *api.IGNORED, *api.DEFAULTS}
        assert not set(theirs.__annotations__) - known


def test_the_openai_client_chats_and_streams(client):
    whole = client.chat.completions.create(
        model="", messages=HI, max_completion_tokens=8, n=2, seed=1, logprobs=True, top_logprobs=3
    )
    assert len(whole.choices) == 2
    assert whole.usage.completion_tokens <= 16
    assert whole.choices[0].finish_reason in ("stop", "length")
    token = whole.choices[0].logprobs.content[0]
    assert len(token.top_logprobs) == 3
    assert bytes(token.bytes)
    assert token.logprob <= 0
    for choice in whole.choices:
        said = b"".join(bytes(t.bytes) for t in choice.logprobs.content)
        assert said.decode("utf-8", "ignore") == choice.message.content.replace("\ufffd", "")
    stream = client.chat.completions.create(
        model="",
        messages=HI,
        max_completion_tokens=8,
        seed=1,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage = ["", ""], [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for c in chunk.choices:
            texts[c.index] += c.delta.content or ""
            reasons += [c.finish_reason] if c.finish_reason else []
    assert texts == [c.message.content for c in whole.choices]
    assert len(reasons) == 2
    assert usage == whole.usage


def test_the_openai_client_parses_a_schema_into_its_class(client):
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        ok: bool

    point = (
        client.chat.completions.parse(model="", messages=HI, response_format=Point, max_tokens=60)
        .choices[0]
        .message.parsed
    )
    assert isinstance(point.x, int)
    assert isinstance(point.ok, bool)


def test_the_openai_client_completes_embeds_and_lists(client, real):
    one = client.completions.create(
        model="", prompt=["the", "fox"], max_tokens=4, echo=True, logprobs=2, stop=["zzz"]
    )
    assert [c.text[:3] for c in one.choices] == ["the", "fox"]
    assert len(one.choices[0].logprobs.tokens) >= 1
    assert set(dict(one.choices[0].logprobs)) == {
        "tokens",
        "token_logprobs",
        "top_logprobs",
        "text_offset",
    }
    vectors = client.embeddings.create(
        model=client.models.list().data[0].id, input=["the", "fox"]
    ).data  # asks for base64
    assert sum(x * x for x in vectors[0].embedding) == pytest.approx(1, abs=1e-3)
    body = dict(model="", prompt="the", max_tokens=5, seed=3)
    assert "".join(c.choices[0].text for c in client.completions.create(**body, stream=True)) == (
        client.completions.create(**body).choices[0].text
    )


def test_the_openai_client_calls_tools_in_both_modes():
    import openai

    tok = make_tokenizer()
    tok.chat_template = TEMPLATE_WITH_TOOLS
    with running(Stub(CALL, tok=tok)) as server:
        c = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        call = (
            c.chat.completions.create(model="", messages=HI, tools=TOOLS)
            .choices[0]
            .message.tool_calls[0]
        )
        assert call.function.name == "add"
        assert json.loads(call.function.arguments) == {"x": 41}
        with c.chat.completions.stream(model="stub", messages=HI, tools=TOOLS) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert final.message.tool_calls[0].function.arguments == '{"x": 41}'
        history = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "42"},
        ]
        assert c.chat.completions.create(model="", messages=history, tools=TOOLS)


def test_a_forced_tool_call_of_an_untrained_model_is_valid(real):
    tok, before = real.engine.tok, real.engine.tok.chat_template
    tok.chat_template = TEMPLATE_WITH_TOOLS
    try:
        for choice in ("required", {"type": "function", "function": {"name": "add"}}):
            reply = ask(real, tools=TOOLS, tool_choice=choice, max_tokens=100, seed=1)
            message = reply.json()["choices"][0]
            assert message["finish_reason"] == "tool_calls", message
            call = message["message"]["tool_calls"][0]["function"]
            assert call["name"] == "add"
            assert isinstance(json.loads(call["arguments"])["x"], int)
    finally:
        tok.chat_template = before


def test_the_openai_client_raises_its_own_errors(client, real):
    import openai

    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="gpt-5", messages=HI)
    with pytest.raises(openai.BadRequestError, match="context is 256") as caught:
        client.completions.create(model="", prompt="x" * 4000)
    assert caught.value.code == "context_length_exceeded"
    with running(Stub(), {"k": "a"}) as server, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong").models.list()


# --------------------------------------------------------------- clients in their own environment
CLIENTS = ROOT / ".venv-clients/bin/python"


def run_client(name, url, folder):
    if not CLIENTS.exists():
        pytest.skip("no .venv-clients: make .venv-clients/stamp installs these clients")
    offline = {
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    command = [CLIENTS, ROOT / "tests/clients.py", name, url, folder]
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def served(folder):
    with process(folder) as (_, url):
        yield url


@pytest.mark.parametrize(
    "name",
    ["openai_async", "langchain", "litellm", "lm_eval_completions", "lm_eval_chats", "gradio"],
)
def test_a_client_works_with_its_own_defaults(name, served, folder):
    run_client(name, served, folder)


def test_langchain_calls_tools_and_sends_the_calls_back():
    tok = make_tokenizer()
    tok.chat_template = TEMPLATE_WITH_TOOLS
    with running(Stub(CALL, tok=tok)) as server:
        run_client("langchain_tools", server.url, "stub")


def test_a_browser_may_send_the_headers_of_the_openai_client(client):
    """It asks first, with the names of all headers that the page's client will send."""
    names = ",".join(name.lower() for name in client.default_headers)
    assert "x-stainless-lang" in names
    names += ",openai-organization,openai-project,openai-beta,x-stainless-helper-method"
    asks = {
        "Origin": "http://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": names,
    }
    with running(Stub(), {"k": "a"}, cors="http://other.example, http://app.example") as server:
        answer = HTTP.options(server.url + "/v1/chat/completions", headers=asks)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://app.example"
        allowed = answer.headers["access-control-allow-headers"].lower().split(",")
        assert set(names.split(",")) <= {name.strip() for name in allowed}
        asks["Origin"] = "http://evil.example"
        assert HTTP.options(server.url + "/v1/models", headers=asks).status_code == 400


def test_curl_reads_a_stream_and_a_body():
    with running(Stub()) as server:
        body = json.dumps({"messages": HI, "stream": True})
        command = [
            "curl",
            "-sN",
            server.url + "/v1/chat/completions",
            "-H",
            "Content-Type: application/json",
            "-d",
        ]
        lines = subprocess.run(
            [*command, body], capture_output=True, text=True, timeout=30
        ).stdout.split("\n\n")
        deltas = [
            json.loads(line[6:])["choices"][0]["delta"]
            for line in lines
            if line.startswith("data: {")
        ]
        assert "".join(d.get("content", "") for d in deltas) == SAID
        assert lines[-2] == "data: [DONE]"
        whole = subprocess.run(
            [*command, json.dumps({"messages": HI})], capture_output=True, timeout=30
        ).stdout
        assert json.loads(whole)["choices"][0]["message"]["content"] == SAID


# ----------------------------------------------------------------------------------- unruly clients
@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_no_hang(real):
    """Thousands of requests made from our own OpenAPI, valid and invalid ones."""
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        real.url + "/openapi.json",
        "--checks",
        "not_a_server_error",
        "--max-examples",
        os.environ.get("EXAMPLES", "250"),
        "--mode",
        "all",
        "--request-timeout",
        "60",
        "--seed",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = int(re.search(r"(\d[\d,]*) generated", done.stdout)[1].replace(",", ""))
    print(f"{cases:,} cases")
    assert cases > 3000, done.stdout[-3000:]
    assert HTTP.get(real.url + "/ready").status_code == 200
    until(lambda: real.service.client.jobs == {} and real.engine.stats()["blocks_used"] == 0)


@pytest.mark.slow
def test_the_servers_own_work_is_microseconds_a_token():
    """CPU time of the process without the stub's steps, whose 4 ms are slept: no Python runs in
    them, as in a step in C++."""

    class Timed(Stub):
        seconds = 0.0

        def step(self):
            begin = time.thread_time()
            try:
                return super().step()
            finally:
                self.seconds += time.thread_time() - begin

    with running(Timed("x" * 6000, delay=0.004)) as server:
        for streams in (1, 4, 16, 64):
            made, own = server.engine.made, time.process_time() - server.engine.seconds
            subprocess.run(
                [
                    sys.executable,
                    ROOT / "bench.py",
                    "serve",
                    server.url,
                    "--requests",
                    str(streams),
                    "--concurrency",
                    str(streams),
                    "--new",
                    "400",
                    "--rounds",
                    "1",
                ],
                check=True,
                capture_output=True,
            )
            own = (
                (time.process_time() - server.engine.seconds - own)
                / (server.engine.made - made)
                * 1e6
            )
            print(f"{streams:3d} streams: {own:6.1f} us a token")
    assert own < 100


# ----------------------------------------------------------------------------- a process of its own
@contextlib.contextmanager
def process(folder, *flags):
    """python serve.py FOLDER on a free port -> (Popen, URL)"""
    child = subprocess.Popen(
        [sys.executable, ROOT / "serve.py", folder, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = next(line for line in child.stdout if line.startswith("ready"))
        yield child, line.split()[1]
    finally:
        child.kill()
        child.wait()


@pytest.fixture(scope="module")
def folder(real):
    return real.folder


def front_of(child):
    """The process that speaks HTTP, which the engine's has forked."""
    return int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0])


def refuses(url):
    with contextlib.suppress(httpx.TransportError), httpx.Client() as http:
        return not http.get(url + "/health")
    return True


async def random_client(http, rng, seen):
    body = {
        "prompt": "the quick" * rng.randint(1, 4),
        "max_tokens": rng.randint(1, 12),
        "stream": rng.random() < 0.7,
        "n": rng.choice([1, 1, 2]),
    }
    leaves = rng.random() < 0.3
    try:
        answer = await asyncio.wait_for(
            http.post("/v1/completions", json=body), rng.random() * 0.5 if leaves else 120
        )
        what = answer.status_code
    except asyncio.TimeoutError:
        what = "left" if leaves else "hung"
    seen[what] = seen.get(what, 0) + 1


@pytest.mark.slow
def test_five_thousand_requests_leave_memory_files_and_blocks_as_they_were(folder):
    """256 at once, 30 % leave at a random moment; every other one is answered or refused."""

    async def some(url, count, rng, seen):
        limits = httpx.Limits(max_connections=256, keepalive_expiry=1)
        async with httpx.AsyncClient(
            base_url=url, timeout=120, limits=limits, verify=False
        ) as http:
            todo = iter(range(count))

            async def place():
                for _ in todo:
                    await random_client(http, rng, seen)

            await asyncio.gather(*(place() for _ in range(256)))

    def state(child, url):
        until(lambda: (s := HTTP.get(url + "/stats").json())["running"] == s["queue"] == 0)
        time.sleep(32)  # longer than the server keeps an idle connection
        both = [Path(f"/proc/{pid}") for pid in (child.pid, front_of(child))]
        memory = (
            sum(int((p / "statm").read_text().split()[1]) for p in both)
            * os.sysconf("SC_PAGE_SIZE")
            / 2**20
        )
        return (
            sum(len(os.listdir(p / "fd")) for p in both),
            memory,
            HTTP.get(url + "/stats").json()["blocks_used"],
        )

    rng, seen = random.Random(4), {}
    with process(folder, "--queue", "120") as (child, url):
        asyncio.run(some(url, 1000, rng, seen))
        before = state(child, url)
        asyncio.run(some(url, 4000, rng, seen))
        after = state(child, url)
    print(seen, before, after)
    assert sum(seen.values()) == 5000
    assert set(seen) <= {200, 429, "left"}
    assert seen["left"] > 500
    assert seen[200] > 2000
    assert after[0] <= before[0] + 2
    assert after[1] < before[1] + 30
    assert after[2] == 0


LONG = {"prompt": "the", "max_tokens": 240, "ignore_eos": True, "stream": True}


@pytest.mark.slow
def test_sigterm_lets_streams_finish_and_refuses_new_ones(folder):
    with (
        process(folder) as (child, url),
        HTTP.stream("POST", url + "/v1/completions", json={**LONG, "n": 16}, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        child.send_signal(signal.SIGTERM)
        time.sleep(0.02)
        with httpx.Client() as other:  # over connections of its own, which the server still takes
            refused = other.post(url + "/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["message"]
            assert other.get(url + "/health").status_code == 200
            assert other.get(url + "/ready").status_code == 503
            assert child.poll() is None
        text = [line for line in lines if line]
        assert text[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in text[-2]
        assert child.wait(20) == 0


@pytest.mark.slow
def test_a_stream_that_outlives_the_drain_ends_with_an_error(folder):
    with (
        process(folder, "--drain", "0.5") as (child, url),
        HTTP.stream("POST", url + "/v1/completions", json={**LONG, "n": 16}, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        os.kill(
            child.pid, signal.SIGSTOP
        )  # the engine makes no more tokens, so the stream cannot end by itself
        os.kill(front_of(child), signal.SIGTERM)
        *_, error, done = [line for line in lines if line]
        assert "shutting down" in json.loads(error[6:])["error"]["message"]
        assert done == "data: [DONE]"
        os.kill(child.pid, signal.SIGCONT)
        child.wait(10)


@pytest.mark.slow
def test_an_idle_server_ends_at_once(folder):
    with process(folder) as (child, url):
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0


@pytest.mark.slow
def test_clients_of_a_killed_server_get_an_error_and_a_new_one_is_ready_soon(folder):
    many = {**LONG, "n": 16}
    with (
        process(folder) as (child, url),
        HTTP.stream("POST", url + "/v1/completions", json=many, timeout=10) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        child.kill()  # the engine's process: the one that speaks HTTP says so, and ends
        *_, error, done = [line for line in lines if line]
        assert "the engine's process is gone" in json.loads(error[6:])["error"]["message"]
        assert done == "data: [DONE]"
        until(lambda: refuses(url))
    with process(folder) as (child, url):
        with HTTP.stream("POST", url + "/v1/completions", json=many, timeout=10) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(front_of(child), signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                list(lines)
        child.wait(10)  # the engine's process ends with it
    begin = time.monotonic()
    with process(folder) as (child, url):
        assert HTTP.get(url + "/ready").status_code == 200
        print(f"ready after {time.monotonic() - begin:.1f} s")
        assert time.monotonic() - begin < float(
            os.environ.get("READY_SECONDS", "60")
        )  # 3 on a quiet machine


@pytest.mark.slow
def test_the_process_serves_tls_and_says_which_flag_is_wrong(folder, tmp_path):
    names = [str(tmp_path / n) for n in ("a.key", "a.pem", "b.key", "b.pem")]
    for key, cert in (names[:2], names[2:]):
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-keyout",
                key,
                "-out",
                cert,
                "-days",
                "1",
                "-subj",
                "/CN=localhost",
            ],
            check=True,
            capture_output=True,
        )
    with process(folder, "--certificate", names[1], "--certificate-key", names[0]) as (child, url):
        assert url.startswith("https://")
        assert HTTP.get(url + "/ready").status_code == 200
        command = [sys.executable, ROOT / "serve.py", folder]
        taken = subprocess.run(
            [*command, "--port", url.rsplit(":", 1)[1]], capture_output=True, text=True
        )
    wrong = subprocess.run(
        [*command, "--certificate", names[1], "--certificate-key", names[2]],
        capture_output=True,
        text=True,
    )
    for done, what in ((taken, "in use"), (wrong, "do not open as a pair")):
        assert done.returncode
        assert what in done.stderr
        assert "Traceback" not in done.stderr
