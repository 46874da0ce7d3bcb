"""The forward pass in C++ (forward.cpp): compiled on first use, fed with a model's weights in the order it reads them.

    python native.py --out DIR           # compile for machines of this architecture, as an image does: the result needs no compiler

Runner (runner.py) asks for it on a CPU. Where there is no compiler, or a model has something that forward.cpp does not know,
`Native` raises Unavailable with the reason, and the Runner computes the same with torch.
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
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, cli, write_atomic
from quant import QuantLinear, in_kind

SOURCE = Path(__file__).with_name("forward.cpp")
PAGE = 16  # tokens of a block of the cache, forward.cpp's PAGE
FLOAT32, FLOAT16, INT8, INT4 = range(4)
CACHED = {torch.float32: FLOAT32, torch.float16: FLOAT16}  # types of keys and values that it knows


class Unavailable(UserError):
    """Why torch has to do it."""


class Linear(Structure):
    _fields_ = (
        [(name, c_int32) for name in ("kind", "N", "K", "group")]
        + [(name, c_void_p) for name in ("weight", "scale", "zero", "order", "bias")]
        + [("inputs", c_int32), ("rank", c_int32)]
        + [(name, c_void_p) for name in ("a", "b", "keep", "gain")]
    )


Norm = c_void_p * 2  # gain, bias


class Layer(Structure):
    _fields_ = [
        ("norm1", Norm),
        ("norm2", Norm),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("qkv", Linear * 3),
        ("out", Linear),
        ("up", Linear * 2),
        ("down", Linear),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
    ]


class Model(Structure):
    _fields_ = [
        ("L", c_int32),
        ("C", c_int32),
        ("H", c_int32),
        ("KV", c_int32),
        ("D", c_int32),
        ("M", c_int32),
        ("eps", c_float),
        ("cached", c_int32),
        ("embed", c_void_p),
        ("places", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("norm", Norm),
        ("layers", POINTER(Layer)),
        ("head", Linear),
    ]


# ---------------------------------------------------------------------------------------- compiling
AVX2 = (
    "-mavx2 -mfma -mf16c -mbmi2"  # by name, since older compilers do not know the levels of x86-64
)
LEVELS = {
    "avx512-vnni": f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni",
    "avx2": AVX2,
    "plain": "",
}


def level():
    """The best of LEVELS that this machine can run."""
    if platform.machine() != "x86_64":
        return "plain"
    if torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported():
        return "avx512-vnni"
    return "avx2" if torch.cpu._is_avx2_supported() else "plain"


def compile_to(path, name):
    """forward.cpp -> a shared library; it appears under its name only when it is whole."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise Unavailable("there is no C++ compiler (g++) on this machine")
    path.parent.mkdir(parents=True, exist_ok=True)

    def make(temporary):
        flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", *LEVELS[name].split()]
        got = subprocess.run(
            [*compiler.split(), *flags, str(SOURCE), "-o", str(temporary)],
            capture_output=True,
            text=True,
        )
        if got.returncode:
            raise Unavailable(
                f"{compiler} could not compile forward.cpp: {got.stderr.strip().splitlines()[:1]}"
            )

    write_atomic(path, make)


def library_path(name, folder=None):
    """Its name says what it was made of: another source or another machine never finds an old one."""
    key = hashlib.sha256(SOURCE.read_bytes() + LEVELS[name].encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-forward"
    return Path(folder or cache) / f"forward-{name}-{key}.so"


@functools.lru_cache
def library():
    """The compiled forward.cpp: one made beforehand beside this file, else one in the user's cache, compiled now if need be."""
    name = level()
    path = library_path(name, SOURCE.parent / "build")
    path = path if path.is_file() else library_path(name)
    if not path.is_file():
        try:
            compile_to(path, name)
        except OSError as error:
            raise Unavailable(f"{path.parent} cannot be written ({error.strerror})") from None
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} does not load ({error}): delete it") from None
    lib.linear.restype = lib.forward.restype = None
    lib.linear.argtypes = [POINTER(Linear), c_int32, c_void_p, c_void_p, c_int32]
    lib.forward.argtypes = [
        POINTER(Model),
        c_int32,
        c_void_p,
        c_void_p,
        c_int32,
        c_void_p,
        c_void_p,
        c_int32,
        c_void_p,
        c_void_p,
        c_void_p,
        c_int32,
    ]
    return lib


