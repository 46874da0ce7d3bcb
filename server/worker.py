"""The engine behind a socket: Worker, the half of the server that computes, and EngineClient, through which serve.py, the half
that speaks HTTP, reaches it.

    front, back = socket.socketpair()
    Worker(engine, back, concurrency=64).run()      # in a thread, or in the process that forked the other half
    await loop.create_unix_connection(lambda: client, sock=front)

Python runs one thread of a process at a time, so HTTP in the engine's process would take its time from every step. Orders
come in and answers go out as messages: four bytes of length, then plain values in `marshal`, the interpreter's own format.

    submit number, key, prompt ids, fields of Sampling, adapter, grammar      cancel number      call number, what, arguments
    deltas stats, [(number, when it was admitted, then the fields of a Delta)]      result number, value, error      failed why
"""

import asyncio
import itertools
import json
import marshal
import os
import socket
import sys
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import UserError
from engine.grammar import Constraint, Vocabulary, json_grammar, regex_grammar
from engine.sampler import Sampling
from engine.scheduler import Delta, TokenLogprob
from server.api import Refusal


def message(*values):
    """Plain values -> the bytes that carry them."""
    try:
        data = marshal.dumps(values)
    except ValueError as error:
        raise UserError(f"this is nested too deeply ({error})") from None
    return len(data).to_bytes(4, "little") + data


def messages(buffer):
    """The whole messages at the front of a bytearray, which they leave."""
    while len(buffer) >= 4 and len(buffer) >= (end := 4 + int.from_bytes(buffer[:4], "little")):
        values = marshal.loads(bytes(buffer[4:end]))
        del buffer[:end]
        yield values


def plain(logprobs):
    """[TokenLogprob] as tuples."""
    return [(t.id, t.logprob, t.top) for t in logprobs]


class Grammars:
    """Grammars by what they were made of, kept because their automata learn as they go, and the vocabulary they share."""

    def __init__(self, tok):
        self.tok, self.vocabulary, self.kept = tok, None, OrderedDict()

    def constraint(self, kind, *what):
        """("regex", pattern), or ("json", schema or None, and perhaps the text before and after) -> Constraint."""
        self.vocabulary = self.vocabulary or Vocabulary(self.tok)
        name = json.dumps([kind, what], sort_keys=True)
        grammar = self.kept.get(name)
        if (
            grammar is None or len(grammar.masks) * self.tok.vocab_size > 5e7
        ):  # what it learned is 200 MB: forget
            grammar = (regex_grammar if kind == "regex" else json_grammar)(*what)
            Constraint(
                grammar, self.vocabulary
            ).needs()  # the first mask here, not between two steps of the engine
            self.kept[name] = grammar
            while len(self.kept) > 64:
                self.kept.popitem(last=False)
        return Constraint(grammar, self.vocabulary)


@dataclass
class Active:
    """A request in the engine."""

    unfinished: int  # answers still being made
    admitted: float  # when it left the queue
    begun: bool = False  # its first token is out


