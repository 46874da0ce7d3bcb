"""An OpenAI-compatible server over the engine, and the chat page.

    python serve.py MODEL --port 8000          # then open http://127.0.0.1:8000, or point the openai client at .../v1

Top to bottom: flags and the table of fields; the engine's thread; what a request asks for; what is sent back; the routes;
the door (keys, limits, logs); the process. `create_app(engine)` takes anything with the engine's interface, so tests inject a stub.
"""
import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

import chat
from common import Metrics, UserError, cli, parse_flags
from generate import Engine, Sampling
from grammar import Constraint, Vocabulary, json_grammar, regex_grammar

HERE = Path(__file__).parent


@dataclass
class Args:
    model: str = ""               # the model folder, or a .gguf file
    name: str = ""                # the model's name in the API; empty is the folder's
    adapters: str = ""            # LoRA adapters as further models: name=folder,name=folder
    host: str = "127.0.0.1"       # 0.0.0.0 to be reached from elsewhere: then use keys
    port: int = 8000
    quant: str = ""               # int8, int4, ... as in quant.py: weights packed while loading
    device: str = "auto"          # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"           # auto, float32, bfloat16, float16
    kv_tokens: int = 0            # tokens of key/value cache; 0 is what memory allows
    concurrency: int = 64         # requests in the engine at once
    queue: int = 256              # requests that may wait for that; one more gets 429
    timeout: float = 600.0        # seconds a request may take in all
    max_body: int = 2_000_000     # bytes of a request
    api_key_file: str = ""        # one key a line, or name:key; also $LLM_API_KEYS, apart by commas
    rate_limit: int = 0           # requests a minute and key; 0 is no limit
    cors: str = ""                # origins that may call from a browser, apart by commas, or *
    certificate: str = ""         # TLS: certificate chain and key in PEM
    certificate_key: str = ""
    drain: float = 30.0           # seconds running requests get after SIGTERM
    log_prompts: bool = False     # also log what was asked and answered
    runs: str = "runs"            # training runs that the page may draw


# Every field of OpenAI's two endpoints: applied, ignored (nothing here depends on it) or refused with 400. "extra" are ours.
FIELDS = {what: tuple(names.split()) for what, names in {
    "applied": "model messages prompt echo best_of frequency_penalty logit_bias logprobs top_logprobs max_tokens presence_penalty n "
               "max_completion_tokens response_format seed stop stream stream_options temperature tool_choice tools top_p",
    "extra": "top_k min_p typical_p repetition_penalty min_tokens ignore_eos stop_token_ids regex return_token_ids",
    "ignored": "user metadata store service_tier parallel_tool_calls prediction safety_identifier prompt_cache_key verbosity "
               "prompt_cache_retention reasoning_effort",
    "refused": "audio modalities web_search_options functions function_call suffix"}.items()}


class Refusal(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, status, message, code=None, param=None, headers=None):
        super().__init__(message)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# -------------------------------------------------------------------------------------------------------- the engine's thread
@dataclass(eq=False)
class Job:
    """One request on its way through the engine. Its answers arrive in `deltas`, in the event loop it came from."""
    prompt: list
    sampling: Sampling
    adapter: str | None
    key: str                    # whose it is: keys take turns
    id: str
    loop: object
    deltas: asyncio.Queue = field(default_factory=asyncio.Queue)
    created: float = field(default_factory=time.monotonic)
    admitted: float = 0.0       # when it left the queue
    first: float = 0.0          # when its first token came
    tokens: int = 0
    unfinished: int = 1
    reason: str = ""


