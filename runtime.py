"""Where and how to compute: device, precision, ranks, compiling. And what lets a run come back:
random number state, tensor files, checkpoints.

`resolve` makes every choice and prints its reason; `save_checkpoint` is how a run survives a crash.
"""

import contextlib
import functools
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import UserError, first_words, sync_dir, write_atomic, write_json


# --------------------------------------------------------------------------- device, dtype, compile
@dataclass
class Runtime:
    """Where and in which precision to compute; `compile` means to try, and to say why not."""

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
        total = torch.tensor(number, dtype=torch.float64)  # on the CPU: no GPU is waited for
        dist.all_reduce(total, getattr(dist.ReduceOp, how))
        return total.item()

    def smallest(self, number):
        """The least of an integer over all ranks (every rank must call it)."""
        return int(self.sum(number, "MIN"))


def resolve(device="auto", dtype="auto", compile="auto") -> Runtime:
    """Choose device, dtype and compiling once, and print each choice with its reason -> Runtime.

    Under torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK, it starts the process group too."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    chosen, why = choose_device(device)
    if "WORLD_SIZE" in os.environ:
        chosen = join_ranks(chosen)
    elif chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    print(f"device   {chosen}: {why}; rank {rank} of {world}")
    precision = choose("dtype", dtype, DTYPES, best_dtype(chosen.type))
    if chosen.type == "cpu" and precision == "float32" and onednn_is_faster():
        print("products oneDNN's in training: torch's own leave this AMD CPU's AVX-512 unused")
    compiled = choose("compile", compile, ("on", "off"), best_compile(chosen.type))
    return Runtime(chosen, DTYPES[precision], compiled == "on", rank, world)


def choose(what, asked, choices, best):
    """--dtype or --compile -> one of its choices; best: (the one that "auto" takes, why)."""
    chosen, why = best if asked == "auto" else (asked, "asked for")
    if chosen not in choices:
        raise UserError(f"--{what} {asked}: use auto, {', '.join(choices)}")
    print(f"{what:8} {chosen}: {why}")
    return chosen


def choose_device(device):
    """--device -> (torch.device, why)."""
    cpu = torch.device("cpu")
    gpu = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return (gpu, "found") if gpu else (cpu, "no GPU found")
    with contextlib.suppress(RuntimeError):  # torch's for a word that is no device
        chosen = torch.device(device)
        known = gpu and chosen.type == gpu.type
        if chosen.type == "cpu" or known and (chosen.index or 0) < torch.accelerator.device_count():
            return chosen, "asked for"
    raise UserError(
        f"--device {device}: torch {torch.__version__} has no such device here; "
        "use auto, cpu, cuda, cuda:N or mps"
    )


def join_ranks(device):
    """Start the process group of torchrun's ranks -> this rank's device."""
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"--device {device}: torchrun's ranks take a GPU each: use cuda")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_dtype(device):
    """For a kind of device -> (a name in DTYPES, why)."""
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU has it"
        return "float16", "no bf16 units: fp16 and a scaled loss"
    if device == "cpu" and cpu_has_bf16_units():
        return "bfloat16", "this CPU has bf16 matrix units"
    return "float32", "16 bits may be slow here"


def cpu_facts():
    """What Linux says of this CPU; nothing on other systems."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def cpu_has_bf16_units():
    """Whether this CPU multiplies bf16 natively (AMX); else bf16 is 10x slower than float32."""
    return "amx_bf16" in cpu_facts()


def best_compile(device):
    """For a kind of device -> ("on" or "off", why). NOTES.md has the figures for a CPU."""
    if device == "cuda":
        return "on", "fuses the small kernels"
    return "off", "costs half a minute and gains a tenth on a CPU, and is not reliable on MPS"


@functools.cache
def onednn_is_faster():
    """Whether float32 products of a CPU are faster in oneDNN, where model.float_product takes them.

    torch takes MKL for them, which leaves the AVX-512 units of AMD's CPUs unused."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    return "AuthenticAMD" in cpu_facts() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def compile_or_say_why(function, runtime, warm_up):
    """torch.compile(function), tried by warm_up(compiled); if that fails, why is printed and it
    stays eager."""
    if not runtime.compile:
        return function
    try:
        compiled = torch.compile(function, dynamic=False)
        warm_up(compiled)
        return compiled
    except Exception as error:  # whatever a compiler can trip over
        print(f"compile  failed, continuing without: {first_words(error)}")
        return function


# --------------------------------------------------------------------------- what the device can do
# Dense bf16 (fp16 before Ampere), from the makers' data sheets; others have no MFU. The first that
# is part of the device's name counts.
PEAK_TFLOPS = {
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
    """Floating-point operations a second that the device can do at best; None if not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = (tera * 1e12 for key, tera in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name))
    return next(known, None)


