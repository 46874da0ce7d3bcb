"""The engine in a process of its own, and the way to it.

    front, back = socket.socketpair()
    Worker(engine, back, concurrency=64).run()      # in a thread, or in the process that forked
    await loop.create_unix_connection(lambda: client, sock=front)    # an EngineClient

Python runs one thread of a process at a time, so HTTP in the engine's process would take its time
from every step. Worker is the half that computes; EngineClient is how serve.py, the half that
speaks HTTP, reaches it. Each message between them calls one method of the other side, whose name
comes first: `submit`, `read` and `cancel` go in, `deltas` and `failed` come out. A message is four
bytes of length and then plain values in `marshal`, the interpreter's own format.
"""

import asyncio
import contextlib
import gc
import itertools
import marshal
import os
import select
import signal
import socket
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from common import UserError
from engine.sampler import Sampling
from engine.scheduler import Delta, TokenLogprob
from server.api import Refusal
from server.door import Gatherer, log_line

PULSE_SECONDS = 1.0  # after which an engine without work says that it lives
SILENT_SECONDS = 30.0  # after which one that says nothing counts as hung
LONG_WAIT = 1.0  # seconds between two steps that are told in the log
PAUSE = 0.005  # seconds between two messages to the other half, at least, while there is work


def message(*values):
    """Plain values -> the bytes that carry them."""
    try:
        data = marshal.dumps(values)
    except ValueError as error:
        raise UserError(f"this is nested too deeply ({error})") from None
    return len(data).to_bytes(4, "little") + data


def deliver(data, buffer, receiver):
    """Call the receiver's methods that the messages in buffer + data ask for; what is not whole
    stays in the buffer, a bytearray."""
    buffer += data
    while len(buffer) >= 4:
        end = 4 + int.from_bytes(buffer[:4], "little")
        if len(buffer) < end:
            return
        what, *values = marshal.loads(buffer[4:end])
        del buffer[:end]
        getattr(receiver, what)(*values)


def plain_logprobs(logprobs):
    """A list of TokenLogprob as (id, logprob, [(id, logprob) of the likeliest]), which marshal
    takes."""
    return [(token.id, token.logprob, token.top) for token in logprobs]


# ---------------------------------------------------------------------------- the engine's process
class FairQueue:
    """What waits, each a tuple that begins with its request's number and key. Keys take turns, so
    that no key's thousand requests stand before another one's first."""

    def __init__(self):
        self.lines = {}  # {key: deque of its requests}, the key whose turn it is first

    def __bool__(self):
        return bool(self.lines)

    def push(self, *request):
        self.lines.setdefault(request[1], deque()).append(request)

    def pop(self):
        key = next(iter(self.lines))
        line = self.lines.pop(key)
        request = line.popleft()
        if line:
            self.lines[key] = line  # as the last of all keys
        return request

    def cancel(self, number):
        for key, line in list(self.lines.items()):
            self.lines[key] = deque(request for request in line if request[0] != number)
            if not self.lines[key]:
                del self.lines[key]


