"""The forward pass in C++ (forward.cpp): compiled on first use, fed with a model's packed weights.

    python -m engine.native --out DIR    # compile for this architecture, as an image does it

The Runner asks for it on a CPU. Where there is no compiler, or a model has something that
forward.cpp does not know, `Native` raises Unavailable with the reason, and forward.py computes the
same with torch.
tests/engine/test_native.py holds both equal to model.py.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from array import array
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, cli, parse_flags, write_atomic
from engine.weights import rope_tables, stack_adapters
from quant import NF4Linear, QuantLinear, in_kind

SOURCE = Path(__file__).with_name("forward.cpp")
ROOT_ID = 0  # the administrator, who builds images
PAGE = 16  # tokens of a block of the cache, forward.cpp's PAGE
MADV_PAGEOUT = 21  # linux/mman.h: these pages are not needed soon; nothing is lost
FLOAT32, FLOAT16, INT8, INT4 = range(4)  # forward.cpp's Kind
KV_KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16}  # types of keys and values it knows


class Unavailable(UserError):
    """Why torch has to do it."""


# ---------------------------------------------------------------------- forward.cpp's structs
def fields(kind, names):
    """Neighbours of one type in a struct."""
    return [(name, kind) for name in names.split()]


class Linear(Structure):
    _fields_ = [
        *fields(c_int32, "kind N K group"),
        *fields(c_void_p, "weight scale zero order bias"),
        *fields(c_int32, "inputs rank"),
        *fields(c_void_p, "a b rank_scale"),
    ]


Norm = c_void_p * 2  # gain, bias


class Layer(Structure):
    _fields_ = [
        *fields(Norm, "norm1 norm2 q_norm k_norm"),
        ("qkv", Linear * 3),
        ("out", Linear),
        ("up", Linear * 2),
        ("down", Linear),
        *fields(c_void_p, "keys values"),
        ("window", c_int64),
    ]


class Model(Structure):
    _fields_ = [
        *fields(c_int32, "L C H KV D M"),
        ("eps", c_float),
        ("cached", c_int32),
        ("layer_bytes", c_int64),
        *fields(c_void_p, "cache embed places cos sin"),
        ("norm", Norm),
        ("layers", POINTER(Layer)),
        ("head", Linear),
    ]


# ---------------------------------------------------------------------------------------- compiling
# The instructions by name, since older compilers do not know the levels of x86-64.
AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
LEVELS = {"avx512-vnni": AVX512, "avx2": AVX2, "plain": ""}


def level():
    """The best of LEVELS that this machine can run; not on x86-64 torch says no to all."""
    if torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported():
        return "avx512-vnni"
    return "avx2" if torch.cpu._is_avx2_supported() else "plain"


def compile_to(path, name):
    """forward.cpp -> a shared library; it appears under its name only when it is whole."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise Unavailable("there is no C++ compiler (g++) on this machine")
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", *LEVELS[name].split()]
    command = [*compiler.split(), *flags, str(SOURCE), "-o"]

    def make(temporary):
        done = subprocess.run([*command, str(temporary)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            said = [line for line in lines if "error" in line][:1] or lines[:1]
            raise Unavailable(f"{compiler} could not compile forward.cpp: {said}")

    write_atomic(path, make)
    path.chmod(0o755)  # or others of the group might write to it, see check_owner


def check_owner(path):
    """A library is code: it is loaded only if nobody but this user and root could have put it
    there."""
    for place in (path, path.parent) if hasattr(os, "getuid") else ():  # not on Windows
        status = place.stat()
        if status.st_uid not in (ROOT_ID, os.getuid()) or status.st_mode & 0o022:
            raise Unavailable(
                f"{place} is another user's, or others may write to it "
                f"(mode {status.st_mode & 0o777:o}): delete it, or chmod go-w"
            )


def library_path(name, folder=None):
    """Where a level's library lies. A hash of what it is made with keeps old ones from being
    found; a folder's, made for an image, serves whatever CXX is there."""
    made_with = LEVELS[name] + ("" if folder else os.environ.get("CXX", ""))
    key = hashlib.sha256(SOURCE.read_bytes() + made_with.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-forward"
    return Path(folder or cache) / f"forward-{name}-{key}.so"


@functools.lru_cache
def library():
    """forward.cpp compiled: beforehand beside this file, or in the user's cache, or now."""
    name = level()
    path = library_path(name, SOURCE.parent / "build")
    if not path.is_file():
        path = library_path(name)
    try:
        if not path.is_file():
            compile_to(path, name)
        check_owner(path)
        lib = ctypes.CDLL(str(path))
    except OSError as error:  # of a folder that cannot be written, too
        raise Unavailable(f"{path} does not load ({error}): delete it or set CXX") from None
    i, p = c_int32, c_void_p
    lib.forward.argtypes = [POINTER(Model), i, p, p, i, p, p, i, p, p, i, i]
    lib.forward.restype = None
    return lib


@contextlib.contextmanager
def quiet_torch(native):
    """Inside, torch computes with one thread, where forward.cpp computes too.

    Its other threads would spin for milliseconds on cores that forward.cpp's threads need.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if native else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def return_memory(module, kind):
    """Give the system back what packing a module freed, and the pages of its weights in the file.

    Else a model would be there twice while it is loaded, and glibc would keep half of it. Without
    a `kind` the weights may be those of a model that is being trained, which stay in memory.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "malloc_trim"):  # musl
        return
    libc.malloc_trim(0)
    page = os.sysconf("SC_PAGE_SIZE")
    for p in module.parameters() if kind else ():
        begin = -(-p.data_ptr() // page) * page
        size = (p.data_ptr() + p.nbytes - begin) // page * page
        if size > 0:
            libc.madvise(c_void_p(begin), c_size_t(size), MADV_PAGEOUT)


# ------------------------------------------------------------------------------------------ packing
class Native:
    """A model as forward.cpp reads it, with its cache; forward.TorchForward is its twin."""

    def __init__(self, model, kind=None, adapters=None, kv_dtype=torch.float32, block_size=PAGE):
        """kind: None, "16", "int8", "int4"; adapters as in weights.stack_adapters."""
        c = self.config = model.config
        for problem, found in (
            (f"heads of {c.head_dim}", c.head_dim % 16 or c.head_dim > 512),
            (f"a width of {c.hidden_size}", c.hidden_size % 16),
            (f"an inner width of {c.intermediate_size}", c.intermediate_size % 16),
            (f"a cache of {kv_dtype}", kv_dtype not in KV_KINDS),
            (f"blocks of {block_size}", block_size != PAGE),
        ):
            if found:
                raise Unavailable(f"forward.cpp does not do {problem}")
        self.lib = library()
        self.lanes = self.lib.lanes()
        self.kept = []  # tensors whose memory C++ reads
        self.old = iter(())  # what `kept` was, in the same order, while weights are packed anew
        self.adapter_count = len(adapters or {})
        self.threads = torch.get_num_threads()
        self.kind = kind
        self.layers, self.model = self.pack(model, stack_adapters(model, adapters or {}))

    def refresh(self, model):
        """Pack the weights of a model that was trained on, in place; it has no adapter stacks."""
        self.old = iter(self.kept)
        self.kept = []
        self.pack(model, {})

    def pack(self, model, stacks):
        """-> (its Layers, its Model), which point at the packed weights."""
        c = self.config
        # the largest first, while memory is still free for what its packing takes for a moment
        head = self.linear(model.lm_head, stacks)
        return_memory(model.lm_head, self.kind)
        layers = [self.layer(i, block, stacks) for i, block in enumerate(model.layers)]
        layers = (Layer * len(layers))(*layers)
        embed = self.floats(model.embed_tokens.weight)
        self.embedding = self.kept[-1]  # the Runner asks for its device, as of TorchForward's
        return_memory(model.embed_tokens, self.kind)
        cos, sin = map(self.floats, rope_tables(model))
        return layers, Model(
            L=len(layers),
            C=c.hidden_size,
            H=c.num_attention_heads,
            KV=c.num_key_value_heads,
            D=c.head_dim,
            M=c.intermediate_size,
            eps=c.norm_eps,
            embed=embed,
            places=self.floats(model.embed_positions.weight) if c.is_gpt2 else None,
            cos=cos,
            sin=sin,
            norm=self.norm(model.norm),
            layers=layers,
            head=head,
        )

    def norm(self, norm):
        if norm is None:
            return Norm()
        return Norm(self.floats(norm.weight), self.floats(getattr(norm, "bias", None)))

    def layer(self, i, block, stacks):
        products = []
        for layers in block.products():
            products.append([self.linear(layer, stacks) for layer in layers])
        qkv, (out,), up, (down,) = products
        return_memory(block, self.kind)
        c = self.config
        return Layer(
            norm1=self.norm(block.input_layernorm),
            norm2=self.norm(block.post_attention_layernorm),
            q_norm=self.norm(block.self_attn.q_norm),
            k_norm=self.norm(block.self_attn.k_norm),
            qkv=tuple(qkv),
            out=out,
            up=tuple(up),
            down=down,
            window=c.sliding_window if i in c.sliding_layers else 0,
        )

    def keep(self, tensor):
        """-> where C++ finds these values: in `refresh` the memory that it reads already, so that
        the pointers in its structs stay right."""
        place = next(self.old, tensor)
        if place is not tensor:
            place.copy_(tensor)
        self.kept.append(place)
        return place.data_ptr()

    def floats(self, tensor):
        return None if tensor is None else self.keep(tensor.detach().float().contiguous())

    def panels(self, t):
        """(N, K, ...) -> where C++ finds it as (N/lanes, K, lanes, ...), rows padded with zeros."""
        t = torch.cat((t, t.new_zeros(-t.size(0) % self.lanes, *t.shape[1:])))
        return self.keep(t.unflatten(0, (-1, self.lanes)).transpose(1, 2).contiguous())

    def linear(self, layer, stacks):
        """A layer in the order in which forward.cpp reads it, in the format that it has or, if it
        is in floats, in that of `kind`; with its AdapterStack, if it has one."""
        stack = stacks.get(layer)
        layer = in_kind(layer, self.kind)
        base = getattr(layer, "base", layer)  # the weight of an adapted layer is the merged one
        if isinstance(base, nn.Linear):
            made = self.float_linear(layer)
        elif isinstance(layer, QuantLinear) and not isinstance(layer, NF4Linear):
            made = self.packed_linear(layer)
        else:
            raise Unavailable(f"forward.cpp does not do {type(layer).__name__}")
        made.inputs = layer.in_features
        made.bias = self.floats(base.bias)
        if stack is not None:
            made.rank = len(stack.A)
            made.a = self.floats(stack.A)
            made.b = self.panels(stack.B)
            made.rank_scale = self.floats(stack.rank_scale)
        return made

    def float_linear(self, layer):
        """Of kind "16" or in 16 bits: float16, if all weights fit it."""
        weight = layer.weight.detach()  # (N, K)
        N, K = weight.shape
        small = self.kind == "16" or weight.dtype != torch.float32
        if small and weight.abs().max() < 65504:
            return Linear(FLOAT16, N, K, K, self.panels(weight.half()))
        return Linear(FLOAT32, N, K, K, self.panels(weight.float()))

    def packed_linear(self, layer):
        codes, scale, zero, group, order, bits = layer.groups()  # codes (N, K)
        N, K = codes.shape
        size = min(group, K)
        if size % 8 and size < K:
            raise Unavailable(f"forward.cpp does not do groups of {group}")
        size = -(-size // 8) * 8
        if size * 255 * 127 >= 1 << 31:
            raise Unavailable(
                f"forward.cpp does not do {size:,} inputs with one scale: "
                "their sum of products may not fit 32 bits"
            )
        codes = F.pad(codes, (0, -K % size))
        if bits > 4:
            kind = INT8
            codes = codes.unflatten(1, (-1, 4))  # (N, K/4, 4)
        else:
            kind = INT4
            low, high = codes.unflatten(1, (-1, 2, 4)).unbind(2)  # (N, K/8, 4) each
            codes = low | high << 4
        pointers = map(self.panels, (codes, scale.half(), zero.half()))
        if order is not None:
            order = self.keep(order.int())
        return Linear(kind, N, -(-K // size) * size, size, *pointers, order)

    @property
    def weight_bytes(self):
        return sum(tensor.nbytes for tensor in self.kept)

    # -- the cache and a step
    def allocate(self, blocks, dtype):
        """Make keys (layers, blocks, KV, D, PAGE) and values (layers, blocks, KV, PAGE, D)."""
        c = self.config
        shape = 2, len(self.layers), blocks, c.num_key_value_heads, c.head_dim * PAGE
        self.cache = torch.zeros(shape, dtype=dtype)
        self.model.cached = KV_KINDS[dtype]
        self.model.layer_bytes = self.cache.stride(1) * dtype.itemsize
        self.model.cache = self.cache.data_ptr()

    def with_cache(self, blocks, dtype):
        """The same weights with another cache."""
        twin = copy.copy(self)
        twin.model = Model.from_buffer_copy(self.model)
        twin.allocate(blocks, dtype)
        return twin

    def __call__(self, batch, hidden=False):
        """A runner.StepBatch -> logits (R, V), or with hidden what the head reads, (R, C)."""
        counts, pasts, starts, sizes = batch.layout()
        first_blocks = np.cumsum(sizes) - sizes
        spans = np.stack((starts, counts, pasts, first_blocks), 1).astype(np.int32)  # (S, 4)
        blocks = batch.blocks()
        ids = array("q", batch.ids)
        rows = array("q", batch.rows)
        adapters = np.zeros(len(ids), np.int32)  # without adapters nothing reads them
        if self.adapter_count:
            # -1, no adapter, becomes the last row of a stack's `rank_scale`
            own = np.array(batch.adapters, np.int32) % (self.adapter_count + 1)
            adapters = np.repeat(own, counts)
        out = torch.empty(len(rows), self.model.C if hidden else self.model.head.N)

        tokens = len(ids), ids.buffer_info()[0], adapters.ctypes.data
        sequences = len(spans), spans.ctypes.data, blocks.ctypes.data
        wanted = len(rows), rows.buffer_info()[0], out.data_ptr(), hidden
        self.lib.forward(self.model, *tokens, *sequences, *wanted, self.threads)
        return out


# ------------------------------------------------------------------------------------------ command
@dataclass
class Args:
    out: str = ""  # folder for the libraries, engine/build for an image


def main():
    args = Args(**parse_flags(Args, __doc__))
    if not args.out:
        raise UserError("--out: name a folder for the libraries")
    for name in LEVELS if platform.machine() == "x86_64" else ["plain"]:
        path = library_path(name, args.out)
        compile_to(path, name)
        print(path)


if __name__ == "__main__":
    cli(main)
