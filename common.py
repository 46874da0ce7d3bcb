"""What every script shares: errors in one line, flags from a dataclass, device choice, run folder, checkpoints.

Nothing here knows about models or text; the scripts call these helpers and keep their own loops.
"""
import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import types
import typing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file


# ---------------------------------------------------------------------------------------------------- errors and flags
class UserError(ValueError):
    """Something the user can mend: the message is one line that says what, with the numbers, and what to do."""


def cli(main):
    """Run a script's `main()`: what a user did wrong is one line on stderr and exit status 2, never a traceback."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output went away (`... | head`): nothing to say, nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are our one line, with the nearest flag there is."""

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            known = [s for action in self._actions for s in action.option_strings]
            near = difflib.get_close_matches(unknown[1].split("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            message = f"unknown argument {unknown[1]}: {hint}"
        raise UserError(message)


def flag_comments(cls):
    """{field: its trailing comment} read from the dataclass's own source, so that help is written once, as a comment."""
    lines = inspect.getsource(cls).splitlines()
    return {m[1]: m[2] for line in lines if (m := re.match(r"    (\w+):[^#]*#\s*(.*)", line))}


def parse_flags(cls, description, argv=None, positional=()):
    """Command line -> {field: value} of only what was typed, for a dataclass whose fields are the flags.

    A field `grad_accum: int = 1  # help` becomes `--grad-accum`. What was not typed is absent, so the caller decides what
    it inherits from (a preset, a resumed run, the defaults). Fields in `positional` are arguments without dashes.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments, hints = flag_comments(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # `int | None` takes an int
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        if field.name in positional:
            parser.add_argument(field.name, type=kind, help=comments.get(field.name, ""))
            continue
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)
    return vars(parser.parse_args(argv))


def from_preset(cls, presets, typed):
    """The dataclass with, in rising order of authority: its defaults, the named preset, what was typed."""
    name = typed.get("preset", cls.preset)
    if name not in presets:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    return cls(**{**presets[name], **typed})


# ------------------------------------------------------------------------------------------------- device, dtype, compile
@dataclasses.dataclass
class Runtime:
    """Where and in which precision to compute. `compile` is False, or True for "try, and say so if it fails"."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0   # of `world` processes that train together
    world: int = 1

    def autocast(self):
        """Context for the forward pass: weights stay float32, products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


    def sum(self, number):
        """A number added up over all ranks (every rank must call it)."""
        if self.world == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cpu_has_bf16_units():
    """Whether this CPU multiplies bf16 matrices natively (AMX); without, bf16 products are about 10x slower than f32."""
    with contextlib.suppress(OSError):
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    return False


def resolve(device="auto", dtype="auto", compile="auto"):
    """Choose device, dtype and compilation once, and print each choice with its reason -> Runtime.

    Under torchrun (which sets RANK, WORLD_SIZE and LOCAL_RANK) this also starts the process group.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        sys.stdout = open(os.devnull, "w")  # one rank tells the story; errors go to stderr from every rank
    if device == "auto":
        device, why = (("cuda", "a CUDA device is present") if torch.cuda.is_available() else
                       ("mps", "an Apple GPU is present") if torch.backends.mps.is_available() else
                       ("cpu", "no GPU found"))
    else:
        why = "asked for"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
        if device == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: this torch sees no Apple GPU; use --device cpu")
    try:
        dev = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: not a device; use auto, cpu, cuda, cuda:N or mps") from None
    if "WORLD_SIZE" in os.environ:
        if dev.type == "cuda":
            dev = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(dev)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
        why += f"; rank {rank} of {world}"
    print(f"device   {dev}: {why}")

    if dtype == "auto":
        if dev.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype, why = ("bfloat16", "this GPU has it") if bf16 else ("float16", "no bf16 units: fp16 + GradScaler")
        elif dev.type == "cpu" and cpu_has_bf16_units():
            dtype, why = "bfloat16", "this CPU has bf16 matrix units"
        else:
            dtype, why = "float32", "no bf16 matrix units" if dev.type == "cpu" else "the safe choice on MPS"
    else:
        why = "asked for"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: use auto, {', '.join(DTYPES)}")
    print(f"dtype    {dtype}: {why}")

    if compile not in ("auto", "on", "off"):
        raise UserError(f"--compile {compile}: use auto, on or off")
    if compile != "auto":
        use, why = compile == "on", "asked for"
    elif dev.type == "cuda":
        use, why = True, "fuses the small kernels"
    elif dev.type == "cpu":  # NOTES.md has the figures: half a minute of compiling for a tenth of the time of a step
        use, why = False, "on a CPU it costs half a minute and gains a tenth; --compile on for long runs"
    else:
        use, why = False, f"not reliable on {dev.type}"
    print(f"compile  {'on' if use else 'off'}: {why}")
    return Runtime(dev, DTYPES[dtype], use, rank, world)


PEAK_TFLOPS = {  # dense bf16 (fp16 before Ampere), from the makers' data sheets; MFU is only printed for these
    "H200": 989, "H100 PCIe": 756, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "V100": 125,
    "T4": 65, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71}


def peak_flops(device):
    """Floating-point operations per second the device can do at best, or None where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((t * 1e12 for key, t in PEAK_TFLOPS.items() if key in name), None)


def free_memory(device):
    """Bytes that can be taken now on the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return None


def compile_or_say_why(function, runtime, warm_up):
    """torch.compile(function), tried out by warm_up(compiled); if that fails the cause is printed and eager mode stays.

    The trial leaves the random number generators as they were.
    """
    if not runtime.compile:
        return function
    before, start = rng_state(), time.time()
    try:
        compiled = torch.compile(function, dynamic=False)
        warm_up(compiled)
        print(f"compile  done in {time.time() - start:.0f} s")
        return compiled
    except Exception as error:  # whatever a compiler can trip over: the message names it
        print(f"compile  failed, continuing without: {str(error).strip().splitlines()[0][:200]}")
        return function
    finally:
        set_rng_state(before)


# --------------------------------------------------------------------------------------------------- files, all or nothing
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
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def write_json(path, value):
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))


