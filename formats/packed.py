"""Packed weights: NF4, int8 and groups of 2 to 8 bits as linear layers with a fast product on each device; their folders.

quant.py makes them; GPTQ's layout on disk, and bitsandbytes' for NF4, are what other programs open.
"""

import copy
import functools
import json
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError

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
FEW_ROWS = (
    16  # on a CPU more rows than these are quicker unpacked and multiplied in float32 (NOTES.md)
)
CLIPS = [
    1 - i / 20 for i in range(11)
]  # ranges that GPTQ tries for a group's scale, as shares of the group's extent
NESTED_BLOCK = 256  # scales that share one scale under double quantization


# --------------------------------------------------------------------------------------------------------------------- NF4
@functools.lru_cache
@torch.inference_mode(False)  # made once, and then of use in training too
def nf4_pairs(device):
    """(256,) the two float32 values of every byte, the high half's first, taken for one float64: one look-up finds both."""
    value = torch.tensor(NF4, device=device)
    return (
        torch.stack((value.repeat_interleave(16), value.repeat(16)), 1)
        .view(torch.float64)[:, 0]
        .contiguous()
    )


@functools.lru_cache
@torch.inference_mode(False)
def dynamic_map(device="cpu", signed=True):
    """The 256 values of bitsandbytes' 8-bit "dynamic" type, sorted, float32 (Dettmers 2015, arXiv:1511.04561).

    Seven decades 10^-6..10^0; each has twice the fraction steps of the one below it, so small values keep their relative
    precision. The values are the midpoints between the steps; 0 and 1 are added. Unsigned: twice the steps in place of the sign.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middle = 10.0 ** (decade - 6) * (steps[:-1] + steps[1:]) / 2
        values += [*middle.tolist(), *(-middle).tolist()] if signed else middle.tolist()
    return torch.tensor(sorted(values), device=device)


def scaled_blocks(flat, block):
    """(n,) floats -> (each divided by its block's largest magnitude (n,) in [-1, 1], those magnitudes (blocks,))."""
    blocks = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)  # (blocks, block)
    absmax = blocks.abs().amax(1)
    scaled = (
        blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    )  # times the reciprocal, as bitsandbytes: the bits differ
    return scaled.clamp(-1, 1).view(-1)[: flat.numel()], absmax


