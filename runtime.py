"""Where and how to compute: device, precision, ranks, compiling. And what a run needs to come back:

random number state, tensor files, checkpoints. `resolve` makes every choice and prints its reason.
"""

import contextlib
import functools
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from common import UserError, sync_dir, write_atomic, write_json


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
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
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
        why = f"{why}; rank {rank} of {world}"
    print(f"device   {chosen}: {why}")
    precision, why = choose_dtype(dtype, chosen.type)
    print(f"dtype    {precision}: {why}")
    compiled, why = choose_compile(compile, chosen.type)
    print(f"compile  {'on' if compiled else 'off'}: {why}")
    return Runtime(chosen, DTYPES[precision], compiled, rank, world)


def choose_device(device):
    """--device -> (torch.device, why)."""
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        if has_cuda:
            return torch.device("cuda"), "a CUDA device is present"
        if has_mps:
            return torch.device("mps"), "an Apple GPU is present"
        return torch.device("cpu"), "no GPU found"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(
            f"--device {device}: not a device; use auto, cpu, cuda, cuda:N or mps"
        ) from None
    if not {"cuda": has_cuda, "mps": has_mps}.get(chosen.type, True):
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees no such device; use --device cpu"
        )
    return chosen, "asked for"


def join_ranks(device):
    """Start the process group of torchrun's ranks -> this rank's device."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(dtype, device):
    """--dtype on a kind of device -> (a name in DTYPES, why)."""
    if dtype in DTYPES:
        return dtype, "asked for"
    if dtype != "auto":
        raise UserError(f"--dtype {dtype}: use auto, {', '.join(DTYPES)}")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU has it"
        return "float16", "no bf16 units: fp16 and a scaled loss"
    if device == "cpu" and cpu_has_bf16_units():
        return "bfloat16", "this CPU has bf16 matrix units"
    return "float32", "no bf16 matrix units" if device == "cpu" else "the safe choice on MPS"


def cpu_has_bf16_units():
    """Whether this CPU multiplies bf16 natively (AMX); else bf16 is 10x slower than float32."""
    with contextlib.suppress(OSError):
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    return False


def choose_compile(compile, device):
    """--compile on a kind of device -> (whether, why). NOTES.md has the figures for a CPU."""
    if compile in ("on", "off"):
        return compile == "on", "asked for"
    if compile != "auto":
        raise UserError(f"--compile {compile}: use auto, on or off")
    if device == "cuda":
        return True, "fuses the small kernels"
    if device == "cpu":
        return (
            False,
            "on a CPU it costs half a minute and gains a tenth; --compile on for long runs",
        )
    return False, f"not reliable on {device}"


def compile_or_say_why(function, runtime, warm_up):
    """torch.compile(function), tried by warm_up(compiled); if that fails, why is printed and it
    stays eager.

    The trial leaves the random number generators as they were."""
    if not runtime.compile:
        return function
    before = rng_state()
    start = time.time()
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


# --------------------------------------------------------------------------- what the device can do
PEAK_TFLOPS = {  # dense bf16 (fp16 before Ampere), from the makers' data sheets; others have no MFU
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
    for key, tera in PEAK_TFLOPS.items():
        if re.search(rf"\b{key}\b", name):
            return tera * 1e12
    return None


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

    def write(temporary):
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except Exception as error:  # safetensors reports I/O faults as its own SafetensorError
            raise OSError(f"{path}: cannot write ({error})") from None

    write_atomic(path, write)


def read_tensors(path):
    """-> {name: tensor} on the CPU; UserError if it is no safetensors file."""
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


# ------------------------------------------------------------------------- random number generators
def rng_state():
    """torch's generators, on the CPU and every GPU: nothing in a training draws from any other."""
    state = {"torch": torch.get_rng_state()}
    for i in range(torch.cuda.device_count()):
        state[f"cuda{i}"] = torch.cuda.get_rng_state(i)
    return state


def set_rng_state(state):
    """The inverse of `rng_state`; a GPU that the state does not know goes on as it is."""
    torch.set_rng_state(state["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda{i}"], i)


def all_rng_states():
    """The generators of every rank -> {rank.name: tensor}; all ranks must call it."""
    states = [rng_state()]
    if dist.is_initialized():
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, rng_state())
    named = {}
    for rank, state in enumerate(states):
        named |= {f"{rank}.{name}": tensor for name, tensor in state.items()}
    return named


def set_all_rng_states(states, rank, seed):
    """The inverse. A rank unknown to the states, when there are more now, starts from the seed."""
    prefix = f"{rank}."
    own = {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
    if own:
        set_rng_state(own)
    else:
        torch.manual_seed(seed + rank)


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
    final = out / "state" / f"step-{step:08d}"
    temporary = out / "state" / f"writing-{step:08d}"
    if final.is_dir():  # saved by a periodic save just now, or by a run that then crashed
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
    """Make OUT's own model files those of `checkpoint`; config.json comes last."""
    for stale in out.glob("*.tmp"):  # of a crash
        stale.unlink()
    files = [file for file in checkpoint.iterdir() if file.name not in STATE_FILES]
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        write_atomic(out / file.name, functools.partial(shutil.copyfile, file))


def latest_checkpoint(out):
    """The newest complete OUT/state/step-N, or None."""
    return max(Path(out, "state").glob("step-*"), default=None)
