"""An OpenAI-compatible server over the engine, and the chat page.

    python serve.py MODEL --port 8000     # then open http://127.0.0.1:8000, or point an OpenAI
                                          # client at http://127.0.0.1:8000/v1

A request's way: door.Protocol reads its head; door.Door asks for its key, may answer 429 (the
key's requests a minute), and whatever happens closes its jobs at the end; BodyRoute reads its body;
a route plans it with server/api.py; Service.admit puts it into the queue, or answers 429 (the queue
is full); server/worker.py computes; `reply` carries what server/answers.py makes of the tokens to
the client. BodyRoute stops all of this when the client leaves.

Top to bottom: flags; what the routes share; a reply on its way; the routes; the process.
`create_app(engine)` takes anything that has the engine's interface.
"""

import asyncio
import base64
import contextlib
import gc
import hashlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import generate_latest
from pydantic import ValidationError

from common import UserError, cli, distinct, flag, model_name, parse_flags, warn  # isort: skip

from chat import CHATML_TEMPLATE
from generate import Engine, turn_ends
from runtime import lost_rank_explained
from server import api
from server.answers import DONE, ChatAnswer, TextAnswer, encode_vector
from server.api import Refusal
from server.door import (
    ERROR_HANDLERS,
    Door,
    Measures,
    invalid,
    json_later,
    json_response,
    listed,
    listen,
    read_keys,
)
from server.worker import EngineClient, Inbox, Job, Worker, fork_front

CHAT_PAGE = Path(__file__).with_name("ui.html")
LATER = {"Retry-After": "5"}
LOGPROBS = 1 << 18  # that the tokens of one request's prompts may ask for
PARTS = 100_000  # lists and objects in a request: each costs much more than its two bytes
BODIES = json.JSONDecoder(object_pairs_hook=distinct)
RUN_BYTES = 2_000_000  # at the end of a training run's metrics that are read


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
    warm_up: bool = True  # on a GPU; without: ready at once, with slower kernels and first answers
    concurrency: int = 64  # requests in the engine at once
    queue: int = 256  # requests that may wait for that; one more gets 429
    timeout: float = 600.0  # seconds a request may take in all
    max_body: int = 2_000_000  # bytes of a request
    api_key_file: str = ""  # one key a line, or name:key; also $LLM_API_KEYS, apart by commas
    rate_limit: int = 0  # requests a minute of a key, or without keys of an address; 0 is no limit
    allowed_hosts: str = ""  # names it may be called by, * is any; empty: with keys any, else local
    trusted_proxy: str = ""  # addresses or networks whose X-Forwarded-For is believed; * is any
    cors: str = ""  # origins that may call from a browser, apart by commas, or *
    certificate: str = ""  # TLS: certificate chain and key in PEM
    certificate_key: str = ""
    drain: float = 30.0  # seconds running requests get after SIGTERM
    runs: str = "runs"  # training runs that the page may draw


def base_name(args):
    """What the model without an adapter is called."""
    return args.name or model_name(args.model or "model")


def adapter_folders(args):
    """--adapters name=folder,name=folder -> {name: folder}"""
    adapters = {}
    for pair in listed(args.adapters):
        name, _, folder = pair.partition("=")
        if not name or not folder or name in (base_name(args), *adapters):
            raise UserError(
                f"--adapters {pair}: write name=folder, several apart by commas, each "
                "with a name of its own"
            )
        adapters[name] = folder
    return adapters


