"""Every attack we know at once, beside 16 honest streams, on a server of its own.

    python tests/soak.py --seconds 600

Prints, and exits with 1 unless: no honest request fails; the 99th percentile of their gaps between
tokens is at most three times what it is without attackers; and soon after the attackers have left,
both processes' memory is within a tenth of what it was after a first, short round of attacks, and
their descriptors are as many as before any.
"""

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STREAMS = 16
KEYS = {"honest": "key-of-honest", "hostile": "key-of-hostile"}


# ---------------------------------------------------------------------------- the honest clients
async def stream_once(port, gaps):
    """Ask for a stream and read it to its end -> gaps between tokens. Raises for any other end."""
    body = json.dumps(
        {"prompt": "the quick", "max_tokens": 100, "ignore_eos": True, "stream": True}
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: application/json\r\nAuthorization: Bearer {KEYS['honest']}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Connection: close\r\n\r\n{body}".encode())
    text, last = b"", None
    while part := await asyncio.wait_for(reader.read(65536), 60):
        text += part
        now = time.monotonic()
        if last:
            gaps.append(now - last)
        last = now
    writer.close()
    whole = text.startswith(b"HTTP/1.1 200") and b'"finish_reason":"length"' in text
    if not whole or b"data: [DONE]" not in text:
        raise RuntimeError(f"an honest request failed: {text[:300]!r} ... {text[-300:]!r}")


async def honest_clients(port, seconds):
    """-> the 99th percentile of all gaps between tokens, in seconds, and how many streams ended"""
    gaps, ended = [], 0
    end = time.monotonic() + seconds

    async def client():
        nonlocal ended
        while time.monotonic() < end:
            await stream_once(port, gaps)
            ended += 1

    await asyncio.gather(*(client() for _ in range(STREAMS)))
    gaps.sort()
    return gaps[len(gaps) * 99 // 100], ended


# ---------------------------------------------------------------------------- the attackers
def connect(port):
    """A socket that comes from another address than the honest ones."""
    return socket.create_connection(("127.0.0.1", port), 10, ("127.0.0.2", 0))


def request(path, body, key=KEYS["hostile"], more=""):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def ask(port, data, patience):
    """Send a request, read for so many seconds at most, and leave."""
    with connect(port) as s:
        s.sendall(data)
        s.settimeout(patience)
        end = time.monotonic() + patience
        while s.recv(1 << 20) and time.monotonic() < end:
            pass


def drip(port, head, piece, pause):
    with connect(port) as s:
        s.sendall(head)
        for _ in range(1000):
            s.sendall(piece)
            time.sleep(pause)


def unread(port, data, seconds):
    """Send all the time and read nothing."""
    with connect(port) as s:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            s.sendall(data)


def hold(port, data, count, seconds):
    """Keep many connections that do nothing."""
    held = []
    with contextlib.suppress(OSError):
        for _ in range(count):
            held.append(connect(port))
            held[-1].sendall(data)
    time.sleep(seconds)
    for s in held:
        s.close()


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
TEXTS = ["the quick brown fox " * 10] * 128
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
LONG = {"prompt": "the", "max_tokens": 200, "ignore_eos": True, "n": 16}
BOMBS = [
    (CHAT, b'{"messages": [' + b"1," * 900_000 + b"1]}"),
    (EMBEDDINGS, b'{"input": [' + b"{}," * 40_000 + b"{}]}"),
    (EMBEDDINGS, b'{"input": [[' + b'"a",' * 450_000 + b"1]]}"),
    (CHAT, b'{"messages": ' + b"[" * 900_000),
]
GRAMMARS = [
    {"prompt": "a", "regex": ".{0,1000}[x].{0,990}"},
    {"prompt": "a", "regex": "(((?:){1000}){1000}){1000}"},
]
SCHEMA = {"type": "integer"}
for _ in range(12):
    SCHEMA = {"anyOf": [SCHEMA, SCHEMA]}
GRAMMARS.append(
    {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
)
ATTACKS = {
    "trailers": lambda port: unread(port, CHUNKED + b"0\r\n" + b"x-1: y\r\n" * 8192, 5),
    "a trailer's name": lambda port: drip(port, CHUNKED + b"0\r\n", b"x" * 65536, 0),
    "pipelines": lambda port: unread(port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 2000, 5),
    "slow heads": lambda port: drip(port, b"POST / HTTP/1.1\r\n", b"x", 0.5),
    "slow bodies": lambda port: drip(port, request(COMPLETIONS, b" " * 999)[:-999], b" ", 0.5),
    "bodies after an error": lambda port: drip(port, CHUNKED, b"1\r\nx\r\n", 0.01),
    "large bodies": lambda port: ask(port, request(CHAT, b" " * 8_000_000), 2),
    "idle connections": lambda port: hold(port, b"", 450, 5),
    "unread streams": lambda port: hold(port, request(COMPLETIONS, LONG | {"stream": True}), 2, 5),
    "leaving": lambda port: ask(port, request(COMPLETIONS, LONG), random.random() / 5),
    "wrong keys": lambda port: ask(
        port, request(COMPLETIONS, LONG, "guess", "Connection: close\r\n"), 2
    ),
    "garbage": lambda port: ask(port, random.randbytes(4000), 0.1),
    "bombs": lambda port: ask(port, request(*random.choice(BOMBS)), 1),
    "embeddings": lambda port: ask(port, request(EMBEDDINGS, {"input": TEXTS}), 1),
    "echoes": lambda port: ask(
        port,
        request(COMPLETIONS, {"prompt": TEXTS, "echo": True, "logprobs": 5, "max_tokens": 0}),
        1,
    ),
    "logprobs": lambda port: ask(port, request(COMPLETIONS, LONG | {"logprobs": 20}), 3),
    "grammars": lambda port: ask(port, request(COMPLETIONS, random.choice(GRAMMARS)), 1),
}


def attack(port, seconds, names):
    """All of them, two clients each, until the time is over."""
    os.nice(19)  # they are other machines, whose work is not this one's
    end = time.monotonic() + seconds
    done = dict.fromkeys(names, 0)

    def client(name):
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                ATTACKS[name](port)
            done[name] += 1
            time.sleep(0.02)

    for name in 2 * list(names):
        threading.Thread(target=client, args=(name,), daemon=True).start()
    time.sleep(seconds)
    print("attacks:", ", ".join(f"{name} {count}" for name, count in done.items()), flush=True)
    os._exit(0)


# ---------------------------------------------------------------------------- the server
def make_model(folder):
    from chat import CHATML_TEMPLATE
    from model import Config, Transformer
    from tokenizer import Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = Tokenizer.train(
        ["the quick brown fox jumps over the lazy dog"], 270, special_tokens=special
    )
    tok.chat_template = CHATML_TEMPLATE
    tok.save(folder)
    ends = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id}
    Transformer(Config("qwen3", tok.vocab_size, 64, 128, 2, 4, 2, 16, 512, **ends)).save_pretrained(
        folder
    )


def state(child):
    """-> (bytes of memory, descriptors) of both processes, the second of which speaks HTTP"""
    front = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0]
    both = [Path(f"/proc/{pid}") for pid in (child.pid, front)]
    pages = sum(int((p / "statm").read_text().split()[1]) for p in both)
    return pages * os.sysconf("SC_PAGE_SIZE"), sum(len(os.listdir(p / "fd")) for p in both)


def settled(child, files, memory):
    """-> the state once it is within these bounds, or after a minute: the server lets an idle
    connection live for half of one."""
    for _ in range(60):
        time.sleep(1)
        now = state(child)
        if now[0] < memory and now[1] <= files:
            break
    return now


def attacked(port, seconds, names):
    """What the honest clients find while all attacks go on."""
    spawn = multiprocessing.get_context("spawn")
    attackers = spawn.Process(target=attack, args=(port, seconds, names))
    attackers.start()
    found = asyncio.run(honest_clients(port, seconds))
    attackers.join(30)
    return found


def soak(port, child, seconds, names):
    """-> what was not as it should be"""
    alone, _ = asyncio.run(honest_clients(port, max(seconds / 5, 5)))
    _, files = state(child)
    # What the first of each attack loads (llguidance, the vocabulary's tree) or makes of the
    # allocators' arenas stays: a leak is what grows from then on.
    attacked(port, max(seconds / 5, 20), names)
    memory, _ = settled(child, files, math.inf)
    beside, ended = attacked(port, seconds, names)
    most, _ = state(child)
    after, left = settled(child, files, memory * 1.1)
    again, _ = asyncio.run(honest_clients(port, max(seconds / 5, 5)))
    alone = max(alone, again)  # the machine may have got other work meanwhile
    print(f"{ended} honest streams; p99 gap alone {alone:.3f} s, attacked {beside:.3f} s")
    print(f"memory {memory / 1e6:.0f} MB, attacked {most / 1e6:.0f}, after {after / 1e6:.0f}")
    print(f"descriptors {files}, after {left}")
    bounds = {"gaps": beside <= 3 * alone, "memory": after <= memory * 1.1, "files": left <= files}
    return [what for what, held in bounds.items() if not held]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long the attack lasts")
    parser.add_argument("--without", default="", help="attacks to leave out, apart by commas")
    args = parser.parse_args()
    names = [name for name in ATTACKS if name not in args.without.split(",")]
    keys = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        log = Path(folder, "log").open("w")
        command = [sys.executable, ROOT / "serve.py", folder, "--port", "0", "--timeout", "60"]
        environment = {**os.environ, "LLM_API_KEYS": keys}
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        try:
            ready = next(line for line in child.stdout if line.startswith("ready"))
            port = int(ready.split()[1].rsplit(":", 1)[1])
            failed = soak(port, child, args.seconds, names)
        finally:
            child.terminate()
            child.wait(60)
        text = Path(folder, "log").read_text()
    if "Traceback" in text or '"status":500' in text:
        failed.append("log")
        print(text[-3000:])
    print("failed: " + ", ".join(failed) if failed else "held")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