class Worker(threading.Thread):
    """Owns the engine: nobody else calls it. Orders come through a thread-safe queue, deltas go to each job's event loop."""

    def __init__(self, engine, concurrency):
        super().__init__(daemon=True, name="engine")
        self.engine, self.concurrency = engine, concurrency
        self.orders, self.waiting, self.active = queue.SimpleQueue(), OrderedDict(), {}
        self.depth, self.stopping, self.broken, self.rate = 0, False, None, deque(maxlen=64)  # rate: (time, tokens) of steps

    def run(self):
        try:
            while not self.stopping:
                self.take_orders(wait=not (self.engine.has_work or self.active or self.waiting))
                self.admit()
                if self.engine.has_work:
                    self.deliver(self.engine.step())
        except Exception as error:  # the engine is unusable now: every caller hears so, and readiness fails
            self.broken = f"the engine failed: {type(error).__name__}: {error}"
            print(json.dumps({"event": "engine_failed", "error": self.broken}), file=sys.stderr, flush=True)
            for job in [*self.active.values(), *(j for jobs in self.waiting.values() for j in jobs)]:
                self.end(job, self.broken)

    def take_orders(self, wait):
        with contextlib.suppress(queue.Empty):
            while True:
                what, job = self.orders.get(timeout=0.5 if wait else None) if wait else self.orders.get_nowait()
                wait = False
                if what == "submit":
                    self.waiting.setdefault(job.key, deque()).append(job)
                elif what == "cancel":
                    self.drop(job)
                else:  # a function to be called with the engine, by whoever holds the future
                    try:
                        result = what(self.engine)
                        job.get_loop().call_soon_threadsafe(lambda: job.done() or job.set_result(result))
                    except Exception as error:
                        job.get_loop().call_soon_threadsafe(lambda e=error: job.done() or job.set_exception(e))

    def admit(self):
        """From the queue to the engine, one key after the other, so that no key's thousand requests stand before another's one."""
        while self.waiting and len(self.active) < self.concurrency:
            key, jobs = self.waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self.waiting[key] = jobs  # to the end of the line
            try:
                self.engine.submit(job.prompt, job.sampling, request_id=job.id, adapter=job.adapter)
            except UserError as error:
                self.end(job, str(error), "invalid")
                continue
            job.admitted, self.active[job.id] = time.monotonic(), job

    def deliver(self, deltas):
        now, batches = time.monotonic(), {}
        self.rate.append((now, sum(len(d.token_ids) for d in deltas)))
        for delta in deltas:
            if (job := self.active.get(delta.request_id)) is None:
                continue
            job.tokens += len(delta.token_ids)
            job.first = job.first or (now if delta.token_ids else 0.0)
            if delta.finish_reason:
                job.unfinished, job.reason = job.unfinished - 1, delta.finish_reason
                if job.unfinished == 0:
                    del self.active[job.id]
            batches.setdefault(job.loop, []).append((job, delta))
        for loop, batch in batches.items():  # one wake-up for all
            loop.call_soon_threadsafe(lambda batch=batch: [job.deltas.put_nowait(delta) for job, delta in batch])

    def drop(self, job):
        """Cancelled: out of the queue or out of the engine, whose blocks are free at once."""
        if self.active.pop(job.id, None):
            self.engine.cancel(job.id)
        elif job.key in self.waiting and job in self.waiting[job.key]:
            self.waiting[job.key].remove(job)
            if not self.waiting[job.key]:
                del self.waiting[job.key]

    def end(self, job, message, kind="failed"):
        job.loop.call_soon_threadsafe(job.deltas.put_nowait, (kind, message))

    def tokens_per_second(self):
        steps = [(t, n) for t, n in self.rate if t > time.monotonic() - 10]
        return sum(n for _, n in steps[1:]) / (steps[-1][0] - steps[0][0]) if len(steps) > 1 else 0.0

    async def call(self, function):
        """function(engine), in the engine's thread, between two steps."""
        future = asyncio.get_running_loop().create_future()
        self.orders.put((function, future))
        return await future


class Gauges:
    """What /metrics shows, named as vLLM names it."""

    def __init__(self, worker):
        self.registry = r = CollectorRegistry()
        seconds = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120)
        self.ttft = Histogram("llm:time_to_first_token_seconds", "from arrival to the first token", registry=r, buckets=seconds)
        self.tpot = Histogram("llm:time_per_output_token_seconds", "between tokens, mean of a request", registry=r,
                              buckets=(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1))
        self.e2e = Histogram("llm:e2e_request_latency_seconds", "from arrival to the end", registry=r, buckets=seconds)
        self.queued = Histogram("llm:request_queue_time_seconds", "waiting for a place in the engine", registry=r, buckets=seconds)
        self.finished = Counter("llm:request_success", "requests by how they ended", ["finished_reason"], registry=r)
        self.http = Counter("llm:http_requests", "HTTP answers by status", ["status"], registry=r)

        def gauge(name, text, read):
            Gauge(name, text, registry=r).set_function(read)
        stats = worker.engine.stats
        gauge("llm:num_requests_running", "in the engine", lambda: stats()["running"])
        gauge("llm:num_requests_waiting", "in the queue", lambda: worker.depth - len(worker.active))
        gauge("llm:kv_cache_usage_perc", "share of cache blocks in use", lambda: stats()["blocks_used"] / max(stats()["blocks_total"], 1))
        for name in ("prompt_tokens", "generated_tokens", "preemptions", "cache_hit_tokens", "cache_query_tokens"):
            gauge(f"llm:{name}_total", f"{name.replace('_', ' ')} since the start", lambda name=name: stats()[name])

    def observe(self, job):
        now = time.monotonic()
        self.finished.labels(job.reason or "abort").inc()
        self.e2e.observe(now - job.created)
        if job.admitted:
            self.queued.observe(job.admitted - job.created)
        if job.first:
            self.ttft.observe(job.first - job.created)
            if job.tokens > 1:
                self.tpot.observe((now - job.first) / (job.tokens - 1))


