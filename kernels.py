"""The Triton kernels of the GPU path, each beside the plain torch twin that defines it.

    python -m pytest tests/test_kernels.py   # without a GPU they run in Triton's interpreter
    python bench.py kernels                  # GB/s of each, beside the rate at which it reads

A public function runs its kernel for CUDA tensors (for any tensor if TRITON_INTERPRET=1), and
otherwise its `_twin`, which takes the same arguments. `linear`'s twin is torch's product with
`dequantize`d weights.
"""

import contextlib
import functools
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, first_words, read_json, write_json

try:
    import triton
    import triton.language as tl
    from triton import jit, next_power_of_2
    from triton.language import constexpr
except ImportError:  # Windows, macOS: the twins serve
    triton = None

    def constexpr(value):
        return value

    def jit(kernel=None, **options):
        return kernel or jit


# Triton reads the variable when it is imported; a constexpr may be used inside kernels, too.
INTERPRET = constexpr(triton is not None and os.environ.get("TRITON_INTERPRET") == "1")


# ------------------------------------------------------------------------------ choosing and tuning
def use_kernel(x):
    """Whether a kernel computes x here. If so on a GPU, x's device becomes the current one: Triton
    launches there. While torch compiles, which fuses the twin, and where x needs a gradient, the
    twin computes."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if triton is None or not x.is_cuda:
        return INTERPRET
    torch.cuda.set_device(x.device)
    return compiles(x.device)


@functools.cache
def compiles(device):
    """Whether Triton runs on the device at all; if not, a line says why."""
    x = torch.zeros(32, device=device)
    try:
        _swiglu[1, 1](x, x.clone(), 16, 16)
    except Exception as error:  # no C compiler, a card that is too old, whatever it trips over
        leave_to_twin("Triton fails here", error)
        return False
    return True


def leave_to_twin(what, error):
    say(f"{what} ({type(error).__name__}: {first_words(error)}); plain torch computes")


def say(text):
    print(f"kernels  {text}", file=sys.stderr)


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
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-kernels"
        name = card(device).name.replace(" ", "-")
        self.path = folder / f"{name}-triton-{triton.__version__}.json"
        self.closed = False  # what is not in it is not timed any more
        self.doubted = False
        self.failed = set()  # the keys of which no configuration runs; another process tries again
        self.choices = {}
        try:
            self.choices = read_json(self.path)
        except FileNotFoundError:
            pass
        except (OSError, UserError) as error:
            self.doubt(error)

    def choice(self, key, configs):
        """What was chosen among configs; None if nothing was, or by another version."""
        choice = self.choices.get(key)
        if choice in [None, *configs]:
            return choice
        self.doubt(f"{self.path}: another version wrote it")
        return None

    def doubt(self, why):
        if not self.doubted:
            say(f"tuning again: {why}")
        self.doubted = True

    def choose(self, key, configs, launch):
        """-> the fastest of configs, which takes seconds to find and is kept; None if none runs.

        A closed table takes the first that runs, until the process ends."""
        times = {}  # by the place in configs
        for i, config in enumerate(configs):
            try:
                if self.closed:
                    launch(config)
                    times[i] = 0
                    break
                times[i] = milliseconds(launch, config)
            except torch.OutOfMemoryError:
                raise  # it says nothing about the card
            except Exception as error:  # no room on the card, or Triton cannot compile it
                failure = error.with_traceback(None)  # whose frames hold tensors
        if not times:
            self.failed.add(key)
            leave_to_twin(f"{key}: no configuration runs on this card", failure)
            return None
        self.choices[key] = configs[min(times, key=times.get)]
        if not self.closed:
            with contextlib.suppress(OSError):  # a folder that is read-only: every run tunes again
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, self.choices)
        return self.choices[key]


@functools.cache
def tuning_table(device):
    return TuningTable(device)


def milliseconds(launch, config):
    """Median time of launch(config) with a cold L2."""
    bench = triton.testing.do_bench
    return bench(lambda: launch(config), warmup=5, rep=30, return_mode="median")


def tuned(key, configs, launch, device):
    """launch(config) with the fastest of `configs` (the last is the smallest) -> its result.

    None if the card runs none of them. The first call with a new key tunes it, unless the table is
    closed: then, while requests wait, the first that runs serves. Shapes whose sizes share the next
    power of two share a key. While a CUDA graph is captured, or without the 256 MB that timing
    takes, an unknown key runs the smallest: call once before capturing.
    """
    if INTERPRET:
        return launch(configs[0])
    table = tuning_table(device)
    choice = table.choice(key, configs)
    if choice is None and key not in table.failed:
        if torch.cuda.is_current_stream_capturing():
            return launch(configs[-1])
        try:
            choice = table.choose(key, configs, launch)
        except torch.OutOfMemoryError:
            return launch(configs[-1])
    return None if choice is None else launch(choice)


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


# ------------------------------------------------------------------------ weight-only linear layers
# Decoding reads every weight once per token, so a layer takes at least (bytes of packed weights) /
# (memory bandwidth), if its instructions take no longer: at 3.35 TB/s or more an SM has time for
# about 3 instructions a 4-bit weight (`python bench.py sass` counts them). Up to FUSED_ROWS rows of
# x share that one reading. More rows make the tensor cores the limit, which a kernel that unpacks
# between its products cannot keep busy: writing the weights out in 16 bits first costs their bytes
# (225 MB for 22,016 x 4,096: 47 microseconds at an H200's 4.8 TB/s), and cuBLAS makes good for it.
FUSED_ROWS = 64

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


# A tile is 128 columns of all rows, so that a program reads contiguous memory. Its columns are 4
# parts of 32 neighbours (int8: 2 of 64), and a row of it is 16-bit words, each with codes from all
# parts, so that taking the same bits of all words gives a part. 16 bits also make Triton lay out x
# for the tensor cores without moving registers, which it does not with bytes.
COLUMNS = 128
TILE = constexpr(COLUMNS)  # the same for kernels
# A row's columns as (parts, runs, neighbours); in memory runs come first. An int4 word i holds the
# columns i, i + 32, i + 64, i + 96, lowest bits first, and int8's i and i + 64. NF4's codes lie in
# pairs of neighbours, as `prmt` needs them: the words 2 h and 2 h + 1 hold the columns 2 h and
# 2 h + 1 of the parts 0 and 1, and of the parts 2 and 3.
LAYOUT = {"int8": (2, 64, 1), "int4": (4, 32, 1), "nf4": (4, 16, 2)}


class Tiles(NamedTuple):
    """Packed weights of an (N, K) layer, laid out by `tile`:

    int4 W = (code - zero) * scale, int8 W = code * scale, nf4 W = NF4[code] * scale,
    with the scale and the zero point at [k // group, n].
    """

    format: str
    words: torch.Tensor  # int16 (ceil(K / 128), N, 32), int8: (ceil(K / 128), N, 64)
    scales: torch.Tensor  # (ceil(K / group), N)
    zeros: torch.Tensor | None  # as scales; None: all are 8, or the format has none
    K: int
    group: int  # columns of a scale, a multiple of 32; 1 << 30 where a whole row has one
    done: torch.Tensor  # int32: of the programs that share some rows those that ended (_finish)

    @property
    def N(self):
        return self.words.size(1)


def tile(format, codes, scales, group, zeros=None):
    """codes uint8 (N, K), scales (N, G), zeros (N, G) or None -> Tiles; int8 codes are W + 128.

    G = ceil(K / group), or 1. None if the groups are not of multiples of 32 columns, or int8 has
    more than one a row.
    """
    N, K = codes.shape
    padding = -K % COLUMNS
    if scales.size(1) == 1:
        group = 1 << 30
    if group % 32 or (format == "int8" and scales.size(1) > 1):
        return None
    codes = F.pad(codes, (0, padding)).view(N, -1, COLUMNS).transpose(0, 1)  # (T, N, 128)
    codes = codes.unflatten(2, LAYOUT[format]).transpose(2, 3).flatten(2)
    if format == "int8":
        codes = codes ^ 128  # two's complement
    else:
        codes = codes[..., ::2] | codes[..., 1::2] << 4  # (T, N, 64) bytes
    words = codes.contiguous().view(torch.int16)
    missing = -(-(K + padding) // group) - scales.size(1)  # groups of padding alone
    scales = F.pad(scales, (0, missing)).t().contiguous()
    if zeros is not None:
        zeros = F.pad(zeros, (0, missing)).t().contiguous()
    done = torch.zeros(-(-N // 16), dtype=torch.int32, device=words.device)
    return Tiles(format, words, scales, zeros, K, group, done)


def tiled_codes(w):
    """What `tile` was given -> uint8 (N, K)."""
    codes = w.words.view(torch.uint8)  # (T, N, bytes)
    if w.format == "int8":
        codes = codes ^ 128
    else:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(2)
    parts, runs, neighbours = LAYOUT[w.format]
    codes = codes.unflatten(2, (runs, parts, neighbours)).transpose(2, 3)
    return codes.flatten(2).transpose(0, 1).flatten(1)[:, : w.K]  # (T, N, 128) -> (N, K)


# A code's bits under a fixed exponent are a number: 0x4300 | n is 128 + n in bfloat16, 0x6400 | n
# is 1024 + n in float16, both exact. One logical operation so converts two codes, where the
# conversion instruction does one at an eighth of the rate. lop3's 0xEA is (a & b) | c.
def int4_asm(exponent):
    """A register of two words -> 4 registers of two numbers, exponent + code."""
    return f"""{{
        .reg .b32 a, b, c;
        shr.b32 a, $4, 4;
        shr.b32 b, $4, 8;
        shr.b32 c, $4, 12;
        lop3.b32 $0, $4, 0x000f000f, {exponent}, 0xEA;
        lop3.b32 $1, a, 0x000f000f, {exponent}, 0xEA;
        lop3.b32 $2, b, 0x000f000f, {exponent}, 0xEA;
        lop3.b32 $3, c, 0x000f000f, {exponent}, 0xEA;
    }}"""


def int8_asm(exponent, negative, one, number):
    """A register of two words -> 2 registers of two numbers.

    Bfloat16 has no room for 8 bits. Of two's complement the low seven make 128 + n, and the sign
    bit, under the same exponent of a negative number, -128 or -256: their sum is the weight.
    Float16 has 1024 for 128, and -1024 or -1152. The sum is an fma by one, as bf16x2 has an add
    only from sm_90 on."""
    return f"""{{
        .reg .b32 a, b, c, one;
        mov.b32 one, {one};
        shr.b32 a, $2, 8;
        lop3.b32 $0, $2, 0x007f007f, {exponent}, 0xEA;
        lop3.b32 $1, a, 0x007f007f, {exponent}, 0xEA;
        lop3.b32 b, $2, 0x00800080, {negative}, 0xEA;
        lop3.b32 c, a, 0x00800080, {negative}, 0xEA;
        fma.rn.{number} $0, $0, one, b;
        fma.rn.{number} $1, $1, one, c;
    }}"""


def nf4_asm(dtype):
    """A register of two words -> 4 registers of two of NF4's values.

    prmt looks four codes up at once: each digit of its third operand chooses one of the 8 bytes of
    the first two by its low three bits. Two look-ups and a choice by the fourth bit give the low
    bytes of four values, as many their high ones.
    """
    value = torch.tensor(NF4).to(dtype).view(torch.uint8).view(16, 2)  # low and high byte
    low, high = [bytes(column.tolist()) for column in value.unbind(1)]
    words = {}
    for name, data in (("L", low), ("H", high)):
        for i in range(4):
            words[f"{name}{i}"] = int.from_bytes(data[4 * i : 4 * i + 4], "little")
    four = """
        and.b32 i, {codes}, 0x7777;
        shr.b32 s, {codes}, 1;
        lop3.b32 s, s, 0x4444, 0x3210, 0xEA;
        prmt.b32 a, {L0}, {L1}, i;
        prmt.b32 b, {L2}, {L3}, i;
        prmt.b32 a, a, b, s;
        prmt.b32 b, {H0}, {H1}, i;
        prmt.b32 c, {H2}, {H3}, i;
        prmt.b32 b, b, c, s;
        prmt.b32 {first}, a, b, 0x5140;
        prmt.b32 {second}, a, b, 0x7362;"""
    lower = four.format(codes="$4", first="$0", second="$1", **words)
    upper = four.format(codes="h", first="$2", second="$3", **words)
    return f"{{ .reg .b32 a, b, c, h, i, s; shr.b32 h, $4, 16; {lower} {upper} }}"


BF16_INT4 = constexpr(int4_asm("0x43004300"))
FP16_INT4 = constexpr(int4_asm("0x64006400"))
BF16_INT8 = constexpr(int8_asm("0x43004300", "0xC300C300", "0x3F803F80", "bf16x2"))
FP16_INT8 = constexpr(int8_asm("0x64006400", "0xE400E400", "0x3C003C00", "f16x2"))
BF16_NF4 = constexpr(nf4_asm(torch.bfloat16))
FP16_NF4 = constexpr(nf4_asm(torch.float16))


@jit
def _nf4_pair(word, SHIFT: constexpr, table):
    """Two neighbouring columns' codes in each of (R, 16) words -> their values (R, 32)."""
    pair = tl.join((word >> SHIFT) & 15, (word >> SHIFT + 4) & 15)  # (R, 16, 2)
    return tl.load(table + tl.reshape(pair, (word.shape[0], 32)))


@jit
def _parts(words, table, FORMAT: constexpr):
    """(R, 32) words -> 4 parts (R, 32) float32, int4's codes or nf4's values.

    int8's (R, 64) words -> 2 parts (R, 64)."""
    bits = words.to(tl.int32)
    if FORMAT == "int8":
        return (bits << 24 >> 24).to(tl.float32), (bits >> 8).to(tl.float32)
    elif FORMAT == "int4":
        part0 = (bits & 15).to(tl.float32)
        part1 = (bits >> 4 & 15).to(tl.float32)
        part2 = (bits >> 8 & 15).to(tl.float32)
        return part0, part1, part2, (bits >> 12 & 15).to(tl.float32)
    else:
        even, odd = tl.split(tl.reshape(bits, (words.shape[0], 16, 2)))
        part0 = _nf4_pair(even, 0, table)
        part1 = _nf4_pair(even, 8, table)
        return part0, part1, _nf4_pair(odd, 0, table), _nf4_pair(odd, 8, table)


@jit
def _unpack(words, x, table, FORMAT: constexpr, OFFSET: constexpr):
    """`_parts` in x's type, int4's plus OFFSET; 16 bits on a GPU by the instructions above."""
    TYPE = x.dtype.element_ty
    if INTERPRET or TYPE == tl.float32:
        parts = _parts(words, table, FORMAT)
        if FORMAT == "int4":
            parts = (parts[0] + OFFSET, parts[1] + OFFSET, parts[2] + OFFSET, parts[3] + OFFSET)
        return parts
    elif FORMAT == "int8":
        asm: constexpr = FP16_INT8 if TYPE == tl.float16 else BF16_INT8
        return tl.inline_asm_elementwise(
            asm, "=&r,=&r,r", [words], (TYPE, TYPE), is_pure=True, pack=2
        )
    else:
        int4: constexpr = FP16_INT4 if TYPE == tl.float16 else BF16_INT4
        nf4: constexpr = FP16_NF4 if TYPE == tl.float16 else BF16_NF4
        asm: constexpr = int4 if FORMAT == "int4" else nf4
        return tl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r", [words], (TYPE, TYPE, TYPE, TYPE), is_pure=True, pack=2
        )


