"""The Triton kernels of the GPU path, each beside the plain torch twin that defines it and has the same signature.

    python -m pytest tests/test_kernels.py      # on a GPU the real kernels, elsewhere the same code in Triton's interpreter
    python bench.py kernels                     # GB/s of each, beside the card's own copy bandwidth and beside cuBLAS

A public function runs the kernel for CUDA tensors (for any tensor under TRITON_INTERPRET=1) and its `_twin` otherwise; `linear`
leaves the otherwise to the layer that calls it.
"""

import functools
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from common import UserError, read_json, write_json
from model import attention_mask, rotate

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # Windows, macOS: the twins serve
    triton, tl, jit = (
        None,
        SimpleNamespace(constexpr=bool),
        lambda function=None, **_: function or (lambda kernel: kernel),
    )

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton itself when it is imported
INTERPRETED = tl.constexpr(INTERPRET)  # the same for use inside kernels


# ------------------------------------------------------------------------------ choosing and tuning
# Numbers that change from step to step (rows, sequences) are marked do_not_specialize: Triton would otherwise compile a kernel
# again whenever one becomes or stops being a multiple of 16.
@functools.cache
def say_once(message):
    print(f"kernels  {message}", file=sys.stderr)


def use_kernel(x, cache=None):
    """Whether x is where the kernels run, and can compute with the cache's type. Triton launches on the current device, so x's
    device is made that."""
    if not x.is_cuda or triton is None:
        if x.is_cuda:
            say_once(
                "triton is not installed, so plain torch computes, several times slower: pip install triton"
            )
        return triton is not None and INTERPRET
    if x.device.index != torch.cuda.current_device():
        torch.cuda.set_device(x.device)
    if (
        cache is not None
        and cache.dtype == torch.float8_e4m3fn
        and torch.cuda.get_device_capability() < (8, 9)
    ):
        say_once(
            "float8 needs compute capability 8.9, so plain torch serves the cache, slowly: use an int8 cache"
        )
        return False
    return True


@functools.cache
def card(device):
    """What block sizes depend on: multiprocessors and the shared memory of a block (T4 64 KB, RTX 99, A100 163, H100 227)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device)
    return SimpleNamespace(
        name=platform.machine(), multi_processor_count=4, shared_memory_per_block_optin=99 << 10
    )


@functools.cache
def tuning_table(device):
    """(path, {key: configuration} of earlier runs), one file per card and Triton version; each new entry is written at once."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llm-kernels"
    path = folder / f"{card(device).name.replace(' ', '-')}-triton-{triton.__version__}.json"
    try:
        table = read_json(path)
        return path, table if isinstance(table, dict) else {}
    except (OSError, UserError):  # no file yet, or a broken one: tune again
        return path, {}


def milliseconds(launch, config):
    """Median time of launch(config) with a cold L2; infinite where the card has no room for it, or no such instruction."""
    try:
        return triton.testing.do_bench(
            lambda: launch(config), warmup=5, rep=30, return_mode="median"
        )
    except (triton.OutOfResources, triton.runtime.errors.PTXASError):
        return float("inf")
    except RuntimeError as error:
        if "PassManager" in str(error):  # Triton has no int8 products before compute capability 8.0
            return float("inf")
        raise


def tuned(key, configs, launch, device):
    """launch(config) with the fastest of `configs` (last: the smallest) -> its result, or None if the card has room for none.

    The first call with a new key times them all, which takes seconds. In the capture of a CUDA graph nothing can be timed: an
    unknown key then runs the smallest, so call once before capturing.
    """
    if INTERPRET:
        return launch(configs[0])
    path, table = tuning_table(device)
    if table.get(key) not in [*configs, "twin"]:  # also an entry that an older version wrote
        if torch.cuda.is_current_stream_capturing():
            return launch(configs[-1])
        try:
            times = [milliseconds(launch, config) for config in configs]
        except torch.OutOfMemoryError:  # timing clears the L2 with a buffer of 256 MB
            say_once("no memory is left to tune in: the kernels run as they are")
            return launch(configs[0])
        table[key] = configs[times.index(min(times))] if min(times) < float("inf") else "twin"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, table)
        except OSError as error:
            say_once(f"tuned configurations cannot be kept ({error}); every run will tune again")
    if table[key] == "twin":
        shared = card(device).shared_memory_per_block_optin
        say_once(
            f"{key}: no configuration compiles for this card and its {shared:,} bytes of shared memory; plain torch computes"
        )
        return None
    return launch(table[key])


def bucket(n):
    """Shapes between two powers of two share a tuned configuration."""
    return 1 << max(n - 1, 0).bit_length()


# ------------------------------------------------------------------------ weight-only linear layers
# Decoding reads every weight once per token, so the layer takes (bytes of packed weights) / (memory bandwidth) at best. Rows
# of x share that one reading up to about 64 rows; from DEQUANTIZE_ABOVE rows on the products take longer than writing the
# weights out in 16 bits, and cuBLAS is the faster multiplier.
DEQUANTIZE_ABOVE = 512


@functools.cache
def nf4_table(device):
    return torch.tensor(NF4, device=device)


