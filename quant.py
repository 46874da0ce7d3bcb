"""Models in fewer bits: int8, int4, NF4 and GPTQ in place of the linear layers' weights.

python quant.py runs/demo --format gptq --group-size 64 --out runs/demo-gptq

First come the codes that weights are rounded to, then the layers that hold them, then the ways to
round a whole model: each weight to its nearest code (`quantize`), or by GPTQ (`gptq`).
"""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

# first, since it sets how torch's threads wait
from common import UserError, cli, flags_among, parse_flags  # isort: skip

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from model import Transformer, float_product
from runtime import resolve
from tokenizer import Tokenizer

# 8 bits with one scale a row; 4 bits in groups; 4-bit NormalFloat as bitsandbytes has it
FORMATS = "int8", "int4", "nf4"


# ---------------------------------------------------------------- a grid: scale, zero point, codes
# A group of weights is stored as small integers, its codes: w = scale * (code - zero). The scale is
# the step from one code's weight to the next, and zero is the code that stands for 0.
def check_finite(weight, name="a weight"):
    """UserError where there is NaN or infinity: the whole group would become that too."""
    bad = (~weight.isfinite()).sum()
    if bad:
        raise UserError(
            f"{name}: {bad:,} of {weight.numel():,} values are NaN or infinite; "
            "the model is damaged"
        )


def in_groups(values, size):
    """(..., K) -> (..., G, size), G = ceil(K / size), the last group filled up with zeros; a group
    of more than K is one of K."""
    size = min(size, values.size(-1))
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
        scale = torch.maximum(-low, high) / (127 if bits == 8 else top / 2)
    else:
        scale = (high - low) / top
    scale = scale.half().float()
    if scale.isinf().any():
        raise UserError(
            f"weights up to {groups.abs().max():.3g} need a scale beyond float16's 65,504: "
            "rescale the model first"
        )
    scale = torch.where(scale == 0, 1, scale)  # of zeros, or less than float16 can tell from them
    zero = torch.full_like(scale, 2 ** (bits - 1))  # the middle
    if not sym:
        zero = torch.where(low < high, (-low / scale).round().clamp(0, top), zero)
    return scale, zero


def to_codes(weight, scale, zero, bits):
    """The nearest codes, as floats."""
    return (weight / scale + zero).round_().clamp_(0, 2**bits - 1)


CLIPPED_RANGES = [1 - i / 20 for i in range(11)]  # shares of a group's range that GPTQ tries


def clipped_grid(groups, bits, sym, cost):
    """As `grid`, for that of CLIPPED_RANGES whose rounding errors cost least.

    (..., g) floats -> (2, ...): scale and zero. cost (g,): what a squared error in each column
    costs. A narrower range cuts the group's extremes, and serves the many weights in its middle
    better.
    """
    best = least = torch.inf
    for share in CLIPPED_RANGES:
        tried = torch.stack(grid(groups * share, bits, sym))  # (2, ...)
        scale, zero = tried[..., None]  # (..., 1) each
        rounded = (to_codes(groups, scale, zero, bits) - zero) * scale
        error = (rounded - groups) ** 2 @ cost  # (..., g) @ (g,) -> (...)
        best = torch.where(error < least, tried, best)  # one choice for scale and zero: (2, ...)
        least = error.clamp(max=least)
    return best


ROUNDED_AT_ONCE = 1 << 22  # weights


