"""What stands around every request: keys, limits, logs, figures, and time limits for slow clients.

serve.py puts `Door` around its routes, and `Protocol` is how uvicorn reads HTTP for it.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import math
import os
import re
import secrets
import socket
import ssl
import sys
import time
import traceback
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from itertools import accumulate
from pathlib import Path

import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common import UserError, read_utf8, warn
from server.answers import json_bytes, json_pieces
from server.api import Refusal

ARRIVAL_SECONDS = 30.0  # that a head or a body may take, and a client that reads nothing
LINGER_SECONDS = 5.0  # that the rest of a refused body is read, so that its sender reads why
LATE = "late"  # what a task is told that waited for so long
HEAD_BYTES = 65_536  # of a head, or of trailers
PIPELINE = 16  # requests of a connection that may wait for their turn
CONNECTIONS = 400  # of one address
WRONG_KEYS = 60  # in a minute, from one address
WINDOWS = 10_000  # keys and addresses whose rate is remembered
OPEN_PATHS = "/ /health /ready /docs /openapi.json /favicon.ico".split()  # need no key
UNLOGGED_PATHS = "/health /ready /metrics /stats".split()  # unless refused: monitors ask often


# ------------------------------------------------------------------------------- keys and figures
def listed(text):
    """What a flag lists, apart by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_keys(args):
    """--api-key-file and $LLM_API_KEYS -> {key: name}; a file that others can read is warned of.
    UserError where one of the two is given and holds no key: without keys everyone may come in."""
    sources = {}
    listed_keys = os.environ.get("LLM_API_KEYS")
    if listed_keys:  # compose.yaml sets it to "" where there are none
        sources["$LLM_API_KEYS"] = re.split(r"[,\n]", listed_keys)
    if args.api_key_file:
        path = Path(args.api_key_file)
        if os.name == "posix" and path.stat().st_mode & 0o077:
            warn(f"{path} can be read by others; chmod 600 {path}")
        text = re.sub(r"(?m)^\s*#.*", "", read_utf8(path))
        sources[f"--api-key-file {path}"] = text.splitlines()
    keys = {}
    for source, lines in sources.items():
        lines = list(filter(None, map(str.strip, lines)))
        if not lines:
            raise UserError(f"{source} holds no key: write KEY or NAME:KEY, or do not give it")
        for line in lines:
            name, key = re.fullmatch(r"(?:([^:]*):)?\s*(.*)", line).groups()
            if not key:
                raise UserError(f"the key of {name!r} is empty, which would let everyone in")
            keys[key] = name or "key-" + hashlib.sha256(key.encode()).hexdigest()[:8]
    return keys


# Where the buckets of the histograms end, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# The engine's counters, under our names and vLLM's.
COUNTERS = {
    "prompt_tokens": "prompt_tokens",
    "generated_tokens": "generation_tokens",
    "preemptions": "num_preemptions",
    "cache_hit_tokens": "prefix_cache_hits",
    "cache_query_tokens": "prefix_cache_queries",
}


class Measures:
    """Counts what /metrics shows, named as vLLM names it; with numbers of its own, as those of
    prometheus-client would be a tenth of all that HTTP costs a request."""

    def __init__(self, client):
        self.client = client
        self.seconds = defaultdict(float)  # {name: sum}
        self.buckets = defaultdict(lambda: [0] * (len(BUCKETS) + 1))
        self.finished = Counter()  # {reason: jobs}
        self.http = Counter()  # {status: requests}

    def observe(self, job):
        """Count a job that is over."""
        now = time.monotonic()
        self.finished[job.reason] += 1
        found = {"e2e_request_latency": now - job.created}
        if job.admitted:
            found["request_queue_time"] = job.admitted - job.created
        if job.first:
            found["time_to_first_token"] = job.first - job.created
            if job.tokens > 1:  # the first aside, mean of a request
                found["time_per_output_token"] = (now - job.first) / (job.tokens - 1)
        for name, seconds in found.items():
            self.seconds[name] += seconds
            self.buckets[name][bisect_left(BUCKETS, seconds)] += 1

    def collect(self):
        """All figures, as prometheus-client asks for them."""
        for name, counts in self.buckets.items():
            buckets = list(zip(map(floatToGoString, (*BUCKETS, math.inf)), accumulate(counts)))
            yield HistogramMetricFamily(f"llm:{name}_seconds", name, buckets, self.seconds[name])
        for name, label, counts in (
            ("request_success", "finished_reason", self.finished),
            ("http_requests", "status", self.http),
        ):
            family = CounterMetricFamily(f"llm:{name}", f"requests by {label}", labels=[label])
            for value, count in counts.items():
                family.add_metric([value], count)
            yield family
        stats = self.client.stats
        if not stats:
            return
        gauges = {
            "num_requests_running": stats["running"],
            "num_requests_waiting": self.client.queue_length(),
            "kv_cache_usage_perc": stats["blocks_used"] / max(stats["blocks_total"], 1),
            "longest_wait_between_steps_seconds": stats["longest_wait"],
        }
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"llm:{name}", name, value)
        for ours, theirs in COUNTERS.items():
            yield CounterMetricFamily(f"llm:{theirs}", theirs, stats[ours])


