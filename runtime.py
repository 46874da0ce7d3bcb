"""Where and how to compute: device, precision, ranks, compiling; random number state, tensor files and checkpoints.

Every choice is made in one place, `resolve`, and printed with its reason.
"""

import contextlib
import os
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from common import UserError, sync_dir, write_atomic, write_json


# --------------------------------------------------------------------------- device, dtype, compile
@dataclass
class Runtime:
    """Where and in which precision to compute. `compile` is False, or True for "try, and say so if it fails"."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0  # of `world` processes that work together
    world: int = 1

    def autocast(self):
        """Context for the forward pass: weights stay float32, products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, number, how="SUM"):
        """A number added up over all ranks (every rank must call it)."""
        if self.world == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, getattr(dist.ReduceOp, how))
        return total.item()

    def smallest(self, number):
        """The least of an integer over all ranks (every rank must call it)."""
        return int(self.sum(number, "MIN"))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cpu_has_bf16_units():
    """Whether this CPU multiplies bf16 matrices natively (AMX); without, bf16 products are about 10x slower than f32."""
    with contextlib.suppress(OSError):
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    return False


def resolve(device="auto", dtype="auto", compile="auto") -> "Runtime":
    """Choose device, dtype and compilation once, and print each choice with its reason -> Runtime. Under torchrun (which sets
    RANK, WORLD_SIZE and LOCAL_RANK) this also starts the process group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        sys.stdout = open(
            os.devnull, "w"
        )  # one rank tells the story; errors go to stderr from every rank
    why = "asked for"
    if device == "auto":
        device, why = (
            ("cuda", "a CUDA device is present")
            if torch.cuda.is_available()
            else ("mps", "an Apple GPU is present")
            if torch.backends.mps.is_available()
            else ("cpu", "no GPU found")
        )
    try:
        dev = torch.device(device)
    except RuntimeError:
        raise UserError(
            f"--device {device}: not a device; use auto, cpu, cuda, cuda:N or mps"
        ) from None
    if (dev.type == "cuda" and not torch.cuda.is_available()) or (
        dev.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees no such device; use --device cpu"
        )
    if "WORLD_SIZE" in os.environ:
        if dev.type == "cuda":
            dev = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(dev)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
        why += f"; rank {rank} of {world}"
    print(f"device   {dev}: {why}")

    why = "asked for"
    if dtype == "auto":
        dtype, why = (
            "float32",
            "no bf16 matrix units" if dev.type == "cpu" else "the safe choice on MPS",
        )
        if dev.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype, why = (
                ("bfloat16", "this GPU has it")
                if bf16
                else ("float16", "no bf16 units: fp16 + GradScaler")
            )
        elif dev.type == "cpu" and cpu_has_bf16_units():
            dtype, why = "bfloat16", "this CPU has bf16 matrix units"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: use auto, {', '.join(DTYPES)}")
    print(f"dtype    {dtype}: {why}")

    if compile not in ("auto", "on", "off"):
        raise UserError(f"--compile {compile}: use auto, on or off")
    use, why = compile == "on", "asked for"
    if (
        compile == "auto"
    ):  # NOTES.md has the figures for a CPU: half a minute of compiling for a tenth of the time of a step
        cpu = "on a CPU it costs half a minute and gains a tenth; --compile on for long runs"
        use, why = (
            dev.type == "cuda",
            {"cuda": "fuses the small kernels", "cpu": cpu}.get(
                dev.type, f"not reliable on {dev.type}"
            ),
        )
    print(f"compile  {'on' if use else 'off'}: {why}")
    return Runtime(dev, DTYPES[dtype], use, rank, world)


PEAK_TFLOPS = {  # dense bf16 (fp16 before Ampere), from the makers' data sheets; MFU is only printed for these
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "V100": 125,
    "T4": 65,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops(device):
    """Floating-point operations per second the device can do at best, or None where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next(
        (t * 1e12 for key, t in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None
    )


def free_memory(device):
    """Bytes that can be taken now on the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = None
    with contextlib.suppress(OSError, IndexError):
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    with contextlib.suppress(
        OSError, ValueError
    ):  # in a container the limit is its own; "max" is none
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current")
        )
        free = min(free or limit, limit - used)
    return free


@contextlib.contextmanager
def lost_rank_explained(advice):
    """Context: that another rank died is one line and exit status 3, not a traceback and a hang."""
    try:
        yield
    except RuntimeError as error:
        lost = any(
            w in str(error)
            for w in (
                "Connection closed by peer",
                "Connection reset",
                "NCCL",
                "Broken pipe",
                "gloo",
            )
        )
        if not (lost and "WORLD_SIZE" in os.environ):
            raise
        print(
            f"error: rank {os.environ['RANK']} lost another rank ({str(error).splitlines()[0][:120]}); stopped. {advice}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(3)  # the process group's own shutdown would wait for the rank that is gone


def compile_or_say_why(function, runtime, warm_up):
    """torch.compile(function), tried out by warm_up(compiled); if that fails the cause is printed and eager mode stays. The trial
    leaves the random number generators as they were."""
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


# ------------------------------------------------------------------------------------- tensor files
def write_tensors(path, tensors):
    """A safetensors file, all or nothing. {name: tensor}; a full disk is an OSError like any other."""

    def write(temporary):
        try:
            save_file(
                {k: v.detach().contiguous() for k, v in tensors.items()},
                temporary,
                metadata={"format": "pt"},
            )
        except Exception as error:  # safetensors reports I/O faults as its own SafetensorError
            raise OSError(f"{path}: cannot write ({error})") from None

    write_atomic(path, write)


def read_tensors(path):
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


# -------------------------------------------------------------------------------------- checkpoints
def rng_state():
    """Every random number generator a script can touch -> {name: tensor}."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *internal]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([position, has_gauss, *keys.tolist()]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    for i in range(torch.cuda.device_count()):
        state[f"cuda{i}"] = torch.cuda.get_rng_state(i)
    return state


def set_rng_state(state):
    torch.set_rng_state(state["torch"])
    version, *internal = state["python"].tolist()
    random.setstate(
        (
            version,
            tuple(internal),
            state["python_gauss"].item() if len(state["python_gauss"]) else None,
        )
    )
    position, has_gauss, *keys = state["numpy"].tolist()
    np.random.set_state(
        (
            "MT19937",
            np.array(keys, dtype=np.uint32),
            position,
            has_gauss,
            state["numpy_gauss"].item(),
        )
    )
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda{i}"], i)


def all_rng_states():
    """The generators of every rank -> {rank.name: tensor}; all ranks must call it."""
    states = [rng_state()]
    if dist.is_initialized():
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, rng_state())
    return {
        f"{rank}.{name}": tensor
        for rank, state in enumerate(states)
        for name, tensor in state.items()
    }