def round_to_nearest(weight, bits, group, sym):
    """(N, K) -> codes uint8 (N, K), scales and zeros float32 (N, G), G = ceil(K / group).

    group: neighbouring inputs that share a scale, -1 for a whole row; the last may be shorter. It
    takes some rows at a time, so that no float copy of the whole matrix is ever in memory.
    """
    check_finite(weight)
    K = weight.size(1)
    group = K if group < 0 else group
    parts = []
    for rows in weight.detach().split(max(1, ROUNDED_AT_ONCE // K)):
        groups = in_groups(rows.float(), group)  # (n, G, group)
        scale, zero = grid(groups, bits, sym)
        codes = to_codes(groups, scale[..., None], zero[..., None], bits)
        codes = codes.to(torch.uint8).flatten(1)[:, :K]  # (n, G, group) -> (n, K)
        parts.append((codes, scale, zero))
    return tuple(map(torch.cat, zip(*parts)))


# -------------------------------------------------------- NF4: codes that are not evenly spaced
# QLoRA (Dettmers et al. 2023, section 3): 16 values that are equally likely under a normal
# distribution. Blocks of 64 weights share a scale, their largest magnitude; double quantization
# rounds these scales in turn to 8 bits, 256 of which share one float32.
NESTED_BLOCK = 256


@functools.lru_cache
@torch.inference_mode(False)  # made once, and then of use in training too
def nf4_pairs(device):
    """(256,) int64, each the bits of the two float32 values of a byte, the high half's first.

    One look-up in this table so unpacks two weights.
    """
    value = torch.tensor(kernels.NF4, device=device)
    pairs = torch.stack((value.repeat_interleave(16), value.repeat(16)), 1)  # (256, 2)
    return pairs.view(torch.int64).flatten()


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
    return scaled.clamp(-1, 1).flatten()[: flat.numel()], absmax


def nearest_index(x, values):
    """Index uint8 of the nearest of the sorted `values`; of two equally near the lower one."""
    midpoints = (values[1:] + values[:-1]) / 2
    return torch.bucketize(x, midpoints, out_int32=True).to(torch.uint8)


def dynamic_quantize(flat):
    """(n,) float32 -> (uint8 indices into `dynamic_map` (n,), float32 scale of each block).

    bitsandbytes' CPU code looks values up in a table of 65,536 steps over [-1, 1], and gives a
    block of zeros the code 0; so do we, to have its bits.
    """
    scaled, absmax = scaled_blocks(flat, NESTED_BLOCK)
    # in float64, which Apple's GPUs do not have, and rounded once, as a fused multiply-add does
    step = ((scaled + 1).cpu().double() * 0.5 * 65535 + 0.5).float().int().to(flat.device)
    codes = nearest_index(-1 + 2.0 * step / 65535, dynamic_map(flat.device))
    in_use = (absmax > 0).repeat_interleave(NESTED_BLOCK)[: flat.numel()]
    return codes * in_use, absmax


def nf4_quantize(weight):
    """(N, K) floats -> dict of tensors as bitsandbytes makes them on the CPU, bit for bit.

    "packed" uint8 (N*K/2,), two codes a byte, the earlier one in the high half; "absmax" float32
    (blocks,), the largest magnitude of each block of 64, is doubly quantized: "absmax" uint8
    (blocks,), "nested_absmax" float32 (blocks/256,) and "offset" float32 ().
    """
    check_finite(weight)
    if weight.numel() % 2:
        raise UserError(f"NF4 holds two weights a byte; {tuple(weight.shape)} is an odd number")
    flat = weight.detach().reshape(-1).float()
    scaled, absmax = scaled_blocks(flat, 64)
    codes = nearest_index(scaled, torch.tensor(kernels.NF4, device=flat.device))
    packed = codes[::2] << 4 | codes[1::2]
    # scales are all positive: without their mean they make better use of a signed type
    offset = absmax.mean()
    codes, nested = dynamic_quantize(absmax - offset)
    return {"packed": packed, "absmax": codes, "nested_absmax": nested, "offset": offset}


# ------------------------------------------------------------------------------ the linear layers
class FrozenProduct(torch.autograd.Function):
    """x @ W.T with a gradient for x alone, as QLoRA needs it: adapters before it learn.

    Only the packed weight stays alive for backward, which unpacks it again: dL/dx = dL/dy @ W.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad):
        return float_product(grad, ctx.layer.dequantize(grad.dtype).t()), None


def joined(layers, name):
    """The layers' tensors of one name, one below the other."""
    return torch.cat([getattr(layer, name).detach() for layer in layers])


class QuantLinear(nn.Module):
    """A linear layer with packed weights: x (..., K) -> (..., N).

    `dequantize` and `product` say what it computes, in torch on any device. For a GPU `tiled` makes
    a layer of it that the kernels read; on a CPU the engine packs the weights for forward.cpp.
    """

    format = ""

    def __init__(self, shape, bias=None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), False)

    def dequantize(self, dtype=torch.float32):
        """-> (N, K) of dtype, the weights that this layer stands for."""
        raise NotImplementedError

    def product(self, x):
        """What a product is: unpack, then multiply. x (..., K) -> (..., N), in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return float_product(x, self.dequantize(x.dtype), bias)

    def tiles(self):
        """-> kernels.Tiles, or None where the kernels cannot take this layer."""

    def forward(self, x):
        return FrozenProduct.apply(x, self) if x.requires_grad else self.product(x)

    def fuse_key(self):
        """What layers must have in common to be fused."""
        return type(self), self.format, self.bias is None

    def stacked(self, layers):
        """{buffer: tensor} of one layer whose rows are those of `layers`, in their order."""
        buffers = self.named_buffers()  # of which the order is the same in all
        return {name: joined(layers, name) for name, _ in buffers if name != "order"}


class GroupLinear(QuantLinear):
    """2 to 8 bits, a scale and zero point for each `group` neighbouring inputs of a row.

    packed  uint8 (N, ceil(K/2)), two codes a byte, the earlier in the low half; 5 to 8 bits: (N, K)
    scales  float16 (N, G), G = ceil(K/group): the last group may be shorter
    zeros   uint8 (N, G)
    order   int64 (K,) or None: packed column j is input order[j] (GPTQ's act-order)
    """

    def __init__(self, codes, scales, zeros, bits, group, order=None, bias=None):
        """codes uint8 (N, K) in the order of `order`; group -1: whole rows."""
        super().__init__(codes.shape, bias)
        self.bits = bits
        self.group = group if group > 0 else self.in_features
        self.format = f"int{bits}"
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
        """What the layer holds, the codes unpacked, as other formats of integers give it, too."""
        return self.codes(), self.scales, self.zeros, self.group, self.order, self.bits

    def dequantize(self, dtype=torch.float32):
        weight = in_groups(self.codes(), self.group).float()  # (N, G, group)
        weight.sub_(self.zeros[:, :, None]).mul_(self.scales[:, :, None])
        weight = weight.flatten(1)[:, : self.in_features]  # (N, K)
        if self.order is not None:
            weight = weight[:, self.order.argsort()]
        return weight.to(dtype)

    def tiles(self):
        # where all zero points are the middle code, the GPU need not read them
        symmetric = (self.zeros == 2 ** (self.bits - 1)).all()
        if self.bits == 8 and symmetric:
            return kernels.tile("int8", self.codes(), self.scales, self.group)
        if self.bits > 4:
            return None
        zeros = None if self.bits == 4 and symmetric else self.zeros
        return kernels.tile("int4", self.codes(), self.scales, self.group, zeros)

    def fuse_key(self):
        order = None if self.order is None else tuple(self.order.tolist())
        return *super().fuse_key(), self.group, order


class NF4Linear(QuantLinear):
    """4-bit NormalFloat weights; the tensors of `nf4_quantize` are buffers of the same names."""

    format = "nf4"

    def __init__(self, state, shape, bias=None, block=64):
        """state: what `nf4_quantize` makes of weights of that shape"""
        super().__init__(shape, bias)
        self.block = block
        for name in ("packed", "absmax", "nested_absmax", "offset"):
            self.register_buffer(name, state.get(name))
        # a buffer, since a compiler cannot follow dynamic_map, as it can nf4_pairs
        self.register_buffer("scale_table", dynamic_map(self.packed.device), persistent=False)

    def block_scales(self):
        """-> float32 (blocks,), double quantization undone."""
        if self.nested_absmax is None:
            return self.absmax
        values = self.scale_table[self.absmax.int()]
        scale = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: values.numel()]
        return values * scale + self.offset

    def tiles(self):
        if self.in_features % self.block:  # blocks run on across the ends of rows
            return None
        codes = torch.stack((self.packed >> 4, self.packed & 15), -1)  # (N*K/2, 2)
        shape = self.out_features, -1
        return kernels.tile("nf4", codes.view(shape), self.block_scales().view(shape), self.block)

    def dequantize(self, dtype=torch.float32):
        table = nf4_pairs(self.packed.device)
        pairs = table.index_select(0, self.packed.int())  # (N*K/2,)
        flat = pairs.view(torch.float32)  # (N*K,)
        blocks = in_groups(flat, self.block).mul_(self.block_scales()[:, None])  # (blocks, block)
        weights = blocks.view(-1)[: flat.numel()]
        return weights.view(self.out_features, -1).to(dtype)

    def fuse_key(self):
        cut = self.out_features * self.in_features % self.block  # no layer can follow in that block
        return *super().fuse_key(), self.block, self if cut else None

    def stacked(self, layers):
        """Scales in float32, since 256 that share one need not end where a layer does."""
        absmax = torch.cat([layer.block_scales() for layer in layers])
        packed = joined(layers, "packed")
        return {"packed": packed, "absmax": absmax, "nested_absmax": None, "offset": None}


class TiledLinear(QuantLinear):
    """A packed layer on a GPU: its weights as the kernels read them, and only so.

    The buffers are kernels.Tiles' of the same names; order as GroupLinear's.
    """

    def __init__(self, layer, tiles):
        super().__init__((layer.out_features, layer.in_features), layer.bias)
        self.format = tiles.format
        self.group = tiles.group
        for name in ("words", "scales", "zeros", "done"):
            self.register_buffer(name, getattr(tiles, name))
        self.register_buffer("order", getattr(layer, "order", None))

    def tiles(self):
        tensors = self.words, self.scales, self.zeros, self.in_features, self.group, self.done
        return kernels.Tiles(self.format, *tensors)

    def dequantize(self, dtype=torch.float32):
        weight = kernels.dequantize(self.tiles(), dtype)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def product(self, x):
        rows = x.reshape(-1, self.in_features)  # (..., K) -> (M, K)
        if self.order is not None:
            rows = rows[:, self.order]
        y = kernels.linear(rows, self.tiles(), self.bias)
        # (M, N) -> (..., N); not a view where it need not be, so that an adapter can add to it
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features)


def tiled(layer):
    """A packed layer on a GPU in the layout of its kernels; any other, or one that they cannot
    take, as it is."""
    if not isinstance(layer, QuantLinear) or not any(b.is_cuda for b in layer.buffers()):
        return layer
    tiles = layer.tiles()
    return layer if tiles is None else TiledLinear(layer, tiles)


def pack_linear(linear, format, group_size, sym=True):
    """nn.Linear -> a layer in one of FORMATS."""
    if format == "int8":
        return GroupLinear.from_linear(linear, 8, -1)
    if format == "nf4":
        return NF4Linear(nf4_quantize(linear.weight), linear.weight.shape, linear.bias)
    return GroupLinear.from_linear(linear, 4, group_size, sym)


def in_kind(linear, kind):
    """A layer still in floats -> the format that --quant names, "int8" or "int4"; others as is."""
    if not isinstance(linear, nn.Linear) or kind not in ("int8", "int4"):
        return linear
    group = 32 if linear.in_features % 64 == 32 else 64  # whole groups where they can be
    return pack_linear(linear, kind, group)


def fuse(layers):
    """Packed layers over the same input (q, k, v; gate and up) -> one with the rows of all.

    The engine fuses layers that are still in floats itself. UserError: their fuse_keys differ.
    """
    first = layers[0]
    if any(layer.fuse_key() != first.fuse_key() for layer in layers):
        raise UserError(
            "layers of different formats, group sizes or column orders cannot be one, nor those of "
            "which some have a bias"
        )
    fused = copy.copy(first)
    fused.out_features = sum(layer.out_features for layer in layers)
    fused._buffers = first._buffers | first.stacked(layers)
    bias = None if first.bias is None else nn.Parameter(joined(layers, "bias"), False)
    fused._parameters = {"bias": bias}
    return fused


# ----------------------------------------------------------------------------- a model, in place
@dataclass
class Recipe:
    """How integers are rounded, by GPTQ (Frantar et al. 2023; act-order is its authors' code's)
    or to nearest."""

    bits: int = 4  # GPTQ: 2 to 8
    group_size: int = 128  # GPTQ, int4: neighbouring inputs that share a scale; -1: a whole row
    sym: bool = True  # GPTQ, int4: zero is the middle code, as vLLM's fastest kernels ask
    act_order: bool = False  # GPTQ: columns with the largest activations first
    damp: float = 0.01  # GPTQ: share of the Hessian's mean diagonal added to it; may rise by itself

    def __post_init__(self):
        grouped = self.group_size == -1 or 1 <= self.group_size <= 1 << 24
        if not (2 <= self.bits <= 8 and grouped and 0 <= self.damp <= 1):
            raise UserError(
                f"bits {self.bits} must be from 2 to 8, group size {self.group_size} from 1 to "
                f"16,777,216 or -1 for whole rows, damp {self.damp} from 0 to 1"
            )


def float_layers(model):
    """{name: nn.Linear} of all blocks, in their order.

    UserError: they are packed already, NaN in a weight.
    """
    if model.quantization:
        method = model.quantization["quant_method"]
        raise UserError(f"the model is quantized already ({method}); start from the original model")
    modules = model.layers.named_modules(prefix="layers")
    found = {name: layer for name, layer in modules if isinstance(layer, nn.Linear)}
    for name, layer in found.items():
        check_finite(layer.weight, name)
    return found


def quantize(model, format, group_size=128, sym=True):
    """Replace the linear layers of all blocks by packed ones, in place -> the model.

    format: one of FORMATS. int4 has groups of group_size neighbouring inputs that share a scale, -1
    is a whole row; without sym also a zero point. Embeddings, norms and the head stay. UserError:
    NaN in a weight, a model that is quantized already.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    recipe = Recipe(8, -1) if format == "int8" else Recipe(4, group_size, sym)
    for name, linear in float_layers(model).items():
        model.set_submodule(name, pack_linear(linear, format, group_size, sym))
    if format == "nf4":
        model.quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
        }
    else:
        model.quantization = gptq_config(model, recipe)
    return model


def gptq_config(model, recipe):
    """The folder's quantization_config; integers have GPTQ's layout whoever rounded them."""
    zeros = [layer.zeros for layer in model.modules() if isinstance(layer, GroupLinear)]
    # version 1 stores zero points less one, so it has no place for a zero point of 0
    version = "gptq_v2" if any((zero == 0).any() for zero in zeros) else "gptq"
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "lm_head": False,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "sym": recipe.sym,
        "desc_act": recipe.act_order,
    }


