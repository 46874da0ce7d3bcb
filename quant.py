"""Models in fewer bits: int8, int4, NF4 and GPTQ in place of the linear layers' weights.

python quant.py runs/demo --format gptq --group-size 64 --out runs/demo-gptq
python quant.py report runs/demo                       # every format in one table and a plot
"""

import copy
import functools
import math
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, cli, parse_flags
from kernels import NF4
from model import Transformer
from runtime import resolve
from tokenizer import Tokenizer

FORMATS = {
    "int8": "8 bits, one scale a row",
    "int8-dynamic": "int8 weights and activations",
    "int4": "4 bits, symmetric groups",
    "int4-asym": "4 bits, groups with a zero point",
    "nf4": "4-bit NormalFloat, as bitsandbytes",
}
COMPARED = ("original", *FORMATS, "gptq", "gguf-q8_0", "gguf-q4_0", "gguf-q4_k_m")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


# ---------------------------------------------------------------- a grid: scale, zero point, codes
# A group of weights is stored as small integers, its codes: w = scale * (code - zero).
CLIPPED_RANGES = [1 - i / 20 for i in range(11)]  # shares of a group's range that GPTQ tries


def check_finite(weight, name="a weight"):
    """UserError where there is NaN or infinity: the whole group would become that too."""
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise UserError(
            f"{name}: {bad:,} of {weight.numel():,} values are NaN or infinite; "
            "the model is damaged"
        )


def in_groups(values, size):
    """(..., K) -> (..., G, size), G = ceil(K / size), the last group filled up with zeros."""
    padded = F.pad(values, (0, -values.size(-1) % size))
    return padded.unflatten(-1, (-1, size))


def grid(groups, bits, sym):
    """(..., g) floats -> (scale, zero), each (...) float32, for codes 0 .. 2^bits - 1.

    The codes span each group from its least value to its greatest, and 0 is always one of the
    values. Symmetric: zero is the middle code. The scale is a float16 number, as folders hold it.
    """
    top = 2**bits - 1
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    if sym:
        # 8 bits use codes -127 .. 127 around the middle, so that the largest magnitude has a code;
        # fewer bits cannot spare one, and the positive end is cut by half a step
        high = torch.maximum(-low, high)
        scale = high / (127 if bits == 8 else top / 2)
    else:
        scale = (high - low) / top
    scale = scale.half().float()
    if torch.isinf(scale).any():
        raise UserError(
            f"weights up to {groups.abs().max():.3g} need a scale beyond float16's 65,504: "
            "rescale the model first"
        )
    scale = torch.where(scale == 0, 1, scale)  # a group of zeros
    middle = torch.full_like(scale, 2 ** (bits - 1))
    if sym:
        return scale, middle
    zero = (-low / scale).round().clamp(0, top)
    return scale, torch.where(low == high, middle, zero)


def to_codes(weight, scale, zero, bits):
    """The nearest codes, as floats."""
    return (weight / scale + zero).round_().clamp_(0, 2**bits - 1)


def clipped_grid(groups, bits, sym, cost):
    """As `grid`, of the narrower ranges too: that whose rounding errors cost least.

    cost (g,): what a squared error in each column costs. A range that cuts the group's extremes
    serves the many weights in its middle better.
    """
    best_scale = best_zero = torch.ones_like(groups[..., 0])
    least = torch.inf
    for share in CLIPPED_RANGES:
        scale, zero = grid(groups * share, bits, sym)
        codes = to_codes(groups, scale[..., None], zero[..., None], bits)
        rounded = (codes - zero[..., None]) * scale[..., None]
        error = (rounded - groups) ** 2 @ cost  # (..., g) @ (g,) -> (...)
        best_scale = torch.where(error < least, scale, best_scale)
        best_zero = torch.where(error < least, zero, best_zero)
        least = error.clamp(max=least)
    return best_scale, best_zero


def round_to_nearest(weight, bits, group, sym):
    """(N, K) -> codes uint8 (N, K), scales and zeros float32 (N, G), G = ceil(K / group).

    group: neighbouring inputs that share a scale, -1 for a whole row; the last may be shorter.
    """
    check_finite(weight)
    K = weight.size(1)
    group = K if group < 0 else group
    groups = in_groups(weight.detach().float(), group)  # (N, G, group)
    scale, zero = grid(groups, bits, sym)
    codes = to_codes(groups, scale[..., None], zero[..., None], bits)
    codes = codes.to(torch.uint8).flatten(1)[:, :K]  # (N, G, group) -> (N, K)
    return codes, scale, zero


# -------------------------------------------------------- NF4: codes that are not evenly spaced
# QLoRA (Dettmers et al. 2023, section 3): 16 values that are equally likely under a normal
# distribution. Blocks of 64 weights share a scale, their largest magnitude; double quantization
# rounds these scales in turn to 8 bits, 256 of which share one float32.
NESTED_BLOCK = 256


