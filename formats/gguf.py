"""GGUF, llama.cpp's one file for weights, shape and tokenizer: written from a model folder, and read back into our model.

    python -m formats.gguf runs/chat --type q4_k_m --out chat.gguf            # then: llama-cli -m chat.gguf
    python -m formats.gguf show chat.gguf

The layout, version 3 (ggml/docs/gguf.md): magic, counts, metadata, tensor infos, padding, tensors; all little-endian.
"""

import json
import math
import mmap
import re
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import tokenizer
from common import UserError, cli, parse_flags, write_atomic
from formats.vocab import naming, read_bpe, sequence, to_json
from model import Config, Transformer, rope_frequencies
from quant import QuantLinear
from tokenizer import PATTERNS, Tokenizer, merges_by_score

WEIGHTS_AT_ONCE = (
    1 << 18
)  # packed or unpacked at a time: few enough that the work stays near the cache


# ------------------------------------------------------------------------------------ block formats
# A row is cut into blocks of 32 or 256 weights. The fields of a block lie in the order in which a Kind's layout names them:
#   q  the codes' low bits     h  their high bits     s  scales, and minima, of the sub-blocks, as whole numbers of few bits
#   d  what the scales are multiples of, float16      m  what the minima are multiples of, float16
# w = (code - zero) * scale - low. Rounding follows ggml-quants.c's reference functions, so that the bytes are the same.


