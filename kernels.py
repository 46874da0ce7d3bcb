"""The Triton kernels of the GPU path, each beside the plain torch twin that defines it.

    python -m pytest tests/test_kernels.py   # without a GPU they run in Triton's interpreter
    python bench.py kernels                  # GB/s of each, beside the rate at which it reads

A twin has the kernel's signature. A public function runs the kernel for CUDA tensors (for any
tensor if TRITON_INTERPRET=1) and its `_twin` otherwise. `linear` and `dequantize` leave that to
their caller: their twins are `plain` and `dequantize` of quant.QuantLinear.
"""

import contextlib
import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import UserError, read_json, write_json

try:
    import triton
    import triton.language as tl
    from triton import jit, next_power_of_2
    from triton.language import constexpr
except ImportError:  # Windows, macOS: the twins serve
    triton = None
    constexpr = int

    def jit(kernel=None, **options):
        return kernel or jit


# Triton reads the variable when it is imported; a constexpr may be used inside kernels, too.
INTERPRET = constexpr(triton is not None and os.environ.get("TRITON_INTERPRET") == "1")


# ------------------------------------------------------------------------------ choosing and tuning
def use_kernel(x):
    """Whether a kernel computes x here. If so on a GPU, Triton launches on x's device."""
    if triton is None or not x.is_cuda:
        return INTERPRET
    torch.cuda.set_device(x.device)
    return compiles(x.device)


@functools.cache
def compiles(device):
    """Whether Triton runs on the device at all; if not, a line says why."""
    x = torch.zeros(1, 1, 16, device=device)
    try:
        store_rows(x, x[None].clone(), None, torch.zeros(1, dtype=torch.int64, device=device))
    except Exception as error:  # no C compiler, a card that is too old, whatever it trips over
        why = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"kernels  Triton fails here ({why}); plain torch computes", file=sys.stderr)
        return False
    return True


@functools.cache
def card(device):
    """Its name, and the number of its multiprocessors, which must all be kept busy."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device)
    return SimpleNamespace(name="cpu", multi_processor_count=4)


def parts_of_work(programs, wanted, most):
    """How many parts (a power of two up to `most`) of each program make at least `wanted`."""
    parts = 1
    while programs * parts < wanted and parts * 2 <= most:
        parts *= 2
    return parts


class TuningTable:
    """{key: configuration}, kept in a file: one for each card and Triton version."""

    def __init__(self, device):
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llm-kernels"
        name = card(device).name.replace(" ", "-")
        self.path = folder / f"{name}-triton-{triton.__version__}.json"
        self.closed = False  # what is not in it is not tuned any more
        self.doubted = False
        self.choices = {}
        try:
            self.choices = read_json(self.path)
        except FileNotFoundError:
            pass
        except (OSError, UserError) as error:
            self.doubt(error)

    def choice(self, key, configs):
        """What was chosen among configs, or "twin"; None if it was not, or by another version."""
        choice = self.choices.get(key)
        if choice in [None, "twin", *configs]:
            return choice
        self.doubt(f"{self.path}: another version wrote it")

    def doubt(self, why):
        if not self.doubted:
            print(f"kernels  tuning again: {why}", file=sys.stderr)
        self.doubted = True

    def tune(self, key, configs, launch):
        """Time them all, which takes seconds, and keep the fastest."""
        times = [milliseconds(launch, config) for config in configs]
        self.choices[key] = configs[times.index(min(times))]
        if min(times) == float("inf"):
            self.leave_to_twin(key)
        with contextlib.suppress(OSError):  # a folder that is read-only: every run tunes again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.choices)

    def take_first(self, key, configs, launch):
        """Without tuning: the first that the card has room for -> its result."""
        for config in configs:
            with contextlib.suppress(triton.TritonError):
                result = launch(config)
                self.choices[key] = config
                return result
        self.leave_to_twin(key)

    def leave_to_twin(self, key):
        self.choices[key] = "twin"
        message = f"{key}: no configuration compiles for this card; plain torch computes"
        print(f"kernels  {message}", file=sys.stderr)


@functools.cache
def tuning_table(device):
    return TuningTable(device)


def milliseconds(launch, config):
    """Median time of launch(config) with a cold L2; infinite where the card cannot run it."""
    try:
        return triton.testing.do_bench(
            lambda: launch(config), warmup=5, rep=30, return_mode="median"
        )
    except torch.OutOfMemoryError:
        raise  # it says nothing about the card
    except (triton.TritonError, RuntimeError):
        return float("inf")


def tuned(key, configs, launch, device):
    """launch(config) with the fastest of `configs` (the last is the smallest) -> its result.

    None if the card has room for none of them. The first call with a new key tunes it, unless the
    table is closed: then, while requests wait, the first that runs serves. Shapes whose sizes share
    the next power of two share a key. While a CUDA graph is captured, or without the 256 MB that
    timing takes, an unknown key runs the smallest: call once before capturing.
    """
    if INTERPRET:
        return launch(configs[0])
    table = tuning_table(device)
    choice = table.choice(key, configs)
    if choice is None:
        if torch.cuda.is_current_stream_capturing():
            return launch(configs[-1])
        if table.closed:
            return table.take_first(key, configs, launch)
        try:
            table.tune(key, configs, launch)
        except torch.OutOfMemoryError:
            return launch(configs[-1])
        choice = table.choices[key]
    return None if choice == "twin" else launch(choice)


# ----------------------------------------------------------------------------- tiles of a matrix
@jit
def _read(at, mask):
    """Numbers of any type as float32, 0 where the mask is False."""
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@jit
def _tile(matrix, rows, cols, width, mask):
    """The elements at rows x cols of a matrix with `width` columns.

    0 beyond these, and in rows whose mask is False."""
    mask = mask[:, None] & (cols < width)[None, :]
    at = rows.to(tl.int64)[:, None] * width + cols[None, :]
    return tl.load(matrix + at, mask=mask, other=0.0)


@jit
def _put(matrix, value, rows, cols, width, mask):
    """The reverse of `_tile`, in the matrix's type."""
    mask = mask[:, None] & (cols < width)[None, :]
    at = rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(matrix + at, value.to(matrix.dtype.element_ty), mask=mask)