class Worker:
    """Owns the engine: nobody else calls it. Each turn takes orders, admits requests, computes one
    step and a chunk of a text to be read, and tells what there is to tell."""

    def __init__(self, engine, sock, concurrency):
        self.engine = engine
        self.sock = sock
        self.concurrency = concurrency
        self.buffer = bytearray()  # of orders
        # A request is (number, key, prompt, fields of Sampling, adapter, what binds its answer: a
        # grammar, then the future of its Constraint, or None).
        self.grammars = FairQueue()  # of requests whose grammar is not built yet
        self.building = None  # one of them, with its future
        self.waiting = FairQueue()  # of requests for tokens
        self.texts = FairQueue()  # that are only to be read: (number, key, index, ids, count)
        self.reading = None  # (number, index, the generator of Engine.read) of one of them
        self.unfinished = {}  # {number of a request in the engine: answers still being made}
        self.silent = set()  # numbers of those whose first token is not out
        self.admitted = []  # (number, when), not told yet
        self.outbox = {}  # {(number, answer): Delta}, not told yet
        self.urgent = set()  # names of those in it that go out with the next message
        self.last_message = 0.0  # when it went out
        self.last_flush = 0.0  # when a message had all of the outbox
        self.waited = 0.0  # the longest wait between two steps that the log knows
        self.builder = ThreadPoolExecutor(1, "grammar")
        self.vocabulary = None  # of grammars, once there is one

    def run(self):
        """Work until the other half is gone. An engine that fails is unusable from then on:
        everybody hears that nothing more will come, and the log why. The engine has seen ids and no
        texts; but its error may name files, and /health needs no key."""
        try:
            self.tell(self.outbox)
            while self.take_orders():
                self.admit()
                if self.engine.has_work:
                    self.collect(self.engine.step())
                else:
                    self.tell(self.outbox)
                self.read_on()
        except ConnectionError:
            pass
        except Exception as error:
            log_line({"event": "engine_failed", "error": f"{type(error).__name__}: {error}"})
            self.send("failed", "the engine failed: the server's log says why")
        self.log_wait(self.engine.stats(), 0)
        self.builder.shutdown(wait=False, cancel_futures=True)
        self.sock.close()

    def send(self, *values):
        self.sock.sendall(message(*values))

    def log_wait(self, stats, at_least):
        """Say how long there was no step though there was work, where that is a new record."""
        longest = stats["longest_wait"]
        if longest > max(self.waited, at_least):
            log_line({"event": "longest_wait_between_steps", "seconds": round(longest, 3)})
            self.waited = longest

    # -- orders come in
    def idle_seconds(self):
        """How long there is nothing to do but to wait for orders."""
        if self.engine.has_work or self.waiting or self.texts or self.reading:
            return 0
        return 0.005 if self.building else PULSE_SECONDS

    def take_orders(self):
        """Do what was asked for -> False once nobody can ask any more."""
        if not select.select([self.sock], [], [], self.idle_seconds())[0]:
            return True
        data = self.sock.recv(1 << 18)
        deliver(data, self.buffer, self)
        return bool(data)

    def submit(self, *request):
        queue = self.grammars if request[-1] else self.waiting
        queue.push(*request)

    def read(self, number, key, texts, count):
        for index, ids in enumerate(texts):
            self.texts.push(number, key, index, ids, count)

    def cancel(self, number):
        """Take a request out of the queue, or out of the engine, whose blocks are free at once."""
        self.silent.discard(number)
        if self.unfinished.pop(number, None):
            self.engine.cancel(number)
        for queue in (self.grammars, self.waiting, self.texts):
            queue.cancel(number)
        if self.reading and self.reading[0] == number:
            self.reading = None
        if self.building and self.building[0] == number:
            self.building[-1].cancel()  # unless the thread is at it: the next one waits for that
            self.building = None

    def constraint(self, kind, *what):
        """("regex", pattern), or ("json", (schema, and perhaps the texts before and after it), ...)
        of which the answer is one -> Constraint"""
        from engine.grammar import Constraint, Vocabulary, json_grammar, regex_grammar

        self.vocabulary = self.vocabulary or Vocabulary(self.engine.tok)
        if kind == "regex":
            grammar = regex_grammar(*what)
        else:
            grammar = " | ".join(json_grammar(*choice) for choice in what)
        return Constraint(grammar, self.vocabulary)

    def build_on(self):
        """A grammar may take seconds, so a thread builds it while all else goes on: one at a time,
        so that keys take turns here too."""
        if self.building and self.building[-1].done():
            self.waiting.push(*self.building)
            self.building = None
        if self.grammars and not self.building:
            *request, grammar = self.grammars.pop()
            self.building = *request, self.builder.submit(self.constraint, *grammar)

    def admit(self):
        """Move requests from the queue to the engine."""
        self.build_on()
        while self.waiting and len(self.unfinished) < self.concurrency:
            number, _, prompt, fields, adapter, future = self.waiting.pop()
            try:
                sampling = Sampling(**fields)
                if future and future.exception():
                    raise UserError(str(future.exception()))
                if future:
                    sampling.constraint = future.result()
                self.engine.submit(prompt, sampling, number, adapter)
                self.unfinished[number] = sampling.n
                self.silent.add(number)
                self.admitted.append((number, time.monotonic()))
            except UserError as error:
                self.outbox[number, 0] = Delta(number, 0, finish_reason="error", error=str(error))

    def read_on(self):
        """Read a chunk of the text whose turn it is: nobody's next token waits for more than that.
        What comes of it goes out at once, as the logprobs of a Delta with the text's index."""
        if not self.reading:
            if not self.texts:
                return
            number, _, index, ids, count = self.texts.pop()
            self.reading = number, index, self.engine.read(ids, count)
            if index == 0:
                self.admitted.append((number, time.monotonic()))
        number, index, parts = self.reading
        delta = Delta(number, index)
        try:
            delta.logprobs = next(parts)
        except StopIteration:
            delta.finish_reason = "stop"
        except Exception as error:  # a text too long for the memory is its own request's fault
            delta.finish_reason = "error"
            delta.error = str(error)
        if delta.finish_reason:
            self.reading = None
        self.outbox[number, index] = delta
        self.tell([(number, index)])

    # -- answers go out
    def collect(self, deltas):
        """Keep deltas until it is time to tell them.

        Several steps' tokens of an answer go out as one, more often than an eye can tell; the more
        streams there are, the more, as what the other half does with them costs the machine time.
        A first token and an end wait for nothing but the pause: a message costs both processes a
        turn, and a small model's steps are shorter than that."""
        for delta in deltas:
            number = delta.request_id
            name = number, delta.index
            if number not in self.unfinished:
                continue  # it was cancelled
            if delta.finish_reason:
                delta.text = delta.text.removesuffix("\ufffd")  # a character that did not end
                self.unfinished[number] -= 1
                if self.unfinished[number] == 0:
                    del self.unfinished[number]
            if name in self.outbox:
                self.outbox[name].add(delta)
            else:
                self.outbox[name] = delta
            if delta.finish_reason or number in self.silent:
                self.silent.discard(number)
                self.urgent.add(name)
        now = time.monotonic()
        if now - self.last_flush >= min(PAUSE * len(self.unfinished), 0.05):
            self.last_flush = self.last_message = now
            self.tell(self.outbox)
        elif self.urgent and now - self.last_message >= PAUSE:
            self.last_message = now
            self.tell(self.urgent)

    def tell(self, names):
        """Send what these answers have got, and how the engine is."""
        items = []
        for name in list(names):
            delta = self.outbox.pop(name)
            self.urgent.discard(name)
            if delta.logprobs and isinstance(delta.logprobs[0], TokenLogprob):
                delta.logprobs = plain_logprobs(delta.logprobs)
            items.append(list(vars(delta).values()))  # in the order in which Delta takes them
        stats = self.engine.stats() | {"active": len(self.unfinished) + bool(self.reading)}
        self.log_wait(stats, LONG_WAIT)
        self.send("deltas", stats, self.admitted, items)
        self.admitted = []