def write_tensors(path, tensors):
    """A safetensors file, all or nothing. {name: tensor}; a full disk is an OSError like any other."""
    def write(temporary):
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
        except Exception as error:  # safetensors reports I/O faults as its own SafetensorError
            raise OSError(f"{path}: cannot write ({error})") from None
    write_atomic(path, write)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_tensors(path):
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------------------ checkpoints
def rng_state():
    """Every random number generator a script can touch -> {name: tensor}."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": torch.tensor([version, *internal]),
             "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
             "numpy": torch.tensor([position, has_gauss, *keys.tolist()]),
             "numpy_gauss": torch.tensor([cached], dtype=torch.float64)}
    for i in range(torch.cuda.device_count()):
        state[f"cuda{i}"] = torch.cuda.get_rng_state(i)
    return state


def set_rng_state(state):
    torch.set_rng_state(state["torch"])
    version, *internal = state["python"].tolist()
    random.setstate((version, tuple(internal), state["python_gauss"].item() if len(state["python_gauss"]) else None))
    position, has_gauss, *keys = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda{i}"], i)


def all_rng_states():
    """The generators of every rank -> {rank.name: tensor}; all ranks must call it."""
    states = [rng_state()]
    if dist.is_initialized():
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, rng_state())
    return {f"{rank}.{name}": tensor for rank, state in enumerate(states) for name, tensor in state.items()}


def set_all_rng_states(states, rank, seed):
    """The inverse; a rank that the states do not know (there are more ranks now) starts from the seed."""
    own = {name.split(".", 1)[1]: tensor for name, tensor in states.items() if name.startswith(f"{rank}.")}
    if own:
        set_rng_state(own)
    else:
        torch.manual_seed(seed + rank)


def save_checkpoint(out, step, save_model, optimizer_tensors, rng_tensors, info, keep=1):
    """Write everything that exact resume needs to OUT/state/step-N, then publish its model files in OUT.

    save_model(folder) writes the model folder's files; the tensors are {name: tensor}; info is JSON. The folder
    appears under its final name only when it is complete on disk, and OUT's own files are replaced one rename at a time
    afterwards, so a crash or a full disk at any moment leaves OUT loadable and the previous state untouched.
    """
    out = Path(out)
    final, temporary = out / "state" / f"step-{step:08d}", out / "state" / f"writing-{step:08d}"
    if final.is_dir():
        return  # saved already (a stop signal right after a periodic save)
    for stale in (out / "state").glob("writing-*"):  # of a crash
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    try:
        save_model(temporary)
        write_tensors(temporary / "optimizer.safetensors", optimizer_tensors)
        write_tensors(temporary / "rng.safetensors", rng_tensors)
        write_json(temporary / "state.json", {"step": step, **info})
        sync_dir(temporary)
        os.rename(temporary, final)
        sync_dir(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish(final, out)
    for old in sorted((out / "state").glob("step-*"))[:-keep]:
        shutil.rmtree(old)


STATE_FILES = ("optimizer.safetensors", "rng.safetensors", "state.json")


def publish(checkpoint, out):
    """Make OUT's own model files those of `checkpoint`: hard links, so it costs no space; config.json comes last."""
    def link(source, target):
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)
    files = [f for f in checkpoint.iterdir() if f.name not in STATE_FILES]
    for file in sorted(files, key=lambda f: (f.name == "config.json", f.name)):
        write_atomic(out / file.name, lambda p, file=file: link(file, p))


