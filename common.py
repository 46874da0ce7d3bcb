"""What every script shares: errors in one line, flags from a dataclass, files written all or
nothing, metrics.

`write_atomic` is how a file appears whole or not at all. Nothing here imports torch (runtime.py
does), so that commands that do not need it start at once. A command that computes imports this file
before torch, because of GOMP_SPINCOUNT.
"""

import argparse
import codecs
import contextlib
import dataclasses
import difflib
import errno
import functools
import gzip
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import time
import typing
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path

# Torch's threads on a CPU (libgomp's) wait for each other by spinning, by default so long that on a
# core which another process wants, too, a training of small matrices takes three times as long. A
# shorter wait costs little where nobody else is. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "600")


# --------------------------------------------------------------------------------- errors and flags
def printable(text):
    """Control characters but the newline spelled out: no text may steer the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda m: repr(m[0])[1:-1], text)


class UserError(ValueError):
    """Something the user can mend. Its one line says what, with the numbers, and what to do."""

    status = 2  # the program's exit status

    def __init__(self, message):
        told = printable(" ".join(str(message).splitlines()))
        if len(told) > 1500:  # it quotes what a hostile file says
            told = f"{told[:1000]} ... {told[-400:]}"
        super().__init__(told)


def cli(main):
    """Run a script's `main()`: a user's mistake is one line on stderr and exit status 2, no
    traceback.

    Under torchrun only rank 0 writes to stdout; errors go to stderr from every rank."""
    silent = os.environ.get("RANK", "0") != "0"
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # it may be closed
            stream.reconfigure(errors="replace")  # what its encoding cannot say is a `?`
    try:
        with open(os.devnull, "w", errors="replace") as nowhere:
            with contextlib.redirect_stdout(nowhere if silent else sys.stdout):
                main()
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 2))
    except KeyboardInterrupt:
        sys.exit(130)


def first_words(error):
    """What an exception of some library says, in one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def warn_of_unknown(keys, where):
    """Name the keys of a file that nothing here knows; one that begins with _ says nothing."""
    unknown = sorted(repr(key) for key in keys if not key.startswith("_"))
    if unknown:
        warn(f"{where}: ignored: {', '.join(unknown)[:400]}")


def keys_said(d):
    """The keys of an object, without those that are null, which says as much as nothing."""
    return {key for key, value in d.items() if value is not None}


def model_name(path):
    """A model folder's whole name, dots included, also of "."; of a file that without .gguf."""
    return re.sub(r"(?i)\.gguf$", "", os.path.basename(os.path.abspath(path)))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are our one line, with the nearest flag there is; no abbreviations."""

    def __init__(self, **options):  # a subcommand's parser is made with more than a description
        layout = argparse.RawDescriptionHelpFormatter  # a description stays as it was written
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[1].split("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            message = f"unknown argument {unknown[1]}: {hint}"
        raise UserError(message)


def flag_comments(cls):
    """{field: the comment behind it}, from the source: help is written once, as a comment."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= re.findall(r"^    (\w+):[^#\n]*#\s*(.*)", inspect.getsource(base), re.M)
    return comments


def flag(name):
    """How a field is typed: grad_accum as --grad-accum."""
    return "--" + name.replace("_", "-")


def parse_flags(cls, description, argv=None, positional=()):
    """Command line -> {field: value} of what was typed, for a dataclass whose fields are the flags.

    A field `grad_accum: int = 1  # help` becomes `--grad-accum`. What was not typed is absent, so
    the caller decides where it comes from (a preset, a resumed run, the defaults). Fields in
    `positional` are arguments without dashes."""
    parser = Parser(description=description)
    comments = flag_comments(cls)
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        kind = next(iter(typing.get_args(kind)), kind)  # `int | None` takes an int
        help = comments.get(field.name, "").replace("%", "%%")
        options = {"type": kind, "metavar": kind.__name__}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:  # values are str; where there is a default, the empty list replaces it
            options = {"nargs": "*" if field.default else "+", "metavar": "str"}
        if field.name not in positional:
            help = f"{help} [{field.default}]"
            parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=help, **options)
            continue
        options["metavar"] = None  # argparse shows the field's name
        if field.default not in ("", ()):  # an empty default means that it must be given
            options |= {"nargs": "?", "default": argparse.SUPPRESS}
        parser.add_argument(field.name, help=help, **options)
    return vars(parser.parse_args(argv))


