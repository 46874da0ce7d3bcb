"""What stands around every request: keys, limits, logs, figures, and time limits for slow clients.

serve.py puts `Door` around its routes, and `Protocol` is how uvicorn reads HTTP for it.
"""

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import socket
import ssl
import sys
import time
from collections import deque
from pathlib import Path

import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common import UserError
from server.answers import compact_json, json_bytes
from server.api import Refusal

ARRIVAL_SECONDS = 30.0  # that a request's head and its body may each take to arrive
HEAD_BYTES = 65_536  # of a request's head
OPEN_PATHS = "/ /health /ready /docs /openapi.json /favicon.ico".split()  # need no key
UNLOGGED_PATHS = "/health /ready /metrics /stats".split()  # what watches, asks all the time


# ------------------------------------------------------------------------------- keys and figures
def read_keys(args):
    """--api-key-file and $LLM_API_KEYS -> {key: name}; a file that others can read is warned of."""
    lines = os.environ.get("LLM_API_KEYS", "").split(",")
    if args.api_key_file:
        path = Path(args.api_key_file)
        if not path.is_file():
            raise UserError(f"--api-key-file {path}: no such file")
        if os.name == "posix" and path.stat().st_mode & 0o077:
            print(f"warning: {path} can be read by others; chmod 600 {path}", file=sys.stderr)
        lines += path.read_text().splitlines()
    keys = {}
    for line in lines:
        name, _, key = line.strip().rpartition(":")
        if key and not line.startswith("#"):
            keys[key] = name or "key-" + hashlib.sha256(key.encode()).hexdigest()[:8]
    if args.api_key_file and not keys:
        raise UserError(f"--api-key-file {path} holds no key: one a line, or name:key")
    return keys


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# The engine's counters, under our names and vLLM's.
COUNTERS = {
    "prompt_tokens": "prompt_tokens",
    "generated_tokens": "generation_tokens",
    "preemptions": "num_preemptions",
    "cache_hit_tokens": "prefix_cache_hits",
    "cache_query_tokens": "prefix_cache_queries",
}


class Measures:
    """Counts what /metrics shows, named as vLLM names it."""

    def __init__(self, client):
        self.client = client
        self.registry = CollectorRegistry()
        self.ttft = self.histogram("time_to_first_token")  # from arrival
        self.tpot = self.histogram("time_per_output_token")  # the first aside, mean of a request
        self.e2e = self.histogram("e2e_request_latency")  # from arrival to the end
        self.queued = self.histogram("request_queue_time")  # waiting for a place in the engine
        self.finished = self.counter("request_success", "finished_reason")
        self.http = self.counter("http_requests", "status")
        self.registry.register(self)

    def histogram(self, name):
        return Histogram(f"llm:{name}_seconds", name, registry=self.registry, buckets=SECONDS)

    def counter(self, name, label):
        return Counter(f"llm:{name}", f"requests by {label}", [label], registry=self.registry)

    def collect(self):
        """The engine's own figures, as prometheus-client asks for them."""
        stats = self.client.stats
        if not stats:
            return
        gauges = {
            "num_requests_running": stats["running"],
            "num_requests_waiting": self.client.queue_length(),
            "kv_cache_usage_perc": stats["blocks_used"] / max(stats["blocks_total"], 1),
        }
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"llm:{name}", name, value)
        for ours, theirs in COUNTERS.items():
            yield CounterMetricFamily(f"llm:{theirs}", theirs, stats[ours])

    def observe(self, job):
        """Count a job that is over."""
        now = time.monotonic()
        self.finished.labels(job.reason).inc()
        self.e2e.observe(now - job.created)
        if job.admitted:
            self.queued.observe(job.admitted - job.created)
        if job.first:
            self.ttft.observe(job.first - job.created)
            if job.tokens > 1:
                self.tpot.observe((now - job.first) / (job.tokens - 1))


# ------------------------------------------------------------------------------------------ errors
def json_response(content, status=200, headers=None):
    return Response(json_bytes(content), status, headers, "application/json")


def refused(refusal):
    return json_response(refusal.body, refusal.status_code, refusal.headers)


def invalid(errors):
    """pydantic's findings -> Refusal"""
    found = []
    for error in errors[:3]:
        place = ".".join(map(str, error["loc"])) or "body"
        unknown = error["type"] == "extra_forbidden"
        found.append(f"{place}: {'not supported by this server' if unknown else error['msg']}")
    param = str(errors[0]["loc"][0]) if errors[0]["loc"] else None
    return Refusal(400, "; ".join(found), "invalid_request", param)


async def show_error(request, error):
    """Any error that FastAPI hands us -> the answer in OpenAI's shape."""
    if isinstance(error, UserError):
        error = Refusal(400, str(error))
    elif isinstance(error, RequestValidationError):
        error = invalid(error.errors())
    elif not isinstance(error, Refusal):
        message = f"{error.detail}: see /docs for what there is"
        error = Refusal(error.status_code, message, headers=error.headers)
    return refused(error)


ERROR_HANDLERS = dict.fromkeys((HTTPException, UserError, RequestValidationError), show_error)