@functools.lru_cache
@torch.inference_mode(False)  # made once, and then of use in training too
def nf4_pairs(device):
    """(256,) float64: the two float32 values of every byte, the high half's first.

    Two values that are taken for one number are found by one look-up.
    """
    value = torch.tensor(NF4, device=device)
    pairs = torch.stack((value.repeat_interleave(16), value.repeat(16)), 1)  # (256, 2)
    return pairs.view(torch.float64)[:, 0].contiguous()


@functools.lru_cache
@torch.inference_mode(False)
def dynamic_map(device="cpu", signed=True):
    """The 256 sorted values of bitsandbytes' 8-bit "dynamic" type (Dettmers 2015, 1511.04561).

    Seven decades 10^-6 .. 10^0, each with twice the steps of the one below it, so that small values
    keep their relative precision. The values are the midpoints between the steps; 0 and 1 are
    added. Unsigned: twice the steps in place of the sign.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middle = 10.0 ** (decade - 6) * (steps[:-1] + steps[1:]) / 2
        values += middle.tolist()
        if signed:
            values += (-middle).tolist()
    return torch.tensor(sorted(values), device=device)


def scaled_blocks(flat, block):
    """(n,) floats -> (each over its block's largest magnitude (n,), those magnitudes (blocks,))."""
    blocks = in_groups(flat, block)  # (blocks, block)
    absmax = blocks.abs().amax(1)
    # times the reciprocal, as bitsandbytes does: a division would round otherwise
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    flat_again = scaled.clamp(-1, 1).flatten()[: flat.numel()]
    return flat_again, absmax


def nearest_index(x, values):
    """Index uint8 of the nearest of the sorted `values`; of two equally near the lower one."""
    midpoints = (values[1:] + values[:-1]) / 2
    return torch.bucketize(x, midpoints, out_int32=True).to(torch.uint8)


def dynamic_quantize(flat, block=NESTED_BLOCK):
    """(n,) float32 -> (uint8 indices into `dynamic_map` (n,), float32 scale of each block).

    bitsandbytes' CPU code looks values up in a table of 65,536 steps over [-1, 1], and gives a
    block of zeros the code 0; so do we, to have its bits.
    """
    scaled, absmax = scaled_blocks(flat, block)
    # in float64 and rounded once, as a fused multiply-add does
    step = ((scaled + 1).double() * 0.5 * 65535 + 0.5).float().int()
    codes = nearest_index(-1 + 2.0 * step / 65535, dynamic_map(flat.device))
    in_use = (absmax > 0).repeat_interleave(block)[: flat.numel()]
    return codes * in_use, absmax


def nf4_quantize(weight, block=64, double=True):
    """(N, K) floats -> dict of tensors as bitsandbytes makes them on the CPU, bit for bit.

    "packed" uint8 (N*K/2,), two codes a byte, the earlier one in the high half; "absmax" float32
    (blocks,), each block's largest magnitude. With `double` absmax is uint8, beside
    "nested_absmax" float32 (blocks/256,) and "offset" float32 ().
    """
    check_finite(weight)
    if weight.numel() % 2:
        raise UserError(f"NF4 holds two weights a byte; {tuple(weight.shape)} is an odd number")
    flat = weight.detach().reshape(-1).float()
    scaled, absmax = scaled_blocks(flat, block)
    codes = nearest_index(scaled, torch.tensor(NF4, device=flat.device))
    packed = codes[::2] << 4 | codes[1::2]
    if not double:
        return {"packed": packed, "absmax": absmax}
    # scales are all positive: without their mean they make better use of a signed type
    offset = absmax.mean()
    codes, nested = dynamic_quantize(absmax - offset)
    return {"packed": packed, "absmax": codes, "nested_absmax": nested, "offset": offset}


def nf4_absmax(state):
    """The blocks' scales in float32 (blocks,), double quantization undone."""
    if "nested_absmax" not in state:
        return state["absmax"]
    values = dynamic_map(state["absmax"].device)[state["absmax"].int()]
    scale = state["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: values.numel()]
    return values * scale + state["offset"]


def nf4_dequantize(state, shape, block=64, dtype=torch.float32):
    """The inverse of `nf4_quantize` -> (N, K) of dtype."""
    packed = state["packed"]
    pairs = nf4_pairs(packed.device).index_select(0, packed.int())  # (N*K/2,)
    flat = pairs.view(torch.float32)  # (N*K,)
    blocks = in_groups(flat, block).mul_(nf4_absmax(state)[:, None])  # (blocks, block)
    weights = blocks.view(-1)[: flat.numel()]
    return weights.view(shape).to(dtype)


# ------------------------------------------------------------------------------ the linear layers
FEW_ROWS = 16  # on a CPU more rows are quicker unpacked and multiplied in float32 (NOTES.md)


class FrozenProduct(torch.autograd.Function):
    """x @ W.T with a gradient for x alone, which is all that QLoRA needs.

    Only the packed weight stays alive for backward, which unpacks it again.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None


class Groups(NamedTuple):
    """Any integer layer's weights, unpacked: w = scales * (codes - zeros)."""

    codes: torch.Tensor  # uint8 (N, K)
    scales: torch.Tensor  # (N, G)
    zeros: torch.Tensor  # (N, G)
    size: int  # inputs that share a scale
    order: torch.Tensor | None  # int64 (K,): column j is input order[j]; None: it is input j
    bits: int


def joined(layers, name):
    """The layers' tensors of one name, one below the other."""
    return torch.cat([getattr(layer, name).detach() for layer in layers])


class QuantLinear(nn.Module):
    """A linear layer with packed weights: x (..., K) -> (..., N).

    `dequantize` and `plain` say what it computes; `product` is the quickest way that the device has
    to nearly the same numbers.
    """

    format = ""
    by_row: tuple = ()  # buffers whose first dimension is the outputs, so that layers can be fused
    few_rows: float = FEW_ROWS  # at most so many rows take the fast product on a CPU
    # (M, K) float32 -> (M, N) float32 without the bias, activations rounded to 8 bits; the engine
    # sets it where it has one
    fast_product: Any = None
    symmetric = False  # all zero points are the middle code: a kernel need not read them

    def __init__(self, shape, bias=None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dequantize(self, dtype=torch.float32):
        """-> (N, K) of dtype, the weights that this layer stands for."""
        raise NotImplementedError

    def plain(self, rows):
        """The twin: unpack, then multiply. (M, K) -> (M, N)."""
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        return F.linear(rows, self.dequantize(rows.dtype), bias)

    def on_gpu(self, rows):
        """The same by a kernel, or None where there is none."""

    def by_fast_product(self, rows):
        return self.fast_product(rows)

    def on_cpu(self, rows):
        """The same by the fast product, or None where there is none or `plain` is quicker."""
        if torch.compiler.is_compiling() or self.fast_product is None or len(rows) > self.few_rows:
            return None
        y = self.by_fast_product(rows.float())
        return y if self.bias is None else y.add_(self.bias)

    def product(self, x):
        """x (..., K) -> (..., N) with the bias, in x's dtype."""
        rows = x.reshape(-1, self.in_features)  # (..., K) -> (M, K)
        y = self.on_gpu(rows) if x.is_cuda else self.on_cpu(rows)
        if y is None:
            y = self.plain(rows)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)  # (M, N) -> (..., N)

    def forward(self, x):
        return FrozenProduct.apply(x, self) if x.requires_grad else self.product(x)

    def is_alike(self, other):
        """Whether a layer of the same class can be fused with this one."""
        return other.format == self.format

    def stacked(self, layers):
        """{buffer: tensor} of one layer whose rows are those of `layers`, in their order."""
        return {name: joined(layers, name) for name in self.by_row}


def int8_rows(x):
    """(M, K) floats -> (each row rounded to 8-bit integers, scale (M, 1)).

    Each row has a scale of its own, so none depends on its neighbours. Its largest value is 127.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True)
    scale = largest.clamp(min=1e-30) / 127
    return (x / scale).round(), scale


class Int8Linear(QuantLinear):
    """int8 weights, one float scale an output row: w = scale * code, code in -127 .. 127 ["int8"].

    With `dynamic` the activations are rounded to int8 too, each row by its own scale
    ["int8-dynamic"].
    """

    by_row = ("codes", "scale")

    def __init__(self, codes, scales, bias=None, dynamic=False):
        """codes uint8 (N, K) whose zero point is 128, scales (N, 1)"""
        super().__init__(codes.shape, bias)
        self.dynamic = dynamic
        self.format = "int8-dynamic" if dynamic else "int8"
        self.few_rows = math.inf if dynamic else FEW_ROWS
        self.register_buffer("codes", (codes ^ 128).view(torch.int8))  # 0 .. 255 -> -128 .. 127
        self.register_buffer("scale", scales[:, 0].float())

    @classmethod
    def from_linear(cls, linear, dynamic=False):
        codes, scales, _ = round_to_nearest(linear.weight, 8, -1, sym=True)
        return cls(codes, scales, linear.bias, dynamic)

    def dequantize(self, dtype=torch.float32):
        return (self.codes * self.scale[:, None]).to(dtype)

    def groups(self):
        scale = self.scale[:, None]
        codes = self.codes.view(torch.uint8) ^ 128
        return Groups(codes, scale, torch.full_like(scale, 128), self.in_features, None, 8)

    def plain(self, rows):
        if self.dynamic:
            codes, scale = int8_rows(rows.float())
            rows = (codes * scale).to(rows.dtype)
        return super().plain(rows)

    def on_gpu(self, rows):
        from kernels import Packed, linear

        kind = "int8x8" if self.dynamic else "int8"
        return linear(rows, Packed(kind, self.codes, self.scale, *self.codes.shape), self.bias)

    def by_fast_product(self, rows):
        """Activations of 8 bits, or of 16: what 8 bits lose of a row makes a second row."""
        if self.dynamic:
            return self.fast_product(rows)
        codes, scale = int8_rows(rows)
        rounded = codes * scale
        y = self.fast_product(torch.cat((rounded, rows - rounded)))  # (2M, K) -> (2M, N)
        return torch.add(*y.chunk(2))


class GroupLinear(QuantLinear):
    """2 to 8 bits, a scale and zero point for each `group` neighbouring inputs of a row.

    packed  uint8 (N, ceil(K/2)), two codes a byte, the earlier in the low half; 5 to 8 bits: (N, K)
    scales  float16 (N, G), G = ceil(K/group): the last group may be shorter
    zeros   uint8 (N, G)
    order   int64 (K,) or None: packed column j is input order[j] (GPTQ's act-order)
    """

    by_row = ("packed", "scales", "zeros")

    def __init__(self, codes, scales, zeros, bits, group, order=None, bias=None):
        """codes uint8 (N, K) in the order of `order`; group -1: whole rows."""
        super().__init__(codes.shape, bias)
        self.bits = bits
        self.group = group if group > 0 else self.in_features
        self.format = f"int{bits}"
        self.symmetric = bits == 4 and bool((zeros == 8).all())
        if bits <= 4:
            codes = F.pad(codes, (0, codes.size(1) % 2))
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        self.register_buffer("packed", codes)
        self.register_buffer("scales", scales.half())
        self.register_buffer("zeros", zeros.to(torch.uint8))
        self.register_buffer("order", order)

    @classmethod
    def from_linear(cls, linear, bits=4, group=128, sym=True):
        codes, scales, zeros = round_to_nearest(linear.weight, bits, group, sym)
        return cls(codes, scales, zeros, bits, group, None, linear.bias)

    def codes(self):
        """-> uint8 (N, K), columns still in `order`."""
        if self.bits > 4:
            return self.packed
        halves = torch.stack((self.packed & 15, self.packed >> 4), -1)  # (N, K/2, 2)
        return halves.flatten(1)[:, : self.in_features]  # (N, K)

    def groups(self):
        return Groups(self.codes(), self.scales, self.zeros, self.group, self.order, self.bits)

    def dequantize(self, dtype=torch.float32):
        weight = in_groups(self.codes(), self.group).float()  # (N, G, group)
        weight.sub_(self.zeros[:, :, None])
        weight.mul_(self.scales[:, :, None])
        weight = weight.flatten(1)[:, : self.in_features]  # (N, K)
        if self.order is not None:
            weight = weight[:, self.order.argsort()]
        return weight.to(dtype)

    def on_gpu(self, rows):
        if self.bits > 4:
            return None
        from kernels import Packed, linear

        if self.order is not None:
            rows = rows[:, self.order]
        N, K = self.out_features, self.in_features
        zeros = None if self.symmetric else self.zeros
        packed = Packed("int4", self.packed, self.scales, N, K, self.group, zeros)
        return linear(rows, packed, self.bias)

    def is_alike(self, other):
        if (self.bits, self.group) != (other.bits, other.group):
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return torch.equal(self.order, other.order)


class NF4Linear(QuantLinear):
    """4-bit NormalFloat weights; the tensors of `nf4_quantize` are buffers of the same names."""

    format = "nf4"

    def __init__(self, state, shape, bias=None, block=64):
        """state: what `nf4_quantize` makes of weights of that shape"""
        super().__init__(shape, bias)
        self.block = block
        for name, tensor in state.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_linear(cls, linear, block=64, double=True):
        state = nf4_quantize(linear.weight, block, double)
        return cls(state, linear.weight.shape, linear.bias, block)

    def state(self):
        """As `nf4_quantize` made it."""
        return dict(self.named_buffers())

    def for_gpu(self):
        from kernels import Packed

        absmax = nf4_absmax(self.state())
        return Packed("nf4", self.packed, absmax, self.out_features, self.in_features, self.block)

    def dequantize(self, dtype=torch.float32):
        if self.packed.is_cuda:
            import kernels

            return kernels.dequantize(self.for_gpu(), dtype)
        shape = (self.out_features, self.in_features)
        return nf4_dequantize(self.state(), shape, self.block, dtype)

    def on_gpu(self, rows):
        from kernels import linear

        return linear(rows, self.for_gpu(), self.bias)

    def stacked(self, layers):
        """Scales in float32, since 256 that share one need not end where a layer does."""
        absmax = torch.cat([nf4_absmax(layer.state()) for layer in layers])
        packed = joined(layers, "packed")
        return {"packed": packed, "absmax": absmax, "nested_absmax": None, "offset": None}


def pack_linear(linear, format, group_size):
    """nn.Linear -> a layer in one of FORMATS."""
    if format in ("int8", "int8-dynamic"):
        return Int8Linear.from_linear(linear, dynamic=format == "int8-dynamic")
    if format == "nf4":
        return NF4Linear.from_linear(linear)
    return GroupLinear.from_linear(linear, 4, group_size, sym=format == "int4")


def in_kind(linear, kind):
    """A layer still in floats -> the format that --quant names, "int8" or "int4"; others as is."""
    if type(linear) is not nn.Linear or kind not in ("int8", "int4"):
        return linear
    if kind == "int8" and linear.weight.device.type == "cpu":
        kind = "int8-dynamic"
    group = 32 if linear.in_features % 64 and linear.in_features % 32 == 0 else 64
    return pack_linear(linear, kind, group)


def fuse(layers):
    """Layers of one kind over the same input (q, k, v; gate and up) -> one with all their rows.

    Float layers' weights become views of the fused one, so that nothing is held twice. UserError:
    layers of different formats or column orders, or of which only some have a bias.
    """
    first = layers[0]
    for layer in layers:
        alike = type(layer) is type(first) and (layer.bias is None) == (first.bias is None)
        if alike and isinstance(first, QuantLinear):
            alike = first.is_alike(layer)
        if not alike:
            raise UserError("layers of different formats or column orders cannot be one")
    rows = [layer.out_features for layer in layers]
    fused = copy.copy(first)
    fused.out_features = sum(rows)
    fused._parameters = {"bias": None}
    if first.bias is not None:
        fused.bias = nn.Parameter(joined(layers, "bias"), False)
    if isinstance(first, QuantLinear):
        fused.fast_product = None
        fused.symmetric = all(layer.symmetric for layer in layers)
        fused._buffers = first._buffers | first.stacked(layers)
        return fused
    fused.weight = nn.Parameter(joined(layers, "weight"), False)
    for layer, part in zip(layers, fused.weight.detach().split(rows)):
        layer.weight.data = part
    return fused


# ----------------------------------------------------------------------------- a model, in place
BITSANDBYTES_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
}


def float_layers(model):
    """{name: nn.Linear} of all blocks. UserError if they are packed already."""
    found = {}
    for name, layer in model.layers.named_modules(prefix="layers"):
        if isinstance(layer, QuantLinear):
            raise UserError(
                f"{name} is quantized already ({layer.format}); start from the original model"
            )
        if isinstance(layer, nn.Linear):
            found[name] = layer
    return found


def check_group(group_size):
    if group_size != -1 and group_size < 1:
        raise UserError(f"group size {group_size}: use a positive number, or -1 for whole rows")


def quantize(model, format, group_size=128):
    """Replace the linear layers of all blocks by packed ones, in place -> the model.

    format: one of FORMATS. group_size is int4's: neighbouring inputs that share a scale, -1 for a
    whole row. Embeddings, norms and the head stay. UserError: NaN in a weight, a model that is
    quantized already.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    check_group(group_size)
    for name, linear in float_layers(model).items():
        check_finite(linear.weight, name)
        model.set_submodule(name, pack_linear(linear, format, group_size))
    if format == "nf4":
        model.quantization = dict(BITSANDBYTES_CONFIG)
        return model
    eight = format.startswith("int8")
    activations = {"activations": "int8"} if format == "int8-dynamic" else {}
    model.quantization = gptq_config(
        model,
        bits=8 if eight else 4,
        group_size=-1 if eight else group_size,
        sym=format != "int4-asym",
        desc_act=False,
        **activations,
    )
    return model


def gptq_config(model, **settings):
    """The folder's quantization_config; integers have GPTQ's layout whoever rounded them."""
    layers = [layer for layer in model.modules() if isinstance(layer, GroupLinear)]
    lowest = min((int(layer.zeros.min()) for layer in layers), default=1)
    # version 1 stores zero points less one, so it has no place for a zero point of 0
    version = "gptq" if lowest > 0 else "gptq_v2"
    return {"quant_method": "gptq", "checkpoint_format": version, "lm_head": False, **settings}


# -------------------------------------------------------------------------------------------- GPTQ
@dataclass
class Recipe:
    """How GPTQ rounds (Frantar et al. 2023; act-order comes from its authors' code)."""

    bits: int = 4  # GPTQ: 2 to 8
    group_size: int = 128  # neighbouring inputs that share a scale; -1: a whole row
    sym: bool = True  # GPTQ: the zero point is the middle code, as vLLM's fastest kernels ask
    act_order: bool = False  # GPTQ: columns with the largest activations first
    clip: bool = True  # GPTQ: scales that cost least, not those that span the extremes
    damp: float = 0.01  # GPTQ: share of the Hessian's mean diagonal added to it; may rise by itself


class Rounded(NamedTuple):
    """A matrix as GPTQ left it; `order` as in GroupLinear, `damp` the damping that it took."""

    codes: torch.Tensor  # uint8 (N, K)
    scales: torch.Tensor  # (N, G)
    zeros: torch.Tensor  # (N, G)
    order: torch.Tensor | None = None
    damp: float = 0.0


def inverse_factor(H, damp):
    """Upper Cholesky factor U of (H + damp * mean(diag) * I)^-1 = U.T @ U, and the damping.

    A Hessian of too few or too similar rows is not positive definite in float32: the damping grows
    tenfold until it is.
    """
    # inputs that are all zero have nothing to say, but must not stop the rest
    mean = H.diagonal().mean().clamp(min=1e-6)
    while True:
        damped = H + torch.eye(len(H), device=H.device) * (damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and torch.isfinite(factor).all():
                return factor, damp
        damp = max(damp * 10, 1e-6)
        if damp > 1e6 or not torch.isfinite(mean):
            raise UserError(
                "GPTQ: the activations' second moments hold NaN or infinity; "
                "the model or its calibration is broken"
            )


def gptq_round(weight, H, recipe, block=128):
    """Round a matrix so that weight @ X changes least -> Rounded.

    weight (N, K) float32; H (K, K) = X @ X.T over calibration inputs. Column by column, each
    column's rounding error is made good by those not yet rounded (algorithm 1):
    W[:, j:] -= err * U[i, j:] with err = (w_i - q_i) / U[i, i]. Updates reach later blocks once per
    block. A group's scale is taken when its first column comes up, from weights that already carry
    the errors of those before it. Inputs that never fired have no say and are rounded as they are.
    """
    K = weight.size(1)
    bits = recipe.bits
    group = K if recipe.group_size < 0 else min(recipe.group_size, K)
    dead = (H.diagonal() == 0).to(H.dtype)
    H = H + torch.diag(dead * H.diagonal().mean().clamp(min=1e-6))
    order = None
    if recipe.act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        weight = weight[:, order]
        H = H[order][:, order]
    U, damp = inverse_factor(H, recipe.damp)
    if group < K:  # a block holds whole groups, so a group's weights are up to date when it begins
        block = group * max(1, block // group)
    W = weight.t().contiguous()  # (K, N): a column's weights lie together
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    pivots = U.diagonal().tolist()
    cost = U.diagonal() ** -2  # of a squared error in each column
    scales, zeros = [], []  # (N,) of each group
    for start in range(0, K, block):
        end = min(start + block, K)
        now = W[start:end]
        factor = U[start:end, start:end].contiguous()
        errors = torch.empty_like(now)
        for i in range(end - start):
            column = start + i
            if column % group == 0:
                until = column + group
                weights = W[column:until].t()  # (N, group)
                if recipe.clip:
                    scale, zero = clipped_grid(weights, bits, recipe.sym, cost[column:until])
                else:
                    scale, zero = grid(weights, bits, recipe.sym)
                scales.append(scale)
                zeros.append(zero)
            code = to_codes(now[i], scale, zero, bits)
            codes[column] = code
            rounded = (code - zero) * scale
            errors[i] = (now[i] - rounded) / pivots[column]
            now[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        W[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
    codes = codes.t().contiguous()  # (K, N) -> (N, K)
    return Rounded(codes, torch.stack(scales, 1), torch.stack(zeros, 1), order, damp)


def round_together(linears, H, cross, recipe):
    """Round layers that read the same input as one matrix -> {name: GroupLinear}.

    linears: {name: nn.Linear}. H = X @ X.T of the inputs X that they get now that the layers before
    are rounded; cross = X0 @ X.T with the original model's X0. First the weights are moved to where
    they make the original outputs of the new inputs: the least squares solution of V @ X = W @ X0,
    which is V = W + W @ (cross - H) @ H^-1.
    """
    weight = joined(linears.values(), "weight").float()
    check_finite(weight, ", ".join(linears))
    factor, _ = inverse_factor(H, recipe.damp)
    moved = weight + weight @ (cross - H) @ factor.T @ factor
    rounded = gptq_round(moved, H, recipe)
    how = (recipe.bits, recipe.group_size, rounded.order)
    layers, row = {}, 0
    for name, linear in linears.items():
        own = slice(row, row + linear.out_features)
        parts = (rounded.codes[own], rounded.scales[own], rounded.zeros[own])
        layers[name] = GroupLinear(*parts, *how, linear.bias)
        row = own.stop
    return layers


class Calibration:
    """All calibration batches' hidden states in front of a block, and what attention needs beside.

    batches: (B, T) int64 each.
    """

    def __init__(self, model, batches):
        device = model.embed_tokens.weight.device
        self.states, self.ropes, self.masks = [], [], []
        for ids in batches:
            x, rope, masks = model.start(ids.to(device))
            self.states.append(x)
            self.ropes.append(rope)
            self.masks.append(masks)

    def attention_inputs(self, normed, sliding):
        for x, rope, (full, near) in zip(normed, self.ropes, self.masks):
            yield x, rope, near if sliding else full


def second_moments(inputs, others):
    """Sum of y.T @ x over all rows of all batches, x of `inputs`, y of `others` -> (K, K) float32.

    Of one list and itself it is GPTQ's Hessian, up to a factor.
    """
    K = inputs[0].size(-1)
    H = torch.zeros(K, K, device=inputs[0].device)
    for x, y in zip(inputs, others):
        x = x.reshape(-1, K).float()  # (B, T, K) -> (B*T, K)
        y = y.reshape(-1, K).float()
        H.addmm_(y.t(), x)
    return H


def read_by_last(module, last, inputs):
    """What a module's last projection reads of each input: an identity stands in for it."""
    projection = module.get_submodule(last)
    module.set_submodule(last, nn.Identity())
    outputs = [module(*arguments) for arguments in inputs]
    module.set_submodule(last, projection)
    return outputs


def stages(block, calibration, sliding):
    """Walk a block's four products in order, yielding (layers' names, their input of all batches).

    The caller may replace these layers before it asks for the next, so that every product runs
    once, on the outputs of those rounded before it ("true sequential"). At the end the calibration
    stands in front of the next block.
    """
    names = {module: name for name, module in block.named_modules()}
    qkv, o, up, down = [[names[layer] for layer in product] for product in block.products()]
    attention, mlp = block.self_attn, block.mlp

    normed = [block.input_layernorm(x) for x in calibration.states]
    yield qkv, normed
    inputs = calibration.attention_inputs(normed, sliding)
    attended = read_by_last(attention, "o_proj", inputs)
    yield o, attended
    pairs = zip(calibration.states, attended)
    calibration.states = [x + attention.o_proj(y) for x, y in pairs]

    normed = [block.post_attention_layernorm(x) for x in calibration.states]
    yield up, normed
    activated = read_by_last(mlp, "down_proj", [(x,) for x in normed])
    yield down, activated
    pairs = zip(calibration.states, activated)
    calibration.states = [x + mlp.down_proj(y) for x, y in pairs]


def round_block(block, now, then, sliding, recipe):
    """Replace a block's linear layers by rounded ones.

    now, then: Calibration behind the blocks rounded so far, and behind the original ones.
    """
    original = copy.deepcopy(block)
    # strict: the shorter of two generators would stop the other before its last step
    walks = zip(stages(block, now, sliding), stages(original, then, sliding), strict=True)
    for (names, inputs), (_, originals) in walks:
        linears = {name: block.get_submodule(name) for name in names}
        H = second_moments(inputs, inputs)
        cross = second_moments(inputs, originals)
        for name, layer in round_together(linears, H, cross, recipe).items():
            block.set_submodule(name, layer)


def relative_change(states, originals):
    """|states - originals|^2 / |originals|^2 over all batches."""
    change = size = 0.0
    for x, y in zip(states, originals):
        change += F.mse_loss(x, y, reduction="sum").item()
        size += y.square().sum().item()
    return change / size


@torch.no_grad()
def gptq(model, batches, bits=4, group_size=128, act_order=False, log=print, **recipe):
    """Quantize a model's linear layers by GPTQ, in place -> the model.

    batches: a list of (B, T) int64 token ids. Block after block: beside the model only one block's
    Hessians and the hidden states in front of it, with and without the rounding so far, are alive.
    Further keywords: fields of Recipe. `log` gets a line a block. UserError: NaN, a model that is
    quantized already.
    """
    recipe = Recipe(bits, group_size, act_order=act_order, **recipe)
    check_group(group_size)
    if not 2 <= bits <= 8:
        raise UserError(f"GPTQ to {bits} bits: use 2 to 8")
    float_layers(model)  # refuses what is packed already
    now, then = Calibration(model, batches), Calibration(model, batches)
    for i, block in enumerate(model.layers):
        begin = time.time()
        round_block(block, now, then, i in model.config.sliding_layers, recipe)
        change = relative_change(now.states, then.states)
        log(f"block {i:2d}: its output changes by {change:.2e}, {time.time() - begin:.1f} s")
    model.quantization = gptq_config(
        model,
        bits=bits,
        group_size=group_size,
        sym=recipe.sym,
        desc_act=act_order,
        true_sequential=True,
        damp_percent=recipe.damp,
    )
    return model


# ------------------------------------------------------------------------------------ the commands
@dataclass
class Args(Recipe):
    model: str = ""  # the model folder, or "report" to compare formats
    folder: str = "-"  # report: the model folder
    format: str = "gptq"  # int8, int8-dynamic, int4, int4-asym, nf4, gptq, gguf-q8_0, gguf-q4_k_m
    out: str = ""  # where to write; report: [MODEL/quantization.md and .png]
    text: str = ""  # text, .jsonl or conversations: half its rows calibrate [the model's own text]
    samples: int = 64  # rows to calibrate on
    held_out_rows: int = 32  # rows to score on
    length: int = 512  # tokens in a row, at most the model's context
    seed: int = 0  # of the samples
    questions: int = 280  # report: toybox questions put to a model that has a chat template
    formats: str = ""  # report: a comma-separated choice [all]
    device: str = "auto"  # auto, cpu, cuda, mps


def read_quant_args(argv=None):
    args = Args(**parse_flags(Args, __doc__, argv, positional=("model", "folder")))
    if args.model == "report":
        args.formats = args.formats or ",".join(COMPARED)
        chosen, known = args.formats.split(","), COMPARED
    else:
        chosen, known = [args.format], COMPARED[1:]
        args.folder = args.model
        if not args.out:
            raise UserError("--out: say where to write the quantized model")
        if Path(args.out).resolve() == Path(args.model).resolve():
            raise UserError(f"--out {args.out} is the model itself; choose another folder")
    if args.folder == "-":
        raise UserError("report: say which model folder")
    for name in chosen:
        if name not in known and not name.startswith("gguf-"):
            raise UserError(f"format {name}: choose from {', '.join(known)}, ...")
    if args.samples < 1 or args.held_out_rows < 1 or args.length < 2:
        raise UserError(
            f"samples {args.samples} and held-out-rows {args.held_out_rows} must be >= 1, "
            f"length {args.length} >= 2"
        )
    args.device = resolve(args.device, "float32", "off").device
    return args


def cast_parameters(model, dtype):
    """Embeddings, norms and biases to dtype, in place; packed weights and their scales stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def load_original(folder, device):
    """-> (the folder's model, the dtype that its weights have in the folder).

    On a CPU it computes in float32, for 16-bit products are slow there.
    """
    model = Transformer.from_pretrained(folder, device)
    if model.quantization:
        method = model.quantization["quant_method"]
        raise UserError(f"{folder} is quantized already ({method}); start from the original model")
    dtype = model.embed_tokens.weight.dtype
    if device.type == "cpu":
        cast_parameters(model, torch.float32)
    return model, dtype


def write_quantized(args, format, calibration, out, log):
    """The model in --folder -> OUT, a model folder in a format. calibration: (R, T) token ids."""
    model, dtype = load_original(args.folder, args.device)
    if format == "gptq":
        recipe = {field.name: getattr(args, field.name) for field in fields(Recipe)}
        gptq(model, calibration.split(8), log=log, **recipe)
    else:
        quantize(model, format, args.group_size)
    cast_parameters(model, dtype)
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (Path(args.folder) / name).is_file():
            shutil.copyfile(Path(args.folder) / name, Path(out) / name)


def gguf_command(args):
    """Write a GGUF file, for llama.cpp."""
    from formats import gguf

    out = Path(args.out)
    if out.suffix != ".gguf":
        out = out.with_suffix(".gguf")
    kinds = gguf.write(args.folder, out, args.format.removeprefix("gguf-"))
    sizes = ", ".join(f"{kind} {size:,} bytes" for kind, size in kinds.items())
    print(f"wrote    {out}: {out.stat().st_size / 1e6:.2f} MB, {sizes}")


def quantize_command(args):
    """Write one format's folder and say what it costs; or, for the report, do so with every one."""
    from formats import gguf
    from generate import Engine, Sampling
    from training import quality

    original, _ = load_original(args.folder, args.device)
    working = original.embed_tokens.weight.dtype
    tok = Tokenizer.load(args.folder)

    def writer(model):
        engine = Engine.of(model, tok, kv_tokens=max(8192, args.length))
        return quality.Writer(engine, Sampling)

    def make(format, out, log=print):
        """-> the model as it is read back from OUT."""
        if format.startswith("gguf-"):
            gguf.write(args.folder, out, format.removeprefix("gguf-"))
            return gguf.load(out, args.device)[0]
        write_quantized(args, format, calibration, out, log)
        return Transformer.from_pretrained(out, args.device, working)

    calibration, held_out = quality.calibration_and_held_out(original, tok, args, writer)
    if args.model == "report":
        quality.compare_formats(args, original, held_out, make, writer)
    else:
        model = make(args.format, args.out)
        quality.compare_with_original(args, model, original, held_out)


@torch.inference_mode()
def main():
    args = read_quant_args()
    if args.model != "report" and args.format.startswith("gguf-"):
        gguf_command(args)
    else:
        quantize_command(args)


if __name__ == "__main__":
    cli(main)
