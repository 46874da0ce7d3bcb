"""Programs that time the same work on one GPU: all compile side by side, then each runs alone."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
OURS = "ours"


@dataclass
class Timing:
    """A program and what it times. A peer's command takes a file for its figures at the end."""

    program: str  # whose it is
    command: str
    figures: Any  # a row -> {work: figure}
    compile: str = ""  # a command that compiles what it needs, in the background with others
    gib: int = 8  # of the card's memory that compiling takes
    seconds: int = 90  # that it may take, once all is compiled
    sources: str | None = None  # the folder that it needs, "" where that is not given

    def fault(self):
        """Why it cannot run, or None."""
        if self.sources == "":
            return "not at hand: give the folder of its sources"
        if self.sources and not Path(self.sources, "model.py").is_file():
            return f"{self.sources} has no model.py, so these are not its sources"


def train_figures(row):
    """Of `bench.py pretrain`: a row of ours or of nanoGPT's, or one of where the time goes."""
    name = row.get("name", "")
    if not name.startswith("ours"):
        return {}
    return {f"{row['arch']} 124M, {row['passes']} passes a step: tok/s": row["tokens_per_s"]}


def nanogpt_figures(row):
    name = row.get("name", "")
    return train_figures(row | {"name": "ours"}) if name.startswith("nanoGPT") else {}


def decode_figures(row):
    figures = {}
    for column in ("1 text", "8 texts", "prompt of 512"):
        if column in row:
            figures[f"7b {row['program']}, {column}: tok/s"] = row[column]
    return figures


def request_figures(row):
    figures = {f"256 requests, {row['program']}: tok/s": row["tokens_per_s"]}
    if "longest_wait" in row:
        figures[f"256 requests, {row['program']}: longest s between steps"] = row["longest_wait"]
    return figures


def kernel_figures(row):
    if "us" not in row:
        return {"memory, read: GB/s": row["gb_per_s"]}
    return {f"{row['group']}, {row['name']}: of reading": row["of_read"]}


def char_figures(row):
    return {"10.7M characters: s to nanoGPT's loss": row["reached"]}


def qlora_figures(row):
    name = f"QLoRA 7b, {row['base']}"
    return {f"{name}: tok/s": row["tokens_per_s"], f"{name}: peak GiB": row["peak_gib"]}


def timings(nanogpt="", gptfast=""):
    """What is timed, in this order; nanogpt, gptfast: folders of their sources."""
    pretrain = "bench.py pretrain --ways compiled"
    gpt2 = f"{pretrain} --arch gpt2"
    beside = f"{gpt2} --nanogpt {shlex.quote(nanogpt)}"
    few = "--steps 2 --passes 1"
    continuous = "-m peers.continuous_batching qwen3-0.6b"
    decode = "bench.py decode 7b --rounds 1 --formats bfloat16 int8 int4"
    requests = "bench.py throughput qwen3-0.6b --low 100 --high 1024 --requests"
    char = "shakespeare-char-10m"
    few_steps = f"train.py --preset {char} --out {tempfile.gettempdir()}/{char} --steps 3"
    planned = [
        Timing(OURS, pretrain, train_figures, f"{pretrain} {few}", 24),
        Timing(OURS, gpt2, train_figures, f"{gpt2} {few}", 24),
        Timing("nanoGPT", beside, nanogpt_figures, f"{beside} {few}", 24, sources=nanogpt),
        Timing(OURS, decode, decode_figures, decode, 40, seconds=150),
    ]
    for kind, gib in (("bfloat16", 15), ("int8", 9), ("int4", 6)):
        fast = f"-m peers.gpt_fast {shlex.quote(gptfast)} {kind}"
        planned.append(Timing("gpt-fast", fast, decode_figures, fast, gib, sources=gptfast))
    return [
        *planned,
        Timing(OURS, f"{requests} 256", request_figures, f"{requests} 16", 40, seconds=120),
        Timing("transformers", continuous, request_figures, continuous, 40),
        Timing(OURS, "bench.py kernels", kernel_figures, "bench.py kernels"),
        Timing(OURS, f"bench.py train --presets {char} --target 1.4697", char_figures, few_steps),
        Timing(OURS, "bench.py qlora --shape 7b", qlora_figures, gib=20),
    ]