# -------------------------------------------------------------------------- what the routes share
class Service:
    """Knows the models by name, and takes requests into the engine and out again."""

    keep_alive = 15.0  # seconds without a token after which a stream says that it lives

    def __init__(self, engine, args):
        self.tok = engine.tok
        self.context = engine.max_model_len  # tokens of prompt and answer
        self.args = args
        self.adapters = adapter_folders(args)
        self.names = [base_name(args), *self.adapters]
        self.defaults = engine.sampling_defaults  # of Sampling, as the folder says
        self.turn_ends = ()
        with contextlib.suppress(UserError):  # a format unknown to us, or none
            self.turn_ends = turn_ends(self.tok)
        self.client = EngineClient()
        self.measures = Measures(self.client)
        self.draining = False
        self.created = int(time.time())

    def model(self, name):
        if name and name not in self.names:
            message = f"no model {name!r}; there are {', '.join(self.names)}"
            raise Refusal(404, message, "model_not_found", "model")
        return name or self.names[0]

    def about(self, model):
        """A model as /v1/models shows it."""
        return {
            "id": model,
            "object": "model",
            "owned_by": "local",
            "parent": self.names[0] if model in self.adapters else None,
            "created": self.created,
            "max_model_len": self.context,
        }

    def check_room(self, count):
        """Raise Refusal 503, 400 or 429 unless so many jobs may come in."""
        message = self.client.broken
        if self.draining:
            message = "shutting down: try another replica"
        elif self.client.hangs():
            message = "the engine has not made a step for long"
        if message:
            raise Refusal(503, message, headers=LATER)

        most = self.args.concurrency + self.args.queue
        if count > most:  # there never will be room
            raise Refusal(400, f"{count} prompts, but this server takes {most} at once")
        depth = len(self.client.jobs)
        if depth + count > most:
            message = f"{depth} requests are running or waiting, the most this server takes"
            raise Refusal(429, message, "queue_full", None, LATER)

    def enter(self, state, tokens, answers, offset, *order):
        """Send an order to the engine -> its Job. Whatever happens to the request then, the Door
        calls `close` with it."""
        job = Job(state.key, tokens, answers, state.inbox, offset)
        state.jobs.append(job)
        self.client.send(job, *order)
        return job

    def admit(self, state, model, prompts, samplings, grammar):
        """Put a request's prompts into the queue."""
        self.check_room(len(samplings))
        adapter = model if model in self.adapters else None
        offset = 0
        for prompt, sampling in zip(prompts, samplings):
            order = prompt, vars(sampling), adapter, grammar
            self.enter(state, len(prompt), sampling.n, offset, "submit", *order)
            offset += sampling.n

    async def read(self, state, model, prompts, count=None):
        """Have prompts read -> for each its embedding, or with a count plain_logprobs (see
        server/worker.py) with so many of the likeliest."""
        if model in self.adapters:
            message = "embeddings and logprobs of an echo are the base model's, not an adapter's"
            raise Refusal(400, message, param="model")
        longest = max(map(len, prompts))
        if longest > self.context:
            message = f"a prompt has {longest:,} tokens, the context is {self.context:,}"
            raise Refusal(400, message, "context_length_exceeded")
        tokens = sum(map(len, prompts))
        if count is not None and tokens * (count + 1) > LOGPROBS:
            message = f"{tokens:,} tokens with {count} logprobs each: {LOGPROBS:,} are the most"
            raise Refusal(400, message, param="logprobs")
        self.check_room(1)
        self.enter(state, tokens, len(prompts), 0, "read", prompts, count)
        found = [[] for _ in prompts]
        async for batch in self.batches(state):
            for delta in batch:
                found[delta.index] += delta.logprobs
        return found

    def close(self, jobs):
        """Take what is left of a request out of queue and engine, and count it."""
        for job in jobs:
            self.client.close(job)
            self.measures.observe(job)

    async def batches(self, state):
        """Yield lists of a request's Deltas as they come, [] when nothing has come for a while.
        Raises Refusal for what failed, and when the time is up."""
        deadline = state.begin + self.args.timeout
        while state.inbox.items or any(job.unfinished for job in state.jobs):
            wait = min(deadline - time.monotonic(), self.keep_alive)
            if wait <= 0:
                raise Refusal(504, f"not finished within {self.args.timeout:g} s", "timeout")
            batch = await state.inbox.get(wait)
            for item in batch:
                if isinstance(item, Refusal):
                    raise item
                if item.finish_reason == "error":
                    raise Refusal(400, item.error)
            yield batch


async def shared(request: Request):
    return request.app.state.service


Shared: TypeAlias = Annotated[Service, Depends(shared)]  # what FastAPI hands to a route


# ----------------------------------------------------------------------------- a reply on its way
async def reply(batches, answer):
    """What comes of a request -> the response that carries it to the client."""
    if not answer.body.stream:
        return await json_later(await answer.whole(batches))

    async def respond(scope, receive, send):
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # or nginx would keep the events until there are many
        ]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        async for events in answer.stream(batches):
            if start:  # with the first token, in one packet
                await send(start)
                start = None
            more = not events.endswith(DONE)
            await send({"type": "http.response.body", "body": events, "more_body": more})

    return respond


