"""An OpenAI-compatible server over the engine, and the chat page.

    python serve.py MODEL --port 8000     # then open http://127.0.0.1:8000, or point an OpenAI
                                          # client at http://127.0.0.1:8000/v1

A request's way: door.Protocol reads its head; door.Door asks for its key, may answer 429 (the
key's requests a minute), and whatever happens closes its jobs at the end; BodyRoute reads its body;
a route plans it with server/api.py; Service.admit puts it into the queue, or answers 429 (the queue
is full); server/worker.py computes; Reply carries what server/answers.py makes of the tokens to the
client, and stops when the client leaves.

Top to bottom: flags; what the routes share; a reply on its way; the routes; the process.
`create_app(engine)` takes anything that has the engine's interface.
"""

import asyncio
import base64
import contextlib
import gc
import hashlib
import html
import math
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import generate_latest
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from chat import CHATML_TEMPLATE
from common import Metrics, UserError, cli, parse_flags
from generate import Engine
from runtime import lost_rank_explained
from server import api
from server.answers import DONE, ChatAnswer, TextAnswer, encode_vector
from server.api import Refusal
from server.door import ERROR_HANDLERS, Door, Measures, invalid, json_response, listen, read_keys
from server.worker import EngineClient, Inbox, Job, Worker, fork_front

CHAT_PAGE = Path(__file__).with_name("ui.html")


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
    runs: str = "runs"  # training runs that the page may draw


def adapter_folders(args):
    """--adapters name=folder,name=folder -> {name: folder}"""
    adapters = {}
    for pair in args.adapters.split(","):
        name, _, folder = pair.strip().partition("=")
        if name and folder:
            adapters[name] = folder
        elif pair.strip():
            raise UserError(f"--adapters {pair}: write name=folder, several apart by commas")
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
        self.names = [args.name or Path(args.model).stem or "model", *self.adapters]
        self.client = EngineClient()
        self.measures = Measures(self.client)
        self.building = 0  # grammars that wait to be built
        self.draining = False
        self.started = time.time()

    def model(self, name):
        if name and name not in self.names:
            message = f"no model {name!r}; there are {', '.join(self.names)}"
            raise Refusal(404, message, "model_not_found", "model")
        return name or self.names[0]

    def refuse_adapter(self, model, what):
        if model in self.adapters:
            raise Refusal(400, f"{what} are the base model's, not an adapter's", param="model")

    def check_ready(self):
        if self.draining or self.client.broken:
            message = self.client.broken or "shutting down: try another replica"
            raise Refusal(503, message, headers={"Retry-After": "5"})

    async def admit(self, request, model, prompts, samplings, grammar):
        """Put a request's prompts into the queue, as jobs, or refuse them with 429 or 503: first
        the engine's process builds the grammar. Whatever happens to the request, the Door calls
        `close` with the jobs."""
        later = {"Retry-After": "5"}
        if grammar:
            if self.building >= 32:
                raise Refusal(429, "too many grammars wait to be built", "queue_full", None, later)
            self.building += 1
            try:
                await self.client.call("grammar", *grammar)
            finally:
                self.building -= 1
        self.check_ready()
        depth = len(self.client.jobs)
        if depth + len(prompts) > self.args.concurrency + self.args.queue:
            message = f"{depth} requests are running or waiting, the most this server takes"
            raise Refusal(429, message, "queue_full", None, later)
        inbox = Inbox()
        adapter = model if model in self.adapters else None
        for position, (prompt, sampling) in enumerate(zip(prompts, samplings)):
            job = Job(prompt, sampling, request.state.key, inbox, position)
            request.state.jobs.append(job)
            self.client.submit(job, adapter, grammar)
        return request.state.jobs

    def close(self, jobs):
        """Take what is left of a request out of queue and engine, and count it."""
        for job in jobs:
            self.client.close(job)
            self.measures.observe(job)

    async def batches(self, jobs):
        """Yield lists of (the prompt's number, Delta) of all jobs as they come, [] when nothing has
        come for a while. Raises Refusal for what failed, and when the time is up."""
        deadline = time.monotonic() + self.args.timeout
        unfinished = sum(job.sampling.n for job in jobs)
        while unfinished:
            wait = min(deadline - time.monotonic(), self.keep_alive)
            if wait <= 0:
                raise Refusal(504, f"not finished within {self.args.timeout:g} s", "timeout")
            batch = await jobs[0].inbox.get(wait)
            for item in batch:
                if isinstance(item, Refusal):
                    raise item
                _, delta = item
                if delta.finish_reason == "error":
                    raise Refusal(400, delta.error or "no token was allowed")
                if delta.finish_reason:
                    unfinished -= 1
            yield batch