def set_all_rng_states(states, rank, seed):
    """The inverse; a rank that the states do not know (there are more ranks now) starts from the seed."""
    own = {
        name.split(".", 1)[1]: tensor
        for name, tensor in states.items()
        if name.startswith(f"{rank}.")
    }
    if own:
        set_rng_state(own)
    else:
        torch.manual_seed(seed + rank)


def save_checkpoint(out, step, save_model, optimizer_tensors, rng_tensors, info, keep=1):
    """Write everything that exact resume needs to OUT/state/step-N, then publish its model files in OUT.

    save_model(folder) writes the model folder's files; the tensors are {name: tensor}; info is JSON. The folder appears under its
    final name only when it is complete on disk, and OUT's own files are replaced one rename at a time afterwards, so a crash or a
    full disk at any moment leaves OUT loadable and the previous state untouched."""
    out = Path(out)
    final, temporary = out / "state" / f"step-{step:08d}", out / "state" / f"writing-{step:08d}"
    if final.is_dir():  # saved already: by a periodic save just now, or before a crash that came between saving and publishing
        return publish(final, out)
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


def publish(checkpoint, out):
    """Make OUT's own model files those of `checkpoint`: hard links, so it costs no space; config.json comes last."""

    def link(source, target):
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)

    files = [
        f
        for f in checkpoint.iterdir()
        if f.name not in ("optimizer.safetensors", "rng.safetensors", "state.json")
    ]
    for stale in out.glob("*.tmp"):  # of a crash
        stale.unlink()
    for file in sorted(files, key=lambda f: (f.name == "config.json", f.name)):
        if (out / file.name).exists() and os.path.samefile(file, out / file.name):
            continue  # published already; renaming one link of a file onto another would leave both
        write_atomic(out / file.name, lambda p, file=file: link(file, p))


def latest_checkpoint(out):
    """The newest complete OUT/state/step-N, or None."""
    return max(Path(out, "state").glob("step-*"), default=None)