def flags_among(typed, names):
    """Those of the names that were typed, as flags in an error: "" without any."""
    return ", ".join(flag(name) for name in typed if name in names)


def run_command(description, commands):
    """`python x.py COMMAND ...`: commands is {COMMAND: a function of the arguments behind it}."""
    name = "".join(sys.argv[1:2])
    if name in commands:
        return commands[name](sys.argv[2:])
    print(description)
    if name not in ("-h", "--help"):
        raise UserError(f"no command {name!r}: use {', '.join(commands)} (each has --help)")


def from_preset(cls, presets, typed):
    """The dataclass with its defaults, over them the named preset, over that what was typed."""
    name = typed.get("preset", cls.preset)
    if name not in presets:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    return cls(**presets[name] | typed)


# ---------------------------------------------------------------------------- files, all or nothing
def sync_dir(path):
    """Make a rename inside `path` survive a power cut (Windows cannot open a folder for that)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_atomic(path, write):
    """Create or replace `path` all or nothing: `write(temporary_path)`, fsync, rename.

    On failure the old file stands."""
    path = Path(path)
    # In a folder that others write to, nobody may lay a link where this file is about to be made.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # the umask's; safetensors would let only the owner read
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:  # Windows flushes only what it may write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def write_text(path, text):
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


LARGEST_JSON = 64 << 20  # bytes; the largest tokenizer in use (Gemma 3, 262K tokens) has 33 MB
MOST_VALUES = 3 << 20  # in a JSON file; that one has 2 million, and a value takes up to 150 bytes


def read_limited(path):
    size = os.path.getsize(path)
    if size > LARGEST_JSON:
        raise UserError(
            f"{path} has {size >> 20} MB, more than the {LARGEST_JSON >> 20} MB allowed"
        )
    return Path(path).read_bytes()


def read_utf8(path):
    """The text of a small file, without a BOM. UserError where it is not UTF-8."""
    try:
        return read_limited(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None


def read_json(path):
    """The object in a JSON file. UserError: it holds something else, or more than is sane."""
    text = read_utf8(path)
    values = sum(map(text.count, ",[{"))
    if values > MOST_VALUES:
        raise UserError(f"{path} has {values:,} values, more than the {MOST_VALUES:,} allowed")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: this is not a JSON object but a {type(content).__name__}")
    return content


MOST = {int: 1 << 31, float: 1e12}  # published rope_theta go up to 5e10


def read_value(d, where, key, kind_or_most, default=None):
    """d[key], or the default where that is missing or null. UserError where it is of another kind.

    kind_or_most: a type (numbers from 0), and then the key may be missing; or the most that a
    number may be which must be there (an int from 1): 4096 is an int from 1 to 4096."""
    value = d.get(key)
    if value is None:
        value = default
    if value is None and not isinstance(kind_or_most, int | float):
        return None
    most = MOST.get(kind_or_most, kind_or_most)
    if isinstance(most, int | float):
        least = int(type(kind_or_most) is int)
        fits = type(value) in (int, type(most)) and least <= value <= most
        expected = f"{type(most).__name__} from {least} to {most:,.0f}"
    else:
        fits = isinstance(value, kind_or_most)
        expected = getattr(kind_or_most, "__name__", "an id or a list of ids")
    if fits:
        return value
    raise UserError(f"{where}: {key} is {value!r}, expected {expected}")


# What code that expects a right file raises over a wrong one.
STUMBLES = ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError


@contextlib.contextmanager
def naming(path):
    """Context: whatever is wrong inside a file from outside is one line that names the file."""
    try:
        yield
    except UserError as error:
        told = str(error)
        named = told.startswith((str(path), f"{Path(path).parent}/"))  # this file or one beside it
        raise UserError(told if named else f"{path}: {told}") from None
    except STUMBLES as error:
        told = f"{type(error).__name__} {str(error)[:200]}"
        raise UserError(f"{path} is not a {Path(path).name}: {told}") from None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def full_disk_explained(path, advice):
    """Context: a full disk (or quota) while writing `path` is one line with numbers and advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(Path(path).parent).free
        raise UserError(f"{path}: {error.strerror} ({free:,} bytes free there); {advice}") from None