# ------------------------------------------------------------------------------------------ packing
def in_panels(t, lanes):
    """(N, K, ...) -> (N/lanes, K, lanes, ...), rows padded with zeros."""
    t = torch.cat((t, t.new_zeros(-t.size(0) % lanes, *t.shape[1:])))
    return t.unflatten(0, (-1, lanes)).transpose(1, 2).contiguous()


@contextlib.contextmanager
def quiet_torch():
    """Inside, torch computes with one thread: its others would spin for milliseconds on cores that forward.cpp's threads need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Panels:
    """Linear layers in the order in which forward.cpp reads them."""

    adapters = ()

    def __init__(self):
        self.lib, self.kept = library(), []  # kept: tensors whose memory C++ reads

    def keep(self, tensor):
        self.kept.append(tensor)
        return tensor.data_ptr()

    def multiply(self, layer, x):
        """x (M, K) float32 by a Linear -> (M, N)."""
        x, y = x.contiguous(), x.new_empty(len(x), layer.N)
        self.lib.linear(layer, len(x), x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y

    def floats(self, tensor):
        return None if tensor is None else self.keep(tensor.detach().float().contiguous())

    def linear(self, m, kind=None):
        """One layer in panels, in the format it has or, if it is still in floats, in that of `kind`."""
        if hasattr(
            m, "adapters"
        ):  # lora.LoRALinear: its base, and all adapters stacked along the rank
            if not set(m.adapters) & set(self.adapters):
                return self.linear(m.base, kind)
            m.make_stack(self.adapters)
            (A, B, keep, gain), made = m.stack, self.linear(m.base, kind)
            made.rank, made.a, made.b = (
                len(A),
                self.floats(A),
                self.floats(in_panels(B.detach().float(), self.lib.lanes())),
            )
            made.keep, made.gain = self.floats(keep), self.floats(gain)
            return made
        lanes, bias = self.lib.lanes(), getattr(m, "bias", None)
        m = in_kind(m, kind)
        if type(m) is nn.Linear:
            (N, K), weight = m.weight.shape, m.weight.detach().float()
            half = (kind == "16" or m.weight.dtype != torch.float32) and weight.abs().max() < 65504
            weight = self.keep(in_panels(weight.half() if half else weight, lanes))
            return Linear(
                FLOAT16 if half else FLOAT32, N, K, K, weight, bias=self.floats(bias), inputs=K
            )
        if not hasattr(m, "groups"):
            raise Unavailable(f"forward.cpp does not do {type(m).__name__}")
        codes, scale, zero, group, order, bits = m.groups()
        (N, K), size = codes.shape, min(group, codes.size(1))
        if size % 8 and size < K:
            raise Unavailable(f"forward.cpp does not do groups of {group}")
        size = -(-size // 8) * 8
        if size * 255 * 127 >= 1 << 31:
            raise Unavailable(
                f"forward.cpp does not do {size:,} inputs with one scale: their sum of products may not fit 32 bits"
            )
        codes = F.pad(codes, (0, -K % size))
        if bits > 4:
            weight = in_panels(codes.unflatten(1, (-1, 4)), lanes)  # (N/W, K/4, W, 4)
        else:
            low, high = codes.unflatten(1, (-1, 2, 4)).unbind(2)  # (N, K/8, 4) each
            weight = in_panels(low | high << 4, lanes)
        packed = map(
            self.keep, (weight, in_panels(scale.half(), lanes), in_panels(zero.half(), lanes))
        )
        order = None if order is None else self.keep(order.int())
        return Linear(
            INT8 if bits > 4 else INT4, N, codes.size(1), size, *packed, order, self.floats(bias), K
        )


class Product(Panels):
    """One packed layer: (M, K) float32 -> (M, N) float32, without the bias."""

    def __init__(self, layer):
        super().__init__()
        self.layer = self.linear(layer)
        self.layer.bias = None

    def __call__(self, x):
        return self.multiply(self.layer, x)

    def __deepcopy__(self, memo):
        return self  # nothing in it changes


def install_products(module):
    """Give every packed layer of a module the product of forward.cpp, as its `fast_product`, where it knows one."""
    for layer in module.modules():
        if isinstance(layer, QuantLinear) and next(layer.buffers()).device.type == "cpu":
            try:
                layer.fast_product = Product(layer)
            except Unavailable:
                layer.fast_product = None


class Native(Panels):
    """A model as forward.cpp reads it, with its cache. kind: as in runner.pack."""

    def __init__(
        self, model, kind, cos=None, sin=None, adapters=(), kv_dtype=torch.float32, block_size=PAGE
    ):
        """cos, sin (positions, D), the sine's first half negated; adapters: names of LoRA adapters, counted in this order."""
        c, self.adapters = model.config, adapters
        for problem, found in (
            (f"heads of {c.head_dim}", c.head_dim % 16 or c.head_dim > 512),
            (f"a width of {c.hidden_size}", c.hidden_size % 16),
            (f"an inner width of {c.intermediate_size}", c.intermediate_size % 16),
            (f"a cache of {kv_dtype}", kv_dtype not in CACHED),
            (f"blocks of {block_size}", block_size != PAGE),
        ):
            if found:
                raise Unavailable(f"forward.cpp does not do {problem}")
        super().__init__()
        self.config, self.threads = c, torch.get_num_threads()
        self.layers = (Layer * len(model.layers))(
            *(self.layer(i, block, kind) for i, block in enumerate(model.layers))
        )
        tensors = map(
            self.floats,
            (
                model.embed_tokens.weight,
                model.embed_positions.weight if c.is_gpt2 else None,
                cos,
                sin,
            ),
        )
        self.model = Model(
            len(model.layers),
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.intermediate_size,
            c.norm_eps,
            FLOAT32,
            *tensors,
            self.norm(model.norm),
            self.layers,
            self.linear(model.lm_head, kind),
        )

    def norm(self, m):
        return Norm(self.floats(getattr(m, "weight", None)), self.floats(getattr(m, "bias", None)))

    def layer(self, i, block, kind):
        a, c = block.self_attn, self.config
        norms = (
            block.input_layernorm,
            block.post_attention_layernorm,
            getattr(a, "q_norm", None),
            getattr(a, "k_norm", None),
        )
        qkv, out, up, down = (
            [self.linear(p, kind) for p in together] for together in block.products()
        )
        return Layer(
            *map(self.norm, norms),
            (Linear * 3)(*qkv),
            *out,
            (Linear * 2)(*up),
            *down,
            None,
            None,
            c.sliding_window if i in c.sliding_layers else 0,
        )

    # -- the cache and a step
    @property
    def weight_bytes(self):
        return sum(t.nbytes for t in self.kept)

    def allocate(self, blocks, dtype):
        """-> keys (layers, blocks, KV, D, PAGE) and values (layers, blocks, KV, PAGE, D) of dtype, float32 or float16."""
        self.model.cached = CACHED[dtype]
        c = self.config
        shape = len(self.layers), blocks, c.num_key_value_heads
        keys, values = (
            torch.zeros(*shape, *page, dtype=dtype)
            for page in ((c.head_dim, PAGE), (PAGE, c.head_dim))
        )
        for i, layer in enumerate(self.layers):
            layer.keys, layer.values = keys[i].data_ptr(), values[i].data_ptr()
        return keys, values

    def __call__(self, batch, hidden=False):
        """A runner.Batch -> logits (R, V), None where no row is wanted; or what the head would read, (R, C)."""
        spans, blocks = array("i"), array("i")
        for start, n, past, own in batch.spans:
            spans.extend((start, n, past, len(blocks)))
            blocks.extend(own[: (past + n - 1) // PAGE + 1])
        ids, rows, adapters = (
            array("q", batch.ids),
            array("q", batch.rows),
            array("i", bytes(4 * len(batch.ids))),
        )
        if self.adapters:
            adapters = array(
                "i", [len(self.adapters) if a < 0 else a for a in batch.token_adapters()]
            )
        out = torch.empty(len(rows), self.model.C if hidden else self.model.head.N)
        at = [a.buffer_info()[0] for a in (ids, adapters, spans, blocks, rows)]
        self.lib.forward(
            self.model,
            len(ids),
            *at[:2],
            len(batch.spans),
            *at[2:4],
            len(rows),
            at[4],
            *((None, out.data_ptr()) if hidden else (out.data_ptr(), None)),
            self.threads,
        )
        return out if len(rows) else None

    def alone(self):
        """The same weights for another cache."""
        twin = copy.copy(self)
        twin.layers = type(self.layers).from_buffer_copy(self.layers)
        twin.model = Model.from_buffer_copy(self.model)
        twin.model.layers = twin.layers
        return twin

    def head(self, x):
        """(R, C) -> logits (R, V)."""
        return self.multiply(self.model.head, x)


def main():
    if len(sys.argv) != 3 or sys.argv[1] != "--out":
        raise UserError("usage: python native.py --out DIR")
    for name in LEVELS if platform.machine() == "x86_64" else ["plain"]:
        path = library_path(name, sys.argv[2])
        compile_to(path, name)
        print(path)


if __name__ == "__main__":
    cli(main)