# ----------------------------------------------------------------------------- a reply on its way
class Reply:
    """Carries an answer to the client, as a stream or as one body. A stream ends here: when the
    answer ends, when the client leaves, or when a client that does not read has had its time.
    Then this returns to the Door, which closes the request's jobs."""

    def __init__(self, service, answer, jobs):
        self.answer = answer
        self.batches = service.batches(jobs)
        self.timeout = service.args.timeout + 10  # seconds, more than `batches` takes

    async def __call__(self, scope, receive, send):
        # The task of the request writes by itself: so its jobs are closed before the client, who
        # has the answer then, can ask again, and a full queue never counts one that is over.
        loop, writer = asyncio.get_running_loop(), asyncio.current_task()
        gone = asyncio.ensure_future(client_left(receive))

        def stop(_=None):
            writer.cancel()

        gone.add_done_callback(stop)
        timer = loop.call_later(self.timeout, stop)
        try:
            await self.write(scope, receive, send)
        except asyncio.CancelledError:
            if not gone.done() and loop.time() < timer.when():
                raise  # somebody else ends this task
        finally:
            gone.remove_done_callback(stop)
            gone.cancel()
            timer.cancel()

    async def write(self, scope, receive, send):
        if self.answer.body.stream:
            await self.write_stream(send)
        else:
            body = await self.answer.whole(self.batches)
            await json_response(body)(scope, receive, send)

    async def write_stream(self, send):
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # or nginx would keep the events until there are many
        ]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        async for events in self.answer.stream(self.batches):
            if start:  # with the first token, in one packet
                await send(start)
                start = None
            more = not events.endswith(DONE)
            await send({"type": "http.response.body", "body": events, "more_body": more})


async def client_left(receive):
    """Wait until the server says that the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


# --------------------------------------------------------------------------- from HTTP to a route
class BodyRoute(APIRoute):
    """FastAPI's route, but what takes (body, request) gets them in one step: FastAPI's general way
    to a function's arguments costs a fifth of the time of a short answer."""

    def __init__(self, path, endpoint, **options):
        super().__init__(path, endpoint, **options)
        kind = endpoint.__annotations__.get("body")

        async def answer(scope, receive, send):
            request = Request(scope, receive)
            body = await read_body(request, kind)
            response = await endpoint(body, request)
            await response(scope, receive, send)

        if kind:
            self.app = answer