# -------------------------------------------------------------------------------------------------- what a request asks for
class StreamOptions(BaseModel):
    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take. null means the default, as OpenAI has it."""
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=10 ** 6)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = Field(None, ge=1, le=10 ** 9)
    min_tokens: int | None = Field(None, ge=0, le=10 ** 6)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-2 ** 63, le=2 ** 63 - 1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict | None = None
    regex: str | None = None
    return_token_ids: bool | None = None


class ChatRequest(Common):
    model_config = ConfigDict(extra="allow", json_schema_extra={"example": {
        "messages": [{"role": "user", "content": "Reverse this list: fox, plum, iron"}], "max_tokens": 32, "stream": False}})
    messages: list[dict] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=10 ** 9)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict] | None = None
    tool_choice: str | dict | None = None


class CompletionRequest(Common):
    model_config = ConfigDict(extra="allow", json_schema_extra={"example": {"prompt": "Once upon a time", "max_tokens": 32}})
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=16)
    echo: bool | None = None


class EmbeddingRequest(BaseModel):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: str | None = Field(None, pattern="^(float|base64)$")


class TokenizeRequest(BaseModel):
    prompt: str | None = None
    messages: list[dict] | None = None
    add_generation_prompt: bool = True


class DetokenizeRequest(BaseModel):
    tokens: list[int] = Field(max_length=1_000_000)


def prompt_lists(value, tok):
    """A prompt or input in any of OpenAI's four shapes -> [ids]."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        value = [value]
    if not value or len(value) > 128:
        raise Refusal(400, f"{len(value)} prompts: give 1 to 128")
    prompts = [tok.encode(p, bos=tok.bos_id is not None) if isinstance(p, str) else list(p) for p in value]
    for ids in prompts:
        if not ids or not all(0 <= i < tok.vocab_size for i in ids):
            raise Refusal(400, f"a prompt must hold at least one token, with ids from 0 to {tok.vocab_size - 1}")
    return prompts


def chat_prompt(body, tok):
    """Messages (and tools) -> ids, through the model's own chat format."""
    if tok.chat_template is None and "<|im_start|>" not in tok.special:
        raise Refusal(400, "this model has no chat template: use /v1/completions with a plain prompt", "no_chat_template")
    messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in body.messages]
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    return chat.render(tok, messages, add_generation_prompt=True, tools=tools)[0]


def forced_call(body, tok):
    """tool_choice "required" or one function -> the Grammar the answer must match, else None."""
    if not body.tools or body.tool_choice in (None, "auto", "none"):
        return None
    wanted = body.tool_choice.get("function", {}).get("name") if isinstance(body.tool_choice, dict) else None
    functions = [t["function"] for t in body.tools if isinstance(t.get("function"), dict)]
    functions = [f for f in functions if wanted is None or f.get("name") == wanted]
    if not functions or (isinstance(body.tool_choice, str) and body.tool_choice != "required"):
        raise Refusal(400, f"tool_choice {body.tool_choice!r} is none of the tools", param="tool_choice")
    arguments = "parameters" if "<|start_header_id|>" in tok.special else "arguments"
    schema = {"anyOf": [{"type": "object", "required": ["name", arguments], "properties": {
        "name": {"const": f["name"]}, arguments: f.get("parameters") or {"type": "object"}}} for f in functions]}
    tagged = "<tool_call>" in (tok.chat_template or "")
    return json_grammar(schema, *(("<tool_call>\n", "\n</tool_call>") if tagged else ()))


def constraint_of(body, app, forced):
    """response_format, regex or a forced tool call -> Constraint or None. Grammars are kept: their automata learn as they go."""
    form = body.response_format or {"type": "text"}
    kind, schema = form.get("type"), None
    if kind not in ("text", "json_object", "json_schema"):
        raise Refusal(400, f"response_format {kind!r}: use text, json_object or json_schema", param="response_format")
    if kind == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema")
        if not isinstance(schema, dict):
            raise Refusal(400, "response_format json_schema needs json_schema.schema, an object", param="response_format")
    if kind == "text" and not body.regex and forced is None:
        return None
    name = json.dumps([kind, schema, body.regex], sort_keys=True)
    if forced is None and name not in app.grammars:
        app.grammars[name] = regex_grammar(body.regex) if kind == "text" else json_grammar(schema)
        if len(app.grammars) > 64:
            app.grammars.popitem(last=False)
    if app.vocabulary is None:
        app.vocabulary = Vocabulary(app.engine.tok)
    return Constraint(forced or app.grammars[name], app.vocabulary)


def sampling_of(body, prompt, app, logprobs, forced=None):
    """The request's fields -> Sampling, with the length clamped to the context; only a prompt that is too long is refused."""
    room = app.engine.max_model_len - len(prompt)
    if room < 1:
        raise Refusal(400, f"the prompt has {len(prompt):,} tokens, this model's context is {app.engine.max_model_len:,}: shorten it "
                      "so that at least one token is left for the answer", "context_length_exceeded", "messages")
    for name in FIELDS["refused"]:
        if getattr(body, name, None) not in (None, [], {}, ["text"]):
            raise Refusal(400, f"{name} is not supported by this server", "unsupported_field", name)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    bias = {int(k): v for k, v in (body.logit_bias or {}).items() if re.fullmatch(r"\d{1,9}", k)}
    if len(bias) < len(body.logit_bias or {}):
        raise Refusal(400, "logit_bias maps token ids (as strings of digits) to numbers", param="logit_bias")
    asked = {name: value for name in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
                                      "frequency_penalty", "min_tokens", "n", "seed", "ignore_eos")
             if (value := getattr(body, name)) is not None}
    most = getattr(body, "max_completion_tokens", None) or body.max_tokens or room
    sampling = Sampling(**asked, max_tokens=min(most, room), top_k=max(body.top_k or 0, 0), stop=tuple(s for s in stop if s),
                        stop_ids=tuple(body.stop_token_ids or ()), logit_bias=bias or None, logprobs=logprobs,
                        best_of=getattr(body, "best_of", None), constraint=constraint_of(body, app, forced))
    sampling.min_tokens = min(sampling.min_tokens, sampling.max_tokens)
    sampling.check(app.engine.tok.vocab_size)
    return sampling