# --------------------------------------------------------------------------- from HTTP to a route
class BodyRoute(APIRoute):
    """FastAPI's route, but what takes (body, request, service) gets them in one step: FastAPI's
    general way to a function's arguments costs a fifth of the time of a short answer. And it ends
    when the client leaves: door.Protocol takes the task `answering` out of the request's state and
    cancels it, this returns to the Door, and that closes the request's jobs."""

    def __init__(self, path, endpoint, **options):
        super().__init__(path, endpoint, **options)
        kind = endpoint.__annotations__.get("body")

        async def answer(scope, receive, send):
            request = Request(scope, receive)
            body = await read_body(request, kind)
            state = scope["state"]
            state["inbox"] = Inbox()
            state["answering"] = asyncio.current_task()
            try:
                response = await endpoint(body, request, await shared(request))
                await response(scope, receive, send)
            except asyncio.CancelledError:
                if "answering" in state:
                    raise  # it was not Protocol: somebody else ends this task
            finally:
                state.pop("answering", None)

        if kind:
            self.app = answer


async def read_body(request, kind):
    """A request's JSON -> its pydantic class `kind`. Raises Refusal for all that is not one."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if media_type.lower() != "application/json":
        # A page of another origin may send other types without asking.
        raise Refusal(400, f"{media_type!r} is not application/json", "invalid_request")
    try:
        body = await request.receive.read()  # the Door's receive is a door.Body
        text = body.decode()
        # Without its strings: every other part between quotes that are not escaped.
        bare = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
        if bare.count("[") + bare.count("{") > PARTS:
            raise Refusal(400, f"body: over {PARTS:,} lists and objects", "invalid_request")
        return api.parse_body(BODIES.decode(text), kind)
    except ValidationError as error:
        raise invalid(error.errors()) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"body: not JSON ({error})", "invalid_request") from None


async def aside(request, function, *args):
    """Call a function, in a thread if others would feel how long it takes: of a large request, or
    where a foreign chat template runs in a process of its own."""
    foreign = request.app.state.service.tok.chat_template not in (None, CHATML_TEMPLATE)
    if not foreign and int(request.headers.get("content-length", 1 << 20)) < 4096:
        return function(*args)
    return await asyncio.to_thread(function, *args)


routes = APIRouter(route_class=BodyRoute)


# ------------------------------------------------------------------------------- routes of OpenAI
@routes.post("/v1/chat/completions")
async def chat_completions(body: api.ChatRequest, request: Request, service: Shared):
    model = service.model(body.model)
    grammar = api.grammar_of(body)
    call = api.forced_call(body, service.tok)
    if grammar and call:
        message = "tool_choice and another field bind the answer: give one"
        raise Refusal(400, message, param="tool_choice")
    prompt, sampling = await aside(request, plan_chat, body, service)
    service.admit(request.state, model, [prompt], [sampling], call or grammar)
    answer = ChatAnswer(service.tok, body, request.state.id, model, [prompt])
    return await reply(service.batches(request.state), answer)


def plan_chat(body, service):
    """-> (prompt, Sampling)"""
    logprobs = body.top_logprobs if body.logprobs else None
    prompt = api.chat_prompt(service.tok, body)
    return prompt, api.request_sampling(body, prompt, service, logprobs, service.turn_ends)


@routes.post("/v1/completions")
async def completions(body: api.CompletionRequest, request: Request, service: Shared):
    model = service.model(body.model)
    grammar = api.grammar_of(body)
    prompts, samplings = await aside(request, plan_completion, body, service)
    scored = []
    if body.echo and body.logprobs is not None:
        scored = await service.read(request.state, model, prompts, body.logprobs)
        if samplings:  # for which its place has to be free
            service.client.close(request.state.jobs[-1])
    service.admit(request.state, model, prompts, samplings, grammar)
    answer = TextAnswer(service.tok, body, request.state.id, model, prompts, scored)
    return await reply(service.batches(request.state), answer)


def plan_completion(body, service):
    """-> (prompts, a Sampling for each, or for none where the prompts are only repeated)"""
    prompts = api.prompt_lists(body.prompt, service.tok, body.add_special_tokens)
    if body.echo and body.max_tokens == 0:
        return prompts, []
    return prompts, [api.request_sampling(body, ids, service, body.logprobs) for ids in prompts]


@routes.post("/v1/embeddings")
async def embeddings(body: api.EmbeddingRequest, request: Request, service: Shared):
    """The mean over an input's tokens of the last hidden states, scaled to length 1."""
    model = service.model(body.model)
    prompts = await aside(request, api.prompt_lists, body.input, service.tok)
    data = []
    for i, vector in enumerate(await service.read(request.state, model, prompts)):
        shown = encode_vector(vector, body.encoding_format)
        data.append({"object": "embedding", "index": i, "embedding": shown})
    used = sum(map(len, prompts))
    usage = {"prompt_tokens": used, "total_tokens": used}
    return await json_later({"object": "list", "model": model, "usage": usage, "data": data})


