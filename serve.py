"""An OpenAI-compatible server over the engine, and the chat page.

    python serve.py MODEL --port 8000          # then open http://127.0.0.1:8000, or point the openai client at .../v1

Top to bottom: flags; what is measured; one request's way through; the routes; the door (keys, limits,
logs); the process. api.py says what requests mean. `create_app(engine)` takes anything with the engine's interface.
"""

import asyncio
import base64
import contextlib
import gc
import hashlib
import hmac
import math
import os
import re
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common import Metrics, UserError, cli, parse_flags
from engine.scheduler import TokenLogprob
from generate import Engine
from runtime import lost_rank_explained
from server import api
from server.api import ENCODE, Answer, Refusal
from server.worker import EngineClient, Inbox, Job, Worker

HERE = Path(__file__).parent


@dataclass
class Args:
    model: str = ""  # the model folder, or a .gguf file
    name: str = ""  # the model's name in the API; empty is the folder's
    adapters: str = ""  # LoRA adapters as further models: name=folder,name=folder
    host: str = "127.0.0.1"  # 0.0.0.0 to be reached from elsewhere: then use keys
    port: int = 8000
    quant: str = ""  # int8, int4, ... as in quant.py: weights packed while loading
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    kv_tokens: int = 0  # tokens of key/value cache; 0 is what memory allows
    concurrency: int = 64  # requests in the engine at once
    queue: int = 256  # requests that may wait for that; one more gets 429
    timeout: float = 600.0  # seconds a request may take in all
    max_body: int = 2_000_000  # bytes of a request
    api_key_file: str = ""  # one key a line, or name:key; also $LLM_API_KEYS, apart by commas
    rate_limit: int = 0  # requests a minute and key; 0 is no limit
    cors: str = ""  # origins that may call from a browser, apart by commas, or *
    certificate: str = ""  # TLS: certificate chain and key in PEM
    certificate_key: str = ""
    drain: float = 30.0  # seconds running requests get after SIGTERM
    log_prompts: bool = False  # also log what was asked
    runs: str = "runs"  # training runs that the page may draw


# --------------------------------------------------------------------------------- what is measured
class Measures:
    """What /metrics shows, named as vLLM names it."""

    def __init__(self, client, depth):
        self.client, self.depth, self.registry = client, depth, (r := CollectorRegistry())
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self.ttft = Histogram(
            "llm:time_to_first_token_seconds",
            "from arrival to the first token",
            registry=r,
            buckets=seconds,
        )
        self.tpot = Histogram(
            "llm:time_per_output_token_seconds",
            "between tokens, mean of a request",
            registry=r,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
        )
        self.e2e = Histogram(
            "llm:e2e_request_latency_seconds",
            "from arrival to the end",
            registry=r,
            buckets=seconds,
        )
        self.queued = Histogram(
            "llm:request_queue_time_seconds",
            "waiting for a place in the engine",
            registry=r,
            buckets=seconds,
        )
        self.finished = Counter(
            "llm:request_success", "requests by how they ended", ["finished_reason"], registry=r
        )
        self.http = Counter("llm:http_requests", "HTTP answers by status", ["status"], registry=r)
        r.register(self)

    def collect(self):
        """The engine's own figures."""
        if not (stats := self.client.stats):
            return
        yield GaugeMetricFamily("llm:num_requests_running", "in the engine", stats["running"])
        yield GaugeMetricFamily(
            "llm:num_requests_waiting", "in the queue", max(0, self.depth() - stats["active"])
        )
        yield GaugeMetricFamily(
            "llm:kv_cache_usage_perc",
            "share of the cache's blocks in use",
            stats["blocks_used"] / max(stats["blocks_total"], 1),
        )
        for ours, name in (
            ("prompt_tokens", "prompt_tokens"),
            ("generated_tokens", "generation_tokens"),
            ("preemptions", "num_preemptions"),
            ("cache_hit_tokens", "prefix_cache_hits"),
            ("cache_query_tokens", "prefix_cache_queries"),
        ):
            yield CounterMetricFamily(
                f"llm:{name}", f"{ours.replace('_', ' ')} since the start", stats[ours]
            )

    def observe(self, job):
        now = time.monotonic()
        self.finished.labels(job.reason).inc()
        self.e2e.observe(now - job.created)
        if job.admitted:
            self.queued.observe(job.admitted - job.created)
        if job.first:
            self.ttft.observe(job.first - job.created)
            if job.tokens > 1:
                self.tpot.observe((now - job.first) / (job.tokens - 1))