# --------------------------------------------------------------------------------------------------------- what is sent back
class ToolCalls:
    """Splits an answer into text and tool calls as it streams: Qwen's <tool_call> tags, or an answer that is a JSON call."""

    def __init__(self, active):
        self.active, self.held, self.calling = active, "", False

    def push(self, text):
        """-> the part that is certainly text."""
        if not self.active:
            return text
        self.held += text
        begin = self.held.lstrip()
        if self.calling or begin[:1] in ("{", "[") or not begin:
            self.calling = self.calling or bool(begin)
            return ""
        at = self.held.find("<tool_call>")
        if at < 0:  # the tag may have begun
            at = max((len(self.held) - n for n in range(1, 11) if self.held.endswith("<tool_call>"[:n])), default=len(self.held))
        else:
            self.calling = True
        text, self.held = self.held[:at], self.held[at:]
        return text

    def finish(self):
        """-> (text left over, calls in OpenAI's shape)."""
        found = re.findall(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", self.held, re.S) or [self.held.strip()]
        calls = []
        for text in found:
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                for call in (parsed if isinstance(parsed := json.loads(text), list) else [parsed]):
                    arguments = call["arguments"] if "arguments" in call else call["parameters"]
                    calls.append({"index": len(calls), "id": f"call_{secrets.token_hex(5)[:9]}", "type": "function", "function": {
                        "name": str(call["name"]), "arguments": json.dumps(arguments, ensure_ascii=False)}})
        return ("", calls) if self.active and calls else (self.held, [])


def spell(tok, i):
    """A token as text: whole characters, or its bytes spelled out, never a replacement character."""
    data = tok.token_bytes(i) or tok.decode([i]).encode()
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data), list(data)


def chat_logprobs(tok, logprobs):
    """[TokenLogprob] -> OpenAI's chat shape."""
    def entry(i, logprob):
        text, data = spell(tok, i)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": data, "id": i}
    return {"content": [{**entry(t.id, t.logprob), "top_logprobs": [entry(i, p) for i, p in t.top]} for t in logprobs], "refusal": None}


def completion_logprobs(tok, logprobs, offset):
    """[TokenLogprob] -> the completions' shape; offset: characters of text before."""
    out = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for t in logprobs:
        text = spell(tok, t.id)[0]
        out["tokens"].append(text)
        out["token_logprobs"].append(None if t.logprob is None else max(t.logprob, -9999.0))
        out["top_logprobs"].append({spell(tok, i)[0]: max(p, -9999.0) for i, p in t.top} if t.top else None)
        out["text_offset"].append(offset)
        offset += len(text)
    return out