@jit
def _finish(acc, sums, done, M, N, at, mask, SPLIT: constexpr):
    """The sum over the SPLIT programs that share this block of rows, in the last one to end.

    -> (the sum, whether this is that program). The order of the sum is always the same, and done is
    0 again for the next launch."""
    tl.store(sums + tl.program_id(1) * M * N + at, acc, mask=mask)
    tl.debug_barrier()  # all of this program's stores come before the count
    last = tl.atomic_add(done + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1
    if last:
        acc = tl.zeros_like(acc)
        for program in range(SPLIT):
            # .cg: past the L1, which may hold what an earlier launch left at this address
            acc += tl.load(sums + program * M * N + at, mask=mask, other=0, cache_modifier=".cg")
        tl.store(done + tl.program_id(0), 0)
    return acc, last


@jit
def _multiply(weights, columns, live, acc, FIRST: constexpr, COUNT: constexpr):
    """acc + some parts of a tile times their columns of x."""
    for p in tl.static_range(FIRST, FIRST + COUNT):
        xs = tl.load(columns + p * weights[p].shape[1], mask=live, other=0.0)
        acc = _dot(weights[p], xs, acc)
    return acc


# Numbers that change from step to step (rows, sequences) are marked do_not_specialize: Triton would
# otherwise compile a kernel again whenever one becomes or stops being a multiple of 16.
@jit(do_not_specialize=["M"])
def _product(
    x, words, scales, zeros, bias, table, sums, done, out, M, N, K,
    FORMAT: constexpr, GROUP: constexpr, TOGETHER: constexpr,
    BLOCK_N: constexpr, BLOCK_M: constexpr, SPLIT: constexpr,
):  # fmt: skip
    """The transposed product W x^T, tile (BLOCK_N, BLOCK_M), on tensor cores for one row of x, too.

    W is the left operand because that one may come from registers, where it is unpacked; x may be
    as narrow as 16 rows. int4's offset and zero point leave through the sum of x,
    sum((code - zero) x) = sum((OFFSET + code) x) - (OFFSET + zero) sum(x):
    that is the product of x with a constant, the same for all rows of W, and so takes but one row's
    instructions. Without zero points the constant is -(OFFSET + 8) itself.
    """
    PARTS: constexpr = 2 if FORMAT == "int8" else 4
    WIDTH: constexpr = TILE // PARTS
    OFFSET: constexpr = 128 if x.dtype.element_ty == tl.bfloat16 else 1024
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    m = tl.arange(0, BLOCK_M)
    live = (m < M)[None, :]
    i = tl.arange(0, WIDTH)
    in_words = rows[:, None] * WIDTH + i[None, :]
    in_x = m[None, :] * K + i[:, None]
    number: constexpr = -8 - OFFSET if zeros is None else -1
    zero = tl.full((BLOCK_N, WIDTH), number, x.dtype.element_ty)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for t in range(tl.program_id(1), K // TILE, SPLIT):
        piece = words + tl.cast(t, tl.int64) * N * WIDTH
        packed = tl.load(piece + in_words, mask=inside[:, None], other=0)
        weights = _unpack(packed, x, table, FORMAT, OFFSET)
        columns = x + t * TILE + in_x
        if FORMAT == "int8":
            acc = _multiply(weights, columns, live, acc, 0, PARTS)
        else:
            for q in tl.static_range(0, 4, TOGETHER):
                group = (t * TILE + q * 32) // GROUP * N + rows
                unscaled = tl.zeros_like(acc)
                if FORMAT == "int4":
                    constant = (zero, zero, zero, zero)
                    unscaled = _multiply(constant, columns, live, unscaled, q, TOGETHER)
                    if zeros is not None:
                        unscaled *= OFFSET + _read(zeros + group, inside)[:, None]
                unscaled = _multiply(weights, columns, live, unscaled, q, TOGETHER)
                acc += _read(scales + group, inside)[:, None] * unscaled
    at = m[None, :] * N + rows[:, None]
    mask = live & inside[:, None]
    last = True
    if SPLIT > 1:
        acc, last = _finish(acc, sums, done, M, N, at, mask, SPLIT)
    if last:
        if FORMAT == "int8":
            acc *= _read(scales + rows, inside)[:, None]
        if bias is not None:
            acc += _read(bias + rows, inside)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


def product_configs(M):
    """Blocks of weight rows by all rows of x, warps, and stages of the pipeline.

    Up to 16 rows fewer than four warps: Triton then takes mma.sync, whose left operand costs no
    shuffles as wgmma's does. More rows need wgmma, or there are too few registers for the sums.
    """
    m = max(16, next_power_of_2(M))
    blocks = (64, 1, 4), (128, 2, 4), (64, 1, 6), (128, 1, 3), (256, 4, 4), (32, 1, 3)
    if m > 16:
        blocks = (128, 4, 4), (256, 8, 3), (128, 4, 3), (64, 4, 4), (64, 2, 3), (32, 1, 3)
    return [dict(BLOCK_N=n, BLOCK_M=m, num_warps=w, num_stages=s) for n, w, s in blocks]


def parts_together(group):
    """How many neighbouring parts of a tile of 4-bit codes share a scale."""
    return math.gcd(group, COLUMNS) // 32


def product(x, w, bias):
    """`linear` by `_product`, or None where this card has no room for it."""
    M, K = x.shape
    x = x.contiguous()
    if K % COLUMNS:  # F.pad copies even where it adds nothing
        x = F.pad(x, (0, -K % COLUMNS))

    def launch(config):
        blocks = triton.cdiv(w.N, config["BLOCK_N"])
        # parts of K, so that 8 warps on every multiprocessor have bytes on their way from memory
        wanted = 8 * card(x.device).multi_processor_count // config["num_warps"]
        split = parts_of_work(blocks, wanted, min(16, len(w.words)))
        out = torch.empty(M, w.N, dtype=x.dtype, device=x.device)
        sums = torch.empty(split, M, w.N, device=x.device) if split > 1 else None
        tensors = x, w.words, w.scales, w.zeros, bias, nf4_table(x.device), sums, w.done, out
        shape = M, w.N, x.size(1), w.format, w.group, parts_together(w.group)
        _product[blocks, split](*tensors, *shape, SPLIT=split, **config)
        return out

    shape = f"M{next_power_of_2(M)} N{w.N} K{K} group{w.group} zeros={w.zeros is not None}"
    return tuned(f"product {w.format} {x.dtype} {shape}", product_configs(M), launch, x.device)


def linear(x, w, bias=None):
    """x (M, K) @ W.T + bias (N,) of tiled weights -> (M, N) in x's dtype."""
    y = None
    if len(x) <= FUSED_ROWS and x.element_size() == 2 and use_kernel(x):
        y = product(x, w, bias)
    if y is None:
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x, dequantize(w, x.dtype), bias)
    return y


@jit
def _dequantize(
    words, scales, zeros, table, out, N, K, FORMAT: constexpr, GROUP: constexpr, BLOCK_N: constexpr
):
    """The weights of BLOCK_N rows of a tile written out."""
    PARTS: constexpr = 2 if FORMAT == "int8" else 4
    WIDTH: constexpr = TILE // PARTS
    t = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    i = tl.arange(0, WIDTH)
    parts = _parts(_tile(words, t * N + rows, i, WIDTH, inside), table, FORMAT)
    for q in tl.static_range(PARTS):
        column = t * TILE + q * WIDTH
        at = column // GROUP * N + rows
        value = parts[q]
        if FORMAT == "int4":
            value -= 8 if zeros is None else _read(zeros + at, inside)[:, None]
        value *= _read(scales + at, inside)[:, None]
        _put(out, value, rows, column + i, K, inside)


def dequantize(w, dtype):
    """Tiles -> (N, K) in dtype."""
    if not use_kernel(w.words):
        return dequantize_twin(w, dtype)
    out = torch.empty(w.N, w.K, dtype=dtype, device=w.words.device)
    tensors = w.words, w.scales, w.zeros, nf4_table(out.device), out
    grid = len(w.words), triton.cdiv(w.N, 64)
    _dequantize[grid](*tensors, w.N, w.K, w.format, w.group, 64)
    return out


def dequantize_twin(w, dtype):
    codes = tiled_codes(w)
    group = torch.arange(w.K, device=codes.device) // w.group  # of each column
    if w.format == "nf4":
        values = nf4_table(codes.device)[codes.int()]
    elif w.format == "int8":
        values = codes.float() - 128
    else:
        values = codes.float() - (8 if w.zeros is None else w.zeros[group].t())
    return (values * w.scales[group].t()).to(dtype)


# ------------------------------------------------------------------------ between the products
# What a step does beside its products and attention is about bytes and launches: each of these
# reads its inputs once, where torch takes two to eight kernels. They compute in float32.
@jit
def _add_norm(x, y, gain, out, eps, C, BLOCK: constexpr):
    """One row of `add_norm`."""
    c = tl.arange(0, BLOCK)
    inside = c < C
    at = tl.program_id(0).to(tl.int64) * C + c
    total = (_read(x + at, inside) + _read(y + at, inside)).to(x.dtype.element_ty)
    tl.store(x + at, total, mask=inside)
    value = total.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / C + eps) * _read(gain + c, inside)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def add_norm(x, y, norm):
    """x += y in place, both (T, C) -> norm(x), by the kernel if that is an nn.RMSNorm with eps."""
    if not (isinstance(norm, nn.RMSNorm) and x.is_contiguous() and use_kernel(x)):
        return add_norm_twin(x, y, norm)
    T, C = x.shape
    out = torch.empty_like(x)
    tensors = x, y.contiguous(), norm.weight, out
    _add_norm[(T,)](*tensors, norm.eps, C, next_power_of_2(C), num_warps=8)
    return out