# ------------------------------------------------------------------------------- files of records
RECORD_FILES = (".jsonl", ".ndjson", ".json", ".parquet")  # in any case, and with .gz behind
# An escape in JSON. The first group is one to keep; what is left is half a surrogate pair.
ESCAPES = re.compile(rb"(\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|\\[^u])|\\u[dD][89a-fA-F]\w\w")


class Row(typing.NamedTuple):
    """A record of a file, or what is wrong with it."""

    number: int  # of its line; in a list or in parquet of the record
    where: str  # file and number, as an error names it
    record: object
    fault: str | None


@contextlib.contextmanager
def open_data(path):
    """Context: a file's bytes, unpacked if they are gzip's whatever its name, behind a BOM."""
    with open(path, "rb") as file:
        try:
            if file.peek(2).startswith(b"\x1f\x8b"):
                file = gzip.GzipFile(fileobj=file)
            if file.peek(3).startswith(codecs.BOM_UTF8):
                file.read(3)
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: damaged gzip ({error})") from None


def without_gz(path):
    """A file's name in small letters, without .gz: its ending says what is in it."""
    return Path(path).name.lower().removesuffix(".gz")


def holds_records(path):
    """Whether a file holds records, not text: its name says it, or else how it begins."""
    name = without_gz(path)
    with open_data(path) as file:
        head = file.peek(BLOCK)
    if name.endswith(RECORD_FILES) or head.startswith(b"PAR1"):
        return True
    return not name.endswith(".txt") and bool(re.match(rb'\s*(\[\s*)?\{\s*"', head))


def file_rows(path, columns=None):
    """Yield a Row for every record of JSON Lines, of a JSON list or of parquet.

    Which it is its first bytes say. A line ends at \\n alone. columns: those to read of parquet."""
    with open_data(path) as file:
        head = file.peek(BLOCK).lstrip()
        if head.startswith(b"PAR1"):
            found = ((record, None) for record in parquet_records(file, path, columns))
        elif head.startswith(b"["):
            records, fault = parse_json(file.read())
            found = [(None, fault)] if fault else ((record, None) for record in records)
        else:
            for number, line in enumerate(file, 1):
                if line.strip() == b"{":
                    raise UserError(f"{path}:{number}: write an object a line, or a list of them")
                if line.strip():
                    yield Row(number, f"{path}:{number}", *parse_json(line))
            return
        for number, (record, fault) in enumerate(found, 1):
            yield Row(number, f"{path}: record {number}", record, fault)


def parse_json(data):
    """Bytes -> (value, None) or (None, what is wrong). Half a surrogate pair becomes U+FFFD."""
    try:
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # few have any, and a search is fast
            data = ESCAPES.sub(lambda found: found[1] or rb"\ufffd", data)
        return json.loads(data.decode(), object_pairs_hook=distinct), None
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON ({error})"


def distinct(pairs):
    """The object of these pairs; UserError if it has a key twice, of which json takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"the key {key!r} is there twice")
    return found


def parquet_records(file, path, columns):
    """Yield the rows of an open parquet file as dicts: of these columns, or of all if one lacks."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = ParquetFile(file)
        if not set(columns or ()) <= set(table.schema_arrow.names):
            columns = None
        for batch in table.iter_batches(1024, columns=columns):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        cause = str(error).splitlines()[0][:200]
        raise UserError(f"{path}: not a readable parquet file ({cause})") from None


def json_records(path):
    """Yield (file and number, record) for every record; UserError for the first that is none."""
    for row in file_rows(path):
        if row.fault:
            raise UserError(f"{row.where}: {row.fault}")
        yield row.where, row.record


# -------------------------------------------------------------------------------------------- text
BLOCK = 1 << 20  # bytes of a file read at a time


def well_formed(text):
    """Surrogates, which UTF-8 cannot hold, become the character that a pair means, or U+FFFD alone.

    tiktoken does the same."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.lru_cache(maxsize=8)
def any_of(names):
    """A regex that matches any of the names, the longest first; without names it never matches."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join([*map(re.escape, longest_first), "(?!)"]) + ")")