def nearest(x, values):
    """Index of the nearest of the sorted `values` for each x -> uint8; of two equally near the lower one."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)


def dynamic_quantize(flat, block=NESTED_BLOCK):
    """(n,) float32 -> (uint8 indices into `dynamic_map` (n,), float32 scale of each block): bitsandbytes' blockwise 8 bits.

    Its CPU code looks values up in a table of 65,536 steps over [-1, 1] and gives a block of zeros the code 0.
    """
    scaled, absmax = scaled_blocks(flat, block)
    step = (
        ((scaled + 1).double() * 0.5 * 65535 + 0.5).float().int()
    )  # rounded once, as a fused multiply-add does
    codes = nearest(-1 + 2.0 * step / 65535, dynamic_map(flat.device))
    return codes * (absmax > 0).repeat_interleave(block)[: flat.numel()], absmax


def nf4_quantize(weight, block=64, double=True):
    """(N, K) floats -> dict of tensors as bitsandbytes makes them on the CPU, bit for bit.

    "packed" uint8 (N*K/2,), two codes a byte, the earlier one in the high half; "absmax": each block's largest magnitude,
    float32 (blocks,), or with `double` quantized again: uint8, with "nested_absmax" float32 (blocks/256,) and "offset".
    """
    check_finite(weight)
    if weight.numel() % 2:
        raise UserError(
            f"NF4 holds two weights a byte; {tuple(weight.shape)} is an odd number of them"
        )
    flat = weight.detach().reshape(-1).float()
    scaled, absmax = scaled_blocks(flat, block)
    codes = nearest(scaled, torch.tensor(NF4, device=flat.device))
    out = {"packed": codes[::2] << 4 | codes[1::2], "absmax": absmax}
    if double:  # QLoRA section 3: the scales are all positive, so their mean is taken off before they become signed 8 bits
        out["offset"] = absmax.mean()
        out["absmax"], out["nested_absmax"] = dynamic_quantize(absmax - out["offset"])
    return out


def nf4_absmax(state):
    """The blocks' scales in float32, double quantization undone."""
    if "nested_absmax" not in state:
        return state["absmax"]
    values = dynamic_map(state["absmax"].device)[state["absmax"].int()]
    scale = state["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: values.numel()]
    return values * scale + state["offset"]


def nf4_dequantize(state, shape, block=64, dtype=torch.float32):
    """The inverse of `nf4_quantize` -> (N, K) of dtype."""
    flat = (
        nf4_pairs(state["packed"].device).index_select(0, state["packed"].int()).view(torch.float32)
    )
    blocks = (
        F.pad(flat, (0, -flat.numel() % block)).view(-1, block).mul_(nf4_absmax(state)[:, None])
    )
    return blocks.view(-1)[: flat.numel()].view(shape).to(dtype)


# ---------------------------------------------------------------------------------------------------------------- integers
def grid(groups, bits, sym, cost=None):
    """(..., g) floats -> (scale, zero) (...) float32 of the integers 0..2^bits-1 that span each group's values and 0.

    w = scale * (code - zero). Symmetric: zero is the middle code. The scale is one that float16, the folder's type, holds.
    With `cost` (g,), what a squared error in each column costs, narrower ranges that cut the group's extremes are tried too.
    """
    if cost is not None:
        best, least = (torch.ones_like(groups[..., 0]),) * 2, torch.inf
        for share in CLIPS:
            scale, zero = grid(groups * share, bits, sym)
            rounded = (
                to_codes(groups, scale[..., None], zero[..., None], bits) - zero[..., None]
            ) * scale[..., None]
            error = (rounded - groups) ** 2 @ cost
            best = [torch.where(error < least, new, old) for new, old in zip((scale, zero), best)]
            least = error.clamp(max=least)
        return best
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if sym:  # 8 bits use -127..127, so that the largest magnitude is a code; fewer bits cannot spare that code
        high = torch.maximum(-low, high)
        scale = high / (127 if bits == 8 else top / 2)
    else:
        scale = (high - low) / top
    scale = scale.half().float()
    if torch.isinf(scale).any():
        raise UserError(
            f"weights up to {groups.abs().max():.3g} need a scale beyond float16's 65,504: rescale the model first"
        )
    scale = torch.where(scale == 0, 1, scale)  # a group of zeros
    middle = torch.full_like(scale, 2 ** (bits - 1))
    return scale, middle if sym else torch.where(
        low == high, middle, (-low / scale).round().clamp(0, top)
    )


def to_codes(weight, scale, zero, bits):
    """The nearest codes, as floats."""
    return (weight / scale + zero).round_().clamp_(0, 2**bits - 1)


def round_to_nearest(weight, bits, group, sym):
    """(N, K) -> codes uint8 (N, K), scales and zeros float32 (N, G). group -1: the whole row; K need not be a multiple."""
    check_finite(weight)
    N, K = weight.shape
    group = K if group < 0 else group
    groups = F.pad(weight.detach().float(), (0, -K % group)).view(N, -1, group)  # (N, G, group)
    scale, zero = grid(groups, bits, sym)
    return (
        to_codes(groups, scale[..., None], zero[..., None], bits)
        .to(torch.uint8)
        .view(N, -1)[:, :K],
        scale,
        zero,
    )


# ----------------------------------------------------------------------------------------------------------- linear layers
def check_finite(weight, name="a weight"):
    """Raises UserError where there is NaN or infinity: its block's scale, and with it the whole block, would be too."""
    if not torch.isfinite(weight).all():
        bad = (~torch.isfinite(weight)).sum().item()
        raise UserError(
            f"{name}: {bad:,} of {weight.numel():,} values are NaN or infinite; the model is damaged"
        )


class FrozenProduct(torch.autograd.Function):
    """x @ W.T with a gradient for x alone. Only the packed weight stays alive for backward, which unpacks it again (QLoRA)."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None


class QuantLinear(nn.Module):
    """A linear layer with packed weights: x (..., K) -> (..., N). `dequantize` and `plain` define it; `product` is the quickest way
    that the device has to nearly the same numbers. Buffers named in `by_row` have the output rows first, so layers can be fused."""

    by_row: tuple = ()
    cpp: Any = None  # native.Product, made by the first product that wants it; False where there cannot be one

    def __init__(self, shape, bias=None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dequantize(self, dtype=torch.float32):
        """-> (N, K) of dtype, the weights that this layer stands for."""
        raise NotImplementedError

    def plain(self, rows):
        """The twin: unpack, then multiply. (M, K) -> (M, N)."""
        return F.linear(
            rows,
            self.dequantize(rows.dtype),
            None if self.bias is None else self.bias.to(rows.dtype),
        )

    def on_gpu(self, rows):
        """The same by a kernel, or None."""

    def on_cpu(self, rows):
        """The same of float32 by forward.cpp, without the bias, or None."""

    def product(self, x):
        """x (..., K) -> (..., N) with the bias, in x's dtype."""
        rows, y = x.reshape(-1, self.in_features), None
        if x.is_cuda:
            y = self.on_gpu(rows)
        elif (
            not torch.compiler.is_compiling()
            and (y := self.on_cpu(rows.float())) is not None
            and self.bias is not None
        ):
            y += self.bias
        y = self.plain(rows) if y is None else y
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def forward(self, x):
        return FrozenProduct.apply(x, self) if x.requires_grad else self.product(x)

    def in_cpp(self, rows):
        """(M, K) float32, each group rounded to 8 bits -> (M, N), or None where forward.cpp cannot."""
        if self.cpp is None:
            from engine import native  # only here: it knows these layers

            try:
                self.cpp = native.Product(self)
            except native.Unavailable:
                self.cpp = False
        return self.cpp(rows) if self.cpp else None


def fuse(layers):
    """Layers of one class that read the same input (q, k, v; gate and up) -> one layer whose rows are theirs, in order."""
    first, N, bias = layers[0], sum(layer.out_features for layer in layers), None
    orders = [
        torch.arange(first.in_features)
        if getattr(layer, "order", None) is None
        else layer.order.cpu()
        for layer in layers
    ]
    if any(
        (type(layer), layer.format) != (type(first), first.format)
        or not torch.equal(order, orders[0])
        for layer, order in zip(layers, orders)
    ):
        raise UserError("layers of different formats or column orders cannot be one")
    if any(layer.bias is not None for layer in layers):
        device = next(first.buffers()).device
        bias = torch.cat(
            [
                torch.zeros(layer.out_features, device=device) if layer.bias is None else layer.bias
                for layer in layers
            ]
        )
    if isinstance(first, NF4Linear):  # their shared scales need not end where a layer does
        state = {
            "packed": torch.cat([layer.packed for layer in layers]),
            "absmax": torch.cat([nf4_absmax(layer._buffers) for layer in layers]),
        }
        return NF4Linear(state, (N, first.in_features), bias, first.block)
    fused = copy.copy(first)
    fused._buffers, fused._parameters = (
        dict(first._buffers),
        {"bias": None if bias is None else nn.Parameter(bias, False)},
    )
    fused.out_features, fused.cpp = N, None
    for name in first.by_row:
        parts = [getattr(layer, name) for layer in layers]
        if name == "zeros" and any(part is not None for part in parts):
            parts = [layer.zero_points() for layer in layers]
        fused._buffers[name] = None if parts[0] is None else torch.cat(parts)
    return fused


def int8_rows(x):
    """(M, K) floats -> (the rows rounded to integers of 8 bits, scale (M, 1)): each by its own scale, so that none depends on its
    neighbours."""
    scale = (
        torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp(min=1e-30) / 127
    )  # the largest magnitude is 127
    return (x / scale).round(), scale


class Int8Linear(QuantLinear):
    """int8 weights with one float scale an output row: w = scale * code, code in -127..127 [format "int8"].

    With `dynamic` the activations are rounded to int8 too, each row of x by its own largest magnitude ["int8-dynamic"].
    """

    by_row = ("codes", "scale")

    def __init__(self, codes, scales, bias=None, dynamic=False):
        """codes uint8 (N, K) whose zero point is 128, scales (N, 1)"""
        super().__init__(codes.shape, bias)
        self.dynamic, self.format = dynamic, "int8-dynamic" if dynamic else "int8"
        self.register_buffer("codes", (codes ^ 128).view(torch.int8))  # 0..255 -> -128..127
        self.register_buffer("scale", scales[:, 0].float())

    @classmethod
    def from_linear(cls, linear, dynamic=False):
        codes, scales, _ = round_to_nearest(linear.weight, 8, -1, sym=True)
        return cls(codes, scales, linear.bias, dynamic)

    def dequantize(self, dtype=torch.float32):
        return (self.codes * self.scale[:, None]).to(dtype)

    def groups(self):
        """As forward.cpp wants it: codes uint8 (N, K), scale and zero (N, G), inputs a group, their order or None, bits."""
        scale = self.scale[:, None]
        return (
            self.codes.view(torch.uint8) ^ 128,
            scale,
            torch.full_like(scale, 128),
            self.in_features,
            None,
            8,
        )

    def plain(self, rows):
        if self.dynamic:
            codes, scale = int8_rows(rows.float())
            rows = (codes * scale).to(rows.dtype)
        return super().plain(rows)

    def on_gpu(self, rows):
        from kernels import Packed, linear

        return linear(
            rows,
            Packed("int8x8" if self.dynamic else "int8", self.codes, self.scale, *self.codes.shape),
            self.bias,
        )

    def on_cpu(self, rows):
        if self.dynamic:
            return self.in_cpp(rows)
        if len(rows) > FEW_ROWS:
            return None
        codes, scale = int8_rows(
            rows
        )  # what 8 bits lose of a row is a second one: two products with 8 bits make one with 16
        y = self.in_cpp(torch.cat((codes * scale, rows - codes * scale)))
        return y if y is None else torch.add(*y.chunk(2))


class GroupLinear(QuantLinear):
    """2 to 8 bits, one scale and zero point for each `group` neighbouring inputs of a row: w = scale * (code - zero).

    packed  uint8 (N, ceil(K/2)), two codes a byte, the earlier in the low half, for 2 to 4 bits; else (N, K)
    scales  float16 (N, G), G = ceil(K/group): the last group may be shorter
    zeros   uint8 (N, G), or None where all are 8 (symmetric int4)
    order   int64 (K,) or None: packed column j is input order[j] (GPTQ's act-order keeps a group's columns together)
    """

    by_row = ("packed", "scales", "zeros")

    def __init__(self, codes, scales, zeros, bits, group, order=None, bias=None):
        """codes uint8 (N, K) in the order of `order`."""
        super().__init__(codes.shape, bias)
        self.bits, self.group, self.format = (
            bits,
            group if group > 0 else self.in_features,
            f"int{bits}",
        )
        if bits <= 4:
            codes = F.pad(codes, (0, codes.size(1) % 2))
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        self.register_buffer("packed", codes)
        self.register_buffer("scales", scales.half())
        self.register_buffer(
            "zeros", None if bits == 4 and (zeros == 8).all() else zeros.to(torch.uint8)
        )
        self.register_buffer("order", order)

    @classmethod
    def from_linear(cls, linear, bits=4, group=128, sym=True):
        codes, scales, zeros = round_to_nearest(linear.weight, bits, group, sym)
        return cls(codes, scales, zeros, bits, group, None, linear.bias)

    def codes(self):
        """-> uint8 (N, K), columns still in `order`."""
        if self.bits > 4:
            return self.packed
        return torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1)[
            :, : self.in_features
        ]  # (N, K/2, 2) -> (N, K)

    def groups(self):
        return self.codes(), self.scales, self.zero_points(), self.group, self.order, self.bits

    def zero_points(self):
        return (
            torch.full_like(self.scales, 8, dtype=torch.uint8) if self.zeros is None else self.zeros
        )

    def dequantize(self, dtype=torch.float32):
        codes, (N, K) = self.codes(), (self.out_features, self.in_features)
        groups = F.pad(codes, (0, -K % self.group)).view(N, -1, self.group).float()  # (N, G, group)
        zero = 8 if self.zeros is None else self.zeros[:, :, None].float()
        weight = groups.sub_(zero).mul_(self.scales[:, :, None]).view(N, -1)[:, :K]
        return (weight if self.order is None else weight[:, self.order.argsort()]).to(dtype)

    def on_gpu(self, rows):
        if self.bits > 4:
            return None
        from kernels import Packed, linear

        rows, shape = (
            rows if self.order is None else rows[:, self.order],
            (self.out_features, self.in_features),
        )
        return linear(
            rows,
            Packed("int4", self.packed, self.scales, *shape, self.group, self.zeros),
            self.bias,
        )

    def on_cpu(self, rows):
        return self.in_cpp(rows) if len(rows) <= FEW_ROWS else None