def add_norm_twin(x, y, norm):
    x += y
    return norm(x)


@jit
def _swiglu(h, out, M, BLOCK: constexpr):
    """A part of one row of `swiglu`."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = _read(h + row * 2 * M + m, m < M)
    up = _read(h + row * 2 * M + M + m, m < M)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * M + m, value.to(out.dtype.element_ty), mask=m < M)


def swiglu(h):
    """h (T, 2M), gate beside up -> silu(gate) * up (T, M)."""
    if not use_kernel(h):
        return swiglu_twin(h)
    T, M = h.size(0), h.size(1) // 2
    out = torch.empty(T, M, dtype=h.dtype, device=h.device)
    _swiglu[T, triton.cdiv(M, 1024)](h.contiguous(), out, M, 1024)
    return out


def swiglu_twin(h):
    gate, up = h.chunk(2, -1)  # (T, 2M) -> (T, M), (T, M)
    return F.silu(gate).mul_(up)


# ------------------------------------------------------------------------------- the paged KV cache
# cache (2, pages, page_size, KH, D), keys and values of KH heads: a slot is page * page_size +
# offset, so slots number the rows of each seen as (pages * page_size, KH, D). An int8 cache comes
# with scales (2, pages, page_size, KH) float32, one for each token and head:
# value = stored * scale.
@jit
def _times_gain(row, gain, heads, d, D, mask):
    """Columns d of some heads in a row of qkv, times theirs of the gain if there is one."""
    value = _tile(row, heads, d, D, mask).to(tl.float32)
    if gain is not None:
        value *= _tile(gain, heads, d, D, mask).to(tl.float32)
    return value


@jit(do_not_specialize_on_alignment=["slots"])
def _store_heads(
    qkv, gain, cos, sin, slots, q, cache, scales, eps, v_offset, H, KH, D,
    BLOCK_H: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """BLOCK_H of one token's heads: queries to q, keys and values to the token's slot.

    A head's value lies v_offset heads behind its key."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    row = qkv + token * (H + 2 * KH) * D
    value = _tile(row, heads, d, D, heads < H + 2 * KH).to(tl.float32)
    turns = heads < H + KH  # which values do not
    turned = _times_gain(row, gain, heads, d, D, turns)
    if cos is not None:
        partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
        other = _times_gain(row, gain, heads, partner, D, turns)
        turned *= _read(cos + token * D + d, d < D)[None, :]
        turned += other * _read(sin + token * D + d, d < D)[None, :]
    if gain is not None:
        turned *= tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
    value = tl.where(turns[:, None], turned, value)
    _put(q + token * H * D, value, heads, d, D, heads < H)
    slot = tl.load(slots + token)
    stored = tl.where(slot < 0, -1, heads - H)  # number of a key or, behind these, of a value
    mask = (stored >= 0) & (stored < 2 * KH)
    at = stored // KH * v_offset + slot * KH + stored % KH
    if scales is not None:
        largest = tl.max(tl.abs(value), 1)
        tl.store(scales + at, largest / 127, mask=mask)
        value *= (127 / tl.maximum(largest, 1e-30))[:, None]
        value = tl.floor(value + 0.5)
    _put(cache, value, at, d, D, mask)