def latest_checkpoint(out):
    """The newest complete OUT/state/step-N, or None."""
    return max(Path(out, "state").glob("step-*"), default=None)


class Interrupt:
    """Context: the first SIGTERM or Ctrl-C only sets `.signal`, so the loop can save and leave; the second one kills."""
    signal = None

    def __enter__(self):
        self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def catch(self, number, frame):
        self.signal = signal.Signals(number)
        signal.signal(number, self.old[number])

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------- metrics
class Metrics:
    """OUT/metrics.jsonl: one JSON object a line, flushed as written; `seconds` is training time, also across resumes.

    `track` sends the same numbers to "tensorboard" (files under OUT) or "wandb" as well.
    """

    def __init__(self, out, resume_step=None, track="", settings=None):
        self.path, self.start, self.tracker = Path(out) / "metrics.jsonl", time.time(), None
        rows = self.read(self.path) if resume_step is not None and self.path.exists() else []
        # what the crash un-did is not history; of the step it resumes at only the evaluation was done before the checkpoint
        rows = [r for r in rows if r["step"] < resume_step or (r["step"] == resume_step and "val_loss" in r)]
        self.start -= rows[-1]["seconds"] if rows else 0.0
        write_atomic(self.path, lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))
        self.file = open(self.path, "a", buffering=1)
        try:
            if track == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(str(out))
                self.tracker = lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()]
            elif track == "wandb":
                import wandb
                run = wandb.init(project="llm", name=Path(out).name, config=settings, resume="allow")
                self.tracker = lambda step, values: run.log(values, step=step)
            elif track:
                raise UserError(f"--track {track}: use tensorboard or wandb")
        except ImportError as error:
            raise UserError(f"--track {track} needs its package ({error}): pip install {track}") from None

    def log(self, step, **values):
        self.file.write(json.dumps({"step": step, "seconds": round(time.time() - self.start, 3), **values}) + "\n")
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
    lines = [f"{high - (high - low) * i / (height - 1):8.3f} |{''.join(row)}" for i, row in enumerate(grid)]
    return "\n".join([*lines, " " * 9 + "+" + "-" * width, f"{'0':>11s}{end:>{width - 2},}"])


def plot_losses(out, title):
    """OUT/loss.png from OUT/metrics.jsonl: training and validation loss over steps."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = Metrics.read(Path(out) / "metrics.jsonl")
    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=120)
    for key, style in (("loss", dict(lw=0.8, alpha=0.6, label="training")),
                       ("val_loss", dict(marker="o", ms=4, lw=1.8, label="validation, whole split"))):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            ax.plot(*zip(*points), **style)
            if key == "val_loss":
                ax.annotate(f"{points[-1][1]:.4f}", points[-1], textcoords="offset points", xytext=(0, 8), ha="right")
    ax.set(xlabel="step", ylabel="loss, nats per token", title=title)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    write_atomic(Path(out) / "loss.png", lambda p: fig.savefig(p, format="png"))
    plt.close(fig)