def sse(value):
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Answer:
    """The choices of one request, gathered from deltas: as chunks of a stream, or as one body. kind: "chat" or "text"."""

    def __init__(self, app, body, kind, jobs, echo=()):
        self.app, self.body, self.kind, self.jobs, self.tok = app, body, kind, jobs, app.engine.tok
        n = body.n or 1
        self.choices = [dict(index=i, text=echo[i // n] if echo else "", ids=[], logprobs=[], reason=None,
                             calls=ToolCalls(bool(getattr(body, "tools", None)) and body.tool_choice != "none"), found=[])
                        for i in range(n * len(jobs))]
        self.head = {"id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{jobs[0].id}", "created": int(time.time()),
                     "model": body.model or app.names[0], "system_fingerprint": None}

    def take(self, position, delta):
        """A delta of job `position` -> (choice, visible text, OpenAI's finish_reason or None)."""
        choice = self.choices[position * (self.body.n or 1) + delta.index]
        text = choice["calls"].push(delta.text)
        choice["ids"] += delta.token_ids
        choice["logprobs"] += delta.logprobs or []
        if delta.finish_reason:
            rest, choice["found"] = choice["calls"].finish()
            text, choice["reason"] = text + rest, "tool_calls" if choice["found"] else {"abort": "stop"}.get(
                delta.finish_reason, delta.finish_reason)
        choice["text"] += text
        return choice, text, choice["reason"]

    def usage(self):
        prompt, made = sum(len(j.prompt) for j in self.jobs), sum(len(c["ids"]) for c in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def chunk(self, choice, delta, logprobs=None, reason=None, ids=()):
        """One event of a stream: delta is OpenAI's {"content": ...} of a chat, or the text of a completion."""
        shown = {"index": choice["index"], "finish_reason": reason, "logprobs": logprobs}
        shown |= {"delta": delta} if self.kind == "chat" else {"text": delta}
        if self.body.return_token_ids:
            shown["token_ids"] = list(ids)
        return sse({**self.head, "object": "chat.completion.chunk" if self.kind == "chat" else "text_completion", "choices": [shown]})

    def logprobs_of(self, logprobs, offset=0):
        if not logprobs:
            return None
        return chat_logprobs(self.tok, logprobs) if self.kind == "chat" else completion_logprobs(self.tok, logprobs, offset)

    async def stream(self, deltas):
        """Role first, text as it comes, finish_reason once for each choice, usage if asked for, [DONE]."""
        for choice in self.choices:
            if self.kind == "chat":
                yield self.chunk(choice, {"role": "assistant", "content": ""})
            elif choice["text"]:
                yield self.chunk(choice, choice["text"])
        try:
            async for position, delta in deltas:
                if delta is None:
                    yield b": keep-alive\n\n"
                    continue
                offset = len(self.choices[position * (self.body.n or 1) + delta.index]["text"])
                choice, text, reason = self.take(position, delta)
                logprobs = self.logprobs_of(delta.logprobs, offset)
                if text or logprobs or (self.body.return_token_ids and delta.token_ids):
                    yield self.chunk(choice, {"content": text} if self.kind == "chat" else text, logprobs, ids=delta.token_ids)
                if choice["found"]:
                    yield self.chunk(choice, {"tool_calls": choice["found"]})
                if reason:
                    yield self.chunk(choice, {} if self.kind == "chat" else "", reason=reason)
        except Refusal as refusal:  # the status line is long gone: the error is an event
            yield sse(refusal.body)
        else:
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield sse({**self.head, "object": "chat.completion.chunk" if self.kind == "chat" else "text_completion",
                           "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    async def whole(self, deltas):
        """The same as one JSON body."""
        async for position, delta in deltas:
            if delta is not None:
                self.take(position, delta)
        shown = []
        for c in self.choices:
            one = {"index": c["index"], "finish_reason": c["reason"], "logprobs": self.logprobs_of(c["logprobs"])}
            if self.kind == "chat":
                calls = [{k: v for k, v in call.items() if k != "index"} for call in c["found"]]
                one["message"] = {"role": "assistant", "content": c["text"] or (None if calls else ""), "refusal": None,
                                  **({"tool_calls": calls} if calls else {})}
            else:
                one["text"] = c["text"]
            if self.body.return_token_ids:
                one["token_ids"] = c["ids"]
            shown.append(one)
        return {**self.head, "object": "chat.completion" if self.kind == "chat" else "text_completion", "choices": shown,
                "usage": self.usage()}


async def merged(app, jobs, keep_alive=15.0):
    """(position of the job, Delta) of all jobs as they come; (0, None) when nothing has come for a while. Cancels whatever is
    left when its reader goes away. Refusal for what failed, and when the time is up."""
    deadline, open_jobs = time.monotonic() + app.args.timeout, set(range(len(jobs)))
    tasks = {}
    try:
        while open_jobs:
            for i in open_jobs - tasks.keys():
                tasks[i] = asyncio.ensure_future(jobs[i].deltas.get())
            left = deadline - time.monotonic()
            if left <= 0:
                raise Refusal(504, f"not finished within {app.args.timeout:g} s: ask for fewer tokens", "timeout")
            await asyncio.wait(tasks.values(), timeout=min(left, keep_alive), return_when=asyncio.FIRST_COMPLETED)
            ready = [i for i, task in tasks.items() if task.done()]
            if not ready:
                yield 0, None
            for i in ready:
                delta = tasks.pop(i).result()
                if isinstance(delta, tuple):
                    raise Refusal(400 if delta[0] == "invalid" else 500, delta[1])
                if delta.finish_reason == "error":
                    raise Refusal(400, delta.error or "no token was allowed")
                if delta.finish_reason:
                    jobs[i].closed = getattr(jobs[i], "closed", 0) + 1
                    if jobs[i].closed == jobs[i].sampling.n:
                        open_jobs.discard(i)
                yield i, delta
    finally:
        for task in tasks.values():
            task.cancel()
        for i, job in enumerate(jobs):
            if i in open_jobs:
                app.worker.orders.put(("cancel", job))
                job.reason = "abort"
            app.worker.depth -= 1
            app.gauges.observe(job)


# ------------------------------------------------------------------------------------------------------------------ the routes
class Service:
    """What the routes share."""

    def __init__(self, engine, args, keys):
        self.engine, self.args, self.keys = engine, args, keys
        self.adapters = dict(pair.split("=", 1) for pair in args.adapters.split(",") if pair)
        self.names = [args.name or Path(args.model).name or "model", *self.adapters]
        self.worker = Worker(engine, args.concurrency)
        self.gauges, self.vocabulary, self.grammars = Gauges(self.worker), None, OrderedDict()
        self.draining, self.started, self.windows = False, time.time(), {}

    def admit(self, request, model, prompts, samplings):
        """Jobs in the queue, or the reason why not: 404, 429, 503."""
        if model not in (None, "", *self.names):
            raise Refusal(404, f"no model {model!r}; there are {', '.join(self.names)}", "model_not_found", "model")
        if self.draining or self.worker.broken:
            raise Refusal(503, self.worker.broken or "shutting down: try another replica", headers={"Retry-After": "5"})
        if self.worker.depth + len(prompts) > self.args.concurrency + self.args.queue:
            raise Refusal(429, f"{self.worker.depth} requests are running or waiting, the most this server takes: try again later",
                          "queue_full", headers={"Retry-After": str(1 + self.worker.depth // 32)})
        self.worker.depth += len(prompts)
        adapter, loop = model if model in self.adapters else None, asyncio.get_running_loop()
        jobs = [Job(ids, sampling, adapter, request.state.key, f"{request.state.id}-{i}", loop, unfinished=sampling.n)
                for i, (ids, sampling) in enumerate(zip(prompts, samplings))]
        for job in jobs:
            self.worker.orders.put(("submit", job))
        request.state.jobs = jobs
        return jobs

    async def respond(self, request, answer):
        """As a stream or as one body; a caller who leaves frees everything in both."""
        deltas = merged(self, answer.jobs)
        if answer.body.stream:
            return StreamingResponse(answer.stream(deltas), media_type="text/event-stream",
                                     headers={"X-Accel-Buffering": "no", "Cache-Control": "no-cache"})
        whole, gone = asyncio.ensure_future(answer.whole(deltas)), asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(whole.result()) if whole.done() else Response(status_code=499)
        finally:
            for task in (whole, gone):
                task.cancel()
            await asyncio.gather(whole, gone, return_exceptions=True)


async def disconnected(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(engine, args=None, keys=None):
    """engine: see generate.Engine; keys: {key: name of its owner}, empty lets everyone in -> FastAPI."""
    service = Service(engine, args or Args(), keys or {})

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.worker.start()
        yield
        service.worker.stopping = True
        await asyncio.to_thread(service.worker.join, 10)

    app = FastAPI(title="LLM server", version="1", lifespan=lifespan, description="OpenAI-compatible; fields: see the README.",
                  responses={400: {"description": "what is wrong with the request, in OpenAI's error shape"}})
    app.state.service = service
    app.add_middleware(Door, service=service)
    app.add_exception_handler(Refusal, lambda _, e: JSONResponse(e.body, e.status, e.headers))
    app.add_exception_handler(UserError, lambda _, e: refused(Refusal(400, str(e))))
    app.add_exception_handler(RequestValidationError, lambda _, e: refused(Refusal(400, "; ".join(
        f"{'.'.join(map(str, x['loc'][1:])) or 'body'}: {x['msg']}" for x in e.errors()[:3]), "invalid_request")))
    add_openai_routes(app, service)
    add_operation_routes(app, service)
    return app


def refused(refusal):
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def add_openai_routes(app, service):
    tok = service.engine.tok

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        prompt = chat_prompt(body, tok)
        if body.top_logprobs and not body.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        sampling = sampling_of(body, prompt, service, (body.top_logprobs or 0) if body.logprobs else None, forced_call(body, tok))
        jobs = service.admit(request, body.model, [prompt], [sampling])
        return await service.respond(request, Answer(service, body, "chat", jobs))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        prompts = prompt_lists(body.prompt, tok)
        if body.stream and body.best_of and body.best_of > (body.n or 1):
            raise Refusal(400, "best_of answers are compared when all are done: they cannot be streamed", param="best_of")
        samplings = [sampling_of(body, p, service, body.logprobs) for p in prompts]
        jobs = service.admit(request, body.model, prompts, samplings)
        return await service.respond(request, Answer(service, body, "text", jobs, [tok.decode(p) for p in prompts] if body.echo else ()))

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request):
        """The mean over an input's tokens of the last hidden states, scaled to length 1."""
        prompts = prompt_lists(body.input, tok)
        if longest := [len(p) for p in prompts if len(p) > service.engine.max_model_len]:
            raise Refusal(400, f"an input has {longest[0]:,} tokens, the context is {service.engine.max_model_len:,}",
                          "context_length_exceeded")
        vectors = await service.worker.call(lambda engine: [engine.embed(ids) for ids in prompts])
        used = sum(map(len, prompts))
        return {"object": "list", "model": body.model or service.names[0], "usage": {"prompt_tokens": used, "total_tokens": used},
                "data": [{"object": "embedding", "index": i, "embedding": encode_vector(v, body.encoding_format)}
                         for i, v in enumerate(vectors)]}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": name, "object": "model", "created": int(service.started), "owned_by": "local",
                                            "parent": service.names[0] if name in service.adapters else None,
                                            "max_model_len": service.engine.max_model_len} for name in service.names]}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest):
        if (body.prompt is None) == (body.messages is None):
            raise Refusal(400, "give a prompt or messages, one of the two")
        if body.messages is not None:
            ids = chat.render(tok, body.messages, add_generation_prompt=body.add_generation_prompt)[0]
        else:
            ids = tok.encode(body.prompt)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.engine.max_model_len,
                "token_strs": [spell(tok, i)[0] for i in ids]}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest):
        if not all(0 <= i < tok.vocab_size for i in body.tokens):
            raise Refusal(400, f"ids go from 0 to {tok.vocab_size - 1}")
        return {"prompt": tok.decode(body.tokens)}


def encode_vector(vector, form):
    if form != "base64":
        return vector
    import base64
    import struct
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def add_operation_routes(app, service):
    worker = service.worker

    @app.get("/health")
    async def health():
        return {"status": "alive"}

    @app.get("/ready")
    async def ready():
        if service.draining or worker.broken or not worker.is_alive():
            raise Refusal(503, worker.broken or "not serving")
        return {"status": "ready", "model": service.names[0]}

    @app.get("/stats")
    async def stats():
        import torch
        gpu = torch.cuda.is_available() and {"name": torch.cuda.get_device_name(), "allocated": torch.cuda.memory_allocated(),
                                             "free": torch.cuda.mem_get_info()[0]}
        return {**service.engine.stats(), "queue": worker.depth - len(worker.active), "tokens_per_second": round(
            worker.tokens_per_second(), 1), "uptime": round(time.time() - service.started, 1), "memory": resident_memory(),
            "gpu": gpu or None, "models": service.names, "max_model_len": service.engine.max_model_len,
            "chat": service.engine.tok.chat_template is not None}

    @app.get("/metrics")
    async def metrics():
        return Response(generate_latest(service.gauges.registry), media_type="text/plain; version=0.0.4")

    @app.get("/runs")
    async def runs():
        """Training runs that can be drawn, the newest first."""
        found = sorted(Path(service.args.runs).glob("*/metrics.jsonl"), key=lambda p: -p.stat().st_mtime)
        return {"runs": [p.parent.name for p in found[:100]]}

    @app.get("/runs/{name}")
    async def run(name: str, after: int = -1):
        if name not in (await runs())["runs"]:  # only what was listed: a name is not a path
            raise Refusal(404, f"no run {name!r}")
        rows = await asyncio.to_thread(Metrics.read, Path(service.args.runs) / name / "metrics.jsonl")
        return {"rows": [r for r in rows if r.get("step", 0) > after][-5000:]}

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(HERE / "ui.html", headers={"Content-Security-Policy":
                            "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
                            "connect-src *", "Cache-Control": "no-cache"})


def resident_memory():
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


# -------------------------------------------------------------------------------------------------------------------- the door
class Door:
    """Around every request, as plain ASGI so that streams pass untouched: an id, keys, limits, CORS, one log line at the end."""
    OPEN = ("/", "/health", "/ready", "/docs", "/openapi.json", "/favicon.ico")  # need no key

    def __init__(self, app, service):
        self.app, self.service, self.cors = app, service, service.args.cors.split(",") if service.args.cors else []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {k.decode("latin1"): v.decode("latin1") for k, v in scope["headers"]}
        state, begin = scope.setdefault("state", {}), time.monotonic()
        state["id"] = given if re.fullmatch(r"[\w.:-]{1,100}", given := headers.get("x-request-id", "")) else secrets.token_hex(8)
        if any(job.id.startswith(state["id"]) for job in list(self.service.worker.active.values())):
            state["id"] += "-" + secrets.token_hex(4)  # two requests of one name stay two
        status = 0

        async def tagged(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", state["id"].encode()), *self.cors_headers(headers)]
            await send(message)
        try:
            self.check(scope, headers, state)
            await self.app(scope, self.limited(scope, receive), tagged)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, tagged)
        except Exception as error:
            if status:
                raise
            await refused(Refusal(500, f"internal error ({type(error).__name__}); its id is {state['id']}"))(scope, receive, tagged)
            print(json.dumps({"event": "error", "id": state["id"], "error": repr(error)[:500]}), file=sys.stderr, flush=True)
        finally:
            self.service.gauges.http.labels(str(status)).inc()
            self.log(scope, state, status, time.monotonic() - begin)

    def check(self, scope, headers, state):
        """Who is it, and may they now? Raises Refusal 401 or 429."""
        keys, given = self.service.keys, headers.get("authorization", "").removeprefix("Bearer ").strip()
        found = None
        for key, name in keys.items():  # every key is compared, in constant time, so that the time tells nothing
            if hmac.compare_digest(hashlib.sha256(key.encode()).digest(), hashlib.sha256(given.encode()).digest()):
                found = name
        state["key"] = found or (scope.get("client") or ("",))[0]
        if scope["path"] in self.OPEN or scope["method"] == "OPTIONS":
            return
        if keys and found is None:
            raise Refusal(401, "this server needs an API key: Authorization: Bearer KEY", "invalid_api_key")
        if limit := self.service.args.rate_limit:
            if len(self.service.windows) > 10_000:  # addresses of long ago
                self.service.windows.clear()
            window = self.service.windows.setdefault(state["key"], deque())
            while window and window[0] < time.monotonic() - 60:
                window.popleft()
            if len(window) >= limit:
                raise Refusal(429, f"over {limit} requests in a minute", "rate_limit_exceeded",
                              headers={"Retry-After": str(int(61 - (time.monotonic() - window[0])))})
            window.append(time.monotonic())

    def limited(self, scope, receive):
        """receive() that ends a body which is too large or comes too slowly."""
        seen, most, deadline = 0, self.service.args.max_body, time.monotonic() + 30
        arrived = False

        async def limit():
            nonlocal seen, arrived
            if arrived:  # the body is here: what comes now is only that the client left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.01, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise Refusal(408, "the request's body did not arrive within 30 s") from None
            seen += len(message.get("body", b""))
            if seen > most:
                raise Refusal(413, f"the body is over {most:,} bytes (--max-body)")
            arrived = message["type"] == "http.request" and not message.get("more_body")
            return message
        return limit

    def cors_headers(self, headers):
        origin = headers.get("origin")
        if not origin or not ("*" in self.cors or origin in self.cors):
            return []
        return [(b"access-control-allow-origin", origin.encode("latin1")), (b"vary", b"Origin"),
                (b"access-control-allow-headers", b"authorization, content-type"), (b"access-control-allow-methods", b"GET, POST")]

    def log(self, scope, state, status, seconds):
        """One line of JSON a request: how long it waited and took, how much it made, why it ended; of its text nothing."""
        if scope["path"] in ("/health", "/ready", "/metrics", "/stats"):
            return
        row = {"event": "request", "id": state["id"], "method": scope["method"], "path": scope["path"], "status": status,
               "seconds": round(seconds, 4)}
        if jobs := state.get("jobs"):
            first = [j.first for j in jobs if j.first]
            row |= {"prompt_tokens": sum(len(j.prompt) for j in jobs), "tokens": sum(j.tokens for j in jobs),
                    "queue_seconds": round(max((j.admitted - j.created for j in jobs if j.admitted), default=0.0), 4),
                    "ttft_seconds": round(min(first) - jobs[0].created, 4) if first else None,
                    "reason": ",".join(sorted({j.reason for j in jobs}))}
            if self.service.args.log_prompts:
                row["prompt"] = self.service.engine.tok.decode(jobs[0].prompt)
        print(json.dumps(row), file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------- the process
def read_keys(args):
    """--api-key-file and $LLM_API_KEYS -> {key: name}; a file that others can read is warned of."""
    lines = [k for k in os.environ.get("LLM_API_KEYS", "").split(",") if k.strip()]
    if args.api_key_file:
        path = Path(args.api_key_file)
        if not path.is_file():
            raise UserError(f"--api-key-file {path}: no such file")
        if os.name == "posix" and path.stat().st_mode & 0o077:
            print(f"warning: {path} can be read by others; chmod 600 {path}", file=sys.stderr)
        lines += [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            raise UserError(f"--api-key-file {path} holds no key: one a line, or name:key")
    named = [line.strip().rpartition(":") for line in lines]
    return {key: name or "key-" + hashlib.sha256(key.encode()).hexdigest()[:8] for name, _, key in named}


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM stops listening and lets what runs finish; from then on the service refuses what is new."""

    def handle_exit(self, sig, frame):
        self.config.app.state.service.draining = True
        super().handle_exit(sig, frame)


def main():
    args = Args(**parse_flags(Args, __doc__, positional=("model",)))
    if not args.model:
        raise UserError("which model? python serve.py MODEL, a model folder or a .gguf file")
    if bool(args.certificate) != bool(args.certificate_key):
        raise UserError("TLS needs both --certificate and --certificate-key")
    keys, begin = read_keys(args), time.time()
    engine = Engine(args.model, args.device, args.dtype, args.quant or None, args.kv_tokens or None,
                    **({"adapters": dict(pair.split("=", 1) for pair in args.adapters.split(","))} if args.adapters else {}))
    app = create_app(engine, args, keys)
    if engine.tok.chat_template is None:
        print("note     this model has no chat template: /v1/completions works, /v1/chat/completions answers 400")
    if args.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        print("warning: reachable from elsewhere and without keys (--api-key-file)", file=sys.stderr)
    config = uvicorn.Config(app, args.host, args.port, log_level="warning", access_log=False, timeout_keep_alive=30,
                            timeout_graceful_shutdown=int(args.drain), h11_max_incomplete_event_size=65536, backlog=1024,
                            ssl_certfile=args.certificate or None, ssl_keyfile=args.certificate_key or None)
    try:
        config.load()
        socket = config.bind_socket()
    except SystemExit:
        raise UserError(f"port {args.port} on {args.host} is in use or not allowed: choose another --port") from None
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UserError(f"TLS: {args.certificate} and {args.certificate_key} do not open as a pair ({error})") from None
    scheme = "https" if args.certificate else "http"
    print(f"ready    {scheme}://{args.host}:{socket.getsockname()[1]} after {time.time() - begin:.1f} s; the page at /, the API at /v1, "
          "its description at /docs", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Server(config).run(sockets=[socket])


if __name__ == "__main__":
    cli(main)