class NF4Linear(QuantLinear):
    """4-bit NormalFloat weights in bitsandbytes' layout; the tensors of `nf4_quantize` are buffers of the same names."""

    format = "nf4"

    def __init__(self, state, shape, bias=None, block=64):
        """state: what `nf4_quantize` makes of weights of that shape"""
        super().__init__(shape, bias)
        self.block = block
        for name, tensor in state.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_linear(cls, linear, block=64, double=True):
        return cls(
            nf4_quantize(linear.weight, block, double), linear.weight.shape, linear.bias, block
        )

    def for_gpu(self):
        from kernels import Packed

        return Packed(
            "nf4",
            self.packed,
            nf4_absmax(self._buffers),
            self.out_features,
            self.in_features,
            self.block,
        )

    def dequantize(self, dtype=torch.float32):
        if self.packed.is_cuda:
            import kernels

            return kernels.dequantize(self.for_gpu(), dtype)
        return nf4_dequantize(
            self._buffers, (self.out_features, self.in_features), self.block, dtype
        )

    def on_gpu(self, rows):
        from kernels import linear

        return linear(rows, self.for_gpu(), self.bias)


def pack(linear, format, group_size):
    """nn.Linear -> one of quant.FORMATS."""
    if format in ("int8", "int8-dynamic"):
        return Int8Linear.from_linear(linear, dynamic=format == "int8-dynamic")
    if format == "nf4":
        return NF4Linear.from_linear(linear)
    return GroupLinear.from_linear(linear, 4, group_size, sym=format == "int4")