@jit
def _dot(a, b, acc):
    """acc + a @ b on the tensor cores, summed in float32; float32 operands stay float32."""
    if INTERPRET:  # which multiplies bf16 as bare bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# A byte becomes a float by placing its bits under the exponent of 1: one shift and one logical
# operation. The conversion instruction for bytes runs at an eighth of an addition's rate, slower
# than memory delivers bytes. These masks keep the low or the high nibble of such a float.
LOW_NIBBLE = constexpr(0x3F878000)
HIGH_NIBBLE = constexpr(0x3FF80000)


@jit
def _one_and(byte):
    """A byte b -> the float32 1 + b / 256; of an int8 b: 1.5 + b / 256."""
    bits = (byte.to(tl.uint8, bitcast=True).to(tl.int32) << 15) | 0x3F800000
    if byte.dtype == tl.int8:
        bits = bits ^ 0x400000  # + 128: two's complement as unsigned
    return bits.to(tl.float32, bitcast=True)


@jit
def _keep(value, BITS):
    """1 + byte / 256 -> 1 + low / 256 or 1 + high / 16."""
    return (value.to(tl.int32, bitcast=True) & BITS).to(tl.float32, bitcast=True)


@jit
def _values(tile, like):
    """A tile in the type of another; int8 by its bits, too."""
    if tile.dtype == tl.int8:
        value = _one_and(tile) * 256 - 384
    else:
        value = tile.to(tl.float32)
    return value.to(like.dtype)


@jit
def _nf4(byte, table):
    """Bytes -> (even columns, odd columns), float32. The table's 16 values are one line of the L1.

    bitsandbytes has the even column in the high nibble; int4 has it in the low one."""
    return tl.load(table + (byte >> 4)), tl.load(table + (byte & 15))


# ------------------------------------------------------------------------ weight-only linear layers
# Decoding reads every weight once per token, so a layer takes at least (bytes of packed weights) /
# (memory bandwidth). Up to about 64 rows of x share that one reading. From DEQUANTIZE_ABOVE rows on
# the products take longer than writing the weights out in 16 bits, and cuBLAS multiplies faster.
DEQUANTIZE_ABOVE = 512

# NormalFloat4 (QLoRA, Dettmers et al. 2023, appendix E): quantiles of N(0, 1), 0 exact, ends +-1
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.cache
def nf4_table(device):
    return torch.tensor(NF4, device=device)