# ------------------------------------------------------------------------ one request's way through
class JSON(Response):
    """A body that any client's decoder takes, whatever half characters a caller had put into what is repeated."""

    media_type = "application/json"

    def render(self, content):
        return ENCODE(content).encode("utf-8", "replace")


def refused(refusal):
    return JSON(refusal.body, refusal.status_code, refusal.headers)


def invalid(errors):
    """pydantic's findings -> Refusal"""
    return Refusal(
        400,
        "; ".join(f"{'.'.join(map(str, x['loc'])) or 'body'}: {x['msg']}" for x in errors[:3]),
        "invalid_request",
    )


class Reply(Response):
    """An Answer on its way to the caller, as events or as one body; a caller who leaves, or never reads, ends it."""

    def __init__(self, answer, batches, timeout):
        self.answer, self.batches, self.timeout, self.status_code, self.background = (
            answer,
            batches,
            timeout,
            200,
            None,
        )

    async def __call__(self, scope, receive, send):
        me, loop = asyncio.current_task(), asyncio.get_running_loop()
        gone, timer = asyncio.ensure_future(left(receive)), loop.call_later(self.timeout, me.cancel)
        gone.add_done_callback(leave := lambda _: me.cancel())
        try:
            await self.write(scope, receive, send)
        except asyncio.CancelledError:
            if not (gone.done() or loop.time() >= timer.when()):
                raise
        finally:
            gone.remove_done_callback(leave)
            gone.cancel()
            timer.cancel()

    async def write(self, scope, receive, send):
        if not self.answer.body.stream:
            return await JSON(await self.answer.whole(self.batches))(scope, receive, send)
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]  # or nginx would keep the events until there are many
        async for events in self.answer.stream(self.batches):
            if headers:  # with the first token, in one packet
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                headers = None
            await send(
                {
                    "type": "http.response.body",
                    "body": events,
                    "more_body": not events.endswith(api.DONE),
                }
            )