async def read_body(request, kind):
    """A request's JSON -> its pydantic class `kind`. Raises Refusal for all that is not one."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if media_type.lower() != "application/json":
        # A page of another origin may send other types without asking.
        raise Refusal(400, f"{media_type!r} is not application/json", "invalid_request")
    try:
        return kind.model_validate(await request.json())
    except ValidationError as error:
        raise invalid(error.errors()) from None
    except (ValueError, RecursionError, ClientDisconnect) as error:
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
async def chat_completions(body: api.ChatRequest, request: Request):
    service = request.app.state.service
    model = service.model(body.model)
    grammar = api.grammar_of(body)
    grammar = api.forced_call(body, service.tok) or grammar  # a forced call goes first
    prompt, sampling = await aside(request, plan_chat, body, service)
    jobs = await service.admit(request, model, [prompt], [sampling], grammar)
    answer = ChatAnswer(service.tok, body, request.state.id, model, [prompt])
    return Reply(service, answer, jobs)


def plan_chat(body, service):
    """-> (prompt, Sampling)"""
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    tools = body.tools if api.offered_functions(body) else None
    prompt = api.chat_prompt(service.tok, body.messages, tools)
    return prompt, api.request_sampling(body, prompt, service.tok, service.context, logprobs)


@routes.post("/v1/completions")
async def completions(body: api.CompletionRequest, request: Request):
    service = request.app.state.service
    model = service.model(body.model)
    grammar = api.grammar_of(body)
    prompts, samplings = await aside(request, plan_completion, body, service)
    scored = []
    if body.echo and body.logprobs is not None:
        service.refuse_adapter(model, "the logprobs of an echo")
        for prompt in prompts:
            scored.append(await service.client.call("prompt_logprobs", prompt, body.logprobs))
    jobs = await service.admit(request, model, prompts[: len(samplings)], samplings, grammar)
    answer = TextAnswer(service.tok, body, request.state.id, model, prompts, scored)
    return Reply(service, answer, jobs)


def plan_completion(body, service):
    """-> (prompts, a Sampling for each, or for none where the prompts are only repeated)"""
    tok, context = service.tok, service.context
    prompts = api.prompt_lists(body.prompt, tok)
    if body.max_tokens == 0:
        if not body.echo or max(map(len, prompts)) > context:
            message = f"max_tokens 0 needs echo, and prompts of at most {context:,} tokens"
            raise Refusal(400, message, param="max_tokens")
        return prompts, []
    logprobs = body.logprobs
    return prompts, [api.request_sampling(body, ids, tok, context, logprobs) for ids in prompts]


@routes.post("/v1/embeddings")
async def embeddings(body: api.EmbeddingRequest, request: Request):
    """The mean over an input's tokens of the last hidden states, scaled to length 1."""
    service = request.app.state.service
    model = service.model(body.model)
    prompts = await aside(request, api.prompt_lists, body.input, service.tok)
    service.refuse_adapter(model, "embeddings")
    longest = max(map(len, prompts))
    if longest > service.context:
        message = f"an input has {longest:,} tokens, the context is {service.context:,}"
        raise Refusal(400, message, "context_length_exceeded")
    data = []
    for i, ids in enumerate(prompts):
        vector = await service.client.call("embed", ids)  # others' steps come in between
        shown = encode_vector(vector, body.encoding_format)
        data.append({"object": "embedding", "index": i, "embedding": shown})
    used = sum(map(len, prompts))
    usage = {"prompt_tokens": used, "total_tokens": used}
    return json_response({"object": "list", "model": model, "usage": usage, "data": data})


@routes.get("/v1/models")
async def list_models(request: Request):
    service = request.app.state.service
    data = []
    for name in service.names:
        parent = service.names[0] if name in service.adapters else None
        model = {"id": name, "object": "model", "owned_by": "local", "parent": parent}
        data.append({**model, "created": int(service.started), "max_model_len": service.context})
    return {"object": "list", "data": data}


# ------------------------------------------------------------------------------ routes of our own
@routes.post("/tokenize")
async def tokenize(body: api.TokenizeRequest, request: Request):
    """A text's ids, or those of the prompt that a chat becomes."""
    tok = request.app.state.service.tok
    if body.messages:
        ids = await aside(request, api.chat_prompt, tok, body.messages)
    else:
        ids = await aside(request, tok.encode, body.prompt)
    return json_response({"tokens": ids})


@routes.post("/detokenize")
async def detokenize(body: api.DetokenizeRequest, request: Request):
    tok = request.app.state.service.tok
    (ids,) = api.prompt_lists(body.tokens, tok)
    return json_response({"prompt": tok.decode(ids)})


@routes.get("/health")
async def health():
    return {"status": "alive"}


@routes.get("/ready")
async def ready(request: Request):
    service = request.app.state.service
    service.check_ready()
    return {"status": "ready", "model": service.names[0]}


@routes.get("/stats")
async def stats(request: Request):
    service = request.app.state.service
    return {
        **service.client.stats,
        "queue": service.client.queue_length(),
        "uptime": round(time.time() - service.started, 1),
        "models": service.names,
        "max_model_len": service.context,
        "chat": service.tok.chat_template is not None,
    }


@routes.get("/metrics")
async def metrics(request: Request):
    text = generate_latest(request.app.state.service.measures.registry)
    return Response(text, media_type="text/plain; version=0.0.4")