class Packed(NamedTuple):
    """Packed weights of an (N, K) layer. The rows of W follow each other:

    int8   byte k = W[n, k]                                       W = (byte - 128) * scale[n]
    int4   byte j = W[n, 2j] low nibble, W[n, 2j+1] high nibble   W = (nibble - zero) * scale,
           both at [n, k // group]
    nf4    byte j = W[n, 2j] HIGH nibble, W[n, 2j+1] low nibble   W = NF4[nibble] * scale,
           at [(n*K + k) // group]
    """

    format: str
    weight: torch.Tensor  # uint8 (N, K), int4: (N, ceil(K/2)), nf4: (N*K/2,), bitsandbytes' order
    scales: torch.Tensor  # N of them; int4: (N, ceil(K/group)); nf4: (ceil(N*K/group),) float32
    N: int
    K: int
    group: int = 256  # columns that share a scale; the last group may be short
    zeros: torch.Tensor | None = None  # as int4's scales; None: all are 8

    @property
    def pack(self):
        """Weights a byte."""
        return 1 if self.format == "int8" else 2


@jit
def _sums(tile, SUB):
    """(R, B) -> (R, B / SUB): sums of SUB neighbours, which lie in the registers of one thread."""
    return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // SUB, SUB)), 2)


@jit
def _vector_sums(x, SUB):
    """The same of a vector: (B,) -> (1, B / SUB); as a tile it would make a loop longer."""
    return tl.sum(tl.reshape(x, (x.shape[0] // SUB, SUB)), 1)[None, :]


@jit
def _int4_sums(byte, x0, x1, zeros, where, inside, SUB):
    """Sums over SUB bytes of (low - zero) x0 + (high - zero) x1, divided by 256.

    low x0 + high x1 = low (x0 - x1/16) + byte x1/16: no shift, and low comes by clearing bits. What
    the ones of the bytes and the zero point add leaves the loop: sum (w - z) x = sum w x - z sum x.
    """
    both = _one_and(byte)
    low = _keep(both, LOW_NIBBLE)
    x1 /= 16
    part = _sums(low * (x0 - x1)[None, :] + both * x1[None, :], SUB)
    if zeros is None:  # the ones and the eights
        part -= _vector_sums(x0 * (1 + 8 / 256) + x1 / 2, SUB)
    else:
        zero = _read(zeros + where, inside[:, None]) / 256
        part -= _vector_sums(x0, SUB)
        part -= zero * _vector_sums(x0 + 16 * x1, SUB)
    return part


@jit
def _gemv(
    x,
    weight,
    scales,
    zeros,
    bias,
    table,
    out,
    M,
    N,
    K,
    width,
    groups,
    FORMAT: constexpr,
    GROUP: constexpr,
    BLOCK_N: constexpr,
    BLOCK_B: constexpr,
    SUB: constexpr,
    SPLIT: constexpr,
):
    """One row of x: out[split, n] = sum over this split's columns of W[n, k] x[k], on plain cores.

    A thread loads SUB = 16 neighbouring bytes at once, multiplies and adds them up in its
    registers, and then applies their one scale: some 3 instructions a weight, which a Hopper SM
    issues faster than memory delivers weights. M is only there for `_gemm`'s sake.
    """
    PACK: constexpr = 1 if FORMAT == "int8" else 2
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    acc = tl.zeros((BLOCK_N, BLOCK_B // SUB), tl.float32)
    for begin in range(tl.program_id(2) * BLOCK_B, width, SPLIT * BLOCK_B):
        cols = begin + tl.arange(0, BLOCK_B)
        byte = _tile(weight, rows, cols, width, inside)  # (BLOCK_N, BLOCK_B)
        k = begin * PACK + tl.arange(0, BLOCK_B * PACK)
        xs = _read(x + k, k < K)
        if FORMAT == "int8":
            acc += _sums(_one_and(byte) * xs[None, :], SUB)
            acc -= 1.5 * _vector_sums(xs, SUB)
        else:
            x0, x1 = tl.split(tl.reshape(xs, (BLOCK_B, 2)))  # even and odd columns of x
            sub = begin + tl.arange(0, BLOCK_B // SUB) * SUB
            where = rows[:, None] * groups + tl.minimum(sub * 2 // GROUP, groups - 1)[None, :]
            if FORMAT == "nf4":
                even, odd = _nf4(byte, table)
                part = _sums(even * x0[None, :] + odd * x1[None, :], SUB)
            else:
                part = _int4_sums(byte, x0, x1, zeros, where, inside, SUB)
            acc += part * _read(scales + where, inside[:, None])
    y = tl.sum(acc, 1) * (1 if FORMAT == "nf4" else 256)
    if FORMAT == "int8":
        y *= _read(scales + rows, inside)
    if bias is not None:
        y += _read(bias + rows, inside)
    tl.store(out + tl.program_id(2) * N + rows, y.to(out.dtype.element_ty), mask=inside)


@jit
def _four_bits(byte, scales, zeros, where, mask, table, FORMAT):
    """A tile of bytes whose rows have one scale each -> (even columns, odd columns) of W."""
    scale = _read(scales + where, mask)[:, None]
    if FORMAT == "nf4":
        even, odd = _nf4(byte, table)
        even *= scale
        odd *= scale
    else:  # (n - zero) * scale as one multiply-add each of 1 + low/256 and 1 + high/16
        zero = 8.0
        if zeros is not None:
            zero = _read(zeros + where, mask)[:, None]
        both = _one_and(byte)
        even = _keep(both, LOW_NIBBLE) * (256 * scale) - (256 + zero) * scale
        odd = _keep(both, HIGH_NIBBLE) * (16 * scale) - (16 + zero) * scale
    return even, odd


# Numbers that change from step to step (rows, sequences) are marked do_not_specialize: Triton would
# otherwise compile a kernel again whenever one becomes or stops being a multiple of 16.
@jit(do_not_specialize=["M"])
def _gemm(
    x,
    weight,
    scales,
    zeros,
    bias,
    table,
    out,
    M,
    N,
    K,
    width,
    groups,
    FORMAT: constexpr,
    GROUP: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_B: constexpr,
    SPLIT: constexpr,
):
    """Several rows of x: the transposed product W x^T, tile (BLOCK_N, BLOCK_M), on tensor cores.

    W is the left operand because that one may come from registers, where it is unpacked; x, the
    right one, may be as narrow as 16 rows. Even and odd columns are two products, so nibbles are
    never interleaved. A 4-bit tile lies in one group.
    """
    PACK: constexpr = 1 if FORMAT == "int8" else 2
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in range(tl.program_id(2) * BLOCK_B, width, SPLIT * BLOCK_B):
        cols = begin + tl.arange(0, BLOCK_B)
        byte = _tile(weight, rows, cols, width, inside)  # (BLOCK_N, BLOCK_B)
        k = begin * PACK + tl.arange(0, BLOCK_B * PACK)
        xs = _tile(x, ms, k, K, ms < M)  # (BLOCK_M, BLOCK_B * PACK)
        if FORMAT == "int8":
            acc = _dot((_one_and(byte) * 256 - 384).to(xs.dtype), tl.trans(xs), acc)
        else:
            where = rows * groups + begin * 2 // GROUP
            even, odd = _four_bits(byte, scales, zeros, where, inside, table, FORMAT)
            x0, x1 = tl.split(tl.reshape(xs, (BLOCK_M, BLOCK_B, 2)))  # even and odd columns of x
            acc = _dot(even.to(xs.dtype), tl.trans(x0), acc)
            acc = _dot(odd.to(xs.dtype), tl.trans(x1), acc)
    if FORMAT == "int8":
        acc *= _read(scales + rows, inside)[:, None]
    if bias is not None:
        acc += _read(bias + rows, inside)[:, None]
    _put(out, tl.trans(acc), tl.program_id(2) * M + ms, rows, N, ms < M)


def gemv_configs(group):
    """(rows, bytes, warps) of a program: 8 x 1024 keeps 4 loads of 16 bytes in flight a thread."""
    sub = min(16, (group & -group) // 2)  # bytes of one scale that a thread adds up
    tiles = (8, 1024, 4), (4, 1024, 4), (4, 2048, 4), (16, 512, 4)
    tiles += (8, 2048, 8), (4, 512, 2), (2, 1024, 2)
    return [dict(BLOCK_N=n, BLOCK_B=b, SUB=sub, num_warps=warps) for n, b, warps in tiles]


def gemm_configs(M, group, pack):
    """Tiles of weight rows, rows of x and columns, warps, and stages of the pipeline."""
    m = min(max(16, next_power_of_2(M)), 128)
    most = min(group & -group, 256) // pack  # a 4-bit tile lies in one group
    tiles = (64, m, 128, 4, 4), (64, m, 256, 4, 3), (128, m, 128, 4, 4), (128, m, 64, 8, 4)
    tiles += (32, m, 128, 2, 4), (32, m, 64, 4, 3), (32, m, 32, 2, 2), (32, 16, 32, 2, 2)
    return [
        dict(BLOCK_N=n, BLOCK_M=m, BLOCK_B=max(16, min(k // pack, most)), num_warps=w, num_stages=s)
        for n, m, k, w, s in tiles
    ]


def has_kernel(w):
    """Whether the 16 bytes that a thread reads, and the rows of a tile, have one scale."""
    return w.group & -w.group >= 32 and (w.format != "nf4" or w.K % w.group == 0)


def linear(x, w, bias=None):
    """x (M, K) @ W.T + bias (N,) of Packed weights -> (M, N) in x's dtype.

    None where no kernel does it; then QuantLinear.plain does.
    """
    if not use_kernel(x) or not has_kernel(w):
        return None
    M, K = x.shape
    dtype = x.dtype
    x = x.contiguous()
    if M > DEQUANTIZE_ABOVE:
        return F.linear(x, dequantize(w, dtype), None if bias is None else bias.to(dtype))
    width = w.weight.numel() // w.N
    groups = w.scales.numel() // w.N

    def launch(config):
        row_tiles = triton.cdiv(w.N, config["BLOCK_N"])
        x_tiles = triton.cdiv(M, config.get("BLOCK_M", 1))
        # Parts of K, so that few rows of weights still keep every multiprocessor busy; their
        # float32 sums are added up in a fixed order.
        most = min(16, width // config["BLOCK_B"])
        split = parts_of_work(row_tiles * x_tiles, card(x.device).multi_processor_count, most)
        whole = split == 1
        out = torch.empty(split, M, w.N, dtype=dtype if whole else torch.float32, device=x.device)
        tensors = w.scales, w.zeros, bias if whole else None, nf4_table(x.device), out
        shape = M, w.N, K, width, groups, w.format, w.group
        kernel = _gemm if "BLOCK_M" in config else _gemv
        kernel[row_tiles, x_tiles, split](x, w.weight, *tensors, *shape, SPLIT=split, **config)
        if whole:
            return out[0]
        y = out.sum(0)  # (split, M, N) -> (M, N)
        return (y if bias is None else y + bias).to(dtype)

    configs = gemv_configs(w.group) if M == 1 else gemm_configs(M, w.group, w.pack)
    shape = f"M{next_power_of_2(M)} N{w.N} K{K} group{w.group} {w.zeros is None}"
    return tuned(f"{w.format} {dtype} {shape}", configs, launch, x.device)


@jit
def _dequantize(
    weight,
    scales,
    zeros,
    table,
    out,
    K,
    width,
    group,
    groups,
    blocks,
    FORMAT: constexpr,
    BLOCK_B: constexpr,
):
    """Packed weights written out; one program per BLOCK_B bytes of a row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    begin = tl.program_id(0) % blocks * BLOCK_B
    cols = begin + tl.arange(0, BLOCK_B)
    there = cols < width
    byte = tl.load(weight + row * width + cols, mask=there, other=0)
    if FORMAT == "int8":
        value = (byte.to(tl.float32) - 128) * tl.load(scales + row).to(tl.float32)
        k = cols
    else:
        where = row * groups + cols * 2 // group  # both columns of a byte lie in one group
        scale = _read(scales + where, there)
        if FORMAT == "nf4":
            even, odd = _nf4(byte, table)
        else:
            zero = 8.0
            if zeros is not None:
                zero = _read(zeros + where, there)
            even = (byte & 15).to(tl.float32) - zero
            odd = (byte >> 4).to(tl.float32) - zero
        value = tl.interleave(even * scale, odd * scale)
        k = begin * 2 + tl.arange(0, BLOCK_B * 2)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


def dequantize(w, dtype):
    """Packed -> (N, K) in dtype, or None where there is no kernel; then QuantLinear does it."""
    if not use_kernel(w.weight):
        return None
    out = torch.empty(w.N, w.K, dtype=dtype, device=w.weight.device)
    rows = 1 if w.format == "nf4" else w.N  # NF4's groups run on across the ends of rows
    width = w.weight.numel() // rows
    groups = w.scales.numel() // rows
    blocks = triton.cdiv(width, 1024)
    tensors = w.weight, w.scales, w.zeros, nf4_table(out.device), out
    shape = out.numel() // rows, width, w.group, groups, blocks
    _dequantize[(rows * blocks,)](*tensors, *shape, w.format, 1024)
    return out


# ------------------------------------------------------------------------------- the paged KV cache
# k_cache, v_cache (blocks, block_size, Kh, D): a slot is block * block_size + offset, so slots
# number the rows of the cache seen as (blocks * block_size, Kh, D). An int8 cache comes with
# k_scale, v_scale (blocks, block_size, Kh) float32, one scale for each token and head:
# value = stored * scale.
@jit(do_not_specialize_on_alignment=["slots"])
def _store_rows(x, out, scales, slots, H, D, stride, BLOCK_H: constexpr, BLOCK_D: constexpr):
    """One token's H rows of D values to its slot, quantized where there are scales."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    heads = tl.arange(0, BLOCK_H)
    there = heads < H
    d = tl.arange(0, BLOCK_D)
    value = _tile(x + token * stride, heads, d, D, there)
    if scales is not None:
        value = value.to(tl.float32)
        largest = tl.max(tl.abs(value), 1)
        tl.store(scales + slot * H + heads, largest / 127, mask=there)
        value *= (127 / tl.maximum(largest, 1e-30))[:, None]
        value = tl.floor(value + 0.5)
    _put(out + slot * H * D, value, heads, d, D, there)


def store_rows(x, out, scales, slots):
    """x (T, H, D) -> rows `slots` of out (..., H, D), in out's type."""
    T, H, D = x.shape
    if x.stride(2) != 1 or x.stride(1) != D:
        x = x.contiguous()
    blocks = next_power_of_2(H), next_power_of_2(D)
    _store_rows[(T,)](x, out, scales, slots, H, D, x.stride(0), *blocks)


def quantize_rows(x):
    """x (..., C) -> values (..., C) int8, scales (...) float32: value * scale is about x.

    Halves round up."""
    x = x.float()
    largest = x.abs().amax(-1)
    x = x * (127 / largest.clamp(min=1e-30))[..., None]
    return torch.floor(x + 0.5).to(torch.int8), largest / 127


def kv_store(k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None):
    """Scatter new keys and values into the pages, in place; quantized where the cache is.

    k, v (T, Kh, D), also strided views of a fused q, k, v; slots (T,) int64, -1 = skip this token.
    """
    store = store_rows if use_kernel(k) else store_rows_twin
    store(k, k_cache, k_scale, slots)
    store(v, v_cache, v_scale, slots)


def store_rows_twin(x, cache, scales, slots):
    keep = slots >= 0
    slots = slots[keep]
    x = x[keep]  # (T, Kh, D)
    if scales is not None:
        x, scale = quantize_rows(x)
        scales.flatten(0, 1)[slots] = scale  # (blocks * block_size, Kh) is a view
    cache.flatten(0, 1)[slots] = x.to(cache.dtype)


@jit
def _locate(starts, S, ROWS):
    """This program's tile of ROWS query rows -> (its sequence, where that starts in q, how many
    rows it has there, which of these comes first in the tile).

    Sequence s owns the tiles from starts[s] // ROWS + s on, enough for its rows, so that the number
    of all tiles, T // ROWS + S, is known without reading the GPU.
    """
    tile = tl.program_id(0)
    seq = 0
    high = S
    while high - seq > 1:
        middle = (seq + high) // 2
        if tl.load(starts + middle) // ROWS + middle <= tile:
            seq = middle
        else:
            high = middle
    start = tl.load(starts + seq)
    rows = tl.load(starts + seq + 1) - start
    return seq, start, rows, (tile - (start // ROWS + seq)) * ROWS


@jit
def _key_range(position, length, window, ROWS, BLOCK_N, SPLIT):
    """This program's part of the keys that ROWS rows from `position` on see -> (begin, stop)."""
    begin = 0
    if window is not None:
        begin = tl.maximum(0, position - window + 1)
    stop = tl.minimum(length, position + ROWS)
    part = tl.cdiv(tl.cdiv(stop - begin, SPLIT), BLOCK_N) * BLOCK_N
    begin += tl.program_id(2) * part
    return begin, tl.minimum(stop, begin + part)


@jit
def _slots(table, j, there, KH, PAGE):
    """Keys j of a sequence -> their rows of the cache, for this program's key head.

    Key j is number j % PAGE of the page that the sequence's block table has at j // PAGE.
    """
    page = tl.load(table + j // PAGE, mask=there, other=0)
    return (page * PAGE + j % PAGE) * KH + tl.program_id(1)


@jit
def _scores(query, k, k_scale, slot, there, gap, window, scale):
    """q.k * scale * log2 e, for exp2 below; -inf where the key, `gap` positions back, is hidden."""
    scores = _dot(query, tl.trans(k), tl.zeros((query.shape[0], k.shape[0]), tl.float32))
    scores *= scale * 1.4426950408889634
    if k_scale is not None:
        scores *= _read(k_scale + slot, there)[None, :]
    seen = (gap >= 0) & there[None, :]
    if window is not None:
        seen &= gap < window
    return tl.where(seen, scores, -float("inf"))


@jit
def _weigh(scores, most, total):
    """One step of the running softmax -> (the keys' weights 2^(scores - maximum), the factor on
    what was summed under the old maximum, the new maximum, the new sum of weights)."""
    new = tl.maximum(most, tl.max(scores, 1))
    base = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet: keep inf - inf away
    p = tl.exp2(scores - base[:, None])
    fade = tl.exp2(most - base)
    return p, fade, new, total * fade + tl.sum(p, 1)


# FlashAttention's running softmax (Dao 2022) over the pages of one sequence and one key head. The
# rows of a tile are (query row, query head of this key head) pairs, so that grouped heads read
# their keys once. With SPLIT > 1 a program takes a part of the context (flash-decoding);
# `_combine` joins the parts.
@jit(
    do_not_specialize=["window", "S", "T", "table_stride"],
    do_not_specialize_on_alignment=["tables", "lengths", "starts"],  # parts of one tensor
)
def _attend(
    q,
    k_cache,
    v_cache,
    tables,
    lengths,
    starts,
    scale,
    window,
    k_scale,
    v_scale,
    out,
    lses,
    S,
    T,
    table_stride,
    H: constexpr,
    KH: constexpr,
    D: constexpr,
    PAGE: constexpr,
    BLOCK_D: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    SPLIT: constexpr,
):
    """One tile of queries against one part of its context (see above) -> out, and lses if SPLIT."""
    GROUP: constexpr = H // KH
    ROWS: constexpr = BLOCK_M // GROUP
    seq, start, rows, first = _locate(starts, S, ROWS)
    if first >= rows:
        return
    length = tl.load(lengths + seq)
    pair = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = first + pair // GROUP
    mine = (row < rows) & (pair < ROWS * GROUP)
    past = length - rows  # the new tokens are the last ones of the context
    at = (start + row) * H + tl.program_id(1) * GROUP + pair % GROUP
    query = _tile(q, at, d, D, mine)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, stop = _key_range(past + first, length, window, ROWS, BLOCK_N, SPLIT)
    for key in range(begin, stop, BLOCK_N):
        j = key + tl.arange(0, BLOCK_N)
        there = j < stop
        slot = _slots(tables + seq * table_stride, j, there, KH, PAGE)
        k = _values(_tile(k_cache, slot, d, D, there), query)
        gap = (past + row)[:, None] - j[None, :]
        scores = _scores(query, k, k_scale, slot, there, gap, window, scale)
        p, fade, most, total = _weigh(scores, most, total)
        v = _values(_tile(v_cache, slot, d, D, there), query)
        if v_scale is not None:
            p *= _read(v_scale + slot, there)[None, :]
        acc = _dot(p.to(query.dtype), v, acc * fade[:, None])
    at += tl.program_id(2) * T * H
    _put(out, acc / tl.where(total > 0, total, 1.0)[:, None], at, d, D, mine)
    if SPLIT > 1:
        tl.store(lses + at, most + tl.log2(total), mask=mine)  # -inf where this part saw nothing


@jit(do_not_specialize=["rows"])
def _combine(parts, lses, out, rows, D, SPLIT: constexpr, BLOCK_D: constexpr):
    """Join the parts of one row's context: each weighs 2^lse, its share of the denominator."""
    row = tl.program_id(0)
    at = tl.arange(0, SPLIT) * rows + row
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lses + at)
    most = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(most == -float("inf"), 0.0, most))
    part = _tile(parts, at, d, D, at >= 0)  # (SPLIT, BLOCK_D)
    total = tl.sum(weight, 0)
    value = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + d, value.to(out.dtype.element_ty), mask=d < D)


def attention_configs(pairs, group):
    """BLOCK_M (query row, head) pairs by BLOCK_N keys, warps, and stages of the pipeline.

    Decoding moves Kh * D * 2 values a key and hardly computes: 16 pairs and a deep pipeline of
    pages. Prefill computes: 64 or 128 pairs.
    """
    least = next_power_of_2(max(group, 16))
    m = max(least, min(next_power_of_2(pairs), 128))
    w = 4 if m < 128 else 8
    tiles = (m, 64, w, 3), (m, 64, w, 4), (m, 32, w, 4), (m, 128, w, 2)
    tiles += (max(m // 2, least), 64, 4, 2), (m, 32, w // 2, 3), (least, 16, 2, 2)
    return [dict(BLOCK_M=m, BLOCK_N=n, num_warps=w, num_stages=s) for m, n, w, s in tiles]


def paged_attention(
    q, k_cache, v_cache, tables, lengths, starts, scale, window=None, k_scale=None, v_scale=None
):
    """Causal attention of new tokens to their sequences' pages -> (T, H, D).

    One call serves decoding, prefill and both mixed. q (T, H, D): the new tokens of all sequences,
    one after the other; sequence s has rows starts[s]:starts[s+1], the last ones of its context of
    lengths[s] tokens, whose keys and values are stored already. tables (S, max_blocks), the block
    table of each sequence, lengths (S,) and starts (S+1,) are int32. Query heads are grouped over
    Kh key heads; keys further back than the window are hidden; the caches are contiguous. Rows that
    see nothing give 0. On a GPU nothing is read back, so a CUDA graph can capture the call.
    """
    inputs = k_cache, v_cache, tables, lengths, starts, scale, window, k_scale, v_scale
    if not use_kernel(q):
        return paged_attention_twin(q, *inputs)
    q = q.contiguous()
    T, H, D = q.shape
    S, width = tables.shape
    page, KH = k_cache.shape[1:3]
    group = H // KH
    # Parts of the context, so that few sequences still keep every multiprocessor busy; only in
    # decoding, and only while a part has more than 64 keys.
    longest = width * page if window is None else min(width * page, window + T)
    most = min(64, (longest - 1) // 64) if T <= 4 * S else 1
    split = parts_of_work(S * KH, 3 * card(q.device).multi_processor_count, most)
    block = next_power_of_2(D)

    def launch(config):
        out = torch.empty_like(q)
        parts, lses = out, None
        if split > 1:
            parts = torch.empty(split, T, H, D, device=q.device)
            lses = torch.empty(split, T, H, device=q.device)
        grid = T // (config["BLOCK_M"] // group) + S, KH, split
        shape = S, T, tables.stride(0), H, KH, D, page, max(16, block)
        _attend[grid](q, *inputs, parts, lses, *shape, SPLIT=split, **config)
        if split > 1:
            _combine[(T * H,)](parts, lses, out, T * H, D, split, block, num_warps=2)
        return out

    rows = 1 if T == S else T // S + 1  # of a sequence, about
    pairs = next_power_of_2(rows * group)
    shape = f"H{H} KH{KH} D{D} page{page} S{next_power_of_2(S)} rows{pairs} {window is None}"
    key = f"attention {q.dtype} {k_cache.dtype} {shape}"
    y = tuned(key, attention_configs(pairs, group), launch, q.device)
    return paged_attention_twin(q, *inputs) if y is None else y


def paged_attention_twin(
    q, k_cache, v_cache, tables, lengths, starts, scale, window=None, k_scale=None, v_scale=None
):
    out = torch.zeros_like(q)
    page = k_cache.size(1)
    starts = starts.tolist()
    for table, length, begin, end in zip(tables, lengths.tolist(), starts, starts[1:]):
        if begin == end or length == 0:
            continue
        blocks = table[: -(-length // page)].long()
        at = torch.arange(length, device=q.device)
        gap = at[begin - end :, None] - at  # (rows, length): the new tokens are the last ones
        mask = gap >= 0
        if window is not None:
            mask &= gap < window
        y = F.scaled_dot_product_attention(
            q[begin:end].float().transpose(0, 1),  # (rows, H, D) -> (H, rows, D)
            read_pages(k_cache, k_scale, blocks)[:, :length],
            read_pages(v_cache, v_scale, blocks)[:, :length],
            mask,
            scale=scale,
            enable_gqa=True,
        )
        out[begin:end] = y.transpose(0, 1).to(q.dtype)
    return out


def read_pages(cache, scales, blocks):
    """The tokens in some pages -> (Kh, len(blocks) * block_size, D) float32."""
    values = cache[blocks].float()  # (n, block_size, Kh, D)
    if scales is not None:
        values = values * scales[blocks][..., None]
    return values.flatten(0, 1).transpose(0, 1)
