"""Smaller weights: int8, int4, NF4 and GPTQ in place of a model's linear layers, and folders that hold them.

    python quant.py runs/demo --format gptq --bits 4 --group-size 64 --out runs/demo-gptq
    python quant.py report runs/demo
"""
import json

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError

# NormalFloat4 (QLoRA, Dettmers et al. 2023, appendix E): quantiles of N(0, 1) over the code's 16 values, 0 exact, ends +-1
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
NESTED_BLOCK = 256  # scales that share one scale under double quantization


# --------------------------------------------------------------------------------------------------------------------- NF4
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
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]  # times the reciprocal, as bitsandbytes: the bits differ
    return scaled.clamp(-1, 1).view(-1)[:flat.numel()], absmax


def nearest(x, values):
    """Index of the nearest of the sorted `values` for each x -> uint8; of two equally near the lower one."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)


def dynamic_quantize(flat, block=NESTED_BLOCK):
    """(n,) float32 -> (uint8 indices into `dynamic_map` (n,), float32 scale of each block): bitsandbytes' blockwise 8 bits.

    Its CPU code looks values up in a table of 65,536 steps over [-1, 1] and gives a block of zeros the code 0.
    """
    scaled, absmax = scaled_blocks(flat, block)
    step = ((scaled + 1).double() * 0.5 * 65535 + 0.5).float().int()  # rounded once, as a fused multiply-add does
    codes = nearest(-1 + 2.0 * step / 65535, dynamic_map(flat.device))
    return codes * (absmax > 0).repeat_interleave(block)[:flat.numel()], absmax


def nf4_quantize(weight, block=64, double=True):
    """(N, K) floats -> dict of tensors as bitsandbytes makes them on the CPU, bit for bit.

    "packed" uint8 (N*K/2,), two codes a byte, the earlier one in the high half; "absmax": each block's largest magnitude,
    float32 (blocks,), or with `double` quantized again: uint8, with "nested_absmax" float32 (blocks/256,) and "offset".
    """
    check_finite(weight)
    if weight.numel() % 2:
        raise UserError(f"NF4 holds two weights a byte; {tuple(weight.shape)} is an odd number of them")
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
    scale = state["nested_absmax"].repeat_interleave(NESTED_BLOCK)[:values.numel()]
    return values * scale + state["offset"]


def nf4_dequantize(state, shape, block=64, dtype=torch.float32):
    """The inverse of `nf4_quantize` -> (N, K) of dtype."""
    value = torch.tensor(NF4, device=state["packed"].device)
    pairs = torch.stack((value.repeat_interleave(16), value.repeat(16)), 1)  # (256, 2): both values of every byte
    flat = F.embedding(state["packed"].int(), pairs).view(-1)
    blocks = F.pad(flat, (0, -flat.numel() % block)).view(-1, block) * nf4_absmax(state)[:, None]
    return blocks.view(-1)[:flat.numel()].view(shape).to(dtype)


# ----------------------------------------------------------------------------------------------------------- linear layers
def check_finite(weight, name="a weight"):
    """Raises UserError where there is NaN or infinity: its block's scale, and with it the whole block, would be too."""
    if not torch.isfinite(weight).all():
        bad = (~torch.isfinite(weight)).sum().item()
        raise UserError(f"{name}: {bad:,} of {weight.numel():,} values are NaN or infinite; the model is damaged")


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
    """A linear layer with packed weights. Subclasses say how to `dequantize`, which defines it, and may have a faster `product`."""

    def __init__(self, in_features, out_features, bias=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dequantize(self, dtype=torch.float32):
        """-> (N, K) of dtype, the weights that this layer stands for."""
        raise NotImplementedError

    def product(self, x):
        """x (..., K) -> (..., N), with the bias, in x's dtype."""
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def forward(self, x):
        return FrozenProduct.apply(x, self) if x.requires_grad else self.product(x)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Linear(QuantLinear):
    """4-bit NormalFloat weights in bitsandbytes' layout; the tensors of `nf4_quantize` are buffers of the same names."""
    format, block, double = "nf4", 64, True

    @classmethod
    def from_linear(cls, linear, block=64, double=True):
        """nn.Linear -> NF4Linear on the same device."""
        N, K = linear.weight.shape
        return cls.from_state(nf4_quantize(linear.weight, block, double), (N, K), linear.bias, block)

    @classmethod
    def from_state(cls, state, shape, bias=None, block=64):
        """The tensors of `nf4_quantize`, of weights of that shape -> NF4Linear."""
        layer = cls(shape[1], shape[0], bias)
        layer.block, layer.double = block, "nested_absmax" in state
        for name, tensor in state.items():
            layer.register_buffer(name, tensor)
        return layer

    def dequantize(self, dtype=torch.float32):
        return nf4_dequantize(dict(self.named_buffers(recurse=False)), (self.out_features, self.in_features), self.block, dtype)

    def product(self, x):
        if not x.is_cuda:
            return super().product(x)
        from kernels import nf4_linear
        y = nf4_linear(x.reshape(-1, self.in_features), self.packed, nf4_absmax(dict(self.named_buffers(recurse=False))),
                       self.block, self.out_features, self.in_features, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def write_bnb(layer, name, dtype=torch.float32):
    """NF4Linear -> {tensor name: tensor} of a folder, as bitsandbytes and transformers write and read them."""
    info = {"quant_type": "nf4", "blocksize": layer.block, "dtype": str(dtype).removeprefix("torch."),
            "shape": [layer.out_features, layer.in_features]}
    out = {"": layer.packed[:, None], ".absmax": layer.absmax, ".quant_map": torch.tensor(NF4)}
    if layer.double:
        out |= {".nested_absmax": layer.nested_absmax, ".nested_quant_map": dynamic_map()}
        info |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": layer.offset.item()}
    out[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8)
    return {f"{name}.weight{key}": tensor for key, tensor in out.items()}


def read_bnb(tensors, name, shape, bias=None):
    """The inverse: {tensor name: tensor} with NAME.weight and its statistics -> NF4Linear. Other codes than NF4 are refused."""
    own = {key.removeprefix(name + ".weight").lstrip("."): t for key, t in tensors.items() if key.startswith(name + ".weight")}
    if "quant_state.bitsandbytes__nf4" not in own:
        raise UserError(f"{name}.weight: not in bitsandbytes' NF4 layout (found {', '.join(sorted(own))})")
    try:
        info = json.loads(bytes(own["quant_state.bitsandbytes__nf4"].tolist()))
        block, nested = info["blocksize"], info.get("nested_blocksize", NESTED_BLOCK)
        fits = (block in (32, 64, 128, 256, 512, 1024, 2048, 4096) and nested == NESTED_BLOCK and tuple(info["shape"]) == tuple(shape)
                and own[""].dtype == torch.uint8 and own[""].numel() * 2 == shape[0] * shape[1]
                and own["absmax"].numel() == -(-shape[0] * shape[1] // block)
                and torch.equal(own["quant_map"].float(), torch.tensor(NF4)))
        state = {"packed": own[""].reshape(-1), "absmax": own["absmax"]}
        if "nested_absmax" in own:
            fits = fits and torch.equal(own["nested_quant_map"], dynamic_map())
            fits = fits and own["nested_absmax"].numel() == -(-own["absmax"].numel() // NESTED_BLOCK)
            state |= {"nested_absmax": own["nested_absmax"], "offset": torch.tensor(float(info["nested_offset"]))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}.weight: damaged bitsandbytes statistics ({type(error).__name__}: {error})") from None
    if not fits:
        raise UserError(f"{name}.weight: sizes or code table are not those of an NF4 matrix of shape {tuple(shape)}")
    return NF4Linear.from_state(state, shape, bias, block)