def fork_front(engine, concurrency):
    """Fork. This process goes on as the engine's, and ends here when the other one has. The new
    one returns, to speak HTTP, with its end of the socket; it has the tokenizer and all else in
    memory, and never computes."""
    front, back = socket.socketpair()
    with warnings.catch_warnings():
        # Python warns of threads: they are the engine's, they wait, and the child needs none.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        back.close()
        os.setpgrp()  # Ctrl-C reaches the first process, which passes it on
        with contextlib.suppress(OSError):
            cores = os.sched_getaffinity(0)
            if len(cores) > 1:  # one is left to the engine's own thread, for which all others wait
                os.sched_setaffinity(0, cores - {min(cores)})
            os.nice(10)  # a step comes first
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return front
    front.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    Worker(engine, back, concurrency).run()
    gc.unfreeze()  # or triton's bindings count what was never freed, and say so
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


# ------------------------------------------------------------------------------ the side of HTTP
class Inbox:
    """Holds what has come for a request until its one task takes it. It is a list and a future,
    because asyncio.Queue with a time limit costs a task a token."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.items = []
        self.waiter = None

    def put(self, *items):
        self.items += items
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self, seconds):
        """Everything that is there; [] if nothing comes in so many seconds."""
        if not self.items:
            self.waiter = self.loop.create_future()
            timer = self.loop.call_later(seconds, self.put)
            await self.waiter
            timer.cancel()
        items = self.items
        self.items = []
        return items


@dataclass(eq=False)
class Job:
    """Follows one prompt, or all texts that a request has read, on the way through the engine. The
    jobs of a request share an inbox."""

    key: str  # whose it is: keys take turns
    prompt_tokens: int
    unfinished: int  # answers, which end each for itself
    inbox: Inbox  # of Delta, or of a Refusal
    offset: int = 0  # answers of the request's earlier prompts
    number: int | None = None  # its name in the engine, once it is submitted
    created: float = field(default_factory=time.monotonic)
    admitted: float = 0.0  # when it left the queue
    first: float = 0.0  # when its first token came
    tokens: int = 0
    reason: str = "abort"  # why it ended


class EngineClient(asyncio.Protocol):
    """Sends orders to the Worker and takes its answers; nothing here waits for a step."""

    def __init__(self):
        self.numbers = itertools.count()
        self.jobs = {}  # {number: Job}
        self.buffer = bytearray()
        self.transport = None
        self.stats = {}  # the engine's, as they last came
        self.broken = "not serving"  # why there is no engine, or None
        self.lost = False  # the engine's process is gone
        self.heard = time.monotonic()  # when something last came from it

    def connection_made(self, transport):
        # Orders of one turn go out together: a system call each would cost more than they do.
        self.transport = Gatherer(transport)
        self.broken = None

    def connection_lost(self, error):
        self.lost = True
        self.failed("the engine's process is gone")

    def data_received(self, data):
        deliver(data, self.buffer, self)

    # -- orders go out
    def send(self, job, what, *request):
        """what: "submit" or "read", as of Worker"""
        job.number = next(self.numbers)
        self.transport.write(message(what, job.number, job.key, *request))
        self.jobs[job.number] = job

    def close(self, job):
        """A job is over, in whatever way: what is left of it goes out of the engine."""
        known = self.jobs.pop(job.number, None)
        if known and job.unfinished and not self.broken:
            self.transport.write(message("cancel", job.number))

    # -- answers come in
    def deltas(self, stats, admitted, items):
        now = time.monotonic()
        self.stats = stats
        self.heard = now
        for number, when in admitted:
            if number in self.jobs:
                self.jobs[number].admitted = when
        for fields in items:
            delta = Delta(*fields)
            job = self.jobs.get(delta.request_id)
            if job is None:
                continue  # it was closed
            job.tokens += len(delta.token_ids)
            if delta.token_ids and not job.first:
                job.first = now
            if delta.finish_reason:
                job.unfinished -= 1
                if job.unfinished == 0 or delta.error:
                    job.reason = delta.finish_reason
            delta.index += job.offset
            job.inbox.put(delta)

    def failed(self, why):
        self.broken = self.broken or why
        for job in self.jobs.values():
            job.inbox.put(Refusal(503, self.broken))

    def hangs(self):
        return time.monotonic() - self.heard > SILENT_SECONDS

    def queue_length(self):
        return max(0, len(self.jobs) - self.stats.get("active", 0))