# ----------------------------------------------------------------------------------------- running
def last_words(path):
    lines = Path(path).read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no word")[:160]


def compile_all(todo, free_gib, deadline, folder):
    """Run what compiles, as many at once as the card has room for. What a program chooses while
    others keep the card busy does not count: it lands in a cache that is thrown away."""
    waiting = [timing for timing in todo if timing.compile]
    running = []
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    while (waiting or running) and time.monotonic() < deadline:
        used = sum(timing.gib for timing, _ in running)
        if waiting and (not running or used + waiting[0].gib <= free_gib):
            timing = waiting.pop(0)
            command = [sys.executable, *shlex.split(timing.compile)]
            nowhere = subprocess.DEVNULL
            child = subprocess.Popen(
                command, cwd=HERE, env=environment, stdout=nowhere, stderr=nowhere
            )
            running.append((timing, child))
            continue
        time.sleep(0.2)
        running = [(timing, child) for timing, child in running if child.poll() is None]
    for _, child in running:
        child.kill()
        child.wait()


def run_timing(timing, seconds, folder):
    """-> {work: figure}. RuntimeError, with the last line that the program said, if it fails."""
    file = Path(folder, "figures.json")
    file.unlink(missing_ok=True)
    log = Path(folder, "log")
    with open(log, "w") as said, contextlib.suppress(subprocess.TimeoutExpired):
        command = [sys.executable, *shlex.split(timing.command)]
        command += ["--json"] * (timing.program == OURS) + [str(file)]
        done = subprocess.run(command, cwd=HERE, stdout=said, stderr=said, timeout=seconds)
        if done.returncode == 0 and file.exists():
            figures = {}
            for row in json.loads(file.read_text())["rows"]:
                figures |= timing.figures(row)
            return figures
        raise RuntimeError(f"status {done.returncode}: {last_words(log)}")
    raise RuntimeError(f"stopped after {seconds:.0f} s: {last_words(log)}")


def measure(todo, free_gib, minutes):
    """-> (the figures of all programs, {work: {program: figure}}; (program, command, why) of those
    that failed)."""
    deadline = time.monotonic() + 60 * minutes
    table, failed = {}, []
    begin = time.monotonic()

    def say(what):
        print(f"[{time.monotonic() - begin:4.0f} s] {what}", file=sys.stderr, flush=True)

    able = [timing for timing in todo if timing.fault() is None]
    for timing in todo:
        if timing.fault():
            failed.append((timing.program, timing.command, timing.fault()))
    with tempfile.TemporaryDirectory() as folder:
        say(f"compiling for {len(able)} programs side by side")
        compile_all(able, free_gib, begin + 60 * minutes * 0.35, folder)
        for timing in able:
            say(f"{timing.program}: {timing.command}")
            seconds = min(timing.seconds, deadline - time.monotonic())
            try:
                if seconds < 5:
                    raise RuntimeError(f"no time is left of {minutes} minutes")
                for work, figure in run_timing(timing, seconds, folder).items():
                    table.setdefault(work, {})[timing.program] = figure
            except RuntimeError as error:
                failed.append((timing.program, timing.command, str(error)))
    return table, failed


def rows_of(table):
    """{work: {program: figure}} -> rows: ours, and of each peer its figure and ours over it."""
    for work, figures in table.items():
        ours = figures.get(OURS)
        peers = {name: figure for name, figure in figures.items() if name != OURS}
        for name, figure in (peers or {"": None}).items():
            ratio = ours / figure if ours and figure else None
            yield dict(work=work, ours=ours, peer=name, theirs=figure, ours_over_theirs=ratio)