class Packed(NamedTuple):
    """Packed weights of an (N, K) layer. Row n of W holds `width` bytes (nf4: all rows one after the other):

    int8, int8x8  byte k = W[n, k]                                        W = byte * scale[n]; int8x8 takes x in int8, too
    int4          byte j = W[n, 2j] low nibble, W[n, 2j+1] high nibble    W = (nibble - zero) * scale, both at [n, k // group]
    nf4           byte j = W[n, 2j] HIGH nibble, W[n, 2j+1] low nibble    W = NF4[nibble] * scale[(n*K + k) // group]
    """

    format: str
    weight: torch.Tensor  # int8 (N, K) or uint8 (N, ceil(K/2)); nf4: (N*K/2,), bitsandbytes' order
    scales: torch.Tensor  # (N,); int4: (N, ceil(K/group)), the last group may be short; nf4: (ceil(N*K/group),) float32
    N: int
    K: int
    group: int = 256  # columns that share a scale
    zeros: Any = None  # as int4's scales, or None: all are 8

    @property
    def pack(self):
        return 1 if self.format.startswith("int8") else 2  # weights a byte

    @property
    def width(self):
        return -(-self.K // self.pack)


@jit
def _read(at, mask):
    """Numbers of any type as float32, 0 where the mask is False."""
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@jit
def _one_and(byte):
    """A byte b -> the float32 1 + b / 256 (of int8: 1.5 + b / 256), by placing its bits: one shift and one logical operation. The
    conversion instruction for bytes runs at an eighth of an addition's rate, slower than memory delivers bytes."""
    bits = (byte.to(tl.uint8, bitcast=True).to(tl.int32) << 15) | 0x3F800000
    if byte.dtype == tl.int8:
        bits = bits ^ 0x400000  # + 128: two's complement as unsigned
    return bits.to(tl.float32, bitcast=True)


@jit
def _values(tile, like):
    """A tile in the type of another; int8 by its bits too."""
    return (_one_and(tile) * 256 - 384 if tile.dtype == tl.int8 else tile.to(tl.float32)).to(
        like.dtype
    )


@jit
def _keep(value, BITS: tl.constexpr):
    return (value.to(tl.int32, bitcast=True) & BITS).to(tl.float32, bitcast=True)


@jit
def _nibbles(byte, table, FORMAT: tl.constexpr):
    """A tile of bytes -> (even columns, odd columns), float32. Sixteen values of a table lie in one line of the L1 cache."""
    if FORMAT == "nf4":
        even, odd = tl.load(table + (byte >> 4)), tl.load(table + (byte & 15))
    else:
        even, odd = (byte & 15).to(tl.float32), (byte >> 4).to(tl.float32)
    return even, odd


@jit
def _dot(a, b, acc):
    """acc + a @ b on the tensor cores, summed in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED:  # which multiplies bf16 as bare bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _gemv(
    x,
    weight,
    scales,
    zeros,
    bias,
    table,
    out,
    N,
    K,
    width,
    groups,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SUB: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One row of x: out[split, n] = sum over this split's columns of W[n, k] x[k], on the plain (not the tensor) cores.

    A thread loads SUB = 16 neighbouring bytes at once, multiplies and adds them up in its registers, and then applies their one
    scale: some 3 instructions a weight, which a Hopper SM issues faster than memory delivers weights. The bytes enter as
    1 + b/256, and what that and the zero point add leaves the inner loop: sum (w - z) x = sum w x - z sum x.
    """
    PACK: tl.constexpr = 1 if FORMAT == "int8" else 2
    SUBS: tl.constexpr = BLOCK_B // SUB
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here, line = (rows < N)[:, None], rows.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, SUBS), tl.float32)
    for begin in range(tl.program_id(1) * BLOCK_B, width, SPLIT * BLOCK_B):
        cols = begin + tl.arange(0, BLOCK_B)
        byte = tl.load(
            weight + line * width + cols[None, :], mask=here & (cols < width)[None, :], other=0
        )
        k = begin * PACK + tl.arange(0, BLOCK_B * PACK)
        xs = _read(x + k, k < K)
        if FORMAT == "int8":
            acc += tl.sum(tl.reshape(_one_and(byte) * xs[None, :], (BLOCK_N, SUBS, SUB)), 2)
            acc -= 1.5 * tl.sum(tl.reshape(xs, (SUBS, SUB)), 1)[None, :]
        else:
            x0, x1 = tl.split(tl.reshape(xs, (BLOCK_B, 2)))  # even and odd columns of x
            sub = begin + tl.arange(0, SUBS) * SUB
            where = line * groups + tl.minimum(sub * 2 // GROUP, groups - 1)[None, :]
            if FORMAT == "nf4":
                even, odd = _nibbles(byte, table, FORMAT)
                part = tl.sum(
                    tl.reshape(even * x0[None, :] + odd * x1[None, :], (BLOCK_N, SUBS, SUB)), 2
                )
            else:  # low x0 + high x1 = low (x0 - x1/16) + byte x1/16: no shift, and low comes by clearing bits
                both = _one_and(byte)
                low = _keep(both, 0x3F878000)
                x1 /= 16
                part = tl.sum(
                    tl.reshape(low * (x0 - x1)[None, :] + both * x1[None, :], (BLOCK_N, SUBS, SUB)),
                    2,
                )
                if zeros is None:  # the ones and the eights
                    part -= tl.sum(tl.reshape(x0 * (1 + 8 / 256) + x1 / 2, (SUBS, SUB)), 1)[None, :]
                else:
                    zero = _read(zeros + where, here) / 256
                    part -= tl.sum(tl.reshape(x0, (SUBS, SUB)), 1)[None, :]
                    part -= zero * tl.sum(tl.reshape(x0 + 16 * x1, (SUBS, SUB)), 1)[None, :]
            acc += part * _read(scales + where, here)
    y = tl.sum(acc, 1) * (1 if FORMAT == "nf4" else 256)
    if FORMAT == "int8":
        y *= _read(scales + rows, rows < N)
    if bias is not None:
        y += _read(bias + rows, rows < N)
    tl.store(out + tl.program_id(1) * N + rows, y.to(out.dtype.element_ty), mask=rows < N)


@jit(do_not_specialize=["M"])
def _gemm(
    x,
    weight,
    scales,
    zeros,
    bias,
    table,
    out,
    x_scale,
    M,
    N,
    K,
    width,
    groups,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Several rows of x: the transposed product W x^T, tile (BLOCK_N, BLOCK_M), on the tensor cores.

    W is the left operand because that one may come from registers, where it is unpacked; x, the right one, may be as narrow
    as 16 rows. Even and odd columns are two products, so nibbles are never interleaved. A 4-bit tile lies in one group.
    int8x8: x is int8 too, the sums are exact in int32, and x_scale (M,) comes at the end.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    PACK: tl.constexpr = 1 if FORMAT == "int8" or FORMAT == "int8x8" else 2
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if FORMAT == "int8x8" else tl.float32)
    for begin in range(tl.program_id(2) * BLOCK_B, width, SPLIT * BLOCK_B):
        cols = begin + tl.arange(0, BLOCK_B)
        byte = tl.load(
            weight + rows.to(tl.int64)[:, None] * width + cols[None, :],
            mask=(rows < N)[:, None] & (cols < width)[None, :],
            other=0,
        )
        k = begin * PACK + tl.arange(0, BLOCK_B * PACK)
        xs = tl.load(
            x + ms.to(tl.int64)[:, None] * K + k[None, :],
            mask=(ms < M)[:, None] & (k < K)[None, :],
            other=0,
        )
        if FORMAT == "int8x8":
            acc = tl.dot(byte, tl.trans(xs), acc, out_dtype=tl.int32)
        elif FORMAT == "int8":
            acc = _dot(_values(byte, xs), tl.trans(xs), acc)
        else:
            where = rows.to(tl.int64) * groups + begin * 2 // GROUP
            scale = _read(scales + where, rows < N)[:, None]
            if FORMAT == "nf4":
                even, odd = _nibbles(byte, table, FORMAT)
                even, odd = even * scale, odd * scale
            else:  # (n - zero) * scale as one multiply-add each of 1 + low/256 and 1 + high/16
                zero = 8.0
                if zeros is not None:
                    zero = _read(zeros + where, rows < N)[:, None]
                both = _one_and(byte)
                even = _keep(both, 0x3F878000) * (256 * scale) - (256 + zero) * scale
                odd = _keep(both, 0x3FF80000) * (16 * scale) - (16 + zero) * scale
            x0, x1 = tl.split(tl.reshape(xs, (BLOCK_M, BLOCK_B, 2)))  # even and odd columns of x
            acc = _dot(even.to(xs.dtype), tl.trans(x0), acc)
            acc = _dot(odd.to(xs.dtype), tl.trans(x1), acc)
    acc = acc.to(tl.float32)
    if PACK == 1:
        acc *= _read(scales + rows, rows < N)[:, None]
    if FORMAT == "int8x8":
        acc *= tl.load(x_scale + ms, mask=ms < M, other=0.0)[None, :]
    if bias is not None:
        acc += _read(bias + rows, rows < N)[:, None]
    at = out + (tl.program_id(2) * M + ms).to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(ms < M)[None, :] & (rows < N)[:, None])


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
    FORMAT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Packed weights written out; one program per BLOCK_B bytes of a row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    byte = tl.load(weight + row * width + cols, mask=cols < width, other=0)
    if FORMAT == "int8":
        value, k = byte.to(tl.float32) * tl.load(scales + row).to(tl.float32), cols
    else:
        where = row * groups + cols * 2 // group  # both columns of a byte lie in one group
        scale = _read(scales + where, cols < width)
        even, odd = _nibbles(byte, table, FORMAT)
        if FORMAT == "int4":
            zero = 8.0
            if zeros is not None:
                zero = _read(zeros + where, cols < width)
            even, odd = even - zero, odd - zero
        value = tl.interleave(even * scale, odd * scale)
        k = tl.program_id(0) % blocks * BLOCK_B * 2 + tl.arange(0, BLOCK_B * 2)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