@routes.get("/v1/models")
async def list_models(service: Shared):
    return {"object": "list", "data": [service.about(name) for name in service.names]}


@routes.get("/v1/models/{name:path}")
async def read_model(service: Shared, name: str):
    return service.about(service.model(name))


# ------------------------------------------------------------------------------ routes of our own
@routes.post("/tokenize")
async def tokenize(body: api.TokenizeRequest, request: Request, service: Shared):
    """A text's ids, or those of the prompt that a chat becomes."""
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "give a prompt or messages, one of the two")
    service.model(body.model)
    if body.prompt is None:
        chat = api.ChatRequest(messages=body.messages)
        ids = await aside(request, api.chat_prompt, service.tok, chat)
    else:
        ids = await aside(request, service.tok.encode, body.prompt)
    return json_response({"tokens": ids})


@routes.post("/detokenize")
async def detokenize(body: api.DetokenizeRequest, request: Request, service: Shared):
    service.model(body.model)
    return json_response({"prompt": service.tok.decode(body.tokens)})


@routes.get("/health")
async def health(service: Shared):
    if service.client.broken:
        raise Refusal(503, service.client.broken)
    return {"status": "alive"}


@routes.get("/ready")
async def ready(service: Shared):
    service.check_room(0)
    return {"status": "ready", "model": service.names[0]}


@routes.get("/stats")
async def stats(service: Shared):
    return {
        **service.client.stats,
        "queue": service.client.queue_length(),
        "uptime": round(time.time() - service.created, 1),
        "models": service.names,
        "max_model_len": service.context,
        "chat": service.tok.chat_template is not None,
    }


@routes.get("/metrics")
async def metrics(service: Shared):
    text = generate_latest(service.measures)
    return Response(text, media_type="text/plain; version=0.0.4")


@routes.get("/runs")
async def list_runs(service: Shared):
    """Training runs that can be drawn, the newest first."""
    found = Path(service.args.runs).glob("*/metrics.jsonl")
    found = sorted(found, key=lambda path: -path.stat().st_mtime)
    return {"runs": [path.parent.name for path in found[:100]]}


@routes.get("/runs/{name}")
async def read_run(service: Shared, name: str, after: int = -1):
    known = await list_runs(service)
    if name not in known["runs"]:  # only what was listed: a name is not a path
        raise Refusal(404, f"no run {name!r}")
    path = Path(service.args.runs) / name / "metrics.jsonl"
    return await json_later({"rows": await asyncio.to_thread(last_rows, path, after)})


def last_rows(path, after):
    """The last rows of a metrics.jsonl that are behind a step, however large the file is; the first
    line and the last may be cut."""
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - RUN_BYTES, 0))
        lines = file.read().splitlines()
    rows = []
    for line in lines[-5000:]:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            row = json.loads(line, parse_constant=lambda _: None)  # JSON has no NaN
            if isinstance(row, dict) and row.get("step", 0) > after:
                rows.append(row)
    return rows


@routes.get("/docs", include_in_schema=False)
async def docs(request: Request):
    """What there is, as plain text: a foreign script could read the keys that the page holds."""
    return Response(json.dumps(request.app.openapi(), indent=1), media_type="text/plain")


@routes.get("/", include_in_schema=False)
async def page():
    if not CHAT_PAGE.is_file():
        raise Refusal(404, "this server has no page; its API is at /v1, described at /docs")
    text = CHAT_PAGE.read_text(encoding="utf-8")
    hashes = []  # only the page's own scripts may run, whatever a model makes it show
    for script in re.findall(r"<script>(.*?)</script>", text, re.S):
        digest = hashlib.sha256(script.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    policy = (
        f"default-src 'self'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; "
        "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": policy}
    return HTMLResponse(text, headers=headers)


# ------------------------------------------------------------------------------------ the process
def create_app(engine, args=None, keys=None, sock=None):
    """An engine (see generate.Engine) -> FastAPI.

    keys: {key: name of its owner}; empty lets everyone in. sock: the way to a Worker in another
    process; without it the engine gets a thread of this one."""
    service = Service(engine, args or Args())

    @contextlib.asynccontextmanager
    async def lifespan(app):
        front, thread = sock, None
        if front is None:
            front, back = socket.socketpair()
            worker = Worker(engine, back, service.args.concurrency)
            thread = threading.Thread(target=worker.run, daemon=True, name="engine")
            thread.start()
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: service.client, sock=front)
        yield
        service.client.transport.close()
        if thread:
            await asyncio.to_thread(thread.join, 10)

    app = FastAPI(
        title="LLM server",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere, onto the origin of the keys
        redoc_url=None,
        telemetry=dict.fromkeys(("tracing", "metrics", "logs"), False),  # Measures is ours
        lifespan=lifespan,
        routes=routes.routes,
        exception_handlers=ERROR_HANDLERS,
    )
    app.state.service = service
    posts = {("POST", route.path): route.app for route in routes.routes if "POST" in route.methods}
    stack = Door(app.build_middleware_stack(), service, keys or {}, posts)
    if service.args.cors:
        stack = CORSMiddleware(
            stack,
            allow_origins=listed(service.args.cors),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients have many of their own: x-stainless-os, ...
            expose_headers=["x-request-id", "retry-after"],
        )
    app.middleware_stack = stack  # add_middleware would put it behind layers of FastAPI's
    return app