def free_memory(device):
    """Bytes that can be taken now on the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = None
    with contextlib.suppress(OSError, IndexError):
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container has a limit of its own, or "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free or limit, limit - used)
    return free


@contextlib.contextmanager
def lost_rank_explained(advice):
    """Context: that another rank died is one line and exit status 3, not a traceback and a hang."""
    signs = "Connection closed by peer|Connection reset|NCCL|Broken pipe|gloo"
    try:
        yield
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ or not re.search(signs, str(error)):
            raise
        cause = str(error).splitlines()[0][:120]
        print(
            f"error: rank {os.environ['RANK']} lost another rank ({cause}); stopped. {advice}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(3)  # the process group's own shutdown would wait for the rank that is gone


# ------------------------------------------------------------------------------------- tensor files
def write_tensors(path, tensors):
    """{name: tensor} -> a safetensors file, all or nothing. A full disk is an OSError."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        write_atomic(path, functools.partial(save_file, tensors, metadata={"format": "pt"}))
    except SafetensorError as error:  # it reports I/O faults as this
        raise OSError(f"{path}: cannot write ({error})") from None


def read_tensors(path):
    """-> {name: tensor} on the CPU; UserError if it is no safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


# ------------------------------------------------------------------------- random number generators
def fork_rng():
    """Context: what draws random numbers inside changes none that are drawn after it."""
    return torch.random.fork_rng(range(torch.cuda.device_count()))


def rng_states(rank):
    """The generators of every rank -> {rank.name: tensor}; all ranks must call it.

    They are torch's, on the CPU and the rank's GPU: nothing in a training draws from any other."""
    states = {f"{rank}.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{rank}.cuda"] = torch.cuda.get_rng_state()
    if dist.is_initialized():
        gathered = [states] * dist.get_world_size()
        dist.all_gather_object(gathered, states)
        for other in gathered:
            states |= other
    return states


def set_rng_states(states, rank, seed):
    """The inverse. A rank unknown to the states, when there are more now, starts from the seed."""
    torch.manual_seed(seed + rank)
    if f"{rank}.torch" in states:
        torch.set_rng_state(states[f"{rank}.torch"])
    if torch.cuda.is_available():
        once = f"{rank}.cuda{torch.cuda.current_device()}"  # what it was called
        state = states.get(f"{rank}.cuda", states.get(once))
        if state is not None:
            torch.cuda.set_rng_state(state)


# -------------------------------------------------------------------------------------- checkpoints
STATE_FILES = ("optimizer.safetensors", "rng.safetensors", "state.json")  # the rest is the model's


def save_checkpoint(out, step, save_model, optimizer_tensors, rng_tensors, info, keep=1):
    """Write everything that exact resume needs to OUT/state/step-N, then publish its model files in
    OUT.

    save_model(folder) writes the model folder's files; the tensors are {name: tensor}; info is
    JSON. The folder gets its final name only when it is complete on disk, and OUT's own files are
    replaced one rename at a time afterwards. So a crash or a full disk at any moment leaves OUT
    loadable and the previous state untouched."""
    out = Path(out)
    states = out / "state"
    final = states / f"step-{step:08d}"
    temporary = states / f"writing-{step:08d}"
    if final.is_dir():  # the same step, saved just now or by a run that then crashed
        return publish(final, out)
    for stale in states.glob("writing-*"):  # of a crash
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    try:
        save_model(temporary)
        write_tensors(temporary / "optimizer.safetensors", optimizer_tensors)
        write_tensors(temporary / "rng.safetensors", rng_tensors)
        write_json(temporary / "state.json", {"step": step, **info})
        sync_dir(temporary)
        temporary.rename(final)
        sync_dir(states)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish(final, out)
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def publish(checkpoint, out):
    """Make OUT's own model files those of `checkpoint`; config.json comes last."""
    for stale in out.glob(f"*.{'[0-9a-f]' * 16}.tmp"):  # write_atomic's, of a crash
        stale.unlink()
    files = [file for file in checkpoint.iterdir() if file.name not in STATE_FILES]
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        write_atomic(out / file.name, functools.partial(shutil.copyfile, file))


def checkpoints(out):
    """The complete OUT/state/step-N, the newest last."""
    return sorted(Path(out, "state").glob(f"step-{'[0-9]' * 8}"))


def latest_checkpoint(out):
    """The newest of them, or None."""
    return max(checkpoints(out), default=None)