# ------------------------------------------------------------------------------------------ errors
def json_response(content, status=200, headers=None):
    return Response(json_bytes(content), status, headers, "application/json")


async def json_later(content):
    """The same for what may be large: others' turns on the event loop come in between."""
    pieces = []
    for i, piece in enumerate(json_pieces(content), 1):
        pieces.append(piece)
        if i % 1000 == 0:
            await asyncio.sleep(0)
    return Response("".join(pieces).encode("utf-8", "replace"), media_type="application/json")


def invalid(errors):
    """pydantic's findings -> Refusal"""
    found = []
    for error in errors[:3]:
        place = ".".join(map(str, error["loc"])) or "body"
        unknown = error["type"] == "extra_forbidden"
        found.append(f"{place}: {'not supported by this server' if unknown else error['msg']}")
    param = str(errors[0]["loc"][0]) if errors[0]["loc"] else None
    return Refusal(400, "; ".join(found), "invalid_request", param)


def refusal_of(error, request_id):
    """Any exception -> the Refusal that its client gets."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (UserError, RecursionError)):
        return Refusal(400, str(error))
    if isinstance(error, RequestValidationError):
        return invalid(error.errors())
    if isinstance(error, HTTPException):
        message = f"{error.detail}: see /docs for what there is"
        return Refusal(error.status_code, message, headers=error.headers)
    # Where it happened, and of what kind it is: what it says may hold a request's text.
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames]
    log_line({"event": "error", "id": request_id, "error": kind, "at": places})
    return Refusal(500, f"internal error ({kind}); its id is {request_id}")


async def to_the_door(request, error):
    """FastAPI would answer some errors itself; the Door answers all."""
    raise error


ERROR_HANDLERS = dict.fromkeys((HTTPException, RequestValidationError, Exception), to_the_door)


def log_line(row):
    sys.stderr.write(json_bytes(row).decode() + "\n")  # which is flushed at the end of a line


# -------------------------------------------------------------------------------------- the door
def address_of(client):
    """Who a peer (host, port) counts as: its address, of IPv6 the /64 that one client has."""
    host = client[0] if client else ""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


# Hosts that nobody else can let a name of theirs resolve to: addresses, and names without a dot.
# A page in a sandbox says that its origin is null: that names nobody.
LOCAL = r"\[.*\]|[\d.]+|(?!null$)[^.:/]*|[\w.-]+\.localhost"


class Body:
    """A request's receive(), which raises Refusal for a body that is too large or too slow."""

    def __init__(self, receive, most):
        self.receive = receive
        self.most = most
        self.loop = asyncio.get_running_loop()
        self.deadline = self.loop.time() + ARRIVAL_SECONDS
        self.seen = 0
        self.arrived = False

    async def __call__(self):
        if self.arrived:  # what comes now is only that the client has left
            return await self.receive()
        timer = self.loop.call_at(self.deadline, asyncio.current_task().cancel, LATE)
        try:
            message = await self.receive()
        except asyncio.CancelledError as error:
            if error.args != (LATE,):
                raise
            raise Refusal(408, f"the body did not arrive within {ARRIVAL_SECONDS:g} s") from None
        finally:
            timer.cancel()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client left before its body had arrived")
        self.arrived = not message.get("more_body")
        self.seen += len(message.get("body", b""))
        if self.seen > self.most:
            raise Refusal(413, f"the body is over {self.most:,} bytes (--max-body)")
        return message

    async def read(self):
        """-> all of it"""
        data = bytearray()
        while not self.arrived:
            data += (await self()).get("body", b"")
        return data

    async def drop(self):
        """Read the rest for a while. Protocol hangs up on a client that then still sends."""
        self.deadline = self.loop.time() + LINGER_SECONDS
        self.most = math.inf
        with contextlib.suppress(Refusal):
            while not self.arrived:
                await self()


