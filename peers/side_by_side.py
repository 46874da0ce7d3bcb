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

HERE = Path(__file__).resolve().parent.parent
OURS = "ours"
# {column of a program's rows: what is called so in the table, by the row's other columns}
TRAINING = {"tokens_per_s": "{arch} 124M, {passes} passes a step: tok/s"}
DECODING = {
    "gb_per_s": "memory, {memory}: GB/s",
    "1 text": "7b {program}, 1 text: tok/s",
    "8 texts": "7b {program}, 8 texts: tok/s",
    "prompt of 512": "7b {program}, prompt of 512: tok/s",
}
REQUESTS = {
    "tokens_per_s": "256 requests, {program}: tok/s",
    "longest_wait": "256 requests, {program}: longest s between steps",
}
SERVING = {"longest_wait": "64 requests right after ready: longest s between steps"}
KERNEL_SHARES = {"of_read": "{group}, {name}: of reading"}
CHARACTERS = {"reached": "10.7M characters: s to nanoGPT's loss"}
QLORA = {"tokens_per_s": "QLoRA 7b, {base}: tok/s", "peak_gib": "QLoRA 7b, {base}: peak GiB"}


@dataclass
class Timing:
    """A program and what it times. A peer's command takes a file for its figures at the end."""

    program: str  # whose it is
    command: str
    figures: dict  # those of its rows that count, as above
    compile: str = ""  # a command that compiles what it needs, in the background with others
    gib: int = 8  # of the card's memory that compiling takes
    seconds: int = 90  # that it may take, once all is compiled
    folder: str | None = None  # that it needs, "" where that is not given
    file: str = "model.py"  # which must lie there

    def fault(self):
        """Why it cannot run, or None."""
        if self.folder == "":
            return "not at hand: give the folder of its sources"
        if self.folder and not Path(self.folder, self.file).is_file():
            return f"{self.folder} has no {self.file}, so it is not what this needs"

    def read(self, file):
        """The rows that it wrote -> {work: figure}; of works that are called alike the last
        counts, which beside nanoGPT is nanoGPT's and not ours."""
        found = {}
        for row in json.loads(file.read_text())["rows"]:
            for column, work in self.figures.items():
                if column in row:
                    found[work.format(**row)] = row[column]
        return found


def timings(nanogpt="", gptfast="", model="runs/demo-dpo"):
    """What is timed, in this order; nanogpt, gptfast: folders of their sources; model: the folder
    that is served."""
    pretrain = "bench.py pretrain --ways compiled"
    gpt2 = f"{pretrain} --arch gpt2"
    beside = f"{gpt2} --nanogpt {shlex.quote(nanogpt)}"
    few = "--steps 2 --passes 1"
    continuous = "-m peers.continuous_batching qwen3-0.6b"
    decode = "bench.py decode 7b --rounds 1 --formats bfloat16 int8 int4"
    serve = f"bench.py serve {shlex.quote(model)} --requests 64 --concurrency 64 --rounds 1"
    requests = "bench.py throughput qwen3-0.6b --low 100 --high 1024 --requests"
    char = "shakespeare-char-10m"
    few_steps = f"train.py --preset {char} --out {tempfile.gettempdir()}/{char} --steps 3"
    planned = [
        Timing(OURS, pretrain, TRAINING, f"{pretrain} {few}", 24),
        Timing(OURS, gpt2, TRAINING, f"{gpt2} {few}", 24),
        Timing("nanoGPT", beside, TRAINING, f"{beside} {few}", 24, folder=nanogpt),
        Timing(OURS, decode, DECODING, decode, 40, seconds=150),
    ]
    for kind, gib in (("bfloat16", 15), ("int8", 9), ("int4", 6)):
        fast = f"-m peers.gpt_fast {shlex.quote(gptfast)} {kind}"
        planned.append(Timing("gpt-fast", fast, DECODING, fast, gib, folder=gptfast))
    return [
        *planned,
        Timing(OURS, f"{requests} 256", REQUESTS, f"{requests} 16", 40, seconds=120),
        Timing(OURS, serve, SERVING, folder=model, file="config.json"),
        Timing("transformers", continuous, REQUESTS, continuous, 40),
        Timing(OURS, "bench.py kernels", KERNEL_SHARES, "bench.py kernels"),
        Timing(OURS, f"bench.py train --presets {char} --target 1.4697", CHARACTERS, few_steps),
        Timing(OURS, "bench.py qlora --shape 7b", QLORA, gib=20),
    ]


# ----------------------------------------------------------------------------------------- running
def last_words(path):
    said = Path(path).read_text(errors="replace").strip() or "no word"
    return said.splitlines()[-1][:160]


def compile_all(todo, free_gib, deadline, folder):
    """Run what compiles, as many at once as the card has room for. What a program chooses while
    others keep the card busy does not count: it lands in a cache that is thrown away."""
    waiting = [timing for timing in todo if timing.compile]
    running = {}  # process: GiB
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    while (waiting or running) and time.monotonic() < deadline:
        if waiting and (not running or sum(running.values()) + waiting[0].gib <= free_gib):
            timing = waiting.pop(0)
            command = [sys.executable, *shlex.split(timing.compile)]
            nowhere = subprocess.DEVNULL
            child = subprocess.Popen(
                command, cwd=HERE, env=environment, stdout=nowhere, stderr=nowhere
            )
            running[child] = timing.gib
            continue
        time.sleep(0.2)
        running = {child: gib for child, gib in running.items() if child.poll() is None}
    for child in running:
        child.kill()
        child.wait()


def run_timing(timing, seconds, folder):
    """-> {work: figure}. RuntimeError, with the last line that the program said, if it fails."""
    file = Path(folder, "figures.json")
    file.unlink(missing_ok=True)
    log = Path(folder, "log")
    command = [sys.executable, *shlex.split(timing.command)]
    command += ["--json"] * (timing.program == OURS) + [str(file)]
    with open(log, "w") as said, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=HERE, stdout=said, stderr=said, timeout=seconds)
    if file.exists():
        return timing.read(file)
    raise RuntimeError(f"no figures within {seconds:.0f} s; its last line: {last_words(log)}")


def measure(todo, free_gib, minutes):
    """-> (the figures of all programs, {work: {program: figure}}; (program, command, why) of those
    that failed)."""
    begin = time.monotonic()
    table = {}
    failed = [(timing.program, timing.command, timing.fault()) for timing in todo if timing.fault()]
    able = [timing for timing in todo if not timing.fault()]

    def say(what):
        print(f"[{time.monotonic() - begin:4.0f} s] {what}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        say(f"compiling for {len(able)} programs side by side")
        compile_all(able, free_gib, begin + 60 * minutes * 0.35, folder)
        for timing in able:
            say(f"{timing.program}: {timing.command}")
            seconds = min(timing.seconds, begin + 60 * minutes - time.monotonic())
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
        ours = figures.pop(OURS, None)
        for name, figure in (figures or {"": None}).items():
            ratio = ours / figure if ours and figure else None
            yield dict(work=work, ours=ours, peer=name, theirs=figure, ours_over_theirs=ratio)