class Worker:
    """Owns the engine: nobody else calls it. Each turn: orders, admission, one step, what there is to tell."""

    def __init__(self, engine, sock, concurrency):
        self.engine, self.sock, self.concurrency, self.buffer = (
            engine,
            sock,
            concurrency,
            bytearray(),
        )
        self.waiting, self.active = (
            OrderedDict(),
            {},
        )  # {key: its requests in order}, {number: Active}
        self.outbox, self.sent = (
            {},
            0.0,
        )  # {(number, answer): what it gets}, when all of it last went out
        self.grammars, self.builder, self.lock = (
            Grammars(engine.tok),
            ThreadPoolExecutor(1, "grammar"),
            threading.Lock(),
        )
        self.machine, self.looked = {}, 0.0

    def run(self):
        """Until the other half is gone. If the engine fails it is unusable from then on, and everybody hears why."""
        try:
            self.tell()
            while self.take_orders(wait=not (self.engine.has_work or self.waiting)):
                self.admit()
                if self.engine.has_work:
                    self.collect(self.engine.step())
                else:
                    self.tell()
        except ConnectionError:
            pass
        except Exception as error:
            why = f"the engine failed: {type(error).__name__}: {error}"
            print(json.dumps({"event": "engine_failed", "error": why}), file=sys.stderr, flush=True)
            self.send("failed", why)
        self.builder.shutdown(wait=False, cancel_futures=True)

    def send(self, *values):
        with self.lock:
            self.sock.sendall(message(*values))

    # -- orders come in
    def take_orders(self, wait):
        """Do what was asked for -> False once nobody can ask any more."""
        try:
            data = self.sock.recv(1 << 18, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        self.buffer += data
        for what, *values in messages(self.buffer):
            getattr(self, what)(*values)
        return bool(data)

    def submit(self, number, key, *request):
        self.waiting.setdefault(key, deque()).append((number, *request))

    def cancel(self, number):
        """Out of the queue, or out of the engine, whose blocks are free at once."""
        self.outbox = {name: item for name, item in self.outbox.items() if name[0] != number}
        if self.active.pop(number, None):
            self.engine.cancel(number)
        for key, line in list(self.waiting.items()):
            self.waiting[key] = deque(request for request in line if request[0] != number)
            if not self.waiting[key]:
                del self.waiting[key]

    def call(self, number, what, *values):
        """A grammar takes up to a second: it is built in a thread of its own, and all else goes on."""
        if what == "grammar":
            self.builder.submit(self.answer, number, what, values)
        else:
            self.answer(number, what, values)

    def answer(self, number, what, values):
        result = error = None
        try:
            if what == "embed":
                result = self.engine.embed(*values)
            elif what == "prompt_logprobs":
                result = plain(self.engine.prompt_logprobs(*values))
            else:
                self.grammars.constraint(*values)  # it stays here, under what it was made of
        except Exception as e:
            error = isinstance(e, UserError), str(e) if isinstance(e, UserError) else repr(e)
        self.send("result", number, result, error)

    def admit(self):
        """From the queue to the engine, one key after the other, so that no key's thousand requests stand before another's one."""
        while self.waiting and len(self.active) < self.concurrency:
            key, line = self.waiting.popitem(last=False)
            number, prompt, fields, adapter, grammar = line.popleft()
            if line:
                self.waiting[key] = line  # to the end of the line
            try:
                sampling = Sampling(
                    **{
                        **fields,
                        "constraint": self.grammars.constraint(*grammar) if grammar else None,
                    }
                )
                self.engine.submit(prompt, sampling, request_id=number, adapter=adapter)
                self.active[number] = Active(sampling.n, time.monotonic())
            except UserError as error:
                self.outbox[number, 0] = [number, 0.0, 0, "", [], None, "error", str(error)]
                self.tell([(number, 0)])

    # -- answers go out
    def collect(self, deltas):
        """Several steps' tokens of an answer go out as one, more often than an eye can tell, the more streams the more: what
        the other half does with them costs the machine time. A first token and an end never wait."""
        now, urgent = time.monotonic(), set()
        for d in deltas:
            if (request := self.active.get(d.request_id)) is None:
                continue  # cancelled
            name = d.request_id, d.index
            item = self.outbox.get(name)
            if item is None:
                item = self.outbox[name] = [
                    d.request_id,
                    request.admitted,
                    d.index,
                    "",
                    [],
                    None,
                    None,
                    None,
                ]
            item[3] += d.text
            item[4] += d.token_ids
            if d.logprobs is not None:
                item[5] = (item[5] or []) + plain(d.logprobs)
            if d.finish_reason:
                item[6], item[7] = d.finish_reason, d.error
                request.unfinished -= 1
                if request.unfinished == 0:
                    del self.active[d.request_id]
            if d.finish_reason or not request.begun:
                request.begun = True
                urgent.add(name)
        if now - self.sent >= min(0.005 * len(self.active), 0.05):
            self.tell()
        elif urgent:
            self.tell(urgent)

    def tell(self, names=None):
        """Send what these answers have got, or all have, and the engine's state."""
        now = time.monotonic()
        if names is None:
            items, self.outbox, self.sent = list(self.outbox.values()), {}, now
        else:
            items = [self.outbox.pop(name) for name in names]
        if now - self.looked > 1:
            self.machine, self.looked = machine(), now
        self.send(
            "deltas", {**self.engine.stats(), "active": len(self.active), **self.machine}, items
        )


def machine():
    """What the engine's process and its GPU use, in bytes."""
    memory = gpu = None
    if (statm := Path("/proc/self/statm")).is_file():
        memory = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        gpu = {
            "name": torch.cuda.get_device_name(),
            "allocated": torch.cuda.memory_allocated(),
            "free": torch.cuda.mem_get_info()[0],
        }
    return {"memory": memory, "gpu": gpu}


# -------------------------------------------------------------------------- the end that HTTP holds
NUMBERS = itertools.count()


class Inbox:
    """What has come for a request, whose one task waits for it: a list and a future, for a Queue costs a task a token."""

    def __init__(self):
        self.loop, self.items, self.waiter = asyncio.get_running_loop(), [], None

    def put(self, *items):
        self.items += items
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def get(self, seconds):
        """Everything that is there; [] if nothing comes in so many seconds."""
        if not self.items:
            self.waiter, timer = self.loop.create_future(), self.loop.call_later(seconds, self.put)
            await self.waiter
            timer.cancel()
        items, self.items = self.items, []
        return items


@dataclass(eq=False)
class Job:
    """One prompt on its way through the engine. Its answers arrive in `inbox`, which the jobs of a request share."""

    prompt: list
    sampling: Sampling
    adapter: str | None
    grammar: tuple | None
    key: str  # whose it is: keys take turns
    inbox: Inbox  # of (position, Delta), or of a Refusal
    position: int = 0  # among the prompts of its request
    number: int = field(default_factory=NUMBERS.__next__)
    created: float = field(default_factory=time.monotonic)
    admitted: float = 0.0  # when it left the queue
    first: float = 0.0  # when its first token came
    tokens: int = 0
    unfinished: int = 1
    reason: str = "abort"  # why it ended


class EngineClient(asyncio.Protocol):
    """The way to the Worker: orders go out, answers come in, nothing waits for a step."""

    def __init__(self):
        self.jobs, self.calls, self.buffer, self.transport = {}, {}, bytearray(), None
        self.stats, self.made = {}, deque(maxlen=256)  # made: (time, tokens since the start)
        self.broken, self.lost = "not serving", False

    def connection_made(self, transport):
        self.transport, self.broken = transport, None

    def connection_lost(self, error):
        self.lost = True
        self.failed("the engine's process is gone")

    def data_received(self, data):
        self.buffer += data
        for what, *values in messages(self.buffer):
            getattr(self, what)(*values)

    def submit(self, job):
        self.jobs[job.number] = job
        self.transport.write(
            message(
                "submit",
                job.number,
                job.key,
                job.prompt,
                vars(job.sampling),
                job.adapter,
                job.grammar,
            )
        )

    def close(self, job):
        """It is over, in whatever way: what is left of it goes out of the engine."""
        if self.jobs.pop(job.number, None) and job.unfinished and not self.broken:
            self.transport.write(message("cancel", job.number))

    async def call(self, what, *values):
        """embed, prompt_logprobs or grammar, between two steps."""
        if self.broken:
            raise Refusal(503, self.broken)
        number, future = next(NUMBERS), asyncio.get_running_loop().create_future()
        order = message("call", number, what, *values)
        self.calls[number] = future
        self.transport.write(order)
        return await future

    # -- what comes from the engine
    def deltas(self, stats, items):
        now, self.stats = time.monotonic(), stats
        self.made.append((now, stats["generated_tokens"]))
        for number, admitted, index, text, ids, logprobs, reason, error in items:
            if (job := self.jobs.get(number)) is None:
                continue  # it was closed
            job.admitted, job.first, job.tokens = (
                admitted,
                job.first or (now if ids else 0.0),
                job.tokens + len(ids),
            )
            if reason:
                job.unfinished, job.reason = job.unfinished - 1, reason
            logprobs = logprobs and [TokenLogprob(*t) for t in logprobs]
            job.inbox.put((job.position, Delta(number, index, text, ids, logprobs, reason, error)))

    def result(self, number, value, error):
        future = self.calls.pop(number)
        if future.done():
            return  # nobody waits any more
        if error:
            future.set_exception(UserError(error[1]) if error[0] else RuntimeError(error[1]))
        else:
            future.set_result(value)

    def failed(self, why):
        self.broken = self.broken or why
        for future in self.calls.values():
            future.done() or future.set_exception(Refusal(503, self.broken))
        for job in self.jobs.values():
            job.inbox.put(Refusal(500, self.broken))

    def tokens_per_second(self):
        recent = [pair for pair in self.made if pair[0] > time.monotonic() - 10]
        return (
            (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])
            if len(recent) > 1
            else 0.0
        )