class Door:
    """Stands around every request, as plain ASGI so that streams pass untouched: it gives an id,
    checks host, key and limits, and at the end closes the request's jobs and writes one line of
    log."""

    def __init__(self, app, service, keys, posts):
        """posts: {("POST", path): its ASGI app}, which FastAPI need not look for."""
        self.app = app
        self.posts = posts
        self.service = service
        self.keys = {hashlib.sha256(key.encode()).digest(): name for key, name in keys.items()}
        allowed = listed(service.args.allowed_hosts or ("*" if keys else ""))
        names = ".*" if "*" in allowed else "|".join(map(re.escape, allowed))
        self.hosts = re.compile(rf"(https?://)?({LOCAL}|{names})(:\d+)?", re.I)
        self.origins = listed(service.args.cors)
        # {key's name or address: times of its requests in the last minute}, the latest at the end
        self.windows = OrderedDict()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        pairs = reversed(scope["headers"])  # of two with a name the first counts
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in pairs}
        given = headers.get("x-request-id", "")
        named = re.fullmatch(r"[\w.:-]{1,100}", given, re.ASCII)
        state = scope.setdefault("state", {})
        state["begin"] = time.monotonic()
        state["id"] = given if named else secrets.token_hex(8)
        state["jobs"] = []
        body = Body(receive, self.service.args.max_body)
        status = 0  # of the answer, once it has begun

        async def tagged(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", state["id"].encode()))
            elif not body.arrived and not message.get("more_body"):
                await send({**message, "more_body": True})
                await body.drop()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self.check(scope, headers, state)
            app = self.posts.get((scope["method"], scope["path"]), self.app)
            method = "GET" if scope["method"] == "HEAD" else scope["method"]  # but for the body
            await app({**scope, "method": method}, body, tagged)
        except Exception as error:
            refusal = refusal_of(error, state["id"])
            if not status:  # else it is too late for another answer, and uvicorn hangs up
                response = json_response(refusal.body, refusal.status_code, refusal.headers)
                await response(scope, body, tagged)
        finally:
            # Whether the answer ended, failed, or lost its client (see serve.BodyRoute).
            self.service.close(state["jobs"])
            self.service.measures.http[str(status)] += 1
            self.log(scope, state, status)

    def check(self, scope, headers, state):
        """Where from, who, and may they now? Raises Refusal 403, 401 or 429."""
        self.check_host(headers)
        given = re.sub(r"(?i)^bearer\s+", "", headers.get("authorization", "")).strip()
        # How long it takes to find a digest tells nothing of the key that it would be of.
        found = self.keys.get(hashlib.sha256(given.encode("latin1")).digest())
        address = address_of(scope.get("client"))
        state["key"] = found or address
        if scope["path"] in OPEN_PATHS:
            return
        limit = self.service.args.rate_limit
        if self.keys and found is None:
            self.check_rate(address, limit or WRONG_KEYS)
            message = "this server needs an API key: Authorization: Bearer KEY"
            raise Refusal(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if limit:
            self.check_rate(state["key"], limit)

    def check_host(self, headers):
        """A page from elsewhere can give its own name this machine's address (DNS rebinding), and
        then the browser lets it in. It cannot hide that name."""
        names = [headers.get("host", "")]
        origin = headers.get("origin", "")
        if origin not in self.origins and "*" not in self.origins:
            names.append(origin)
        for name in names:
            if not self.hosts.fullmatch(name):
                message = f"{name!r} is not a name of this server (--allowed-hosts)"
                raise Refusal(403, message, "host_not_allowed")

    def check_rate(self, key, limit):
        window = self.windows.setdefault(key, deque())
        self.windows.move_to_end(key)
        if len(self.windows) > WINDOWS:
            self.windows.popitem(last=False)  # the one that asked longest ago
        now = time.monotonic()
        while window and window[0] < now - 60:
            window.popleft()
        if len(window) >= limit:
            later = {"Retry-After": str(int(61 - (now - window[0])))}
            message = f"over {limit} requests in a minute"
            raise Refusal(429, message, "rate_limit_exceeded", headers=later)
        window.append(now)

    def log(self, scope, state, status):
        """Write one line of JSON: how long the request waited and took, how much it made, why it
        ended. Of its text it says nothing."""
        if scope["path"] in UNLOGGED_PATHS and status < 400:
            return
        row = {
            "event": "request",
            "id": state["id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(time.monotonic() - state["begin"], 4),
        }
        jobs = state["jobs"]
        if jobs:
            queued = [job.admitted - job.created for job in jobs if job.admitted]
            first = [job.first - job.created for job in jobs if job.first]
            row |= {
                "key": state["key"],
                "prompt_tokens": sum(job.prompt_tokens for job in jobs),
                "tokens": sum(job.tokens for job in jobs),
                "queue_seconds": round(max(queued, default=0.0), 4),
                "ttft_seconds": round(min(first), 4) if first else None,
                "reason": ",".join(sorted({job.reason for job in jobs})),
            }
        log_line(row)


# ----------------------------------------------------------------------------------- HTTP itself
class Gatherer:
    """A transport that sends at once what is written in one turn of the event loop: uvicorn writes
    an answer's head by itself, which would be a packet and a system call of its own."""

    def __init__(self, transport):
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.unsent = []

    def __getattr__(self, name):
        return getattr(self.transport, name)

    def write(self, data):
        if not self.unsent:
            self.loop.call_soon(self.flush)
        self.unsent.append(data)

    def flush(self):
        if self.unsent and not self.transport.is_closing():
            self.transport.write(b"".join(self.unsent))
        self.unsent.clear()

    def close(self):
        self.flush()
        self.transport.close()


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on what anyone may cost before a key is asked for: it hangs up
    on a client that sends its head slowly or without an end, or does not read its answers, on too
    many requests that wait in a connection, and on too many connections of an address."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.transport = Gatherer(transport)
        # asyncio does this for sockets that say IPPROTO_TCP, and uvicorn's do not: without it the
        # second write of an answer waits 40 ms for the client's delayed ACK.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.scheme == "http":  # asyncio's TLS has a time-out of its own, and would never resume
            transport.set_write_buffer_limits(0)  # pause_writing is called once bytes must wait
        self.running = None  # the RequestResponseCycle that answers now
        self.framing = 0  # bytes that came since the last one of a body: a head, or trailers
        self.in_head = True
        self.late = self.hang_up_later()  # on a client whose head does not come
        self.stalled = self.late  # the same for one that does not read
        self.address = address_of(self.client)
        same = [other for other in self.connections if other.address == self.address]
        if len(same) > CONNECTIONS and not self.config.proxy_headers:  # a proxy is one address
            transport.abort()

    def hang_up_later(self):
        return self.loop.call_later(ARRIVAL_SECONDS, self.transport.abort)

    def watch_reader(self, unread=math.inf):
        """Hang up on a client that has read nothing of `unread` bytes; else look again later."""
        left = self.transport.get_write_buffer_size()
        if left >= unread:
            return self.transport.abort()
        self.stalled = self.loop.call_later(ARRIVAL_SECONDS, self.watch_reader, left)

    def data_received(self, data):
        self.framing += len(data)
        super().data_received(data)
        if not self.in_head:
            self.late.cancel()
        elif self.late.cancelled():
            self.late = self.hang_up_later()
        if self.framing > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"a head or trailers of over {HEAD_BYTES:,} bytes")

    def on_message_begin(self):
        if len(self.pipeline) >= PIPELINE:
            raise ValueError("too many requests wait")  # then uvicorn answers 400 and hangs up
        super().on_message_begin()
        self.in_head = True

    def on_headers_complete(self):
        self.in_head = False
        self.framing = 0
        super().on_headers_complete()

    def on_body(self, body):
        self.framing = 0
        super().on_body(body)

    def _start_asgi_task(self, cycle, app):
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self):
        if self.running.more_body:  # what it still sends of its request is nobody's
            self.transport.close()
        super().on_response_complete()

    def pause_writing(self):
        super().pause_writing()
        self.watch_reader()

    def resume_writing(self):
        super().resume_writing()
        self.stalled.cancel()

    def connection_lost(self, error):
        self.late.cancel()
        self.stalled.cancel()
        # uvicorn tells the newest request that its client has left, but it is the running one's.
        self.pipeline.clear()
        self.cycle = self.running
        super().connection_lost(error)
        answering = self.cycle and self.cycle.scope["state"].pop("answering", None)
        if answering:  # the task of serve.BodyRoute
            answering.cancel()


def listen(args):
    """-> (uvicorn's Config, the socket bound but not yet listening)"""
    config = uvicorn.Config(
        None,
        args.host,
        args.port,
        http=Protocol,
        ws="none",  # or an upgrade would go past Protocol and Door, to a library that is installed
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        proxy_headers=bool(args.trusted_proxy),
        forwarded_allow_ips=args.trusted_proxy,
        ssl_certfile=args.certificate or None,
        ssl_keyfile=args.certificate_key or None,
    )
    pair = args.certificate, args.certificate_key
    try:
        if args.certificate:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*pair)
        return config, config.bind_socket()
    except (SystemExit, OverflowError):  # uvicorn's way to say that; no port has this number
        place = f"port {args.port} on {args.host}"
        raise UserError(f"{place} is in use or not allowed: choose another --port") from None
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UserError(f"TLS: {' and '.join(pair)} do not open as a pair ({error})") from None