def store_heads(qkv, gain, eps, rope, slots, cache, scales=None):
    """qkv (T, H + 2KH, D): norm and turn queries and keys, store keys and values -> q (T, H, D).

    gain (H + KH, D), or None: no norm. rope: cos and sin (T, 1, D), the first half of sin negated,
    or None. slots (T,) int64; -1 = nothing is stored. An int8 cache gets int8 and its scales.
    """
    if not use_kernel(qkv):
        return store_heads_twin(qkv, gain, eps, rope, slots, cache, scales)
    T, heads, D = qkv.shape
    KH = cache.size(3)
    H = heads - 2 * KH
    q = torch.empty(T, H, D, dtype=qkv.dtype, device=qkv.device)
    tensors = qkv.contiguous(), gain, *(rope or (None, None)), slots, q, cache, scales
    numbers = eps, cache.stride(0) // D, H, KH, D, 8, next_power_of_2(D)
    _store_heads[T, triton.cdiv(heads, 8)](*tensors, *numbers)
    return q


def store_heads_twin(qkv, gain, eps, rope, slots, cache, scales=None):
    KH, D = cache.shape[3:]
    qk = qkv[:, :-KH]  # queries and keys are treated alike
    if gain is not None:
        qk = F.rms_norm(qk, (D,), eps=eps) * gain
    if rope is not None:
        cos, sin = rope
        qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
    kv = torch.stack((qk[:, -KH:], qkv[:, -KH:]))[:, slots >= 0]  # (2, T, KH, D)
    slots = slots[slots >= 0]
    if scales is not None:
        largest = kv.abs().amax(-1).float()
        scales.flatten(1, 2)[:, slots] = largest / 127  # (2, pages * page_size, KH) is a view
        kv = kv * (127 / largest.clamp(min=1e-30))[..., None]
        kv = torch.floor(kv + 0.5)  # halves round up
    cache.flatten(1, 2)[:, slots] = kv.to(cache.dtype)
    return qk[:, :-KH]


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
    size = tl.cdiv(tl.cdiv(stop - begin, SPLIT), BLOCK_N) * BLOCK_N
    begin += tl.program_id(2) * size
    return begin, tl.minimum(stop, begin + size)