async def left(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class Service:
    """What the routes share."""

    keep_alive = 15.0  # seconds without a token after which a stream says that it lives

    def __init__(self, engine, args, keys):
        self.engine, self.args = engine, args
        self.keys = {hashlib.sha256(key.encode()).digest(): name for key, name in keys.items()}
        self.adapters = read_adapters(args)
        self.names = [args.name or Path(args.model).stem or "model", *self.adapters]
        self.client, self.depth, self.windows, self.building = EngineClient(), 0, {}, 0
        self.measures, self.draining, self.started = (
            Measures(self.client, lambda: self.depth),
            False,
            time.time(),
        )

    def model(self, name):
        if name not in (None, "", *self.names):
            raise Refusal(
                404,
                f"no model {name!r}; there are {', '.join(self.names)}",
                "model_not_found",
                "model",
            )
        return name or self.names[0]

    def refuse_adapter(self, model, what):
        if model in self.adapters:
            raise Refusal(
                400,
                f"{what} are the base model's: there are none of the adapter {model!r}",
                param="model",
            )

    def admit(self, request, model, prompts, samplings, grammar):
        """Jobs in the queue, or the reason why not: 429, 503. Whatever happens to the request, the Door closes them."""
        if self.draining or self.client.broken:
            raise Refusal(
                503,
                self.client.broken or "shutting down: try another replica",
                headers={"Retry-After": "5"},
            )
        if self.depth + len(prompts) > self.args.concurrency + self.args.queue:
            raise Refusal(
                429,
                f"{self.depth} requests are running or waiting, the most this server takes: try again later",
                "queue_full",
                headers={"Retry-After": str(1 + self.depth // 32)},
            )
        inbox, adapter = Inbox(), model if model in self.adapters else None
        jobs = [
            Job(ids, sampling, adapter, grammar, request.state.key, inbox, i, unfinished=sampling.n)
            for i, (ids, sampling) in enumerate(zip(prompts, samplings))
        ]
        self.depth += len(jobs)
        request.state.jobs = jobs
        for job in jobs:
            self.client.submit(job)
        return jobs

    def close(self, jobs):
        """The request is over, in whatever way: what is left of it goes out of the engine."""
        for job in jobs:
            self.client.close(job)
            self.measures.observe(job)
        self.depth -= len(jobs)

    async def batches(self, jobs):
        """[(prompt's number, Delta)] of all jobs as they come, [] when nothing has come for a while. Refusal for what failed,
        and when the time is up."""
        deadline, answers = (
            time.monotonic() + self.args.timeout,
            sum(job.sampling.n for job in jobs),
        )
        while answers:
            wait = min(deadline - time.monotonic(), self.keep_alive)
            if wait <= 0:
                raise Refusal(
                    504,
                    f"not finished within {self.args.timeout:g} s: ask for fewer tokens",
                    "timeout",
                )
            batch = await jobs[0].inbox.get(wait)
            for item in batch:
                if isinstance(item, Refusal):
                    raise item
                if item[1].finish_reason == "error":
                    raise Refusal(400, item[1].error or "no token was allowed")
                answers -= item[1].finish_reason is not None
            yield batch

    async def grammar(self, body, forced=None):
        """What binds the answer, or None; built already, or refused, by whom the engine is."""
        if grammar := api.grammar_of(body, forced):
            if self.building >= 32:
                raise Refusal(
                    429,
                    f"{self.building} grammars wait to be built: try again later",
                    "queue_full",
                    headers={"Retry-After": "5"},
                )
            self.building += 1
            try:
                await self.client.call("grammar", *grammar)
            finally:
                self.building -= 1
        return grammar

    def reply(self, answer, jobs):
        return Reply(answer, self.batches(jobs), self.args.timeout + 10)


async def aside(request, function, *args):
    """Call a function, in a thread if the request is so large that others would feel it."""
    if int(request.headers.get("content-length", 1 << 20)) < 4096:
        return function(*args)
    return await asyncio.to_thread(function, *args)


# --------------------------------------------------------------------------------------- the routes
def create_app(engine, args=None, keys=None, sock=None):
    """engine: see engine.Engine; keys: {key: name of its owner}, empty lets everyone in; sock: to a Worker in another process,
    without which the engine gets a thread of this one -> FastAPI."""
    service = Service(engine, args or Args(), keys or {})

    @contextlib.asynccontextmanager
    async def lifespan(app):
        front, thread = sock, None
        if not front:
            front, back = socket.socketpair()
            thread = threading.Thread(
                target=Worker(engine, back, service.args.concurrency).run,
                daemon=True,
                name="engine",
            )
            thread.start()
        await asyncio.get_running_loop().create_unix_connection(lambda: service.client, sock=front)
        yield
        service.client.transport.close()
        if thread:
            await asyncio.to_thread(thread.join, 10)

    app = FastAPI(
        title="LLM server",
        version="1",
        lifespan=lifespan,
        description="OpenAI-compatible; fields: see the README.",
        responses={400: {"description": "what is wrong with the request, in OpenAI's error shape"}},
    )
    app.state.service = service
    app.add_exception_handler(
        HTTPException,
        lambda _, e: refused(
            e
            if isinstance(e, Refusal)
            else Refusal(
                e.status_code, f"{e.detail}: see /docs for what there is", headers=e.headers
            )
        ),
    )
    app.add_exception_handler(UserError, lambda _, e: refused(Refusal(400, str(e))))
    app.add_exception_handler(
        RequestValidationError,
        lambda _, e: refused(invalid([{**x, "loc": x["loc"][1:]} for x in e.errors()])),
    )  # without "body" or "query"
    direct = add_openai_routes(app, service)
    add_token_routes(app, service)
    add_operation_routes(app, service)
    app.add_middleware(Door, service=service, direct=direct)
    return app


def add_openai_routes(app, service):
    """-> the two that the Door calls directly: {(method, path): (what a body must be, the function)}"""
    engine, tok, client = service.engine, service.engine.tok, service.client

    @app.post("/v1/chat/completions")
    async def chat_completions(body: api.ChatRequest, request: Request):
        def plan():
            if body.top_logprobs and not body.logprobs:
                raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
            if 0 in (body.max_tokens, body.max_completion_tokens):
                raise Refusal(
                    400,
                    "max_tokens is 0, but a chat's answer needs at least one",
                    param="max_tokens",
                )
            prompt = api.chat_prompt(tok, body.messages, body.tools if api.tools_of(body) else None)
            return prompt, api.sampling_of(
                body,
                prompt,
                tok,
                engine.max_model_len,
                (body.top_logprobs or 0) if body.logprobs else None,
            )

        model, grammar = (
            service.model(body.model),
            await service.grammar(body, api.forced_call(body, tok)),
        )
        prompt, sampling = await aside(request, plan)
        jobs = service.admit(request, model, [prompt], [sampling], grammar)
        return service.reply(Answer(tok, body, "chat", request.state.id, model, [prompt]), jobs)

    @app.post("/v1/completions")
    async def completions(body: api.CompletionRequest, request: Request):
        def plan():
            if body.stream and (body.best_of or 1) > (body.n or 1):
                raise Refusal(
                    400,
                    "best_of answers are compared when all are done: they cannot be streamed",
                    param="best_of",
                )
            prompts = api.prompt_lists(body.prompt, tok)
            if body.max_tokens == 0:
                if not body.echo or max(map(len, prompts)) > engine.max_model_len:
                    raise Refusal(
                        400,
                        "max_tokens 0 only repeats the prompt: it needs echo, and a prompt within the context of "
                        f"{engine.max_model_len:,} tokens",
                        param="max_tokens",
                    )
                return prompts, []
            return prompts, [
                api.sampling_of(body, p, tok, engine.max_model_len, body.logprobs) for p in prompts
            ]

        model, grammar = service.model(body.model), await service.grammar(body)
        prompts, samplings = await aside(request, plan)
        echo, scored = [tok.decode(p) for p in prompts] if body.echo else (), ()
        if body.echo and body.logprobs is not None:
            service.refuse_adapter(model, "the logprobs of an echo")
            scored = [
                [TokenLogprob(*t) for t in await client.call("prompt_logprobs", p, body.logprobs)]
                for p in prompts
            ]
        jobs = service.admit(request, model, prompts[: len(samplings)], samplings, grammar)
        return service.reply(
            Answer(tok, body, "text", request.state.id, model, prompts, echo, scored), jobs
        )

    @app.post("/v1/embeddings")
    async def embeddings(body: api.EmbeddingRequest, request: Request):
        """The mean over an input's tokens of the last hidden states, scaled to length 1."""
        model, prompts = (
            service.model(body.model),
            await aside(request, api.prompt_lists, body.input, tok),
        )
        service.refuse_adapter(model, "embeddings")
        if longest := [len(p) for p in prompts if len(p) > engine.max_model_len]:
            raise Refusal(
                400,
                f"an input has {longest[0]:,} tokens, the context is {engine.max_model_len:,}",
                "context_length_exceeded",
            )
        vectors = [
            await client.call("embed", ids) for ids in prompts
        ]  # others' steps come in between
        used = sum(map(len, prompts))
        return JSON(
            {
                "object": "list",
                "model": model,
                "usage": {"prompt_tokens": used, "total_tokens": used},
                "data": [
                    {
                        "object": "embedding",
                        "index": i,
                        "embedding": api.encode_vector(v, body.encoding_format),
                    }
                    for i, v in enumerate(vectors)
                ],
            }
        )

    @app.get("/v1/models")
    async def models():
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": int(service.started),
                    "owned_by": "local",
                    "parent": service.names[0] if name in service.adapters else None,
                    "max_model_len": engine.max_model_len,
                }
                for name in service.names
            ],
        }

    return {
        ("POST", "/v1/chat/completions"): (api.ChatRequest, chat_completions),
        ("POST", "/v1/completions"): (api.CompletionRequest, completions),
    }