# -------------------------------------------------------------------------------------------- GPTQ
def inverse_factor(H, damp):
    """Upper Cholesky factor U of (H + damp * mean(diag) * I)^-1 = U.T @ U.

    A Hessian of too few or too similar rows is not positive definite in float32: the damping grows
    tenfold until it is.
    """
    # inputs that are all zero have nothing to say, but must not stop the rest
    mean = H.diagonal().mean().clamp(min=1e-6)
    while damp < 1e6:
        damped = H + torch.eye(len(H), device=H.device) * (damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and factor.isfinite().all():
                return factor
        damp = max(damp * 10, 1e-6)
    raise UserError(
        "GPTQ: the activations' second moments hold NaN or infinity; "
        "the model or its calibration is broken"
    )


def gptq_round(weight, H, recipe, block=128):
    """Round a matrix so that weight @ X changes least -> codes, scales, zeros, order.

    weight (N, K) float32; H (K, K) = X @ X.T over calibration inputs. Column by column, each
    column's rounding error is made good by those not yet rounded (algorithm 1): after column i,
    W[:, j] -= err * U[i, j] of every j > i, with err = (w_i - q_i) / U[i, i]. Updates reach later
    blocks once per block. A group's scale is taken when its first column comes up, from weights
    that already carry the errors of those before it. Inputs that never fired have no say and are
    rounded as they are.
    """
    K = weight.size(1)
    bits = recipe.bits
    group = K if recipe.group_size < 0 else min(recipe.group_size, K)
    diagonal = H.diagonal()
    H = H + torch.diag((diagonal == 0) * diagonal.mean())  # those that never fired
    order = None
    if recipe.act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        weight = weight[:, order]
        H = H[order][:, order]
    U = inverse_factor(H, recipe.damp)
    if group < K:  # a block holds whole groups, so a group's weights are up to date when it begins
        block = group * max(1, block // group)
    W = weight.t().contiguous()  # (K, N): a column's weights lie together
    codes = torch.empty_like(W, dtype=torch.uint8)
    pivots = U.diagonal().tolist()
    cost = U.diagonal() ** -2  # of a squared error in each column
    grids = []  # (2, N) of each group
    for start in range(0, K, block):
        end = min(start + block, K)
        columns = W[start:end]  # (block, N)
        factor = U[start:end, start:end].contiguous()
        errors = torch.empty_like(columns)
        for i in range(end - start):
            column = start + i
            if column % group == 0:
                until = column + group
                weights = W[column:until].t()  # (N, group)
                grids.append(clipped_grid(weights, bits, recipe.sym, cost[column:until]))
                scale, zero = grids[-1]  # (N,) each
            code = to_codes(columns[i], scale, zero, bits)
            codes[column] = code
            errors[i] = (columns[i] - (code - zero) * scale) / pivots[column]
            # pass the error on: to the block's later columns now, to later blocks at its end
            columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        W[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
    scales, zeros = torch.stack(grids, 2)  # (2, N, G)
    return codes.t().contiguous(), scales, zeros, order  # (K, N) -> (N, K)


def round_together(linears, H, cross, recipe):
    """Round layers that read the same input as one matrix -> a GroupLinear for each.

    H = X @ X.T of the inputs X that they get now that the layers before are rounded;
    cross = X0 @ X.T with the original model's X0. First the weights are moved to where they make
    the original outputs of the new inputs: the least squares solution of V @ X = W @ X0, which is
    V = W + W @ (cross - H) @ H^-1.
    """
    weight = joined(linears, "weight").float()
    factor = inverse_factor(H, recipe.damp)
    moved = weight + weight @ (cross - H) @ factor.T @ factor
    codes, scales, zeros, order = gptq_round(moved, H, recipe)
    sizes = [linear.out_features for linear in linears]
    how = (recipe.bits, recipe.group_size, order)
    rows = zip(codes.split(sizes), scales.split(sizes), zeros.split(sizes))
    return [GroupLinear(*own, *how, linear.bias) for linear, own in zip(linears, rows)]


def second_moments(inputs, others):
    """Sum of y.T @ x over all batches, x of `inputs`, y of `others` -> (K, K) float32.

    Their rows are the columns of `round_together`'s X and X0, so this is X0 @ X.T: of one list and
    itself GPTQ's Hessian, up to a factor.
    """
    K = inputs[0].size(-1)
    H = torch.zeros(K, K, device=inputs[0].device)
    for x, y in zip(inputs, others):
        # each (B, T, K) -> (B*T, K)
        H.addmm_(y.flatten(0, 1).float().t(), x.flatten(0, 1).float())
    return H


def stages(block, states, rope, mask):
    """Walk a block's four products in order, yielding (layers' names, their input of all batches).

    states: a list with the hidden states (B, T, C) of each batch in front of the block; at the end
    it has those behind. The caller may replace the named layers before it asks for the next, so
    that every product runs once, on the outputs of those rounded before it ("true sequential").
    """
    names = {module: name for name, module in block.named_modules()}
    qkv, o, up, down = block.products()
    halves = (
        (block.input_layernorm, block.self_attn, (rope, mask), qkv, *o),
        (block.post_attention_layernorm, block.mlp, (), up, *down),
    )
    for norm, part, more, first, last in halves:
        inputs = [norm(x) for x in states]
        yield [names[layer] for layer in first], inputs
        # with an identity for its last projection, the part returns what that would read
        block.set_submodule(names[last], nn.Identity())
        inputs = [part(x, *more) for x in inputs]
        block.set_submodule(names[last], last)
        yield [names[last]], inputs
        projection = block.get_submodule(names[last])
        states[:] = [x + projection(y) for x, y in zip(states, inputs)]


def round_block(block, states, original_states, rope, mask, recipe):
    """Replace a block's linear layers by rounded ones.

    states, as in `stages`, are behind the blocks rounded so far, original_states behind the same
    blocks as they were.
    """
    walk = stages(block, states, rope, mask)
    original_walk = stages(copy.deepcopy(block), original_states, rope, mask)
    # strict, or the end of the first generator would keep the second from its last step
    for (names, inputs), (_, originals) in zip(walk, original_walk, strict=True):
        linears = [block.get_submodule(name) for name in names]
        H = second_moments(inputs, inputs)
        cross = second_moments(inputs, originals)
        for name, layer in zip(names, round_together(linears, H, cross, recipe)):
            block.set_submodule(name, layer)


@torch.no_grad()
def gptq(model, batches, bits=4, group_size=128, act_order=False, **recipe):
    """Quantize a model's linear layers by GPTQ, in place -> the model.

    batches: a list of (B, T) int64 token ids, all of one T. Block after block: beside the model
    only one block's Hessians and the hidden states in front of it, with and without the rounding so
    far, are alive. Further keywords: fields of Recipe. UserError: NaN, a model that is quantized
    already.
    """
    recipe = Recipe(bits, group_size, act_order=act_order, **recipe)
    float_layers(model)  # for its checks
    states = []
    for ids in batches:
        x, rope, (full, sliding) = model.start(ids.to(model.embed_tokens.weight.device))
        states.append(x)
    original_states = states.copy()
    for i, block in enumerate(tqdm(model.layers, "gptq", disable=None)):
        mask = sliding if i in model.config.sliding_layers else full
        round_block(block, states, original_states, rope, mask, recipe)
    model.quantization = gptq_config(model, recipe)
    return model


# ------------------------------------------------------------------------------------- the command
@dataclass
class Args(Recipe):
    model: str = ""  # the model folder
    format: str = "gptq"  # or int8, int4, nf4; formats/gguf.py writes files for llama.cpp
    out: str = ""  # where to write
    text: str = ""  # text or .jsonl (texts, chats) to calibrate and score on [the model's own text]
    samples: int = 64  # rows to calibrate on
    held_out_rows: int = 32  # rows to score on
    length: int = 512  # tokens in a row, at most the model's context
    seed: int = 0  # of the samples
    device: str = "auto"  # auto, cpu, cuda, mps


def read_quant_args(argv=None):
    typed = parse_flags(Args, __doc__, argv, positional=("model",))
    args = Args(**typed)
    recipe = Recipe.__dataclass_fields__
    unread = {"int8": recipe, "int4": ("bits", "act_order", "damp"), "nf4": recipe, "gptq": ()}
    if args.format not in unread:
        raise UserError(f"format {args.format}: choose from {', '.join(unread)}")
    given = flags_among(typed, unread[args.format])
    if given:
        raise UserError(f"--format {args.format} does nothing with {given}: leave it out")
    if not args.out:
        raise UserError("--out: say where to write the quantized model")
    if Path(args.out).resolve() == Path(args.model).resolve():
        raise UserError(f"--out {args.out} is the model itself; choose another folder")
    if min(args.samples, args.held_out_rows, args.length - 1) < 1:
        raise UserError(
            f"samples {args.samples} and held-out-rows {args.held_out_rows} must be >= 1, "
            f"length {args.length} >= 2"
        )
    args.device = resolve(args.device, "float32", "off").device
    return args


@torch.inference_mode()
def main():
    """Write a quantized model folder, and say what it costs."""
    from formats import verify
    from generate import Engine, Sampling
    from training import quality

    args = read_quant_args()
    original = Transformer.from_pretrained(args.model, args.device)
    float_layers(original)  # for its checks
    stored = working = original.embed_tokens.weight.dtype
    if args.device.type == "cpu":  # 16-bit products are slow there
        working = torch.float32
        original.float()
    tok = Tokenizer.load(args.model)
    calibration, held_out = quality.calibration_and_held_out(args, original, tok, Engine, Sampling)
    model = copy.deepcopy(original)
    if args.format == "gptq":
        recipe = {name: getattr(args, name) for name in Recipe.__dataclass_fields__}
        gptq(model, calibration.split(8), **recipe)
    else:
        quantize(model, args.format, args.group_size, args.sym)
    for parameter in model.parameters():  # packed weights and their scales are none
        parameter.data = parameter.data.to(stored)
    model.save_pretrained(args.out)
    tok.save(args.out)
    model = Transformer.from_pretrained(args.out, args.device, working)
    quality.compare_with_original(args, model, original, held_out)
    # Held to what a bit less would keep: GPTQ moves weights, too, to make good for the rounding of
    # others. The other formats' names say their bits.
    bits = args.bits - 1 if args.format == "gptq" else None
    written = model, Tokenizer.load(args.out)
    verify.verify(args.out, args.format, (original, tok), written, bits=bits)


if __name__ == "__main__":
    import quant  # the classes that other files know: those of a script are a second copy

    cli(quant.main)