def log_line(row):
    print(compact_json(row), file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------- the door
class Door:
    """Stands around every request, as plain ASGI so that streams pass untouched: it gives an id,
    checks key and limits, and at the end closes the request's jobs and writes one line of log."""

    def __init__(self, app, service, keys):
        self.app = app
        self.service = service
        self.keys = {hashlib.sha256(key.encode()).digest(): name for key, name in keys.items()}
        self.windows = {}  # {key's name or address: times of its requests in the last minute}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        named = re.fullmatch(r"[\w.:-]{1,100}", given, re.ASCII)
        state = scope.setdefault("state", {})
        state["id"] = given if named else secrets.token_hex(8)
        state["jobs"] = []
        status = 0  # of the answer, once it has begun

        async def tagged(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", state["id"].encode()))
            await send(message)

        try:
            self.check(scope, headers.get("authorization", ""), state)
            method = "GET" if scope["method"] == "HEAD" else scope["method"]  # but for the body
            await self.app({**scope, "method": method}, self.limited(receive), tagged)
        except Exception as error:
            if not isinstance(error, Refusal):
                log_line({"event": "error", "id": state["id"], "error": repr(error)[:500]})
                kind = type(error).__name__
                error = Refusal(500, f"internal error ({kind}); its id is {state['id']}")
            if status:
                raise  # too late for another answer
            await refused(error)(scope, receive, tagged)
        finally:
            # Whether the answer ended, failed, or lost its client (see serve.Reply).
            self.service.close(state["jobs"])
            self.service.measures.http.labels(str(status)).inc()
            self.log(scope, state, status, time.monotonic() - begin)

    def check(self, scope, given, state):
        """Who is it, and may they now? Raises Refusal 401 or 429."""
        given = re.sub(r"(?i)^bearer\s+", "", given).strip()
        digest = hashlib.sha256(given.encode("latin1")).digest()
        found = None
        for key, name in self.keys.items():
            # Every key is compared, and in constant time, so that the time tells nothing.
            if hmac.compare_digest(key, digest):
                found = name
        state["key"] = found or (scope.get("client") or ("",))[0]
        if scope["path"] in OPEN_PATHS:
            return
        if self.keys and found is None:
            message = "this server needs an API key: Authorization: Bearer KEY"
            raise Refusal(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.service.args.rate_limit:
            self.check_rate(state["key"], self.service.args.rate_limit)

    def check_rate(self, key, limit):
        if len(self.windows) > 10_000:  # addresses of long ago
            self.windows.clear()
        window = self.windows.setdefault(key, deque())
        now = time.monotonic()
        while window and window[0] < now - 60:
            window.popleft()
        if len(window) >= limit:
            later = {"Retry-After": str(int(61 - (now - window[0])))}
            message = f"over {limit} requests in a minute"
            raise Refusal(429, message, "rate_limit_exceeded", headers=later)
        window.append(now)

    def limited(self, receive):
        """receive(), which raises Refusal for a body that is too large or comes too slowly."""
        most = self.service.args.max_body
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ARRIVAL_SECONDS
        close = {"Connection": "close"}  # the rest of the body is not read
        seen = 0
        arrived = False

        async def limited_receive():
            nonlocal seen, arrived
            if arrived:  # what comes now is only that the client has left
                return await receive()
            late = loop.call_at(deadline, asyncio.current_task().cancel)
            try:
                message = await receive()
            except asyncio.CancelledError:
                if loop.time() < deadline:
                    raise
                text = f"the body did not arrive within {ARRIVAL_SECONDS:g} s"
                raise Refusal(408, text, headers=close) from None
            finally:
                late.cancel()
            seen += len(message.get("body", b""))
            if seen > most:
                raise Refusal(413, f"the body is over {most:,} bytes (--max-body)", headers=close)
            arrived = message["type"] == "http.request" and not message.get("more_body")
            return message

        return limited_receive

    def log(self, scope, state, status, seconds):
        """Write one line of JSON: how long the request waited and took, how much it made, why it
        ended. Of its text it says nothing."""
        if scope["path"] in UNLOGGED_PATHS:
            return
        row = {
            "event": "request",
            "id": state["id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }
        jobs = state["jobs"]
        if jobs:
            queued = [job.admitted - job.created for job in jobs if job.admitted]
            first = [job.first - job.created for job in jobs if job.first]
            row |= {
                "key": state["key"],
                "prompt_tokens": sum(len(job.prompt) for job in jobs),
                "tokens": sum(job.tokens for job in jobs),
                "queue_seconds": round(max(queued, default=0.0), 4),
                "ttft_seconds": round(min(first), 4) if first else None,
                "reason": ",".join(sorted({job.reason for job in jobs})),
            }
        log_line(row)


# ----------------------------------------------------------------------------------- HTTP itself
class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which in addition hangs up on a client whose request's head does not
    come (a "slow loris"), or does not end."""

    def connection_made(self, transport):
        super().connection_made(transport)
        # asyncio does this for sockets that say IPPROTO_TCP, and uvicorn's do not: without it the
        # second write of an answer waits 40 ms for the client's delayed ACK.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head = 0  # bytes of a head that came
        self.late = self.loop.call_later(ARRIVAL_SECONDS, transport.abort)  # while it is awaited

    def on_message_begin(self):
        super().on_message_begin()
        self.head = 0
        if self.late.cancelled():  # not the connection's first, which has its time already
            self.late = self.loop.call_later(ARRIVAL_SECONDS, self.transport.abort)

    def data_received(self, data):
        self.head += len(data)
        if self.head > HEAD_BYTES + len(data) and not self.late.cancelled():
            self.send_400_response(f"The head of the request is over {HEAD_BYTES:,} bytes.")
        else:
            super().data_received(data)

    def on_headers_complete(self):
        self.late.cancel()
        super().on_headers_complete()

    def connection_lost(self, error):
        self.late.cancel()
        super().connection_lost(error)


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
        ssl_certfile=args.certificate or None,
        ssl_keyfile=args.certificate_key or None,
    )
    pair = args.certificate, args.certificate_key
    try:
        if args.certificate:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*pair)
        return config, config.bind_socket()
    except SystemExit:  # uvicorn's way to say that
        place = f"port {args.port} on {args.host}"
        raise UserError(f"{place} is in use or not allowed: choose another --port") from None
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UserError(f"TLS: {' and '.join(pair)} do not open as a pair ({error})") from None