# -------------------------------------------------------------------------------- several processes
def usable_cpus():
    """CPUs that this process may run on, which in a container are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_job = None  # in a child process, set once: the one function that it was started to run


def _start_child(function):
    global _job
    _job = function


def _run_job(argument):
    return _job(argument)


def in_processes(function, jobs, processes=None):
    """Yield function(job) for each job, in order; processes work a bounded number ahead."""
    jobs = iter(jobs)
    processes = processes or usable_cpus()
    first = list(islice(jobs, 2))
    jobs = chain(first, jobs)
    if processes == 1 or len(first) < 2:
        yield from map(function, jobs)
        return
    # fork hands the function over without pickling it; Windows has none, and macOS's is not safe.
    method = "fork" if sys.platform == "linux" else None
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(processes, context, _start_child, (function,))
    try:
        waiting = deque()
        for job in jobs:
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


# ----------------------------------------------------------------------------- a run and its folder
class Interrupt:
    """Context: the first SIGTERM or Ctrl-C only sets `.signal`, so that the loop can save and
    leave.

    One that comes three seconds later ends the program. One that comes sooner is ignored: after a
    Ctrl-C torchrun sends a SIGTERM to the processes that have already had the Ctrl-C. It sends one
    to the ranks that lost another, too: they say so first (`lost_rank_explained`)."""

    signal: int | None = None

    def __enter__(self):
        self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def catch(self, number, frame):
        if self.signal is None:
            self.signal = signal.Signals(number)
            self.at = time.monotonic()
        elif time.monotonic() - self.at > 3:
            signal.signal(number, self.old[number])
            signal.raise_signal(number)

    def __exit__(self, failed, *_):
        if failed and "WORLD_SIZE" in os.environ:
            return  # the line that is still to be printed must not meet a SIGTERM
        for number, handler in self.old.items():
            signal.signal(number, handler)


def lock_folder(folder):
    """Take FOLDER/.lock until this process ends -> the file to hold; UserError if it is taken."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    with contextlib.suppress(ImportError):  # Windows has no fcntl, and runs go unguarded there
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training there now; stop it, or choose another --out"
            ) from None
    return file


class Metrics:
    """OUT/metrics.jsonl: one JSON object a line, flushed as it is written.

    `seconds` in it is the run's time, evaluations included, also across resumes."""

    def __init__(self, out, resume_step=-1):
        """Rows from `resume_step` on, which a crash undid, are dropped; a new run keeps none."""
        path = Path(out) / "metrics.jsonl"
        rows = []
        for row in self.read(path) if path.exists() else ():
            # Of the step itself only the evaluation was done before its checkpoint.
            at_save = row["step"] == resume_step and any(name.startswith("val_") for name in row)
            if row["step"] < resume_step or at_save:
                rows.append(row)
        last = rows[-1] if rows else {"step": 0, "seconds": 0.0}
        self.step = last["step"]  # of the newest row
        with naming(path):
            self.start = time.time() - last["seconds"]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(path, text)
        self.file = open(path, "a", buffering=1)

    def log(self, step, **values):
        row = {"step": step, "seconds": round(time.time() - self.start, 3)}
        for name, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            row[name] = value if finite else None  # JSON has no NaN
        self.file.write(json.dumps(row) + "\n")

    @staticmethod
    def read(path):
        """The rows of a metrics.jsonl; left out is what is none, as a line cut short by a crash."""
        rows = []
        for line in Path(path).read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
        return rows


def curve(rows, key):
    """The (step, value) pairs of a key in rows of metrics.jsonl."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def plot_run(out, title):
    """OUT/metrics.jsonl -> the name of OUT's new picture, loss.png or reward.png: what was trained
    for, in training and validation, over steps."""
    from matplotlib.figure import Figure  # pyplot would need a display, and twice the time

    rows = Metrics.read(Path(out) / "metrics.jsonl")
    figure = Figure(dpi=120)
    axes = figure.subplots()
    goal = "reward" if curve(rows, "reward") else "loss"
    for key, marker in ((goal, ""), (f"val_{goal}", "o")):
        axes.plot(*zip(*curve(rows, key)), marker=marker, label=key)
    unit = {"loss": "nats per token", "reward": "reward"}[goal]
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(Path(out) / f"{goal}.png", lambda path: figure.savefig(path, format="png"))
    return f"{goal}.png"
