"""What every script shares: errors in one line, flags from a dataclass, files written all or nothing, metrics.

Nothing here imports torch (runtime.py does), so that commands that do not need it start at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import types
import typing
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path


# --------------------------------------------------------------------------------- errors and flags
class UserError(ValueError):
    """Something the user can mend: the message is one line that says what, with the numbers, and what to do."""


def cli(main):
    """Run a script's `main()`: what a user did wrong is one line on stderr and exit status 2, never a traceback."""
    try:
        main()
    except (
        BrokenPipeError
    ):  # the reader of our output went away (`... | head`): nothing to say, nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are our one line, with the nearest flag there is; no abbreviations, descriptions as written."""

    def __init__(self, **kw):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kw
        )

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            known = [s for action in self._actions for s in action.option_strings]
            near = difflib.get_close_matches(unknown[1].split("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            message = f"unknown argument {unknown[1]}: {hint}"
        raise UserError(message)


def flag_comments(cls):
    """{field: its trailing comment} read from the dataclass's own source, so that help is written once, as a comment."""
    lines = [line for c in reversed(cls.__mro__[:-1]) for line in inspect.getsource(c).splitlines()]
    return {m[1]: m[2] for line in lines if (m := re.match(r"    (\w+):[^#]*#\s*(.*)", line))}


def parse_flags(cls, description, argv=None, positional=()):
    """Command line -> {field: value} of only what was typed, for a dataclass whose fields are the flags.

    A field `grad_accum: int = 1  # help` becomes `--grad-accum`. What was not typed is absent, so the caller decides what it
    inherits from (a preset, a resumed run, the defaults). Fields in `positional` are arguments without dashes."""
    parser = Parser(description=description)
    comments, hints = flag_comments(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # `int | None` takes an int
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        how: dict = (
            {"nargs": "+", "metavar": "str"}
            if kind is tuple
            else {"type": kind, "metavar": kind.__name__}
        )
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if field.name not in positional:
            parser.add_argument(
                "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how
            )
            continue
        if field.default not in ("", ()):
            how |= {"nargs": "?", "default": argparse.SUPPRESS}
        parser.add_argument(
            field.name, help=comments.get(field.name, ""), **how | {"metavar": None}
        )
    return vars(parser.parse_args(argv))


def from_preset(cls, presets, typed):
    """The dataclass with, in rising order of authority: its defaults, the named preset, what was typed."""
    name = typed.get("preset", cls.preset)
    if name not in presets:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    return cls(**{**presets[name], **typed})


# ---------------------------------------------------------------------------- files, all or nothing
def sync_dir(path):
    """Make a rename inside `path` survive a power cut (directories are files too; Windows cannot open them)."""
    with contextlib.suppress(PermissionError):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def write_atomic(path, write):
    """Create or replace `path` all or nothing: `write(temporary_path)`, fsync, rename. On failure the old file stands."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # as the umask has it: safetensors makes files that only their owner can read
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def write_json(path, value):
    write_atomic(
        path,
        lambda p: p.write_text(
            json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        ),
    )


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def json_records(path):
    """Yields the records of a JSON list or of JSONL; UserError names the one that is no JSON."""
    n = 0
    try:
        with open(path, encoding="utf-8-sig") as f:
            whole = f.read(1) == "["
            f.seek(0)
            for n, record in enumerate(
                json.load(f) if whole else (json.loads(line) for line in f if line.strip()), 1
            ):
                yield record
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: record {n + 1} is not valid JSON ({error})") from None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Interrupt:
    """Context: the first SIGTERM or Ctrl-C only sets `.signal`, so the loop can save and leave; one that comes three seconds
    later kills. Sooner is no wish of the user's: torchrun answers a Ctrl-C with a SIGTERM to those that had it already."""

    signal: int | None = None

    def __enter__(self):
        self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def catch(self, number, frame):
        if self.signal is None:
            self.signal, self.at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.at > 3:
            signal.signal(number, self.old[number])
            signal.raise_signal(number)

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def lock_folder(folder):
    """Take FOLDER/.lock until this process ends -> the open file to hold; UserError if another process has it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / ".lock", "w")
    with contextlib.suppress(ImportError):  # Windows has no fcntl, and runs go unguarded there
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training there now; stop it, or choose another --out"
            ) from None
    return file


def is_locked(folder):
    """Whether a process holds FOLDER's lock (where there are no locks, it may)."""
    try:
        lock_folder(folder).close()
    except UserError:
        return True
    return "fcntl" not in sys.modules


# ------------------------------------------------------------------------------------------ metrics
class Metrics:
    """OUT/metrics.jsonl: one JSON object a line, flushed as written; `seconds` is training time, also across resumes. `track` sends
    the same numbers to "tensorboard" (files under OUT) or "wandb" as well."""

    def __init__(self, out, resume_step=None, track="", settings=None):
        self.path, self.start, self.tracker = Path(out) / "metrics.jsonl", time.time(), None
        rows = self.read(self.path) if resume_step is not None and self.path.exists() else []
        # what the crash un-did is not history; of the step it resumes at only the evaluation was done before the checkpoint
        rows = [
            r
            for r in rows
            if r["step"] < resume_step or (r["step"] == resume_step and "val_loss" in r)
        ]
        self.start -= rows[-1]["seconds"] if rows else 0.0
        write_atomic(self.path, lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))
        self.file = open(self.path, "a", buffering=1)
        try:
            if track == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(str(out))
                self.tracker = lambda step, values: [
                    writer.add_scalar(k, v, step) for k, v in values.items()
                ]
            elif track == "wandb":
                import wandb

                run = wandb.init(
                    project="llm", name=Path(out).name, config=settings, resume="allow"
                )
                self.tracker = lambda step, values: run.log(values, step=step)
            elif track:
                raise UserError(f"--track {track}: use tensorboard or wandb")
        except ImportError as error:
            raise UserError(
                f"--track {track} needs its package ({error}): pip install {track}"
            ) from None

    def log(self, step, **values):
        values = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }  # JSON has no NaN
        self.file.write(
            json.dumps({"step": step, "seconds": round(time.time() - self.start, 3), **values})
            + "\n"
        )
        if self.tracker:
            self.tracker(step, {k: v for k, v in values.items() if isinstance(v, (int, float))})

    @staticmethod
    def read(path):
        """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
        rows = []
        for line in Path(path).read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows


def draw_curve(training, validation, width=72, height=16):
    """Losses as text: dots for training, V for validation. Points are (step, loss) pairs."""
    if not training:
        return "no losses yet"
    steps, losses = zip(*training, *validation)
    low, high, end = min(losses), max(losses), max(max(steps), 1)
    grid = [[" "] * width for _ in range(height)]
    for points, mark in ((training, "."), (validation, "V")):
        for step, loss in points:
            y = round((high - loss) / max(high - low, 1e-9) * (height - 1))
            grid[y][round(step / end * (width - 1))] = mark
    lines = [
        f"{high - (high - low) * i / (height - 1):8.3f} |{''.join(row)}"
        for i, row in enumerate(grid)
    ]
    return "\n".join([*lines, " " * 9 + "+" + "-" * width, f"{'0':>11s}{end:>{width - 2},}"])


def plot_losses(out, title):
    """OUT/loss.png from OUT/metrics.jsonl: training and validation loss over steps."""
    from matplotlib.figure import (
        Figure,
    )  # not pyplot: it needs no display and imports in half the time

    rows = Metrics.read(Path(out) / "metrics.jsonl")
    fig = Figure(figsize=(8, 4.5), dpi=120)
    ax = fig.subplots()
    for key, style in (
        ("loss", dict(lw=0.8, alpha=0.6, label="training")),
        ("val_loss", dict(marker="o", ms=4, lw=1.8, label="validation, whole split")),
    ):
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            ax.plot(*zip(*points), **style)
            if key == "val_loss":
                ax.annotate(
                    f"{points[-1][1]:.4f}",
                    points[-1],
                    textcoords="offset points",
                    xytext=(0, 8),
                    ha="right",
                )
    ax.set(xlabel="step", ylabel="loss, nats per token", title=title)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    write_atomic(Path(out) / "loss.png", lambda p: fig.savefig(p, format="png"))


def usable_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_job = None  # in a child process: the one function it was started to run


def _start_child(function):
    global _job
    _job = function


def _run_job(argument):
    return _job(argument)


def in_processes(function, jobs, processes=None):
    """Yield function(job) for every job, in order, from this many processes, a bounded number of jobs ahead."""
    jobs, processes = iter(jobs), processes or usable_cpus()
    first = list(islice(jobs, 2))
    if processes == 1 or len(first) < 2:
        yield from map(function, chain(first, jobs))
        return
    # fork hands the function over without pickling and works from a notebook; it does not exist on Windows
    method = "fork" if sys.platform == "linux" else None
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context(method), _start_child, (function,)
    )
    try:
        waiting = deque()
        for job in chain(first, jobs):
            waiting.append(pool.submit(_run_job, job))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:  # multiprocessing.Pool would wait for ever
        raise UserError(
            "a worker process was killed, perhaps for want of memory: use fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def well_formed(text):
    """Lone surrogates, which UTF-8 cannot hold, become U+FFFD, paired ones the character they mean, as in tiktoken."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextlib.contextmanager
def full_disk_explained(path, advice):
    """A full disk (or quota, or largest file) while writing `path` becomes one line with the numbers and the advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(Path(path).parent).free
        raise UserError(f"{path}: {error.strerror} ({free:,} bytes free there); {advice}") from None


BLOCK = 1 << 20  # bytes of a file read at a time


def border(file, at, cuts):
    """The first place at or after byte `at` where a block may end: it depends on the file alone, never on who asks.
    `cuts` are tried in turn on the next BLOCK bytes; between two characters is always possible."""
    if at == 0:
        return 0
    file.seek(at - 1)
    window = file.read(BLOCK)
    for cut in (*cuts, rb"(?s).(?=[\x00-\x7f\xc0-\xff])"):
        if found := re.search(cut, window):
            return at - 1 + found.end()
    return at - 1 + len(window)


def blocks_of(paths, step):
    """[(path, start, end)]: the files in parts of `step` bytes."""
    sizes = [os.path.getsize(path) for path in paths]
    return [
        (path, at, min(at + step, size))
        for path, size in zip(paths, sizes)
        for at in range(0, size, step)
    ]


def read_block(block, cuts):
    """The bytes of a file between the borders that belong to a block (path, start, end)."""
    with open(block[0], "rb") as file:
        start, end = (border(file, at, cuts) for at in block[1:])
        file.seek(start)
        return file.read(end - start)