def in_kind(linear, kind):
    """A layer still in floats -> the format that --quant names, "int8" or "int4"; any other layer as it is."""
    if type(linear) is not nn.Linear or kind not in ("int8", "int4"):
        return linear
    kind = "int8-dynamic" if kind == "int8" and linear.weight.device.type == "cpu" else kind
    return pack(linear, kind, next((g for g in (64, 32) if linear.in_features % g == 0), 64))


# ----------------------------------------------------------------------------------------------------------------- folders
# GPTQ's layout, which transformers, GPTQModel, AutoGPTQ and vLLM read. Codes are a stream of `bits` bits each, the lowest
# first, in int32 words; qweight's streams run down the inputs, qzeros' along the outputs:
#   qweight int32 (K*bits/32, N)   qzeros int32 (G, N*bits/32)   scales float16 (G, N)   g_idx int32 (K): each input's group
# Version 1 stores zero points less one, "gptq_v2" as they are. K and N are filled up to multiples of 32.
def to_words(codes, bits):
    """(K, N) integers below 2^bits -> int32 (ceil(K/32) * bits, N): 32 codes fill `bits` words."""
    codes = F.pad(codes.long(), (0, 0, 0, -codes.size(0) % 32)).view(
        -1, 32, codes.size(1)
    )  # (K/32, 32, N)
    words = codes.new_zeros(codes.size(0), bits + 1, codes.size(2))
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= codes[:, i] << shift & 0xFFFFFFFF
        words[:, word + 1] |= codes[:, i] << shift >> 32  # what runs over into the next word
    return words[:, :bits].flatten(0, 1).int()