def add_token_routes(app, service):
    tok = service.engine.tok

    @app.post("/tokenize")
    async def tokenize(body: api.TokenizeRequest, request: Request):
        """A text's ids, or those of the prompt that a chat becomes."""
        if (body.prompt is None) == (body.messages is None):
            raise Refusal(400, "give a prompt or messages, one of the two")
        if body.messages is not None:
            ids = await aside(
                request, api.chat_prompt, tok, body.messages, None, body.add_generation_prompt
            )
        else:
            ids = await aside(request, tok.encode, body.prompt)
        return JSON(
            {
                "tokens": ids,
                "count": len(ids),
                "max_model_len": service.engine.max_model_len,
                "token_strs": [api.spell(tok, i)[0] for i in ids],
            }
        )

    @app.post("/detokenize")
    async def detokenize(body: api.DetokenizeRequest):
        if not all(0 <= i < tok.vocab_size for i in body.tokens):
            raise Refusal(400, f"ids go from 0 to {tok.vocab_size - 1}")
        return JSON({"prompt": tok.decode(body.tokens)})


def add_operation_routes(app, service):
    client = service.client

    @app.get("/health")
    async def health():
        return {"status": "alive"}

    @app.get("/ready")
    async def ready():
        if service.draining or client.broken:
            raise Refusal(503, client.broken or "not serving")
        return {"status": "ready", "model": service.names[0]}

    @app.get("/stats")
    async def stats():
        now = {name: value for name, value in client.stats.items() if name != "active"}
        return {
            **now,
            "queue": max(0, service.depth - client.stats.get("active", 0)),
            "tokens_per_second": round(client.tokens_per_second(), 1),
            "uptime": round(time.time() - service.started, 1),
            "models": service.names,
            "max_model_len": service.engine.max_model_len,
            "chat": service.engine.tok.chat_template is not None,
        }

    @app.get("/metrics")
    async def metrics():
        return Response(
            generate_latest(service.measures.registry), media_type="text/plain; version=0.0.4"
        )

    @app.get("/runs")
    async def runs():
        """Training runs that can be drawn, the newest first."""
        found = sorted(
            Path(service.args.runs).glob("*/metrics.jsonl"), key=lambda p: -p.stat().st_mtime
        )
        return {"runs": [p.parent.name for p in found[:100]]}

    @app.get("/runs/{name}")
    async def run(name: str, after: int = -1):
        if name not in (await runs())["runs"]:  # only what was listed: a name is not a path
            raise Refusal(404, f"no run {name!r}")
        rows = await asyncio.to_thread(
            Metrics.read, Path(service.args.runs) / name / "metrics.jsonl"
        )
        return {"rows": [r for r in rows if r.get("step", 0) > after][-5000:]}

    @app.get("/", include_in_schema=False)
    async def page():
        if not (HERE / "ui.html").is_file():
            raise Refusal(404, "this server has no page; its API is at /v1, described at /docs")
        scripts = re.findall(
            r"<script>(.*?)</script>", (HERE / "ui.html").read_text(), re.S
        )  # only the page's own may run
        hashes = " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in scripts
        )
        return FileResponse(
            HERE / "ui.html",
            headers={
                "Cache-Control": "no-cache",
                "Content-Security-Policy": f"default-src 'self'; script-src {hashes}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
                "object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
            },
        )