@routes.get("/runs")
async def list_runs(request: Request):
    """Training runs that can be drawn, the newest first."""
    found = Path(request.app.state.service.args.runs).glob("*/metrics.jsonl")
    found = sorted(found, key=lambda path: -path.stat().st_mtime)
    return {"runs": [path.parent.name for path in found[:100]]}


@routes.get("/runs/{name}")
async def read_run(request: Request, name: str, after: int = -1):
    known = await list_runs(request)
    if name not in known["runs"]:  # only what was listed: a name is not a path
        raise Refusal(404, f"no run {name!r}")
    path = Path(request.app.state.service.args.runs) / name / "metrics.jsonl"
    rows = await asyncio.to_thread(Metrics.read, path)
    return {"rows": [row for row in rows if row.get("step", 0) > after][-5000:]}


@routes.get("/docs", include_in_schema=False)
async def docs(request: Request):
    """The routes and what they do, as plain HTML; every field is in /openapi.json."""
    rows = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, about in methods.items():
            told = html.escape(about.get("description", about["summary"]))
            rows.append(f"<dt><code>{method.upper()} {path}</code><dd>{told}")
    schema = '<p>Every field: <a href="/openapi.json">/openapi.json</a>'
    return HTMLResponse(f"<title>API</title><dl>{''.join(rows)}</dl>{schema}")


@routes.get("/", include_in_schema=False)
async def page():
    if not CHAT_PAGE.is_file():
        raise Refusal(404, "this server has no page; its API is at /v1, described at /docs")
    text = CHAT_PAGE.read_text()
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
        lifespan=lifespan,
        routes=routes.routes,
        exception_handlers=ERROR_HANDLERS,
    )
    app.state.service = service
    app.add_middleware(Door, service=service, keys=keys or {})
    if service.args.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.args.cors.split(","),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


class Server(uvicorn.Server):
    """uvicorn, which after a SIGTERM or Ctrl-C answers 503 to what is new until what runs has
    finished. A second one ends it at once."""

    ready = ""  # said as soon as it listens
    deadline = math.inf  # of the requests that run, once it drains

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
        if service.draining or service.client.lost:
            if not service.client.jobs or time.monotonic() > self.deadline:
                self.should_exit = True
        return await super().on_tick(counter)


@lost_rank_explained("Start it again.")
def main():
    args = Args(**parse_flags(Args, __doc__, positional=("model",)))
    begin = time.time()
    if not args.model:
        raise UserError("which model? python serve.py MODEL, a model folder or a .gguf file")
    if bool(args.certificate) != bool(args.certificate_key):
        raise UserError("TLS needs both --certificate and --certificate-key")
    keys = read_keys(args)
    adapters = adapter_folders(args)
    if args.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        print("warning: reachable from elsewhere without keys (--api-key-file)", file=sys.stderr)
    config = sock = None
    if int(os.environ.get("RANK", 0)) == 0:  # of several ranks only the first listens
        config, sock = listen(args)  # before the model is read: a port in use is told at once
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
        print("note     no chat template: only /v1/completions works, chats get 400")
    # What is in memory now stays: the collector need not go through it again and again.
    gc.set_threshold(20_000, 50, 50)
    gc.collect()
    gc.freeze()
    # The engine no longer waits for Python while another thread of its process computes.
    sys.setswitchinterval(0.001)
    # Elsewhere a process that forks may not compute, so the engine gets a thread.
    front = fork_front(engine, args.concurrency) if sys.platform == "linux" else None
    config.app = create_app(engine, args, keys, front)
    config.load()
    server = Server(config)
    url = f"{'https' if args.certificate else 'http'}://{args.host}:{sock.getsockname()[1]}"
    after = f"after {time.time() - begin:.1f} s"
    server.ready = f"ready    {url} {after}; the page at /, the API at /v1, described at /docs"
    server.run(sockets=[sock])
    sys.stdout.flush()
    if front:
        os._exit(0)  # the engine's threads and device are the other process's to end
    gc.unfreeze()  # or triton's bindings count what was never freed, and say so


if __name__ == "__main__":
    cli(main)