class Server(uvicorn.Server):
    """uvicorn, which after a SIGTERM or Ctrl-C answers 503 to what is new until what runs has
    finished. A second one ends it at once, and so does an engine that is gone."""

    ready = ""  # said once it listens, and a signal is no longer the end of the process
    deadline = math.inf  # of the requests that run, once it drains
    status = 0  # that the process exits with

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started:
            print(self.ready, flush=True)

    def handle_exit(self, sig, frame):
        service = self.config.app.state.service
        if service.draining:
            super().handle_exit(sig, frame)
        else:
            service.draining = True
            self.deadline = time.monotonic() + service.args.drain

    async def on_tick(self, counter):
        service = self.config.app.state.service
        now = time.monotonic()
        if service.client.lost and not service.draining:
            service.draining = True
            self.deadline = now
            self.status = 1
        if service.draining:
            if now > self.deadline:
                service.client.failed("the server is shutting down")
            if not service.client.jobs or now > self.deadline + 2:  # which ends what still is sent
                self.should_exit = True
        return await super().on_tick(counter)


def spare_the_collector():
    """What is in memory now stays: the collector need not go through it again and again."""
    gc.set_threshold(20_000, 10, 10)
    gc.collect()
    gc.freeze()


@lost_rank_explained("Start it again.")
def main():
    args = Args(**parse_flags(Args, __doc__, positional=("model",)))
    begin = time.monotonic()
    for name, value in vars(args).items():
        least = int(name == "concurrency")
        if isinstance(value, (int, float)) and not value >= least:  # true of NaN as well
            raise UserError(f"{flag(name)} {value} must be at least {least}")
    if bool(args.certificate) != bool(args.certificate_key):
        raise UserError("TLS needs both --certificate and --certificate-key")
    keys = read_keys(args)
    if args.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        warn("reachable from elsewhere without keys (--api-key-file)")
    config = sock = None
    if os.environ.get("RANK", "0") == "0":  # of several ranks only the first listens
        config, sock = listen(args)  # before the model is read: a port in use is told at once
    engine = Engine(  # on other ranks it computes what the first one does, and never returns
        args.model,
        args.device,
        args.dtype,
        args.quant or None,
        args.kv_tokens or None,
        max_seqs=args.concurrency,
        adapters=adapter_folders(args),
    )
    if engine.tok is None:
        raise UserError(f"{args.model} has no tokenizer, and a server needs one (tokenizer.json)")
    if engine.tok.chat_template is None:
        print("note     no chat template: only /v1/completions works, chats get 400")
    engine.warm_up(tune=args.warm_up)
    spare_the_collector()
    # The engine no longer waits for Python while another thread of its process computes.
    sys.setswitchinterval(0.001)
    # Elsewhere a process that forks may not compute, so the engine gets a thread.
    front = fork_front(engine, args.concurrency) if sys.platform == "linux" else None
    config.app = create_app(engine, args, keys, front)
    config.load()
    server = Server(config)
    url = f"{'https' if args.certificate else 'http'}://{args.host}:{sock.getsockname()[1]}"
    after = f"after {time.monotonic() - begin:.1f} s"
    server.ready = f"ready    {url} {after}; the page at /, the API at /v1, described at /docs"
    server.run(sockets=[sock])
    sys.stdout.flush()
    if front:
        os._exit(server.status)  # the engine's threads and device are the other process's to end
    gc.unfreeze()  # or triton's bindings count what was never freed, and say so
    if server.status:
        sys.exit(server.status)


if __name__ == "__main__":
    cli(main)