# ----------------------------------------------------------------------------------------- the door
class Door:
    """Around every request, as plain ASGI so that streams pass untouched: an id, keys, limits, CORS, one log line at the end."""

    slow = 30.0  # seconds that a request's head and body may each take to arrive
    OPEN = ("/", "/health", "/ready", "/docs", "/openapi.json", "/favicon.ico")  # need no key

    def __init__(self, app, service, direct):
        self.app, self.service, self.cors = (
            app,
            service,
            service.args.cors.split(",") if service.args.cors else [],
        )
        self.direct = direct

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {k.decode("latin1"): v.decode("latin1") for k, v in scope["headers"]}
        state, begin, status = scope.setdefault("state", {}), time.monotonic(), 0
        state["id"] = (
            given
            if re.fullmatch(r"[\w.:-]{1,100}", given := headers.get("x-request-id", ""), re.ASCII)
            else (secrets.token_hex(8))
        )
        state["jobs"] = []

        async def tagged(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", state["id"].encode()),
                    *self.cors_headers(headers),
                ]
            await send(message)

        try:
            if scope["method"] == "OPTIONS" and self.cors_headers(
                headers
            ):  # a browser asks before it sends
                await Response(status_code=204)(scope, receive, tagged)
            else:
                self.check(scope, headers, state)
                receive = self.limited(headers, receive)
                kind, route = self.direct.get((scope["method"], scope["path"]), (None, None))
                if kind and headers.get("content-type", "").partition(";")[0] == "application/json":
                    await self.directly(kind, route, scope, receive, tagged)
                else:
                    await self.app(scope, receive, tagged)
        except Refusal as refusal:
            if status:
                raise
            await refused(refusal)(scope, receive, tagged)
        except Exception as error:
            print(
                ENCODE({"event": "error", "id": state["id"], "error": repr(error)[:500]}),
                file=sys.stderr,
                flush=True,
            )
            if status:
                raise
            await refused(
                Refusal(500, f"internal error ({type(error).__name__}); its id is {state['id']}")
            )(scope, receive, tagged)
        finally:
            self.service.close(state["jobs"])
            self.service.measures.http.labels(str(status)).inc()
            self.log(scope, state, status, time.monotonic() - begin)

    async def directly(self, kind, route, scope, receive, send):
        """What FastAPI does with a body of JSON, without its layers, which took a fifth of the time of a short answer."""
        request = Request(scope, receive)
        try:
            body = kind.model_validate(await request.json())
        except ValidationError as error:
            raise invalid(error.errors(include_url=False, include_input=False)) from None
        except (ValueError, RecursionError, ClientDisconnect) as error:
            raise Refusal(400, f"body: not JSON ({error})", "invalid_request") from None
        try:
            await (await route(body, request))(scope, receive, send)
        except UserError as error:
            raise Refusal(400, str(error)) from None

    def check(self, scope, headers, state):
        """Who is it, and may they now? Raises Refusal 401 or 429."""
        keys, found = self.service.keys, None
        given = hashlib.sha256(
            headers.get("authorization", "").removeprefix("Bearer ").strip().encode("latin1")
        ).digest()
        for (
            key,
            name,
        ) in (
            keys.items()
        ):  # every key is compared, in constant time, so that the time tells nothing
            if hmac.compare_digest(key, given):
                found = name
        state["key"] = found or (scope.get("client") or ("",))[0]
        if scope["path"] in self.OPEN:
            return
        if keys and found is None:
            raise Refusal(
                401,
                "this server needs an API key: Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if limit := self.service.args.rate_limit:
            if len(self.service.windows) > 10_000:  # addresses of long ago
                self.service.windows.clear()
            window, now = self.service.windows.setdefault(state["key"], deque()), time.monotonic()
            while window and window[0] < now - 60:
                window.popleft()
            if len(window) >= limit:
                raise Refusal(
                    429,
                    f"over {limit} requests in a minute",
                    "rate_limit_exceeded",
                    headers={"Retry-After": str(int(61 - (now - window[0])))},
                )
            window.append(now)

    def limited(self, headers, receive):
        """receive() that ends a body which is too large or comes too slowly."""
        most, seen, arrived, deadline = (
            self.service.args.max_body,
            0,
            False,
            time.monotonic() + self.slow,
        )
        end = {"Connection": "close"}  # the rest of the body is not read
        too_large = Refusal(413, f"the body is over {most:,} bytes (--max-body)", headers=end)
        if (
            headers.get("content-length", "0").isdigit()
            and int(headers.get("content-length", 0)) > most
        ):
            raise too_large

        async def limit():
            nonlocal seen, arrived
            if arrived:  # the body is here: what comes now is only that the client left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.01, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise Refusal(
                    408, f"the request's body did not arrive within {self.slow:g} s", headers=end
                ) from None
            seen += len(message.get("body", b""))
            if seen > most:
                raise too_large
            arrived = message["type"] == "http.request" and not message.get("more_body")
            return message

        return limit

    def cors_headers(self, headers):
        origin = headers.get("origin")
        if not origin or not ("*" in self.cors or origin in self.cors):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin1")),
            (b"vary", b"Origin"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
        ]

    def log(self, scope, state, status, seconds):
        """One line of JSON a request: how long it waited and took, how much it made, why it ended; of its text nothing."""
        if scope["path"] in ("/health", "/ready", "/metrics", "/stats"):
            return
        row = {
            "event": "request",
            "id": state["id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }
        if jobs := state["jobs"]:
            first = [j.first for j in jobs if j.first]
            row |= {
                "key": state["key"],
                "prompt_tokens": sum(len(j.prompt) for j in jobs),
                "tokens": sum(j.tokens for j in jobs),
                "queue_seconds": round(
                    max((j.admitted - j.created for j in jobs if j.admitted), default=0.0), 4
                ),
                "ttft_seconds": round(min(first) - jobs[0].created, 4) if first else None,
                "reason": ",".join(sorted({j.reason for j in jobs})),
            }
            if self.service.args.log_prompts:
                row["prompts"] = [self.service.engine.tok.decode(j.prompt) for j in jobs]
        print(ENCODE(row), file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------- the process
def read_keys(args):
    """--api-key-file and $LLM_API_KEYS -> {key: name}; a file that others can read is warned of."""
    lines = [k for k in os.environ.get("LLM_API_KEYS", "").split(",") if k.strip()]
    if args.api_key_file:
        path = Path(args.api_key_file)
        if not path.is_file():
            raise UserError(f"--api-key-file {path}: no such file")
        if os.name == "posix" and path.stat().st_mode & 0o077:
            print(f"warning: {path} can be read by others; chmod 600 {path}", file=sys.stderr)
        lines += [
            line
            for line in path.read_text().splitlines()
            if line.strip() and not line.startswith("#")
        ]
        if not lines:
            raise UserError(f"--api-key-file {path} holds no key: one a line, or name:key")
    named = [line.strip().rpartition(":") for line in lines]
    return {
        key: name or "key-" + hashlib.sha256(key.encode()).hexdigest()[:8] for name, _, key in named
    }


def read_adapters(args):
    """--adapters name=folder,name=folder -> {name: folder}"""
    pairs = [pair.partition("=") for pair in args.adapters.split(",") if pair.strip()]
    if bad := ["".join(pair) for pair in pairs if not all(pair)]:
        raise UserError(f"--adapters {bad[0]}: write name=folder, several apart by commas")
    return {name.strip(): folder.strip() for name, _, folder in pairs}


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which in addition hangs up on a client whose request's head does not come (a "slow loris"), or does not
    end."""

    late: asyncio.TimerHandle | None = None  # while a head is awaited
    head = 0  # bytes that came meanwhile

    def connection_made(self, transport):
        super().connection_made(transport)
        # asyncio does this for sockets that say IPPROTO_TCP, and uvicorn's do not: a second write would wait 40 ms for an ACK
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.on_message_begin()

    def on_message_begin(self):
        super().on_message_begin()
        self.head, self.late = 0, self.late or self.loop.call_later(Door.slow, self.transport.abort)

    def data_received(self, data):
        self.head += len(data)
        if self.late and self.head > 65536 + len(data):
            return self.send_400_response("The head of the request is over 65,536 bytes.")
        super().data_received(data)

    def on_headers_complete(self):
        self.in_time()
        super().on_headers_complete()

    def connection_lost(self, error):
        self.in_time()
        super().connection_lost(error)

    def in_time(self):
        if self.late:
            self.late.cancel()
            self.late = None


class Server(uvicorn.Server):
    """uvicorn, which after a SIGTERM or Ctrl-C answers 503 to what is new until what runs has finished; a second one ends it."""

    ready = ""  # said as soon as it listens
    deadline = math.inf  # of the requests that run, once it drains

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started:
            print(self.ready, flush=True)

    def handle_exit(self, sig, frame):
        service = self.config.app.state.service
        if service.draining:
            return super().handle_exit(sig, frame)
        service.draining, self.deadline = True, time.monotonic() + service.args.drain

    async def on_tick(self, counter):
        service = self.config.app.state.service
        self.should_exit |= (service.draining or service.client.lost) and (
            service.depth == 0 or time.monotonic() > self.deadline
        )
        return await super().on_tick(counter)


@lost_rank_explained("Start it again.")
def main():
    args = Args(**parse_flags(Args, __doc__, positional=("model",)))
    if not args.model:
        raise UserError("which model? python serve.py MODEL, a model folder or a .gguf file")
    if bool(args.certificate) != bool(args.certificate_key):
        raise UserError("TLS needs both --certificate and --certificate-key")
    keys, adapters, begin = read_keys(args), read_adapters(args), time.time()
    if args.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        print(
            "warning: reachable from elsewhere and without keys (--api-key-file)", file=sys.stderr
        )
    # before the model is read: a port in use is told at once; of several ranks only the first listens
    config, sock = (None, None) if int(os.environ.get("RANK", 0)) else listen(args)
    engine = Engine(
        args.model,
        args.device,
        args.dtype,
        args.quant or None,
        args.kv_tokens or None,
        max_seqs=args.concurrency,
        adapters=adapters or None,
    )
    if engine.tok is None:
        raise UserError(f"{args.model} has no tokenizer, and a server needs one (tokenizer.json)")
    if engine.tok.chat_template is None:
        print(
            "note     this model has no chat template: /v1/completions works, /v1/chat/completions answers 400"
        )
    gc.set_threshold(20_000, 50, 50)
    gc.collect()
    gc.freeze()  # what is here now stays: the collector need not go through it again and again
    sys.setswitchinterval(
        0.001
    )  # no longer does the engine wait for Python while another thread of its process computes
    front = (
        apart(engine, args.concurrency) if sys.platform == "linux" else None
    )  # elsewhere a process that forks may not compute
    scheme = "https" if args.certificate else "http"
    config.app = create_app(engine, args, keys, front)
    config.load()
    server = Server(config)
    server.ready = (
        f"ready    {scheme}://{args.host}:{sock.getsockname()[1]} after {time.time() - begin:.1f} s; the page at /, "
        "the API at /v1, its description at /docs"
    )
    server.run(sockets=[sock])
    sys.stdout.flush()
    if front:
        os._exit(0)  # the engine's threads and device are the other process's to end
    gc.unfreeze()  # or triton's bindings count what was never freed, and say so


def apart(engine, concurrency):
    """Fork. This process goes on as the engine's and ends here when the other one has; the new one returns, to speak HTTP, with
    the socket between them. It has the tokenizer and all else in memory, and never computes."""
    front, back = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Python warns of threads: the engine's, which wait, and which the new process never needs
        child = os.fork()
    if not child:
        back.close()
        os.setpgrp()  # Ctrl-C reaches the first process, which passes it on
        with contextlib.suppress(OSError):
            if (
                len(cores := os.sched_getaffinity(0)) > 1
            ):  # one core is left to the engine's own thread, which all others wait for
                os.sched_setaffinity(0, cores - {min(cores)})
            os.nice(10)  # a step comes first
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return front
    front.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    Worker(engine, back, concurrency).run()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def listen(args):
    """-> (uvicorn's Config, the socket bound but not yet listening)"""
    config = uvicorn.Config(
        None,
        args.host,
        args.port,
        http=Protocol,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        backlog=1024,
        ssl_certfile=args.certificate or None,
        ssl_keyfile=args.certificate_key or None,
    )
    try:
        if args.certificate:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                args.certificate, args.certificate_key
            )
        return config, config.bind_socket()
    except SystemExit:
        raise UserError(
            f"port {args.port} on {args.host} is in use or not allowed: choose another --port"
        ) from None
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UserError(
            f"TLS: {args.certificate} and {args.certificate_key} do not open as a pair ({error})"
        ) from None


if __name__ == "__main__":
    cli(main)