def dequantize(w, dtype):
    """Packed -> (N, K) in dtype."""
    if not use_kernel(w.weight):
        return dequantize_twin(w, dtype)
    out = torch.empty(w.N, w.K, dtype=dtype, device=w.weight.device)
    rows, K, width, groups = w.N, w.K, w.width, -(-w.K // w.group)
    if w.format == "nf4":  # groups run on across the ends of rows: one long row
        rows, K, width, groups = 1, w.N * w.K, w.weight.numel(), w.scales.numel()
    blocks = triton.cdiv(width, 1024)
    _dequantize[(rows * blocks,)](
        w.weight,
        w.scales,
        w.zeros,
        nf4_table(out.device),
        out,
        K,
        width,
        w.group,
        groups,
        blocks,
        w.format,
        1024,
    )
    return out


def dequantize_twin(w, dtype):
    if w.pack == 1:
        return (w.weight.float() * w.scales.float()[:, None]).to(dtype)
    if w.format == "nf4":
        from quant import nf4_dequantize

        return nf4_dequantize({"packed": w.weight, "absmax": w.scales}, (w.N, w.K), w.group, dtype)
    codes = (
        torch.stack((w.weight & 15, w.weight >> 4), -1).flatten(1)[:, : w.K].float()
    )  # (N, K/2, 2) -> (N, K)
    scales, zeros = (
        t if t is None else t.float().repeat_interleave(w.group, 1)[:, : w.K]
        for t in (w.scales, w.zeros)
    )
    return ((codes - (8 if zeros is None else zeros)) * scales).to(dtype)


def gemv_configs(group):
    """Rows x bytes of a program: 8 x 1024 is 4 loads of 16 bytes in flight for each of 128 threads, some 40 KB per SM."""
    sub = min(16, (group & -group) // 2)  # bytes of one scale that a thread adds up
    return [
        dict(BLOCK_N=n, BLOCK_B=b, SUB=sub, num_warps=warps)
        for n, b, warps in (
            (8, 1024, 4),
            (4, 1024, 4),
            (4, 2048, 4),
            (16, 512, 4),
            (8, 2048, 8),
            (4, 512, 2),
            (2, 1024, 2),
        )
    ]


def gemm_configs(M, group, pack, size, shared):
    """Tiles (BLOCK_N weight rows, BLOCK_M rows of x) whose pipeline of `stages` packed and x tiles fits the shared memory."""
    m, most = (
        min(max(16, bucket(M)), 128),
        min(group & -group, 256) // pack,
    )  # a 4-bit tile lies in one group
    wanted = (
        (64, 128, 4, 4),
        (64, 256, 4, 3),
        (128, 128, 4, 4),
        (128, 64, 8, 4),
        (32, 128, 2, 4),
        (32, 64, 4, 3),
        (32, 32, 2, 2),
    )
    tiles = {
        (n, m, max(16, min(k // pack, most)), warps, stages): None for n, k, warps, stages in wanted
    }
    tiles |= {(32, 16, 32 // pack, 2, 2): None}  # the smallest there is
    return [
        dict(BLOCK_N=n, BLOCK_M=m, BLOCK_B=b, num_warps=warps, num_stages=stages)
        for n, m, b, warps, stages in tiles
        if stages * (n * b + m * b * pack * size) <= shared
    ]


def linear(x, w, bias=None):
    """x (M, K) @ W.T + bias (N,) of Packed weights -> (M, N) in x's dtype; None where no kernel does it, but QuantLinear.plain can.

    int8x8: each row of x is rounded to int8, and int8 x int8 is summed in int32, twice the rate of 16 bits.
    """
    if not use_kernel(x) or w.format == "int4" and w.group % 2:
        return None
    (M, K), x, dtype, x_scale = x.shape, x.contiguous(), x.dtype, None
    fused = (
        w.pack == 1 or w.group & -w.group >= 32 and (w.format == "int4" or K % w.group == 0)
    )  # 16 bytes have one scale
    if w.format == "int8x8":
        floats, x, x_scale = (
            x,
            torch.empty_like(x, dtype=torch.int8),
            torch.empty(M, device=x.device),
        )
        _store_rows[(M,)](floats, x, x_scale, None, 1, K, K, 127.0, 1, bucket(K))
    elif M > DEQUANTIZE_ABOVE or not fused:
        return F.linear(x, dequantize(w, dtype), None if bias is None else bias.to(dtype))
    gpu, gemv = card(x.device), M == 1 and x_scale is None
    configs = (
        gemv_configs(w.group)
        if gemv
        else gemm_configs(M, w.group, w.pack, x.element_size(), gpu.shared_memory_per_block_optin)
    )

    def launch(config):
        tiles = triton.cdiv(w.N, config["BLOCK_N"]), triton.cdiv(M, config.get("BLOCK_M", 1))
        split = 1  # over K, so that few rows of weights still keep every multiprocessor busy
        while (
            tiles[0] * tiles[1] * split < gpu.multi_processor_count
            and split * 2 * config["BLOCK_B"] <= w.width
            and split < 16
        ):
            split *= 2
        # with a split: float32 sums of each part, added up in a fixed order
        out = torch.empty(
            split, M, w.N, dtype=dtype if split == 1 else torch.float32, device=x.device
        )
        tensors = (
            x,
            w.weight,
            w.scales,
            w.zeros,
            bias if split == 1 else None,
            nf4_table(x.device),
            out,
        )
        shape = w.N, K, w.width, triton.cdiv(K, w.group), w.format, w.group
        if gemv:
            _gemv[(tiles[0], split)](*tensors, *shape, SPLIT=split, **config)
        else:
            _gemm[(*tiles, split)](*tensors, x_scale, M, *shape, SPLIT=split, **config)
        if split == 1:
            return out[0]
        y = out.sum(0)
        return (y if bias is None else y + bias).to(dtype)

    return tuned(
        f"{w.format} {dtype} M{bucket(M)} N{w.N} K{K} group{w.group} {w.zeros is None}",
        configs,
        launch,
        x.device,
    )


def linear_twin(x, w, bias=None):
    if w.format == "int8x8":
        x8, x_scale = quantize_rows(x, torch.int8)
        y = (
            (x8.double() @ w.weight.double().T).float() * x_scale[:, None] * w.scales.float()
        )  # float64 holds the int32 sums
    else:
        y = x.float() @ dequantize_twin(w, torch.float32).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(x, dtype):
    """x (..., C) -> values (..., C) in int8 or float8_e4m3fn, scales (...) float32; value * scale is about x. Halves round up."""
    x, top = x.float(), LARGEST[dtype]
    largest = x.abs().amax(-1)
    x = x * (top / largest.clamp(min=1e-30))[..., None]
    return (torch.floor(x + 0.5) if dtype == torch.int8 else x).to(dtype), largest / top


# ----------------------------------------------------------- one pass over rows: norm, RoPE, SwiGLU
# Each reads its inputs once and writes its output once, 16 bytes a thread at a time; unfused, the same work moves 2-4 times
# the bytes.
@jit
def _rms_norm(x, residual, weight, out, total, C, eps, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64) * C, tl.arange(0, BLOCK)
    inside = cols < C
    value = _read(x + row + cols, inside)
    if residual is not None:
        rounded = (value + _read(residual + row + cols, inside)).to(
            total.dtype.element_ty
        )  # as x + residual is in torch
        tl.store(total + row + cols, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / C + eps)
    tl.store(
        out + row + cols,
        (value * _read(weight + cols, inside)).to(out.dtype.element_ty),
        mask=inside,
    )


def rms_norm(x, weight, eps, residual=None):
    """RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean x^2 + eps) * weight. x (..., C) -> (..., C).

    With a residual of x's shape -> (norm of x + residual, x + residual).
    """
    if not use_kernel(x):
        return rms_norm_twin(x, weight, eps, residual)
    x, C, total = x.contiguous(), x.size(-1), None
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
    out, warps = (
        torch.empty_like(x),
        min(16, max(4, bucket(C) // 1024)),
    )  # a row in registers, 16 to 32 values a thread
    _rms_norm[(x.numel() // C,)](
        x, residual, weight, out, total, C, eps, bucket(C), num_warps=warps
    )
    return out if residual is None else (out, total)


def rms_norm_twin(x, weight, eps, residual=None):
    total = x if residual is None else x + residual
    out = F.rms_norm(total.float(), (x.size(-1),), weight.float(), eps).to(x.dtype)
    return out if residual is None else (out, total)


@jit(do_not_specialize=["T"])
def _rope(
    x,
    cos,
    sin,
    out,
    T,
    H,
    half,
    stride,
    CUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token, BLOCK_H heads: the angles are read once for all of them."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    angle = (token % T if CUT else token) * half + d
    c, s = _read(cos + angle, d < half)[None, :], _read(sin + angle, d < half)[None, :]
    inside = (heads < H)[:, None] & (d < half)[None, :]
    at = heads[:, None] * 2 * half + d[None, :]
    a, b = _read(x + token * stride + at, inside), _read(x + token * stride + at + half, inside)
    at += token * H * 2 * half
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + half, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def rope(x, cos, sin):
    """model.rotate: each pair (x[i], x[i + D/2]) turned by its position's angle. x (B, T, H, D) or (T, H, D); cos, sin
    (T, D/2) or (B, T, D/2) -> x's shape and dtype. Computed in float32, rounded once."""
    if not use_kernel(x):
        return rope_twin(x, cos, sin)
    H, D = x.shape[-2:]
    x = x if x.stride(-1) == 1 and x.stride(-2) == D else x.contiguous()
    rows = x.reshape(
        -1, H * D
    )  # (B, T, H, D) -> (B*T, H*D): a view also of a slice of a fused q, k, v
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads, T = min(bucket(H), 32), x.size(-3)
    _rope[(rows.size(0), triton.cdiv(H, heads))](
        rows,
        cos.contiguous(),
        sin.contiguous(),
        out,
        T,
        H,
        D // 2,
        rows.stride(0),
        cos.dim() == 2,
        heads,
        bucket(D // 2),
    )
    return out


def rope_twin(x, cos, sin):
    return rotate(x.float(), cos.float(), sin.float()).to(x.dtype)


@jit
def _swiglu(gate, up, out, M, gate_stride, up_stride, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    g, u = (
        _read(gate + row * gate_stride + cols, cols < M),
        _read(up + row * up_stride + cols, cols < M),
    )
    tl.store(out + row * M + cols, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=cols < M)


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020). gate, up (..., M), also the two halves of one product -> (..., M)."""
    if not use_kernel(gate):
        return swiglu_twin(gate, up)
    M = gate.size(-1)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = (
        t.reshape(-1, M) if t.stride(-1) == 1 else t.contiguous().view(-1, M) for t in (gate, up)
    )
    block = min(bucket(M), 2048)
    blocks = triton.cdiv(M, block)
    _swiglu[(gate.size(0) * blocks,)](gate, up, out, M, gate.stride(0), up.stride(0), blocks, block)
    return out


def swiglu_twin(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


# ------------------------------------------------------------------------------------ cross-entropy
@jit
def _cross_entropy(logits, targets, losses, lses, V, ignore, BLOCK: tl.constexpr):
    """One row: log sum exp by a running maximum, one pass over the logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    most, total = -float("inf"), 0.0
    for begin in range(0, V, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(most, tl.max(value, 0))
        base = tl.where(
            new == -float("inf"), 0.0, new
        )  # only masked logits yet: keep inf - inf away
        total = total * tl.exp(most - base) + tl.sum(tl.exp(value - base), 0)
        most = new
    lse = most + tl.log(total)
    # a target outside the vocabulary is not read, and its loss is NaN
    picked = tl.load(
        logits + row * V + target, mask=(target >= 0) & (target < V), other=float("nan")
    ).to(tl.float32)
    tl.store(lses + row, lse)
    tl.store(losses + row, tl.where(target == ignore, 0.0, lse - picked))


@jit
def _cross_entropy_grad(logits, targets, lses, grads, out, V, ignore, blocks, BLOCK: tl.constexpr):
    """d loss / d logits = softmax - one_hot, times the row's own gradient."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    value = _read(logits + row * V + cols, cols < V)
    grad = tl.exp(value - tl.load(lses + row)) - tl.where(cols == target, 1.0, 0.0)
    grad = tl.where(target == ignore, 0.0, grad * tl.load(grads + row))
    tl.store(out + row * V + cols, grad.to(out.dtype.element_ty), mask=cols < V)


class CrossEntropy(torch.autograd.Function):
    """Forward reads the logits once, backward reads and writes them once; the softmax never exists in memory."""

    @staticmethod
    def forward(ctx, logits, targets, ignore):
        logits, targets = logits.contiguous(), targets.contiguous()
        N, V = logits.shape
        losses, lses = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
        _cross_entropy[(N,)](
            logits, targets, losses, lses, V, ignore, min(bucket(V), 4096), num_warps=8
        )
        ctx.save_for_backward(logits, targets, lses)
        ctx.ignore = ignore
        return losses

    @staticmethod
    def backward(ctx, grad):
        logits, targets, lses = ctx.saved_tensors
        (N, V), out = logits.shape, torch.empty_like(logits)
        block = min(bucket(V), 2048)
        blocks = triton.cdiv(V, block)
        _cross_entropy_grad[(N * blocks,)](
            logits, targets, lses, grad.contiguous(), out, V, ctx.ignore, blocks, block
        )
        return out, None, None


def cross_entropy(logits, targets, ignore=-100):
    """logits (N, V), targets (N,) int64 -> (N,) float32 losses in nats, 0 where the target is `ignore`; differentiable."""
    if not use_kernel(logits):
        return cross_entropy_twin(logits, targets, ignore)
    return CrossEntropy.apply(logits, targets, ignore)


def cross_entropy_twin(logits, targets, ignore=-100):
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore, reduction="none")


# ------------------------------------------------------------------------------- the paged KV cache
# k_cache, v_cache (blocks, block_size, Kh, D): a slot is block * block_size + offset, so slots number the rows of the cache
# seen as (blocks * block_size, Kh, D). A cache of int8 or float8_e4m3fn comes with k_scale, v_scale (blocks, block_size, Kh)
# float32, one scale for each token and head: value = stored * scale.


@jit
def _store_rows(
    x,
    out,
    scales,
    slots,
    H,
    D,
    stride,
    LARGEST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token's H rows of D values to its slot (without slots: in order), quantized where there are scales."""
    token = tl.program_id(0).to(tl.int64)
    slot = token
    if slots is not None:
        slot = tl.load(slots + token)
        if slot < 0:
            return
    heads, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = (heads < H)[:, None] & (d < D)[None, :]
    at = heads[:, None] * D + d[None, :]
    value = tl.load(x + token * stride + at, mask=inside, other=0.0)
    if scales is not None:
        value = value.to(tl.float32)
        largest = tl.max(tl.abs(value), 1)
        tl.store(scales + slot * H + heads, largest / LARGEST, mask=heads < H)
        value *= (LARGEST / tl.maximum(largest, 1e-30))[:, None]
        if LARGEST == 127:
            value = tl.floor(value + 0.5)
    tl.store(out + slot * H * D + at, value.to(out.dtype.element_ty), mask=inside)


def kv_store(k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None):
    """Scatter new keys and values into the pages, in place; quantized where the cache is.

    k, v (T, Kh, D), also strided views of a fused q, k, v; slots (T,) int64, -1 = skip this token.
    """
    if not use_kernel(k, k_cache):
        return kv_store_twin(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    T, H, D = k.shape
    for x, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x if x.stride(2) == 1 and x.stride(1) == D else x.contiguous()
        _store_rows[(T,)](
            x,
            cache,
            scales,
            slots,
            H,
            D,
            x.stride(0),
            LARGEST.get(cache.dtype),
            bucket(H),
            bucket(D),
        )


def kv_store_twin(k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None):
    keep = slots >= 0
    for x, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x[keep]
        if scales is not None:
            x, scales.flatten(0, 1)[slots[keep]] = quantize_rows(
                x, cache.dtype
            )  # (T, Kh, D), (T, Kh)
        cache.flatten(0, 1)[slots[keep]] = x.to(
            cache.dtype
        )  # (blocks * block_size, Kh, D) is a view


@jit
def _find(starts, tile, S, ROWS: tl.constexpr):
    """The sequence that a tile of ROWS rows belongs to: sequence s owns the tiles from starts[s] // ROWS + s on, enough for its
    rows, so that the number of all tiles is known without reading the GPU: T // ROWS + S."""
    low, high = 0, S
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@jit(do_not_specialize=["window", "S", "T", "table_stride"])
def _attend(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    tables,
    lengths,
    starts,
    out,
    lses,
    scale,
    window,
    S,
    T,
    table_stride,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """FlashAttention's running softmax (Dao 2022) over the pages of one sequence and one key head.

    The rows of the tile are (query row, query head of this key head) pairs, so that grouped heads read their keys once. With
    SPLIT > 1 this program takes one part of the context (flash-decoding) and `_combine` joins the parts.
    """
    GROUP: tl.constexpr = H // KH
    ROWS: tl.constexpr = BLOCK_M // GROUP
    seq = _find(starts, tl.program_id(0), S, ROWS)
    start, length = tl.load(starts + seq), tl.load(lengths + seq)
    rows = tl.load(starts + seq + 1) - start
    first = (tl.program_id(0) - (start // ROWS + seq)) * ROWS  # this tile's first query row
    if first >= rows:
        return
    r, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, head = first + r // GROUP, tl.program_id(1) * GROUP + r % GROUP
    mine = (row < rows) & (r < ROWS * GROUP)
    position = length - rows + row  # the new tokens are the last ones of the context
    at = (start + row).to(tl.int64) * H + head
    query = tl.load(
        q + at[:, None] * D + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0
    )

    begin, stop = 0, tl.minimum(length, length - rows + first + ROWS)
    if window is not None:
        begin = tl.maximum(0, length - rows + first - window + 1)
    part = tl.cdiv(tl.cdiv(stop - begin, SPLIT), BLOCK_N) * BLOCK_N
    begin += tl.program_id(2) * part
    stop = tl.minimum(stop, begin + part)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for key in range(begin, stop, BLOCK_N):
        j = key + tl.arange(0, BLOCK_N)
        page = tl.load(tables + seq * table_stride + j // PAGE, mask=j < stop, other=0).to(tl.int64)
        slot = (page * PAGE + j % PAGE) * KH + tl.program_id(1)
        there = (j < stop)[:, None] & (d < D)[None, :]
        k = tl.load(k_cache + slot[:, None] * D + d[None, :], mask=there, other=0.0)
        scores = _dot(query, tl.trans(_values(k, query)), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        scores *= scale * 1.4426950408889634  # log2 e: exp2 below
        if k_scale is not None:
            scores *= tl.load(k_scale + slot, mask=j < stop, other=0.0)[None, :]
        seen = (j[None, :] <= position[:, None]) & (j < stop)[None, :]
        if window is not None:
            seen &= position[:, None] - j[None, :] < window
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet: keep inf - inf away
        p, fade = tl.exp2(scores - base[:, None]), tl.exp2(most - base)
        total, most = total * fade + tl.sum(p, 1), new
        v = tl.load(v_cache + slot[:, None] * D + d[None, :], mask=there, other=0.0)
        if v_scale is not None:
            p *= tl.load(v_scale + slot, mask=j < stop, other=0.0)[None, :]
        acc = _dot(p.to(query.dtype), _values(v, query), acc * fade[:, None])
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    at += tl.program_id(2).to(tl.int64) * T * H
    tl.store(
        out + at[:, None] * D + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=mine[:, None] & (d < D)[None, :],
    )
    if SPLIT > 1:
        tl.store(lses + at, most + tl.log2(total), mask=mine)  # -inf where this part saw nothing


@jit(do_not_specialize=["rows"])
def _combine(parts, lses, out, rows, D, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Join the parts of one row's context: each weighs 2^lse, its share of the softmax's denominator."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SPLIT).to(tl.int64) * rows + row
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lses + at)
    most = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(most == -float("inf"), 0.0, most))
    part = tl.load(parts + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    total = tl.sum(weight, 0)
    value = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + d, value.to(out.dtype.element_ty), mask=d < D)


def attention_configs(rows, D, group, q_size, kv_size, shared):
    """BLOCK_M (query row, head) pairs by BLOCK_N keys. Decoding moves Kh * D * 2 * kv_size bytes a key and hardly computes: 16
    pairs and a deep pipeline of pages. Prefill computes: 64 or 128 pairs."""
    least = bucket(max(group, 16))
    m = max(least, min(bucket(rows), 128))
    w = 4 if m < 128 else 8
    wanted = (
        (m, 64, w, 3),
        (m, 64, w, 4),
        (m, 32, w, 4),
        (m, 128, w, 2),
        (max(m // 2, least), 64, 4, 2),
        (m, 32, w // 2, 3),
        (least, 16, 2, 2),
    )
    fits = [
        c for c in wanted if c[3] * 2 * c[1] * D * kv_size + c[0] * D * q_size <= shared
    ] or wanted[-1:]
    return [
        dict(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in dict.fromkeys(fits)
    ]


def paged_attention(
    q,
    k_cache,
    v_cache,
    block_tables,
    lengths,
    query_starts,
    scale,
    window=None,
    k_scale=None,
    v_scale=None,
):
    """Causal attention of new tokens to their sequences' pages -> (T, H, D). One call serves decoding, prefill and both mixed.

    q (T, H, D): the new tokens of all sequences, one after the other; sequence s has rows query_starts[s]:query_starts[s+1],
    the last ones of its context of lengths[s] tokens, whose keys and values are stored already. block_tables (S, max_blocks)
    int32, lengths (S,) int32, query_starts (S+1,) int32; query heads are grouped over Kh key heads; window: keys further back
    are hidden; the caches are contiguous. Rows that see nothing give 0. On a GPU nothing is read back, so the call can be
    captured in a CUDA graph.
    """
    args = (
        q,
        k_cache,
        v_cache,
        block_tables,
        lengths,
        query_starts,
        scale,
        window,
        k_scale,
        v_scale,
    )
    if not use_kernel(q, k_cache):
        return paged_attention_twin(*args)
    (T, H, D), (_, page, KH, _), (S, width), gpu = (
        q.shape,
        k_cache.shape,
        block_tables.shape,
        card(q.device),
    )
    q, group = q.contiguous(), H // KH
    rows = (
        group if T == S else (T // S + 1) * group
    )  # (query row, head) pairs of one sequence and key head, about
    configs = attention_configs(
        rows,
        bucket(D),
        group,
        q.element_size(),
        k_cache.element_size(),
        gpu.shared_memory_per_block_optin,
    )

    def launch(config):
        grid = (T // (config["BLOCK_M"] // group) + S, KH)
        split, longest = 1, width * page if window is None else min(width * page, window + T)
        # parts of the context, so that few sequences still keep every multiprocessor busy; no part under 128 keys
        while (
            S * KH * split < 3 * gpu.multi_processor_count
            and split * 128 < longest
            and split < 64
            and T <= 4 * S
        ):
            split *= 2
        out = torch.empty_like(q)
        parts = (
            torch.empty(split, T, H, D, dtype=torch.float32, device=q.device) if split > 1 else out
        )
        lses = torch.empty(split, T, H, dtype=torch.float32, device=q.device) if split > 1 else None
        _attend[(*grid, split)](
            q,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            block_tables,
            lengths,
            query_starts,
            parts,
            lses,
            scale,
            window,
            S,
            T,
            block_tables.stride(0),
            H,
            KH,
            D,
            page,
            max(16, bucket(D)),
            SPLIT=split,
            **config,
        )
        if split > 1:
            _combine[(T * H,)](parts, lses, out, T * H, D, split, bucket(D), num_warps=2)
        return out

    key = f"attention {q.dtype} {k_cache.dtype} H{H} KH{KH} D{D} page{page} S{bucket(S)} rows{bucket(rows)} {window is None}"
    y = tuned(key, configs, launch, q.device)
    return paged_attention_twin(*args) if y is None else y


def paged_attention_twin(
    q,
    k_cache,
    v_cache,
    block_tables,
    lengths,
    query_starts,
    scale,
    window=None,
    k_scale=None,
    v_scale=None,
):
    out, page, starts = torch.zeros_like(q), k_cache.size(1), query_starts.tolist()
    for table, length, begin, end in zip(block_tables, lengths.tolist(), starts, starts[1:]):
        if begin < end and length:
            blocks, at = table[: -(-length // page)].long(), torch.arange(length, device=q.device)
            k, v = (
                read_pages(cache, scales, blocks)[:length]
                for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
            )
            query, k, v = (
                t.transpose(0, 1)[None] for t in (q[begin:end].float(), k, v)
            )  # (rows, H, D) -> (1, H, rows, D)
            mask = attention_mask(
                at[begin - end :], at, window
            )  # (rows, length): the new tokens are the last ones
            y = F.scaled_dot_product_attention(
                query, k, v, attn_mask=mask, scale=scale, enable_gqa=True
            )
            out[begin:end] = y[0].transpose(0, 1).to(q.dtype)
    return out


def read_pages(cache, scales, blocks):
    """The tokens in some pages, float32: (len(blocks) * block_size, Kh, D)."""
    values = cache[blocks].float()  # (n, block_size, Kh, D)
    return (values if scales is None else values * scales[blocks][..., None]).flatten(0, 1)


# NormalFloat4 (QLoRA, Dettmers et al. 2023, appendix E): quantiles of N(0, 1) over the code's 16 values, 0 exact, ends +-1
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