@jit
def _cached(cache, rows, D, mask, q, BLOCK_D: constexpr):
    """Rows of the cache in the type of q: of int8, which comes as pairs in 16 bits, the even and
    the odd columns (R, BLOCK_D / 2); else all (R, BLOCK_D), twice, as the caller expects a pair.

    Apart they stay in the registers where the tensor cores want them, as `_product`'s weights do.
    """
    if cache.dtype.element_ty == tl.int16:
        words = _tile(cache, rows, tl.arange(0, BLOCK_D // 2), D // 2, mask)
        return _unpack(words, q, None, "int8", None)
    else:
        values = _tile(cache, rows, tl.arange(0, BLOCK_D), D, mask).to(q.dtype.element_ty)
        return values, values


@jit
def _visible(scores, k_scale, slot, there, gap, window, scale):
    """q.k * scale * log2 e, for exp2 below; -inf where the key, `gap` positions back, is hidden."""
    factor = scale * 1.4426950408889634
    if k_scale is not None:
        factor *= _read(k_scale + slot, there)[None, :]
    seen = (gap >= 0) & there[None, :]
    if window is not None:
        seen &= gap < window
    return tl.where(seen, scores * factor, -float("inf"))


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
    q, k_cache, v_cache, tables, lengths, starts, scale, window, k_scale, v_scale, out, lses,
    S, T, table_stride, H: constexpr, KH: constexpr, D: constexpr, PAGE_SIZE: constexpr,
    BLOCK_D: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, SPLIT: constexpr,
):  # fmt: skip
    """One tile of queries against one part of its context (see above) -> out, and lses if SPLIT."""
    GROUP: constexpr = H // KH
    ROWS: constexpr = BLOCK_M // GROUP
    seq, start, rows, first = _locate(starts, S, ROWS)
    if first >= rows:
        return
    length = tl.load(lengths + seq)
    pair = tl.arange(0, BLOCK_M)
    PAIRS: constexpr = k_scale is not None
    WIDTH: constexpr = BLOCK_D // 2 if PAIRS else BLOCK_D
    d = tl.arange(0, WIDTH) * (BLOCK_D // WIDTH)
    row = first + pair // GROUP
    mine = (row < rows) & (pair < ROWS * GROUP)
    past = length - rows  # the new tokens are the last ones of the context
    at = (start + row) * H + tl.program_id(1) * GROUP + pair % GROUP
    query = _tile(q, at, d, D, mine)
    odd_query = _tile(q, at, d + 1, D, mine)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    odd_acc = acc
    begin, stop = _key_range(past + first, length, window, ROWS, BLOCK_N, SPLIT)
    for key in range(begin, stop, BLOCK_N):
        j = key + tl.arange(0, BLOCK_N)
        there = j < stop
        page = tl.load(tables + seq * table_stride + j // PAGE_SIZE, mask=there, other=0)
        slot = (page * PAGE_SIZE + j % PAGE_SIZE) * KH + tl.program_id(1)  # its row of the cache
        k, odd_k = _cached(k_cache, slot, D, there, q, BLOCK_D)
        scores = _dot(query, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if PAIRS:
            scores = _dot(odd_query, tl.trans(odd_k), scores)
        gap = (past + row)[:, None] - j[None, :]
        scores = _visible(scores, k_scale, slot, there, gap, window, scale)
        p, fade, most, total = _weigh(scores, most, total)
        if PAIRS:
            p *= _read(v_scale + slot, there)[None, :]
        p = p.to(query.dtype)
        v, odd_v = _cached(v_cache, slot, D, there, q, BLOCK_D)
        acc = _dot(p, v, acc * fade[:, None])
        if PAIRS:
            odd_acc = _dot(p, odd_v, odd_acc * fade[:, None])
    at += tl.program_id(2) * T * H
    share = (1 / tl.where(total > 0, total, 1.0))[:, None]
    _put(out, acc * share, at, d, D, mine)
    if PAIRS:
        _put(out, odd_acc * share, at, d + 1, D, mine)
    if SPLIT > 1:
        tl.store(lses + at, most + tl.log2(total), mask=mine)  # -inf where this part saw nothing


@jit(do_not_specialize=["rows"])
def _combine(partial, lses, out, rows, D, SPLIT: constexpr, BLOCK_D: constexpr):
    """Join the parts of one row's context: each weighs 2^lse, its share of the denominator."""
    row = tl.program_id(0)
    at = tl.arange(0, SPLIT) * rows + row
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lses + at)
    most = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(most == -float("inf"), 0.0, most))
    values = _tile(partial, at, d, D, at >= 0)  # (SPLIT, BLOCK_D): all rows are there
    total = tl.sum(weight, 0)
    value = tl.sum(values * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + d, value.to(out.dtype.element_ty), mask=d < D)


def attention_configs(pairs, group):
    """BLOCK_M (query row, head) pairs by BLOCK_N keys, warps, and stages of the pipeline.

    Decoding moves KH * D * 2 values a key and hardly computes: 16 pairs and a deep pipeline of
    pages. Prefill computes: 64 or 128 pairs.
    """
    least = next_power_of_2(max(group, 16))
    m = max(least, min(next_power_of_2(pairs), 128))
    w = max(2, m // 16)
    tiles = (m, 64, w, 3), (m, 64, w, 4), (m, 32, w, 4)
    tiles += (max(m // 2, least), 64, 4, 2), (m, 32, w // 2, 3), (least, 16, 2, 2)
    return [dict(BLOCK_M=m, BLOCK_N=n, num_warps=w, num_stages=s) for m, n, w, s in tiles]


def paged_attention(q, cache, tables, lengths, starts, scale, window=None, scales=None):
    """Causal attention of new tokens to their sequences' pages -> (T, H, D).

    One call serves decoding, prefill and both mixed. q (T, H, D): the new tokens of all sequences,
    one after the other; sequence s has rows starts[s]:starts[s+1], the last ones of its context of
    lengths[s] tokens, whose keys and values are stored already. tables (S, max_pages), the block
    table of each sequence, lengths (S,) and starts (S+1,) are int32. Query heads are grouped over
    KH key heads; keys further back than the window are hidden; keys and values are contiguous. Rows
    that see nothing give 0. On a GPU nothing is read back, so a CUDA graph can capture the call.
    """
    inputs = tables, lengths, starts, scale, window
    T, H, D = q.shape
    if not use_kernel(q) or (scales is not None and D % 2):
        return paged_attention_twin(q, cache, *inputs, scales)
    q = q.contiguous()
    k_cache, v_cache = cache if scales is None else cache.view(torch.int16)
    k_scale, v_scale = (None, None) if scales is None else scales
    S, width = tables.shape
    page_size, KH = k_cache.shape[1:3]
    group = H // KH
    # Parts of the context, so that few sequences still keep every multiprocessor busy; only in
    # decoding, and only while a part has more than 64 keys.
    longest = width * page_size if window is None else min(width * page_size, window + T)
    most = min(64, (longest - 1) // 64) if T <= 4 * S else 1
    warps = 12 * card(q.device).multi_processor_count
    block_d = next_power_of_2(D)
    given = q, k_cache, v_cache, *inputs, k_scale, v_scale

    def launch(config):
        split = parts_of_work(S * KH, warps // config["num_warps"], most)
        out = torch.empty_like(q)
        partial, lses = out, None
        if split > 1:
            partial = torch.empty(split, T, H, D, device=q.device)
            lses = torch.empty(split, T, H, device=q.device)
        grid = T // (config["BLOCK_M"] // group) + S, KH, split
        # a product takes 16 columns or more, and int8's are halved
        shape = S, T, tables.stride(0), H, KH, D, page_size, max(32, block_d)
        _attend[grid](*given, partial, lses, *shape, SPLIT=split, **config)
        if split > 1:
            _combine[(T * H,)](partial, lses, out, T * H, D, split, block_d, num_warps=2)
        return out

    rows = 1 if T == S else T // S + 1  # of a sequence, about
    pairs = next_power_of_2(rows * group)
    # The key leaves the context's length out, as it grows: warm_up.py tunes at 1,024 tokens.
    shape = f"H{H} KH{KH} D{D} page{page_size} S{next_power_of_2(S)} rows{pairs}"
    key = f"attention {q.dtype} {k_cache.dtype} {shape} window={window is not None}"
    y = tuned(key, attention_configs(pairs, group), launch, q.device)
    return paged_attention_twin(q, cache, *inputs, scales) if y is None else y


def paged_attention_twin(q, cache, tables, lengths, starts, scale, window=None, scales=None):
    out = torch.zeros_like(q)
    page_size = cache.size(2)
    starts = starts.tolist()
    for table, length, begin, end in zip(tables, lengths.tolist(), starts, starts[1:]):
        if begin == end or length == 0:
            continue
        pages = table[: -(-length // page_size)].long()
        at = torch.arange(length, device=q.device)
        gap = at[begin - end :, None] - at  # (rows, length): the new tokens are the last ones
        mask = gap >= 0
        if window is not None:
            mask &= gap < window
        y = F.scaled_dot_product_attention(
            q[begin:end].float().transpose(0, 1),  # (rows, H, D) -> (H, rows, D)
            *read_pages(cache, scales, pages)[:, :, :length],
            mask,
            scale=scale,
            enable_gqa=True,
        )
        out[begin:end] = y.transpose(0, 1).to(q.dtype)
    return out


def read_pages(cache, scales, pages):
    """The tokens in some pages -> keys and values (2, KH, len(pages) * page_size, D) float32."""
    values = cache[:, pages].float()  # (2, n, page_size, KH, D)
    if scales is not None:
        values = values * scales[:, pages][..., None]
    return values.flatten(1, 2).transpose(1, 2)