class Kind(NamedTuple):
    """A tensor type: ggml's number for it, weights a block, and what its blocks are made of."""

    number: int
    block: int
    layout: dict  # bytes of each field
    dtype: torch.dtype | None = None  # of plain floats, whose block is one number
    zero: int = 0  # the code of 0
    run: int = 16  # bytes of q that hold the low bits of as many codes, then the next higher ones
    scales: Callable = lambda s: (
        1,
        -1,
    )  # field s -> (n, G) multiples of d, and of m; of a block of 32 the only ones
    encode: Callable | None = (
        None  # (n, block) float32 -> {"codes": (n, block), field: ...}; None: not written here
    )

    @property
    def bytes(self):
        return sum(self.layout.values())

    @property
    def bits(self):
        """How many of a code's bits are in q, and how many in h."""
        return tuple(8 * self.layout.get(field, 0) // self.block for field in "qh")

    def size(self, shape):
        return math.prod(shape) // self.block * self.bytes


def unpack(b, bits, group):
    """(n, m) uint8 -> (n, m * 8 / bits): in each run of `group` bytes the lowest bits of all come first, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    fields = (
        b.reshape(len(b), -1, 1, group) >> shifts & (1 << bits) - 1
    )  # (n, runs, 8 / bits, group)
    return fields.flatten(1)


def pack(q, bits, group):
    """The inverse of `unpack`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (
        (q.to(torch.uint8).view(len(q), -1, 8 // bits, group) << shifts)
        .sum(2, dtype=torch.uint8)
        .flatten(1)
    )


def as_bytes(x, dtype=torch.float16):
    return x.to(dtype).contiguous().view(torch.uint8)


def split(b, kind):
    """(n, bytes) uint8 -> codes uint8 (n, G, block / G), scale (n, G), low (n, G) or None."""
    part, (bits, more) = dict(zip(kind.layout, b.split(list(kind.layout.values()), 1))), kind.bits
    codes = unpack(part["q"], bits, kind.run)
    if more:
        codes = codes | unpack(part["h"], more, 32 if kind.block == 256 else 1) << bits
    if bits == 8:
        codes = codes ^ 128  # -128..127 -> 0..255
    d, m = (
        part[name].contiguous().view(torch.float16).float() if name in part else None
        for name in "dm"
    )  # (n, 1)
    scale, low = kind.scales(part.get("s"))
    scale, low = scale * d, None if m is None else low * m
    return codes.view(len(b), scale.size(1), -1), scale, low


def join(kind, codes, **part):
    """Codes (n, block), d and m (n, 1) in floats and s in bytes -> (n, bytes) uint8."""
    codes, (bits, more) = codes.to(torch.uint8), kind.bits
    part["q"] = pack(codes ^ 128 if bits == 8 else codes & (1 << bits) - 1, bits, kind.run)
    if more:
        part["h"] = pack(codes >> bits, more, 32 if kind.block == 256 else 1)
    return torch.cat(
        [as_bytes(part[name]) if name in "dm" else part[name] for name in kind.layout], 1
    )


def decode(b, kind):
    """(n, bytes) uint8 -> (n, block) float32."""
    if kind.dtype:
        return b.contiguous().view(kind.dtype).float()
    codes, scale, low = split(b, kind)
    x = (codes.float() - kind.zero) * scale[:, :, None]
    return (x if low is None else x - low[:, :, None]).flatten(1)


def six_bit_pairs(s):
    """Q4_K, Q5_K: (n, 12) -> 8 scales and 8 minima. Of the last four of each the top two bits are on top of the first four."""
    high = s[:, :8] >> 6 << 4
    return torch.cat((s[:, :4] & 63, s[:, 8:] & 15 | high[:, :4]), 1), torch.cat(
        (s[:, 4:8] & 63, s[:, 8:] >> 4 | high[:, 4:]), 1
    )


def nibble_pairs(s):
    """Q2_K: (n, 16) -> 16 scales and 16 minima."""
    return s & 15, s >> 4


def six_bits(s):
    """Q3_K: (n, 12) -> 16 scales from -32 to 31, four bits of all first."""
    return (unpack(s[:, :8], 4, 8) | unpack(s[:, 8:], 2, 4) << 4).float() - 32, None


def eight_bits(s):
    """Q6_K: 16 scales from -128 to 127."""
    return s.view(torch.int8), None


def inverse(x):
    return torch.where(x == 0, 0.0, 1 / x)


def encode_q8(x, kind):
    d = x.abs().amax(1, keepdim=True) / 127
    v = x * inverse(d)
    whole = v.trunc()
    return {"d": d, "codes": whole + (2 * (v - whole)).trunc() + 128}  # halves away from zero


def encode_legacy(x, kind):
    """Q4_0, Q4_1, Q5_0, Q5_1: one scale, and a minimum if any."""
    top = (1 << sum(kind.bits)) - 1
    if "m" in kind.layout:
        low, shift = x.amin(1, keepdim=True), 0.5
        d, x = (x.amax(1, keepdim=True) - low) / top, x - low
    else:  # the scale takes the largest magnitude, sign included, to the end of the range that has one value more
        low, shift = None, kind.zero + 0.5
        d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -kind.zero
    codes = (
        (x.double() * inverse(d).double() + shift).float().trunc().clamp(0, top)
    )  # one rounding: C's fma
    return {"d": d, "m": low, "codes": codes}


def fit_range(x, top, start, steps):
    """x (n, 32) ~ scale * q - low, q in 0..top -> (scale (n,), low (n,)), both >= 0.

    Tries `steps` roundings near the plain one, each from the best minimum so far; for each, weighted least squares gives
    the best scale and minimum. Weights |x| + rms(x) make large values count more, as in ggml (make_qkx2_quants).
    """
    x = x.t().contiguous()  # (32, n): sums down the columns run over consecutive numbers
    w = x.square().mean(0).sqrt() + x.abs()
    ww, products = torch.stack((w, w * x)), torch.empty(2, *x.shape)
    (sum_w, sum_x), high, minimum = ww.sum(1), x.amax(0), x.amin(0).clamp(max=0)
    scale = (high - minimum) / top
    q = ((x - minimum) / scale).round_().clamp_(max=top)
    best = (ww[1] * x).sum(0) - (w * (q * scale + minimum - x).square()).sum(0)
    for step in range(steps):
        q = (
            torch.sub(x, minimum, out=q)
            .mul_((start + 0.1 * step + top) / (high - minimum))
            .round_()
            .clamp_(0, top)
        )
        sum_q, sum_qx = torch.mul(ww, q, out=products).sum(1)
        sum_q2 = products[0].mul_(q).sum(0)
        det = sum_w * sum_q2 - sum_q * sum_q
        s, m = (sum_w * sum_qx - sum_x * sum_q) / det, (sum_q2 * sum_x - sum_q * sum_qx) / det
        s, m = torch.where(m > 0, sum_qx / sum_q2, s), m.clamp(max=0)
        # how much less than sum w x^2 the error sum w (s q + m - x)^2 is
        gain = s * (2 * sum_qx - s * sum_q2 - 2 * m * sum_q) + m * (2 * sum_x - m * sum_w)
        better = (det > 0) & (gain > best)
        best, scale, minimum = (
            torch.where(better, gain, best),
            torch.where(better, s, scale),
            torch.where(better, m, minimum),
        )
    return scale, -minimum


def fit_scale(x, top):
    """x (n, 16) ~ scale * q, q in -top..top-1 -> scale (n,), by the same search with weights x^2 (make_qx_quants)."""
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    x = x.t().contiguous()  # (16, n)
    w, scale, best = x.square(), torch.zeros_like(peak), torch.zeros_like(peak)
    wx = w * x
    for step in (0, *range(-9, 0), *range(1, 10)):
        q = (x * (-(top + 0.1 * step) / peak)).round_().clamp_(-top, top - 1)
        sum_qx, sum_q2 = (wx * q).sum(0), (w * q.square_()).sum(0)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = torch.where(better, sum_qx / sum_q2, scale)
        best = torch.where(better, scale * sum_qx, best)
    return torch.where(peak.abs() < 1e-15, 0.0, scale)


def encode_k45(x, kind):
    """Q4_K, Q5_K: 8 sub-blocks of 32, their scales and minima in multiples of a 63rd of the largest."""
    top, x = (1 << sum(kind.bits)) - 1, x.view(-1, 32)
    fits = torch.stack(fit_range(x, top, *((-1.0, 21) if top == 15 else (-0.5, 16)))).view(
        2, -1, 8
    )  # scales; minima
    most = fits.amax(2, keepdim=True)  # (2, n, 1)
    sub, head = (
        (fits * torch.where(most > 0, 63 / most, 0.0)).round().clamp(max=63),
        (most / 63).half(),
    )
    d, low = (sub * head.float()).view(2, -1, 1)  # each (n * 8, 1)
    s, m = sub.to(torch.uint8)
    return {
        "d": head[0],
        "m": head[1],
        "codes": ((x + low) / d).round().nan_to_num(0).clamp(0, top).view(-1, 256),
        "s": torch.cat(
            (
                s[:, :4] | s[:, 4:] >> 4 << 6,
                m[:, :4] | m[:, 4:] >> 4 << 6,
                s[:, 4:] & 15 | m[:, 4:] << 4,
            ),
            1,
        ),
    }


def encode_q6_k(x, kind):
    """16 sub-blocks of 16, their scales in multiples of a 128th of the largest."""
    fits = fit_scale(x.reshape(-1, 16), 32).view(-1, 16)
    most = fits.gather(1, fits.abs().argmax(1, keepdim=True))
    d, sub = (most / -128).half(), (fits * (-128 * inverse(most))).round().clamp(max=127)
    scale = (sub * d.float()).view(-1, 16, 1)
    codes = (x.view(-1, 16, 16) / scale).round().nan_to_num(0).clamp(-32, 31).add(32).view(-1, 256)
    return {"d": d, "s": as_bytes(sub, torch.int8), "codes": codes}


KINDS = {
    "F32": Kind(0, 1, {"q": 4}, torch.float32),
    "F16": Kind(1, 1, {"q": 2}, torch.float16),
    "BF16": Kind(30, 1, {"q": 2}, torch.bfloat16),
    "Q4_0": Kind(2, 32, {"d": 2, "q": 16}, zero=8, encode=encode_legacy),
    "Q4_1": Kind(3, 32, {"d": 2, "m": 2, "q": 16}, encode=encode_legacy),
    "Q5_0": Kind(6, 32, {"d": 2, "h": 4, "q": 16}, zero=16, encode=encode_legacy),
    "Q5_1": Kind(7, 32, {"d": 2, "m": 2, "h": 4, "q": 16}, encode=encode_legacy),
    "Q8_0": Kind(8, 32, {"d": 2, "q": 32}, zero=128, encode=encode_q8),
    "Q2_K": Kind(10, 256, {"s": 16, "q": 64, "d": 2, "m": 2}, run=32, scales=nibble_pairs),
    "Q3_K": Kind(11, 256, {"h": 32, "q": 64, "s": 12, "d": 2}, zero=4, run=32, scales=six_bits),
    "Q4_K": Kind(
        12,
        256,
        {"d": 2, "m": 2, "s": 12, "q": 128},
        run=32,
        scales=six_bit_pairs,
        encode=encode_k45,
    ),
    "Q5_K": Kind(
        13,
        256,
        {"d": 2, "m": 2, "s": 12, "h": 32, "q": 128},
        run=32,
        scales=six_bit_pairs,
        encode=encode_k45,
    ),
    "Q6_K": Kind(
        14,
        256,
        {"q": 128, "h": 64, "s": 16, "d": 2},
        zero=32,
        run=64,
        scales=eight_bits,
        encode=encode_q6_k,
    ),
}
NUMBERS = {kind.number: name for name, kind in KINDS.items()}


def by_rows(function, rows, out):
    """out = function(rows), a few rows at a time: so few that the work stays near the cache."""
    step = max(1, WEIGHTS_AT_ONCE // max(rows[0].numel(), out[0].numel()))
    for i in range(0, len(out), step):
        out[i : i + step] = function(rows[i : i + step]).view(-1, *out.shape[1:])
    return out


def quantize(x, name):
    """(N, K) tensor -> (N, bytes a row) uint8, in type `name` of KINDS. K must be a multiple of its block."""
    kind = KINDS[name]

    def encode(rows):
        rows = rows.float().reshape(-1, kind.block)
        return as_bytes(rows, kind.dtype) if kind.dtype else join(kind, **kind.encode(rows, kind))

    return by_rows(encode, x, torch.empty(len(x), kind.size(x.shape[1:]), dtype=torch.uint8))


@dataclass
class Packed:
    """A tensor as it lies in the file."""

    kind: str  # a name in KINDS
    shape: tuple  # (N, K), or (N,)
    data: torch.Tensor  # (N, bytes a row) uint8

    def dequantize(self, dtype=torch.float32):
        """-> tensor of `shape`"""
        kind = KINDS[self.kind]
        return by_rows(
            lambda rows: decode(rows.reshape(-1, kind.bytes), kind),
            self.data,
            torch.empty(self.shape, dtype=dtype),
        )


class PackedLinear(QuantLinear):
    """A linear layer whose weights stay as they are in the file."""

    by_row = ("data",)

    def __init__(self, tensor, bias=None):
        super().__init__(tensor.shape, bias)
        self.format = tensor.kind
        self.register_buffer("data", tensor.data)

    def dequantize(self, dtype=torch.float32):
        return Packed(self.format, (self.out_features, self.in_features), self.data).dequantize(
            dtype
        )

    def groups(self):
        """As Int8Linear's; w = scale * (code - zero), up to float32's rounding."""
        kind, N = KINDS[self.format], self.out_features
        codes, scale, low = split(self.data.reshape(-1, kind.bytes), kind)
        zero = torch.full_like(scale, kind.zero)
        if low is not None:
            flat = (
                low.abs() > 2048 * scale
            )  # -low throughout, or so nearly that float16 zero points could not tell
            codes, scale = codes.masked_fill(flat[:, :, None], 0), torch.where(flat, low, scale)
            zero = torch.where(scale == 0, 0.0, low / scale)
        return (
            codes.reshape(N, -1),
            scale.reshape(N, -1),
            zero.reshape(N, -1),
            codes.size(2),
            None,
            4 if sum(kind.bits) <= 4 else 8,
        )


# --------------------------------------------------------------------------- names, types and shape
NAMES = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
# What --type says: the type of most matrices, and llama.cpp's number for the mix (general.file_type).
MIXES = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3),
    "q5_0": ("Q5_0", 8),
    "q5_1": ("Q5_1", 9),
    "q4_k_s": ("Q4_K", 14),
    "q4_k_m": ("Q4_K", 15),
    "q5_k_s": ("Q5_K", 16),
    "q5_k_m": ("Q5_K", 17),
    "q6_k": ("Q6_K", 18),
}
FALLBACK = {
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}  # where rows are no multiple of 256; F16 where not of 32


def gguf_name(name, config):
    """layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight; GPT-2's q, k and v all -> attn_qkv."""
    layer, module, leaf = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    part = (
        "attn_qkv"
        if config.is_gpt2 and re.fullmatch(r"self_attn\.[qkv]_proj", module)
        else NAMES[module]
    )
    return f"{part}.{leaf}" if layer is None else f"blk.{layer}.{part}.{leaf}"


def named(state, config):
    """Our state dict -> {name in a GGUF: {our name: tensor}}, several where the file has them in one, end to end."""
    names = {}
    for name, tensor in state.items():
        if not (
            config.tie_word_embeddings and name == "lm_head.weight"
        ):  # llama.cpp, too, takes the embedding then
            names.setdefault(gguf_name(name, config), {})[name] = tensor
    return names


def row_order(name, rows, config, back=False):
    """The order in which the rows of `name` are stored, or back; None for as they are.

    Rotary pairs of the llama architecture are neighbours, as in Meta's own checkpoints; ours, like Hugging Face's, are the
    two halves of a head: (heads, 2, D/2) -> (heads, D/2, 2).
    """
    if config.model_type not in ("llama", "mistral") or not re.search(r"\.attn_[qk]\.", name):
        return None
    pairs = (config.head_dim // 2, 2) if back else (2, config.head_dim // 2)
    return torch.arange(rows).view(-1, *pairs).transpose(1, 2).flatten()


def kind_of(name, shape, mix, config):
    """-> (type llama.cpp's quantizer would choose, the one it wanted if that does not fit the row), llama-quant.cpp."""
    kind, columns, n = MIXES[mix][0], shape[-1], config.num_hidden_layers
    if len(shape) < 2 or name == "position_embd.weight":
        return "F32", None
    if kind in ("F32", "F16", "BF16"):
        return kind, None
    part, i = name.split(".")[-2], int(name.split(".")[1]) if name.startswith("blk.") else 0
    more_bits = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    if part == ("token_embd" if config.tie_word_embeddings else "output"):
        kind = "Q8_0" if kind == "Q8_0" else "Q6_K"
    elif part in ("attn_v", "attn_qkv", "ffn_down"):
        if mix in ("q4_k_m", "q5_k_m") and more_bits:
            kind = "Q6_K"
        elif mix == "q4_k_s" and i < (n // 8 if part == "ffn_down" else 4):
            kind = "Q5_K"
        elif (
            n == 80
            and config.num_key_value_heads < config.num_attention_heads
            and part == "attn_v"
            and kind == "Q4_K"
        ):
            kind = "Q5_K"  # the 70B shape: few rows there, so more bits cost little
    wanted = kind
    while columns % KINDS[kind].block:
        kind = FALLBACK.get(kind, "F16")
    return kind, wanted if kind != wanted else None


def shape_metadata(config, where):
    """Config -> ({key: value}, rope_freqs or None). UserError for what llama.cpp has no way to run."""
    arch = ARCHITECTURES[config.model_type]
    H, K, D, C = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
    )
    context = config.max_position_embeddings
    if config.sliding_layers and config.sliding_window < context:
        warn(
            f"llama.cpp's {arch} has no sliding window; the context ends where it would begin to matter, at "
            f"{config.sliding_window:,} tokens instead of {context:,}"
        )
        context = config.sliding_window
    if arch == "qwen2" and H * D != C or arch == "qwen3" and config.out_bias:
        raise UserError(
            f"{where}: llama.cpp's {arch} needs {H} heads x {D} = {C} channels, and no bias on attention's output"
        )
    meta = {
        "context_length": context,
        "embedding_length": C,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": H,
        "vocab_size": config.vocab_size,
    }
    freqs = None
    if config.is_gpt2:
        meta["attention.layer_norm_epsilon"] = config.norm_eps
    else:
        scaling, freqs = rope_metadata(config, where)
        meta |= {
            "attention.head_count_kv": K,
            "attention.key_length": D,
            "attention.value_length": D,
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "rope.dimension_count": D,
            "rope.freq_base": float(config.rope["rope_theta"]),
            **scaling,
        }
    return {"general.architecture": arch} | {
        f"{arch}.{key}": value for key, value in meta.items()
    }, freqs


def rope_metadata(config, where):
    """-> (rope.scaling.* keys, for Llama 3's rule the factor by which each pair is slowed down (D/2,), else None)"""
    rope, (frequency, scale) = config.rope, rope_frequencies(config)
    kind, factor = rope["rope_type"], float(rope.get("factor", 1.0))
    if kind == "llama3":
        if ARCHITECTURES[config.model_type] != "llama":
            raise UserError(
                f"{where}: llama.cpp knows Llama 3's rope scaling only in Llama models, not in {config.model_type}"
            )
        return {}, rope_frequencies(
            Config(head_dim=config.head_dim, rope={**rope, "rope_type": "default"})
        )[0] / frequency
    meta = {} if kind == "default" else {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "yarn":
        if not rope.get("truncate", True):
            raise UserError(
                f"{where}: yarn with truncate=false is not in llama.cpp, which rounds the borders of the ramp"
            )
        meta |= {
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
            "rope.scaling.attn_factor": scale / (0.1 * math.log(factor) + 1),
        }  # relative to the paper's, eq. 22
    return meta, None


def getter(meta, prefix, path):
    """-> get(key, default, type): an untrusted value; fractions are finite and positive, whole numbers from 0 to 2^31."""

    def get(key, default=None, kind=(int, float)):
        value = meta.get(f"{prefix}.{key}", default)
        fault = (
            isinstance(value, float)
            and not 0 < value < math.inf
            or isinstance(value, int)
            and not 0 <= value < 1 << 31
        )
        if value is not default and (fault or not isinstance(value, kind)):
            raise UserError(
                f"{path}: {prefix}.{key} is {str(value)[:40]}, which makes no sense there"
            )
        return (
            float(f"{value:.7g}") if isinstance(value, float) else value
        )  # float32 1e-05 reads as 9.99999974e-06

    return get


def read_config(meta, tensors, path):
    """Metadata and tensors -> Config."""
    arch = meta.get("general.architecture")
    if not isinstance(arch, str) or arch not in ("gpt2", "llama", "qwen2", "qwen3"):
        raise UserError(
            f"{path}: architecture {str(arch)[:40]!r} is not supported; this program knows gpt2, llama, qwen2, qwen3"
        )
    get = getter(meta, arch, path)
    if get("expert_count", 0) or "token_embd.weight" not in tensors:
        raise UserError(
            f"{path}: a mixture of experts or a file without token_embd.weight, which this program cannot run"
        )
    rows = tensors["token_embd.weight"].shape[0]
    C, H = get("embedding_length"), get("attention.head_count")
    if not (isinstance(C, int) and isinstance(H, int) and 0 < H <= C):
        raise UserError(
            f"{path}: {H} heads in {C} channels cannot be, or differ from layer to layer"
        )
    D = get("attention.key_length", C // H, int)
    if (
        get("rope.dimension_count", D) != D
        or get("attention.value_length", D) != D
        or not 2 <= D <= 1024
    ):
        raise UserError(
            f"{path}: keys, values and their rotary part must have one size ({D}), of 2 to 1,024, to be supported"
        )
    d = {
        "model_type": arch,
        "vocab_size": rows,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if arch == "gpt2":
        d |= {
            "n_embd": C,
            "n_head": H,
            "n_inner": get("feed_forward_length", 4 * C, int),
            "n_layer": get("block_count"),
            "n_positions": get("context_length"),
            "layer_norm_epsilon": get("attention.layer_norm_epsilon", 1e-5),
        }
        return Config.from_dict(d, where=path)
    d |= {
        "hidden_size": C,
        "num_attention_heads": H,
        "head_dim": D,
        "num_hidden_layers": get("block_count"),
        "num_key_value_heads": get("attention.head_count_kv", H),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_parameters": read_rope(get, path),
    }
    config = Config.from_dict(d, where=path)
    config.qkv_bias, config.out_bias, config.mlp_bias = (
        f"blk.0.{part}.bias" in tensors for part in ("attn_q", "attn_output", "ffn_up")
    )
    return config


def read_rope(get, path):
    def number(key, default):
        if (value := float(get(f"rope.{key}", default))) <= 0:
            raise UserError(f"{path}: rope.{key} is {value}, it must be above 0")
        return value

    factor, theta = (
        number("scaling.factor", get("rope.scale_linear", 1.0)),
        number("freq_base", 10000.0),
    )
    kind, rope = (
        get("rope.scaling.type", "linear", str),
        {"rope_type": "default", "rope_theta": theta},
    )
    if (
        kind not in ("none", "linear", "yarn")
        or get("rope.scaling.yarn_log_multiplier", 0)
        or theta <= 1
    ):
        raise UserError(
            f"{path}: rope scaling {kind!r} of base {theta} is not supported; known are linear, yarn, Llama 3's"
        )
    if kind == "none" or factor == 1:
        return rope
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": int(
                number("scaling.original_context_length", get("context_length", 0))
            ),
            "beta_fast": number("scaling.yarn_beta_fast", 32),
            "beta_slow": number("scaling.yarn_beta_slow", 1),
            "attention_factor": number("scaling.attn_factor", 1) * (0.1 * math.log(factor) + 1),
        }
    return rope


def llama3_rope(config, freqs, path):
    """rope_freqs.weight (D/2,), all that a GGUF tells of Llama 3's rule -> the rule's parameters (Config.rope).

    A pair is slowed by 1 / (keep + (1 - keep) / factor), and keep = (turns - 1) / (4 - 1) of those that are neither kept nor fully
    slowed, where turns is how often a pair turns over the original context. The 1 and the 4 are those of all published models.
    """
    if freqs.shape != (config.head_dim // 2,) or freqs.kind != "F32":
        raise UserError(
            f"{path}: rope_freqs.weight is {freqs.shape} {freqs.kind}, expected ({config.head_dim // 2},) F32"
        )
    slowed, frequency = freqs.dequantize().double(), rope_frequencies(config)[0].double()
    factor = slowed.max().item()
    keep = (1 / slowed - 1 / factor) / (1 - 1 / factor)
    between = (keep > 1e-4) & (keep < 1 - 1e-4)
    original = ((1 + 3 * keep) / frequency * 2 * math.pi)[between].mean().item()
    rope = {
        "rope_type": "llama3",
        "rope_theta": config.rope["rope_theta"],
        "factor": round(factor, 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": round(original) if math.isfinite(original) else 1,
    }
    made = rope_frequencies(Config(head_dim=config.head_dim, rope=rope))[0]
    if not torch.allclose(made * slowed, frequency, rtol=1e-3):
        raise UserError(
            f"{path}: rope_freqs.weight is not Llama 3's rule, the only one this program knows"
        )
    return rope


# ---------------------------------------------------------------------------------------- tokenizer
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
# How llama.cpp splits text, by the names it has for that, and whether it takes a chunk that is a token as it is. Ours
# called gpt4 differs from llama3 in spelling alone: \s*[\r\n] ends at the last newline as \s*[\r\n]+ does.
SPLITS = {
    "gpt-2": (("gpt2",), False),
    "llama-bpe": (("llama3",), True),
    "dbrx": (("llama3",), False),
    "qwen2": (("qwen2",), False),
    "smollm": ((r"\p{N}", "gpt2"), False),
    "tekken": (("tekken",), True),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", "gpt2", r"\p{N}+", "[0-9][0-9][0-9]"), False),
}
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "smaug-bpe": "dbrx",
    "phi-2": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "jais": "gpt-2",
    "stablelm2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "codeshell": "smollm",
    "exaone": "smollm",
    "": "default",
}


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def vocabulary(tok, rows, config, where):
    """Tokenizer -> tokenizer.* metadata; ids up to `rows` that it lacks are unused. UserError, or a warning on stderr,
    where llama.cpp would give other ids."""
    if tok.vocab_size > rows:
        raise UserError(
            f"{where}: the tokenizer has {tok.vocab_size:,} ids, the model only {rows:,} rows"
        )
    if tok.kind == "chars":
        raise UserError(
            f"{where}: a character tokenizer cannot be written, for llama.cpp aborts on characters that it lacks"
        )
    content = to_json(tok)["model"]
    tokens, types = [f"[PAD{i}]" for i in range(rows)], np.full(rows, UNUSED, np.int32)
    for text, i in content["vocab"].items():
        tokens[i], types[i] = text, NORMAL
        if text in tok.special:
            types[i] = UNKNOWN if i == tok.unknown else CONTROL
        elif text in tok.added:
            types[i] = USER_DEFINED
        elif tok.kind == "pieces" and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[i] = BYTE
    meta = bytes_metadata(tok, content) if tok.kind == "bytes" else pieces_metadata(tok, tokens)
    meta |= {"tokens": tokens, "token_type": types, **special_metadata(tok, config)}
    if clash := [text for text, count in Counter(tokens).items() if count > 1]:
        raise UserError(f"{where}: the file would have two tokens spelled {clash[0]!r}")
    if others := [step for step in tok.normalizer if step[0] == "unicode"]:
        warn(
            f"llama.cpp does not normalize text to {others[0][1]}: text that is not will get other ids there"
        )
    meta = {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
    return meta | ({"tokenizer.chat_template": tok.chat_template} if tok.chat_template else {})


def bytes_metadata(tok, content):
    """Byte-level BPE: the merges, and the name of the split that is equal to the tokenizer's."""
    names = {pattern: name for name, pattern in PATTERNS.items()} | {PATTERNS["gpt4"]: "llama3"}
    patterns = tuple(names.get(p, p) for p in tok.patterns)
    found = {name: whole for name, (split, whole) in SPLITS.items() if split == patterns}
    if not found:
        raise UserError(
            f"llama.cpp has no pre-tokenizer that splits text by {' then '.join(patterns)!r}; it has those called "
            "gpt2, gpt4, llama3, qwen2 here: train the tokenizer with --pattern of one of them"
        )
    pre = next((name for name in found if found[name] == tok.whole_chunks), next(iter(found)))
    if (
        found[pre] != tok.whole_chunks
        and any(  # no difference where every token is what merging its own bytes ends in
            tokenizer.merge_by_rank([tok._byte_id(b) for b in token], tok.merges) != [i]
            for token, i in tok.vocab.items()
        )
    ):
        warn(
            f"llama.cpp's {pre} {'merges' if tok.whole_chunks else 'takes whole'} chunks that are tokens: some ids will differ"
        )
    if patterns == ("tekken",):
        warn(
            "llama.cpp's tekken splits words by ASCII case alone: text with other capitals gets other ids there"
        )
    return {"model": "gpt2", "pre": pre, "merges": content["merges"]}


def pieces_metadata(tok, tokens):
    """SentencePiece's BPE: scores fall in the order of merging."""
    scores, order = np.zeros(len(tokens), np.float32), [i for _, i in sorted(tok.merges.values())]
    for rank, i in enumerate(reversed(order)):
        scores[i] = rank - len(order)
    back, prefix = (
        merges_by_score(tok.vocab, scores),
        any(step[0] == "prepend" for step in tok.normalizer),
    )
    if (
        back.keys() != tok.merges.keys()
        or [i for _, i in sorted(back.values())] != order
        or any("▁" in token.lstrip("▁") for token in tok.vocab if tok.patterns)
        or tok.normalizer != [("prepend", "▁", "every")] * prefix + [("replace", " ", "▁")]
    ):
        warn(
            "this tokenizer merges or puts spaces first otherwise than SentencePiece does: some ids will differ in llama.cpp"
        )
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix}


def special_metadata(tok, config):
    """Which ids begin and end a text, and whether a beginning is put before every prompt."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [i for i in dict.fromkeys([tok.eos_id, *ends]) if i is not None]
    bos = ends[0] if tok.bos_id is None and ends else tok.bos_id
    if not ends:
        warn(
            f"the tokenizer has no end token; llama.cpp takes id {11 if tok.kind == 'bytes' else 2} for one and stops there"
        )
    meta = dict(zip(("eos_token_id", "eot_token_id"), ends))
    meta |= {"bos_token_id": bos, "unknown_token_id": tok.unknown, "padding_token_id": tok.pad_id}
    steps = (
        sequence(json.loads(tok.source).get("post_processor"), "processors") if tok.source else []
    )
    templates = [step for step in steps if step.get("type") == "TemplateProcessing"]
    add = tok.config.get("add_bos_token")
    if templates and not isinstance(add, bool):
        add = "SpecialToken" in templates[0]["single"][0]
    if not isinstance(
        add, bool
    ):  # a chat template says it itself; else as generate.py does where the token has no other job
        add = tok.kind == "pieces" or (
            not tok.chat_template and tok.bos_id is not None and tok.bos_id not in ends
        )
    return {key: value for key, value in meta.items() if value is not None} | {
        "add_bos_token": add and bos is not None
    }


def read_vocabulary(meta, path):
    """tokenizer.* metadata -> Tokenizer, or None for a file without one."""
    get = getter(meta, "tokenizer", path)
    model, tokens = get("ggml.model", None, str), get("ggml.tokens", [], list)
    if model in (None, "no_vocab", "none"):
        return None
    n, pre = len(tokens), get("ggml.pre", "", str)
    types = get("ggml.token_type", np.full(n, NORMAL), np.ndarray)
    if (
        not all(isinstance(token, str) for token in tokens)
        or len(types) != n
        or len(set(tokens)) < n
    ):
        raise UserError(f"{path}: {n:,} tokens with {len(types):,} types, or some twice")
    if (longest := max(map(len, tokens), default=0)) > (
        256 if model == "llama" else 1 << 12
    ):  # every way to halve one is tried
        raise UserError(f"{path}: a token of {longest:,} characters")
    groups = {t: {tokens[i]: i for i in np.flatnonzero(types == t).tolist()} for t in range(1, 7)}
    special, vocab = groups[CONTROL] | groups[UNKNOWN], groups[NORMAL] | groups[BYTE]
    options = dict(
        special=special,
        added=groups[USER_DEFINED],
        unknown=next(iter(groups[UNKNOWN].values()), None),
    )
    if model == "gpt2":
        pre = ALIASES.get(pre, pre)
        if pre not in SPLITS:
            raise UserError(
                f"{path}: pre-tokenizer {pre!r} is not supported; this program knows {', '.join(SPLITS)}"
            )
        (split, whole), merges = SPLITS[pre], get("ggml.merges", [], list)
        if bad := [
            merge for merge in merges if not isinstance(merge, str) or merge.count(" ") != 1
        ]:
            raise UserError(f"{path}: merge {str(bad[0])[:40]!r} is not two tokens")
        with naming(path):
            vocab, merges = read_bpe({"vocab": vocab, "merges": merges}, "bytes", special)
        tok = Tokenizer(
            "bytes",
            vocab,
            merges,
            patterns=[PATTERNS.get(p, p) for p in split],
            whole_chunks=whole,
            **options,
        )
    elif model == "llama":
        scores = get("ggml.scores", np.zeros(n, np.float32), np.ndarray)
        if len(scores) != n or not np.isfinite(scores).all():
            raise UserError(
                f"{path}: {len(scores):,} scores for {n:,} tokens, or some of them no numbers"
            )
        prefix = get("ggml.add_space_prefix", True, bool)
        tok = Tokenizer(
            "pieces",
            vocab,
            merges_by_score(vocab, scores.tolist()),
            strip_space=prefix,
            normalizer=[("prepend", "▁", "every")] * prefix + [("replace", " ", "▁")],
            **options,
        )
    else:
        raise UserError(f"{path}: tokenizer model {model!r} is not supported, only gpt2 and llama")
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if 0 <= (i := get(f"ggml.{key}_token_id", -1, int)) < n:
            tok.config[f"{role}_token"] = tokens[i]
    tok.config |= {
        k: v
        for k, v in (
            ("add_bos_token", get("ggml.add_bos_token", None, bool)),
            ("chat_template", get("chat_template", None, str)),
        )
        if v is not None
    }
    return tok


# ------------------------------------------------------------------------------------ the container
ALIGNMENT = 32
CODES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # 8 text, 9 array
MOST_METADATA, MOST_KEYS, MOST_TENSORS, MOST_ITEMS, LONGEST_TEXT = (
    1 << 29,
    1 << 12,
    1 << 16,
    1 << 22,
    1 << 24,
)


def text_bytes(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value_bytes(value):
    """A value with its type in front."""
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text_bytes, value))
    if isinstance(value, np.ndarray):
        return (
            struct.pack("<IIQ", 9, {"int32": 5, "float32": 6}[value.dtype.name], len(value))
            + value.tobytes()
        )
    if isinstance(value, str):
        return struct.pack("<I", 8) + text_bytes(value)
    number = 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6
    return struct.pack("<I" + CODES[number], number, value)


class Cursor:
    """Reads the header of an untrusted file: no length is believed before it is held against what is left."""

    def __init__(self, path, data):
        self.path, self.data, self.at, self.end = path, data, 0, min(len(data), MOST_METADATA)

    def refuse(self, what):
        raise UserError(
            f"{self.path}: {what}; the file is damaged, or no GGUF that this program reads"
        )

    def take(self, code):
        """The next values, in struct's spelling."""
        if (n := struct.calcsize("<" + code)) > self.end - self.at:
            self.refuse(
                f"byte {self.at:,} announces {n:,} bytes more, of which {self.end - self.at:,} are there"
            )
        self.at += n
        return struct.unpack_from("<" + code, self.data, self.at - n)

    def text(self):
        (n,) = self.take("Q")
        if n > LONGEST_TEXT:
            self.refuse(f"a text of {n:,} bytes before byte {self.at:,}")
        return self.take(f"{n}s")[0].decode("utf-8", "replace")

    def value(self):
        (kind,) = self.take("I")
        if kind == 8:
            return self.text()
        if kind in CODES:
            return self.take(CODES[kind])[0]
        if kind != 9:
            self.refuse(f"a value of unknown type {kind} before byte {self.at:,}")
        kind, n = self.take("IQ")
        if n > MOST_ITEMS or kind not in {8, *CODES}:
            self.refuse(
                f"a list of {n:,} values of type {kind} (9 is a list) before byte {self.at:,}"
            )
        return (
            [self.text() for _ in range(n)]
            if kind == 8
            else np.array(self.take(f"{n}{CODES[kind]}"), "<" + CODES[kind])
        )


def open_file(path):
    """-> (metadata, {tensor name: Packed}); the tensors lie in the file until used. All sizes are held against the file's."""
    with open(path, "rb") as f:
        if (size := Path(path).stat().st_size) < 24 or f.read(4) != b"GGUF":
            raise UserError(f"{path}: {size:,} bytes that do not begin as a GGUF does")
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    cursor = Cursor(path, data)
    _, version, n_tensors, n_keys = cursor.take("4sIQQ")
    if version not in (2, 3) or n_tensors > MOST_TENSORS or n_keys > MOST_KEYS:
        cursor.refuse(f"version {version} with {n_tensors:,} tensors and {n_keys:,} keys")
    meta, tensors = {}, {}
    for _ in range(n_keys):
        key = cursor.text()
        if key in meta:
            cursor.refuse(f"key {key[:80]!r} is there twice")
        meta[key] = cursor.value()
    found = []
    for _ in range(n_tensors):
        name, (n_dims,) = cursor.text(), cursor.take("I")
        if not 1 <= n_dims <= 4:
            cursor.refuse(f"tensor {name[:80]!r} has {n_dims:,} dimensions")
        *dims, number, offset = cursor.take(f"{n_dims}QIQ")
        found.append((name, tuple(dims[::-1]), number, offset))
    alignment = meta.get("general.alignment", ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or not 8 <= alignment <= 1 << 16
        or alignment & (alignment - 1)
    ):
        cursor.refuse(f"alignment {str(alignment)[:40]} is not a power of two from 8 to 65,536")
    start, end = -(-cursor.at // alignment) * alignment, 0
    for name, shape, number, offset in sorted(found, key=lambda t: t[3]):
        count, kind = math.prod(shape), KINDS.get(NUMBERS.get(number))
        if kind is None or name in tensors or not count or shape[-1] % kind.block:
            cursor.refuse(
                f"tensor {name[:80]!r} of {shape} is twice there, empty, no whole blocks, or of unknown type {number}"
            )
        nbytes = kind.size(shape)
        if offset % alignment or offset < end or start + offset + nbytes > size:
            cursor.refuse(
                f"tensor {name[:80]!r} with {nbytes:,} bytes at {offset:,} overlaps another or passes the end {size:,}"
            )
        flat, end = (
            torch.frombuffer(data, dtype=torch.uint8, offset=start + offset, count=nbytes),
            offset + nbytes,
        )
        tensors[name] = Packed(NUMBERS[number], shape, flat.view(shape[0], -1))
    return meta, tensors


def write_file(path, meta, tensors):
    """meta {key: value}, tensors [(name, type, shape, function that makes its bytes)] -> a file, all or nothing."""
    infos, offset = [], 0
    for name, kind, shape, _ in tensors:
        infos.append(
            text_bytes(name)
            + struct.pack(
                f"<I{len(shape)}QIQ", len(shape), *shape[::-1], KINDS[kind].number, offset
            )
        )
        offset += -(-KINDS[kind].size(shape) // ALIGNMENT) * ALIGNMENT

    def save(temporary):
        with open(temporary, "wb") as f:
            f.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta)))
            f.write(
                b"".join(
                    [text_bytes(key) + value_bytes(value) for key, value in meta.items()] + infos
                )
            )
            for *_, make in tensors:
                f.write(bytes(-f.tell() % ALIGNMENT))
                f.write(make())
            f.write(bytes(-f.tell() % ALIGNMENT))

    write_atomic(path, save)


# ----------------------------------------------------------------------------------- write and read
def write(folder, path, mix):
    """Model folder -> GGUF file, weights in a mix of MIXES ("f16", "q8_0", "q4_k_m", ...), one tensor at a time.

    -> Counter {type: bytes}. UserError: what is wrong with the folder, or what llama.cpp cannot run; on stderr a warning
    for each tensor whose rows do not fit the mix's type (llama.cpp's own fallback is taken) and where ids would differ.
    """
    if mix not in MIXES:
        raise UserError(f"unknown type {mix!r}: choose one of {', '.join(MIXES)}")
    folder, plan, sizes = Path(folder), [], Counter()
    model = Transformer.from_pretrained(
        folder
    )  # its tensors stay in their file until they are used
    config = model.config
    if model.quantization:
        raise UserError(
            f"{folder} is quantized already ({model.quantization['quant_method']}); start from the original model"
        )
    meta, freqs = shape_metadata(config, folder)
    meta |= {
        "general.name": folder.resolve().name,
        "general.file_type": MIXES[mix][1],
        "general.quantization_version": 2,
        **vocabulary(Tokenizer.load(folder), config.vocab_size, config, folder),
    }

    def content(name, kind, parts):
        tensor = torch.cat([part.float() for part in parts])
        most = torch.linalg.vector_norm(tensor, ord=math.inf).item()
        if not most < (math.inf if kind in ("F32", "BF16") else 65504):
            raise UserError(f"{folder}: {name} has values up to {most}, which {kind} cannot hold")
        order = row_order(name, len(tensor), config)
        return quantize(
            (tensor if order is None else tensor[order]).view(len(tensor), -1), kind
        ).numpy()

    for name, tensors in named(model.state_dict(), config).items():
        parts = list(tensors.values())
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        kind, wanted = kind_of(name, shape, mix, config)
        if wanted:
            warn(
                f"{name}: rows of {shape[-1]} do not divide by {KINDS[wanted].block}, so {wanted} becomes {kind}"
            )
        plan.append((name, kind, shape, partial(content, name, kind, parts)))
    if freqs is not None:
        plan.append(
            ("rope_freqs.weight", "F32", tuple(freqs.shape), as_bytes(freqs, torch.float32).numpy)
        )
    for name, kind, shape, _ in plan:
        sizes[kind] += KINDS[kind].size(shape)
    write_file(path, meta, plan)
    return sizes


def read(path, dtype=torch.float32, keep_packed=False):
    """GGUF file -> (Config, {our name: tensor}, Tokenizer or None), completeness checked.

    keep_packed: {our name: Packed} instead, nothing computed. UserError, in bounded time and memory, for whatever is
    wrong with the file.
    """
    meta, tensors = open_file(path)
    config, tok = read_config(meta, tensors, path), read_vocabulary(meta, path)
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if len(layers) != config.num_hidden_layers:
        raise UserError(
            f"{path}: block_count is {config.num_hidden_layers}, the tensors are of {len(layers)} layers"
        )
    freqs, state = tensors.pop("rope_freqs.weight", None), {}
    if freqs is not None:
        config.rope = llama3_rope(config, freqs, path)
    with torch.device("meta"):
        expected = named(Transformer(config).state_dict(), config)
    faults = [f"{name} is not part of this model" for name in tensors if name not in expected]
    for name, parts in expected.items():
        tensor, sizes, rest = (
            tensors.get(name),
            [len(part) for part in parts.values()],
            next(iter(parts.values())).shape[1:],
        )
        shape = (sum(sizes), *rest)
        if (
            tensor is None
            or tensor.shape != shape
            or (len(shape) == 1 and KINDS[tensor.kind].block > 1)
        ):
            faults.append(
                f"{name} is "
                + (f"{tensor.shape} {tensor.kind}, expected {shape}" if tensor else "missing")
            )
            continue
        order = row_order(name, shape[0], config, back=True)
        data = tensor.data if order is None else tensor.data[order]
        for ours, rows in zip(parts, data.split(sizes)):
            state[ours] = Packed(tensor.kind, (len(rows), *rest), rows)
    if faults:
        raise UserError(
            f"{path}: {len(faults)} faults: {'; '.join(faults[:8])}{'; ...' if len(faults) > 8 else ''}"
        )
    ends = [
        i
        for key in ("eos", "eot")
        if isinstance(i := meta.get(f"tokenizer.ggml.{key}_token_id"), int)
        and i < config.vocab_size
    ]
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    config.bos_token_id = tok.bos_id if tok else None
    return (
        config,
        state if keep_packed else {name: p.dequantize(dtype) for name, p in state.items()},
        tok,
    )


def load(path, device="cpu", dtype=torch.float32, keep_packed=False):
    """GGUF file -> (Transformer, Tokenizer or None). keep_packed: linear layers stay as they are in the file (PackedLinear)."""
    config, state, tok = read(path, keep_packed=True)
    with torch.device("meta"):
        model = Transformer(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    for name, m in list(model.named_modules()) if keep_packed else ():
        if isinstance(m, torch.nn.Linear) and KINDS[state[f"{name}.weight"].kind].block > 1:
            bias = state.pop(f"{name}.bias", None)
            model.set_submodule(
                name, PackedLinear(state.pop(f"{name}.weight"), bias and bias.dequantize())
            )
            model.quantization = {"quant_method": "gguf"}
    own = {"F16": torch.float16, "BF16": torch.bfloat16} if keep_packed else {}
    model.load_state_dict(
        {name: t.dequantize(own.get(t.kind, dtype)) for name, t in state.items()},
        strict=False,
        assign=True,
    )
    if isinstance(model.lm_head, torch.nn.Linear):
        model.tie()
    return model.to(device).eval(), tok


# ------------------------------------------------------------------------------------- the commands
@dataclass
class Args:
    model: str = ""  # the model folder, or "show"
    file: str = "-"  # the .gguf to show
    type: str = (
        "q8_0"  # f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k
    )
    out: str = ""  # the file to write [MODEL-TYPE.gguf]


def show(path):
    """Print metadata and tensors, long lists cut short."""
    meta, tensors = open_file(path)
    for key, value in meta.items():
        many = isinstance(value, (list, np.ndarray))
        print(
            f"{key:44s} {f'{len(value):,} x ' if many else ''}{repr(list(value[:4]) if many else value)[:80]}"
        )
    for name, t in tensors.items():
        print(
            f"{name:32s} {t.kind:5s} {' x '.join(map(str, t.shape)):>16s} {t.data.numel():>14,} bytes"
        )
    weights, size = (
        sum(math.prod(t.shape) for t in tensors.values()),
        sum(t.data.numel() for t in tensors.values()),
    )
    print(
        f"{len(tensors)} tensors, {weights:,} weights, {size:,} bytes: {8 * size / max(1, weights):.2f} bits per weight"
    )


def main():
    args = Args(**parse_flags(Args, __doc__, positional=("model", "file")))
    if args.model == "show":
        return show(args.file)
    out = args.out or f"{args.model.rstrip('/')}-{args.type}.gguf"
    sizes = write(args.model, out, args.type)
    print(f"{out}: " + ", ".join(f"{size:,} bytes of {kind}" for kind, size in sizes.most_common()))


if __name__ == "__main__":
    cli(main)