def from_words(words, bits, count):
    """The inverse -> uint8 (count, N)."""
    words, codes = (words.long() & 0xFFFFFFFF).view(-1, bits, words.size(1)), []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code |= words[:, word + 1] << 32 - shift
        codes.append((code & 2**bits - 1).to(torch.uint8))
    return torch.stack(codes, 1).flatten(0, 1)[:count]  # (K/32, 32, N) -> (count, N)


def write_gptq(layer, name, version):
    """Int8Linear or GroupLinear -> {tensor name: tensor} in GPTQ's layout."""
    codes, scales, zeros, group, order, bits = layer.groups()
    groups = torch.arange(layer.in_features, device=codes.device) // group
    if order is not None:
        codes, groups = codes[:, order.argsort()], groups[order.argsort()]
    out = {
        "qweight": to_words(codes.t(), bits),
        "qzeros": to_words(zeros - int(version == "gptq"), bits).t(),
        "scales": scales.half().t(),
        "g_idx": groups.int(),
    }
    return {f"{name}.{key}": tensor for key, tensor in out.items()}


def read_gptq(tensors, name, shape, config, bias=None):
    """The inverse -> Int8Linear or GroupLinear. UserError where g_idx is not groups of the size that the config states."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")
    )
    (N, K), bits = shape, config["bits"]
    group = K if config["group_size"] == -1 else config["group_size"]
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), torch.arange(K, device=g_idx.device) // group):
        raise UserError(
            f"{name}.g_idx: not {-(-K // group)} groups of {group} inputs, as quantization_config says"
        )
    codes = from_words(qweight, bits, K)[order].t().contiguous()  # (N, K)
    zeros = from_words(qzeros.t().contiguous(), bits, N)
    if config["checkpoint_format"] == "gptq":
        zeros = (zeros + 1) & 2**bits - 1  # a writer that had 0 to store less one left all bits set
    scales = scales.t().contiguous()
    if bits == 8 and group == K and (zeros == 128).all() and not config.get("desc_act"):
        return Int8Linear(codes, scales, bias, config.get("activations") == "int8")
    straight = torch.equal(order, torch.arange(K, device=order.device))
    return GroupLinear(codes, scales, zeros, bits, group, None if straight else order, bias)


def write_bnb(layer, name, dtype=torch.float32):
    """NF4Linear -> {tensor name: tensor} of a folder, as bitsandbytes and transformers write and read them."""
    info = {
        "quant_type": "nf4",
        "blocksize": layer.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    out = {"": layer.packed[:, None], ".absmax": layer.absmax, ".quant_map": torch.tensor(NF4)}
    if "nested_absmax" in layer._buffers:
        out |= {".nested_absmax": layer.nested_absmax, ".nested_quant_map": dynamic_map().clone()}
        info |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": layer.offset.item(),
        }
    out[".quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(info).encode()), dtype=torch.uint8
    )
    return {f"{name}.weight{key}": tensor for key, tensor in out.items()}


def read_bnb(tensors, name, shape, bias=None):
    """The inverse: {tensor name: tensor} with NAME.weight and its statistics -> NF4Linear. Other codes than NF4 are refused."""
    own = {
        key.removeprefix(name + ".weight").lstrip("."): t
        for key, t in tensors.items()
        if key.startswith(name + ".weight")
    }
    try:
        info = json.loads(bytes(own["quant_state.bitsandbytes__nf4"].tolist()))
        block, weights, state = (
            info["blocksize"],
            shape[0] * shape[1],
            {"packed": own[""].reshape(-1), "absmax": own["absmax"]},
        )
        fits = [
            block in (32, 64, 128, 256, 512, 1024, 2048, 4096),
            tuple(info["shape"]) == tuple(shape),
            own[""].dtype == torch.uint8 and own[""].numel() * 2 == weights,
            own["absmax"].numel() == -(-weights // block),
            torch.equal(own["quant_map"].float(), torch.tensor(NF4)),
        ]
        if "nested_absmax" in own:
            fits += [
                info.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK,
                own["nested_absmax"].numel() == -(-own["absmax"].numel() // NESTED_BLOCK),
                torch.equal(own["nested_quant_map"], dynamic_map()),
            ]
            state |= {
                "nested_absmax": own["nested_absmax"],
                "offset": torch.tensor(float(info["nested_offset"])),
            }
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{name}.weight: damaged bitsandbytes statistics ({type(error).__name__}: {error})"
        ) from None
    if not all(fits):
        raise UserError(
            f"{name}.weight: sizes or code table are not those of an NF4 matrix of shape {tuple(shape)}"
        )
    return NF4Linear(state, shape, bias, block)


def packed_state(model):
    """A quantized model's state dict as its folder has it: packed layers by the layout's tensor names, the rest as is."""
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear) and name != "lm_head"
    }
    inside = tuple(name + "." for name in layers)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith((*inside, "lm_head."))}
    if not model.config.tie_word_embeddings:
        if isinstance(model.lm_head, QuantLinear):
            raise UserError(
                "a folder keeps the output head as it was: save before quantizing the head"
            )
        state["lm_head.weight"] = model.lm_head.weight
    nf4 = model.quantization["quant_method"] == "bitsandbytes"
    if nf4 and model.config.is_gpt2:
        raise UserError(
            "GPT-2 folders join q, k and v in one transposed matrix, which NF4 blocks cannot follow; use int4 or gptq"
        )
    if model.config.is_gpt2 and model.config.hidden_size % 32:
        raise UserError(
            f"a GPT-2 folder joins q, k and v; their width {model.config.hidden_size} is not a multiple of 32"
        )
    for name, layer in layers.items():
        state |= (
            write_bnb(layer, name)
            if nf4
            else write_gptq(layer, name, model.quantization["checkpoint_format"])
        )
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state


def check_config(config, where):
    """quantization_config of a folder from anywhere -> the same, its fields checked; UserError names what is not supported."""
    config = dict(config) if isinstance(config, dict) else {}
    method = config.get("quant_method")
    if (
        method == "bitsandbytes"
        and config.get("load_in_4bit")
        and config.get("bnb_4bit_quant_type") == "nf4"
    ):
        return config
    config.setdefault("checkpoint_format", "gptq")
    bits, group = config.get("bits"), config.get("group_size", 128)
    if method != "gptq" or config["checkpoint_format"] not in ("gptq", "gptq_v2"):
        raise UserError(
            f"{where}: weights quantized as {method!r} ({config.get('checkpoint_format')}) are not supported; "
            "this program reads gptq, gptq_v2 and bitsandbytes NF4"
        )
    if not (
        isinstance(bits, int)
        and 2 <= bits <= 8
        and isinstance(group, int)
        and (group == -1 or group > 0)
    ):
        raise UserError(
            f"{where}: bits {bits!r} and group_size {group!r}: expected 2 to 8 and a positive number or -1"
        )
    return config | {"group_size": group}


def expect_packed(model, config, files):
    """What a quantized folder should hold -> ({our tensor name: meta tensor}, {packed layer: (N, K)}).

    files: as `model.open_weights` gives them. A layer is packed where its folder says so; others may be left as they were.
    """

    def there(name):
        return name if name.startswith("lm_head") else "model." + name

    gptq_layout = config["quant_method"] == "gptq"
    mark = ".qweight" if gptq_layout else ".weight.quant_state.bitsandbytes__nf4"
    state, packed = model.state_dict(), {}
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        fused = (
            model.config.is_gpt2 and gptq_layout and name.startswith("layers.")
        )  # GPT-2's folders have their own names
        if not fused and there(name + mark) not in files:
            continue
        (N, K), packed[name] = linear.weight.shape, tuple(linear.weight.shape)
        del state[f"{name}.weight"]
        if (
            there(f"{name}.bias") in files
        ):  # some writers store one of zeros where the architecture has none
            state[f"{name}.bias"] = torch.empty(N, device="meta")
        if gptq_layout:
            bits, G = (
                config["bits"],
                1 if config["group_size"] == -1 else -(-K // config["group_size"]),
            )
            shapes = {
                "qweight": (-(-K // 32) * bits, N),
                "qzeros": (G, -(-N // 32) * bits),
                "scales": (G, N),
                "g_idx": (K,),
            }
        else:
            own = [
                key for key in files if key.startswith(there(f"{name}.weight"))
            ]  # `read_bnb` checks what there is
            shapes = {
                key.removeprefix(there(f"{name}.")): files[key][0]
                .get_slice(files[key][1])
                .get_shape()
                for key in own
            }
        state |= {
            f"{name}.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()
        }
    return state, packed


def install_packed(model, config, state, packed):
    """Put packed layers, made of the folder's tensors in `state`, in place of the model's; the rest is left in `state`."""
    for name, shape in packed.items():
        own = {key: state.pop(key) for key in [k for k in state if k.startswith(name + ".")]}
        bias = own.pop(f"{name}.bias", None)
        if config["quant_method"] == "bitsandbytes":
            layer = read_bnb(own, name, shape, bias)
        else:
            layer = read_gptq(own, name, shape, config, bias)
        model.set_submodule(name, layer)
    model.quantization = config
