"""GGUF, llama.cpp's one file for weights, shape and tokenizer: written from a model folder, and
read back into our model.

    python -m formats.gguf runs/chat --type q4_k_m --out chat.gguf    # llama-cli -m chat.gguf
    python -m formats.gguf show chat.gguf

Version 3 (ggml/docs/gguf.md): magic, counts, metadata, tensor infos, padding, tensors; all of it
little-endian. The types in BLOCKS are read, and those with an encoder written; of the others, as
llama.cpp's IQ types, only the names are known.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from common import (
    UserError,
    cli,
    model_name,
    naming,
    parse_flags,
    printable,
    read_value,
    warn,
    warn_of_unknown,
    write_atomic,
)
from formats.hub import (
    SAMPLING_KEYS,
    TENSOR_NAME,
    compare_shapes,
    config_from_dict,
    config_to_dict,
    two_columns,
)
from formats.verify import verify
from formats.vocab import merges_by_score, read_bpe, space_steps, to_json
from model import Config, Transformer, rope_frequencies
from quant import QuantLinear
from tokenizer import PATTERNS, Tokenizer

WEIGHTS_AT_ONCE = 1 << 18  # packed or unpacked at a time: so few that the work stays near the cache


# ---- Blocks: how weights lie in a tensor.
#
# A row is cut into blocks of 32 or 256 weights, and a block has these fields, in its type's order:
#   q  the codes' low bits                      h  the codes' high bits
#   s  scales, and minima, of the sub-blocks, as whole numbers of a few bits
#   d  what the scales are multiples of         m  what the minima are multiples of (both float16)
# A weight is (code - zero) * scale - low. Rounding follows ggml-quants.c's reference functions.


class BlockType(NamedTuple):
    """A tensor type: ggml's number for it, weights a block, and what its blocks are made of."""

    number: int
    block: int
    zero: int  # the code of 0
    run: int  # bytes of q that hold the low bits of as many codes, then the next higher ones
    high_run: int  # the same of h
    layout: dict  # bytes of each field
    dtype: torch.dtype | None  # of plain floats, whose block is one number
    scales: Callable | None  # s (n, bytes) -> (n, G) multiples of d, and of m or None
    encode: Callable | None  # (n, block) float32 -> {"codes": ..., field: ...}, if written

    @property
    def bytes(self):
        return sum(self.layout.values())

    @property
    def bits(self):
        """How many of a code's bits are in q, and how many in h."""
        return [8 * self.layout.get(field, 0) // self.block for field in "qh"]

    def size(self, shape):
        return math.prod(shape) // self.block * self.bytes


def unpack_bits(packed, bits, run):
    """(n, m) uint8 -> (n, m * 8 / bits): in each run of bytes the lowest bits of all come first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    in_runs = packed.reshape(len(packed), -1, 1, run)  # (n, runs, 1, run)
    codes = in_runs >> shifts & (1 << bits) - 1  # (n, runs, 8 / bits, run)
    return codes.flatten(1)


def pack_bits(codes, bits, run):
    """The inverse of unpack_bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    in_runs = codes.to(torch.uint8).view(len(codes), -1, 8 // bits, run)
    return (in_runs << shifts).sum(2, dtype=torch.uint8).flatten(1)


def as_bytes(x, dtype=torch.float16):
    return x.to(dtype).contiguous().view(torch.uint8)


def from_half(data):
    return data.contiguous().view(torch.float16).float()


def split_blocks(blocks, kind):
    """(n, bytes) uint8 -> codes uint8 (n, G, block / G), scale (n, G), low (n, G) or None."""
    field = dict(zip(kind.layout, blocks.split(list(kind.layout.values()), 1)))
    bits, high_bits = kind.bits
    codes = unpack_bits(field["q"], bits, kind.run)
    if high_bits:
        codes = codes | unpack_bits(field["h"], high_bits, kind.high_run) << bits
    if bits == 8:
        codes = codes ^ 128  # -128..127 -> 0..255
    # of a block with one scale; Q4_1 and Q5_1 add their minimum
    multiples, low_multiples = kind.scales(field["s"]) if kind.scales else (1, -1)
    scale = multiples * from_half(field["d"])  # (n, G)
    low = low_multiples * from_half(field["m"]) if "m" in field else None
    return codes.view(len(blocks), scale.size(1), -1), scale, low


def encode_blocks(kind, rows):
    """Floats -> (n, bytes) uint8, the n blocks that they fill."""
    blocks = rows.float().reshape(-1, kind.block)
    if kind.dtype:
        return as_bytes(blocks, kind.dtype)
    field = kind.encode(blocks)
    codes = field["codes"].to(torch.uint8)
    bits, high_bits = kind.bits
    field["q"] = pack_bits(codes ^ 128 if bits == 8 else codes & (1 << bits) - 1, bits, kind.run)
    if high_bits:
        field["h"] = pack_bits(codes >> bits, high_bits, kind.high_run)
    field["d"] = as_bytes(field["d"])
    return torch.cat([field[name] for name in kind.layout], 1)


def decode_blocks(kind, rows):
    """(..., bytes of whole blocks) uint8 -> (n, block) float32."""
    blocks = rows.reshape(-1, kind.bytes)
    if kind.dtype:
        return blocks.contiguous().view(kind.dtype).float()
    codes, scale, low = split_blocks(blocks, kind)
    x = (codes.float() - kind.zero) * scale[:, :, None]
    if low is not None:
        x = x - low[:, :, None]
    return x.flatten(1)


def nibble_pairs(s):
    """Q2_K: (n, 16) -> 16 scales and 16 minima."""
    return s & 15, s >> 4


def six_bits(s):
    """Q3_K: (n, 12) -> 16 scales from -32 to 31, four bits of all first."""
    return (unpack_bits(s[:, :8], 4, 8) | unpack_bits(s[:, 8:], 2, 4) << 4).float() - 32, None


def six_bit_pairs(s):
    """Q4_K, Q5_K: (n, 12) -> 8 scales and 8 minima.

    Of the last four of each, the top two bits are on top of the first four."""
    first = s[:, :8].unflatten(1, (2, 4))  # (n, scales or minima, 4)
    nibbles = torch.stack((s[:, 8:] & 15, s[:, 8:] >> 4), 1)  # (n, 2, 4)
    pairs = torch.cat((first & 63, first >> 6 << 4 | nibbles), 2)  # (n, 2, 8)
    return pairs.unbind(1)


def pack_six_bit_pairs(pairs):
    """(n, 2, 8) scales and minima -> (n, 12), the inverse of six_bit_pairs."""
    first, last = pairs.split(4, 2)  # each (n, 2, 4)
    nibbles = last[:, 0] & 15 | last[:, 1] << 4
    return torch.cat(((first | last >> 4 << 6).flatten(1), nibbles), 1)


def eight_bits(s):
    """Q6_K: 16 scales from -128 to 127."""
    return s.view(torch.int8), None


def inverse(x):
    return torch.where(x == 0, 0.0, 1 / x)


def largest(x):
    """(n, k) -> (n, 1): of each row the value of largest magnitude, with its sign."""
    return x.gather(1, x.abs().argmax(1, keepdim=True))


def encode_q8_0(x):
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * inverse(d)
    whole = scaled.trunc()
    return {"d": d, "codes": whole + (2 * (scaled - whole)).trunc() + 128}  # halves away from zero


def encode_q4_0(x):
    """The scale takes the largest magnitude to -8, the side that has one value more."""
    d = largest(x) / -8
    scaled = (x.double() * inverse(d).double() + 8.5).float()  # one rounding, as C's fma
    return {"d": d, "codes": scaled.trunc().clamp(0, 15)}


def encode_k45(x, top, start, steps):
    """Q4_K, Q5_K: 8 sub-blocks of 32, scales and minima in 63rds of the largest."""
    x = x.view(-1, 32)  # (n * 8, 32)
    fits = torch.stack(fit_range(x, top, start, steps)).view(2, -1, 8)  # scales; minima
    most = fits.amax(2, keepdim=True)  # (2, n, 1)
    multiples = (fits * torch.where(most > 0, 63 / most, 0.0)).round().clamp(max=63)
    head = (most / 63).half()
    scale, low = (multiples * head.float()).view(2, -1, 1)  # each (n * 8, 1)
    codes = ((x + low) / scale).round().nan_to_num(0).clamp(0, top).view(-1, 256)
    s = pack_six_bit_pairs(multiples.to(torch.uint8).transpose(0, 1))
    return {"d": head[0], "m": as_bytes(head[1]), "s": s, "codes": codes}


def fit_range(x, top, start, steps):
    """x (n, 32) ~ scale * q - low, q in 0..top -> (scale (n,), low (n,)), both >= 0.

    Tries `steps` roundings near the plain one, each from the best minimum so far and as if the
    highest code were not `top` but start, start + 0.1, ... more; for each, weighted least squares
    gives the best scale and minimum. The weights |x| + rms(x) make large values count more, as in
    ggml (make_qkx2_quants)."""
    x = x.t().contiguous()  # (32, n): sums down the columns run over consecutive numbers
    w = x.square().mean(0).sqrt() + x.abs()
    weights = torch.stack((w, w * x))
    products = torch.empty(2, *x.shape)
    sum_w, sum_x = weights.sum(1)
    high = x.amax(0)
    minimum = x.amin(0).clamp(max=0)
    scale = (high - minimum) / top
    q = ((x - minimum) / scale).round_().clamp_(max=top)
    best = (weights[1] * x).sum(0) - (w * (q * scale + minimum - x).square()).sum(0)
    for step in range(steps):
        steepness = (start + 0.1 * step + top) / (high - minimum)
        q = torch.sub(x, minimum, out=q).mul_(steepness).round_().clamp_(0, top)
        sum_q, sum_qx = torch.mul(weights, q, out=products).sum(1)
        sum_q2 = products[0].mul_(q).sum(0)
        det = sum_w * sum_q2 - sum_q * sum_q
        s = (sum_w * sum_qx - sum_x * sum_q) / det
        m = (sum_q2 * sum_x - sum_q * sum_qx) / det
        s = torch.where(m > 0, sum_qx / sum_q2, s)
        m = m.clamp(max=0)
        # how much less than sum w x^2 the error sum w (s q + m - x)^2 is
        gain = s * (2 * sum_qx - s * sum_q2 - 2 * m * sum_q) + m * (2 * sum_x - m * sum_w)
        better = (det > 0) & (gain > best)
        best = torch.where(better, gain, best)
        scale = torch.where(better, s, scale)
        minimum = torch.where(better, m, minimum)
    return scale, -minimum


def encode_q6_k(x):
    """16 sub-blocks of 16, their scales multiples of a 128th of the largest."""
    fits = fit_scale(x.reshape(-1, 16), 32).view(-1, 16)
    most = largest(fits)
    multiples = (fits * (-128 * inverse(most))).round().clamp(max=127)
    d = (most / -128).half()
    scale = (multiples * d.float()).view(-1, 16, 1)
    codes = (x.view(-1, 16, 16) / scale).round().nan_to_num(0).clamp(-32, 31).add(32)
    return {"d": d, "s": as_bytes(multiples, torch.int8), "codes": codes.view(-1, 256)}


def fit_scale(x, top):
    """x (n, 16) ~ scale * q, q in -top..top-1 -> scale (n,), by the same search with weights x^2
    (make_qx_quants)."""
    peak = largest(x)[:, 0]
    x = x.t().contiguous()  # (16, n)
    w = x.square()
    wx = w * x
    scale = torch.zeros_like(peak)
    best = torch.zeros_like(peak)
    for step in (0, *range(-9, 0), *range(1, 10)):
        q = (x * (-(top + 0.1 * step) / peak)).round_().clamp_(-top, top - 1)
        sum_qx = (wx * q).sum(0)
        sum_q2 = (w * q.square_()).sum(0)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = torch.where(better, sum_qx / sum_q2, scale)
        best = torch.where(better, scale * sum_qx, best)
    return torch.where(peak.abs() < 1e-15, 0.0, scale)


# The columns of BlockType, in its words, and the bytes of each field (q16: 16 bytes of q):
#   name  number block zero run high_run  layout
BLOCKS = """
    F32    0    1    0  16   1  q4
    F16    1    1    0  16   1  q2
    BF16  30    1    0  16   1  q2
    Q4_0   2   32    8  16   1  d2 q16
    Q4_1   3   32    0  16   1  d2 m2 q16
    Q5_0   6   32   16  16   1  d2 h4 q16
    Q5_1   7   32    0  16   1  d2 m2 h4 q16
    Q8_0   8   32  128  16   1  d2 q32
    Q2_K  10  256    0  32  32  s16 q64 d2 m2
    Q3_K  11  256    4  32  32  h32 q64 s12 d2
    Q4_K  12  256    0  32  32  d2 m2 s12 q128
    Q5_K  13  256    0  32  32  d2 m2 s12 h32 q128
    Q6_K  14  256   32  64  32  q128 h64 s16 d2
"""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCALES = {"Q2_K": nibble_pairs, "Q3_K": six_bits, "Q6_K": eight_bits}
SCALES |= dict.fromkeys(("Q4_K", "Q5_K"), six_bit_pairs)
ENCODERS: dict[str, Callable] = {
    "Q4_0": encode_q4_0,
    "Q8_0": encode_q8_0,
    "Q4_K": partial(encode_k45, top=15, start=-1.0, steps=21),
    "Q5_K": partial(encode_k45, top=31, start=-0.5, steps=16),
    "Q6_K": encode_q6_k,
}


def read_block_types():
    """BLOCKS -> {name: BlockType}"""
    kinds = {}
    for line in BLOCKS.strip().splitlines():
        name, *columns = line.split()
        number, block, zero, run, high_run = map(int, columns[:5])
        layout = {field[0]: int(field[1:]) for field in columns[5:]}
        how = FLOATS.get(name), SCALES.get(name), ENCODERS.get(name)
        kinds[name] = BlockType(number, block, zero, run, high_run, layout, *how)
    return kinds


BLOCK_TYPES = read_block_types()
UNREAD_TYPES = """IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M
    30 31 32 33 TQ1_0 TQ2_0 36 37 38 MXFP4 NVFP4""".split()
TYPE_NAMES = dict(enumerate(UNREAD_TYPES, 16))
TYPE_NAMES |= {kind.number: name for name, kind in BLOCK_TYPES.items()}


def by_rows(function, rows, out):
    """out = function(rows), a few rows at a time: so few that the work stays near the cache."""
    step = max(1, WEIGHTS_AT_ONCE // max(rows[0].numel(), out[0].numel()))
    for i in range(0, len(out), step):
        out[i : i + step] = function(rows[i : i + step]).view(-1, *out.shape[1:])
    return out


def encode_rows(x, name):
    """(N, K) -> (N, bytes a row) uint8, of a type in BLOCK_TYPES whose block divides K."""
    kind = BLOCK_TYPES[name]
    data = torch.empty(len(x), kind.size(x.shape[1:]), dtype=torch.uint8)
    return by_rows(partial(encode_blocks, kind), x, data)


@dataclass
class GGUFTensor:
    """A tensor as it lies in the file."""

    type: str  # a name in BLOCK_TYPES
    shape: tuple  # (N, K), or (N,)
    data: torch.Tensor  # (N, bytes a row) uint8

    def dequantize(self, dtype=torch.float32):
        """-> tensor of `shape`"""
        decode = partial(decode_blocks, BLOCK_TYPES[self.type])
        return by_rows(decode, self.data, torch.empty(self.shape, dtype=dtype))


class PackedLinear(QuantLinear):
    """A linear layer whose weights stay as they are in the file."""

    def __init__(self, tensor, bias=None):
        super().__init__(tensor.shape, bias)
        self.format = tensor.type
        self.register_buffer("data", tensor.data)

    def dequantize(self, dtype=torch.float32):
        shape = (self.out_features, self.in_features)
        return GGUFTensor(self.format, shape, self.data).dequantize(dtype)

    def groups(self):
        """As GroupLinear's; w = scale * (code - zero), up to float32's rounding."""
        kind = BLOCK_TYPES[self.format]
        codes, scale, low = split_blocks(self.data.reshape(-1, kind.bytes), kind)
        zero = torch.full_like(scale, kind.zero)
        if low is not None:
            # Groups that are -low throughout, or so nearly that float16 zero points could not tell.
            flat = low.abs() > 2048 * scale
            codes = codes.masked_fill(flat[:, :, None], 0)
            scale = torch.where(flat, low, scale)
            zero = torch.where(scale == 0, 0.0, low / scale)
        by_row = (part.reshape(self.out_features, -1) for part in (codes, scale, zero))
        return (*by_row, codes.size(2), None, 4 if sum(kind.bits) <= 4 else 8)


# ---- Names, types and order of the tensors.


GGUF_NAMES = two_columns("""
    embed_tokens              token_embd
    embed_positions           position_embd
    norm                      output_norm
    lm_head                   output
    input_layernorm           attn_norm
    post_attention_layernorm  ffn_norm
    self_attn.q_proj          attn_q
    self_attn.k_proj          attn_k
    self_attn.v_proj          attn_v
    self_attn.o_proj          attn_output
    self_attn.q_norm          attn_q_norm
    self_attn.k_norm          attn_k_norm
    mlp.gate_proj             ffn_gate
    mlp.up_proj               ffn_up
    mlp.down_proj             ffn_down
""")
# What --type says, and llama.cpp's number for the mix. Most matrices are of the type that the name
# says: Q4_K in q4_k_m.
MIXES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q4_0": 2,
    "q4_k_m": 15,
    "q5_k_m": 17,
    "q6_k": 18,
}


def gguf_name(name, config):
    """layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight; GPT-2's q, k and v all -> attn_qkv."""
    layer, module, leaf = TENSOR_NAME.fullmatch(name).groups()
    part = GGUF_NAMES[module]
    if config.is_gpt2 and part in ("attn_q", "attn_k", "attn_v"):
        part = "attn_qkv"
    return f"{part}.{leaf}" if layer is None else f"blk.{layer}.{part}.{leaf}"


def by_gguf_name(state, config):
    """Our state dict -> {name in a GGUF: {our name: tensor}}; several lie there end to end.

    These are GPT-2's q, k and v, in this order, in which model.py makes the layers."""
    names = {}
    for name, tensor in state.items():
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        if not tied:  # llama.cpp, too, takes the embedding then
            names.setdefault(gguf_name(name, config), {})[name] = tensor
    return names


def reorder_rows(rows, name, config, back=False):
    """Our rows of the tensor `name` in the order in which a GGUF stores them, or back.

    Rotary pairs of the llama architecture are neighbours, as in Meta's own checkpoints; ours, like
    Hugging Face's, are the two halves of a head: (heads, 2, D/2) -> (heads, D/2, 2)."""
    if gguf_architecture(config) != "llama" or not re.search(r"\.attn_[qk]\.", name):
        return rows
    half = config.head_dim // 2
    pairs = (half, 2) if back else (2, half)
    return rows.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


def type_in_mix(name, shape, mix, config):
    """The type that llama.cpp's quantizer gives this tensor (llama-quant.cpp), rows permitting."""
    kind = mix.removesuffix("_m").upper()
    if len(shape) < 2 or name == "position_embd.weight":
        return "F32"
    if BLOCK_TYPES[kind].dtype:
        return kind
    part = name.split(".")[-2]
    if part == ("token_embd" if config.tie_word_embeddings else "output"):
        return "Q8_0" if kind == "Q8_0" else "Q6_K"
    if mix.endswith("_k_m") and part in ("attn_v", "attn_qkv", "ffn_down"):
        # the first and last eighth of the layers, and every third between, get more bits
        layer = int(name.split(".")[1])
        layers = config.num_hidden_layers
        between = range(layers // 8, 7 * layers // 8)
        if layer not in between or between.index(layer) % 3 == 2:
            return "Q6_K"
    return kind


def type_that_fits(kind, columns):
    """`kind` where its blocks divide rows of `columns` weights; else Q8_0, else F16.

    llama.cpp replaces Q4_K and Q5_K by Q5_0 and Q5_1, which are smaller and seldom made."""
    candidates = (kind, "Q8_0", "F16")
    return next(name for name in candidates if columns % BLOCK_TYPES[name].block == 0)


# ---- The shape of the model, as metadata and back.

GGUF_ARCHITECTURES = "gpt2 llama qwen2 qwen3".split()


def gguf_architecture(config):
    return "llama" if config.model_type == "mistral" else config.model_type


def shape_keys(arch):
    """-> {key after the architecture's name: field of Config}"""
    return two_columns(f"""
        context_length           max_position_embeddings
        embedding_length         hidden_size
        block_count              num_hidden_layers
        feed_forward_length      intermediate_size
        attention.head_count     num_attention_heads
        attention.head_count_kv  num_key_value_heads
        attention.key_length     head_dim
        attention.value_length   head_dim
        vocab_size               vocab_size
        attention.layer_norm{"" if arch == "gpt2" else "_rms"}_epsilon  norm_eps
    """)


def shape_metadata(config):
    """Config -> {key: value}. UserError for what llama.cpp cannot run."""
    arch = gguf_architecture(config)
    heads = config.num_attention_heads
    head_dim = config.head_dim
    channels = config.hidden_size
    if arch == "qwen2" and heads * head_dim != channels:
        raise UserError(f"llama.cpp's qwen2 needs {heads} heads x {head_dim} = {channels} channels")
    meta = {key: getattr(config, field) for key, field in shape_keys(arch).items()}
    if config.sliding_layers and config.sliding_window < config.max_position_embeddings:
        meta["context_length"] = config.sliding_window
        warn(
            f"llama.cpp's {arch} has no sliding window; the context ends where it would begin to "
            f"matter, at {config.sliding_window:,} tokens"
        )
    if not config.is_gpt2:
        kind = config.rope["rope_type"]
        meta["rope.dimension_count"] = head_dim
        meta["rope.freq_base"] = float(config.rope["rope_theta"])
        if kind == "llama3" and arch == "llama":
            original = config.rope["original_max_position_embeddings"]
            meta["rope.scaling.original_context_length"] = int(original)
        elif kind != "default":
            raise UserError(
                f"{arch} with rope scaling {kind!r} cannot be written; Llama 3's can, and "
                "only in Llama models"
            )
    return {"general.architecture": arch} | {f"{arch}.{key}": meta[key] for key in meta}


def slowed_down(head_dim, rope):
    """(D/2,): by what Llama 3's rule slows down each rotary pair."""
    stretched, _ = rope_frequencies(Config(head_dim=head_dim, rope=rope))
    plain, _ = rope_frequencies(Config(head_dim=head_dim, rope=rope | {"rope_type": "default"}))
    return plain / stretched


def metadata_reader(meta, prefix):
    """get(key, kind, default) of untrusted metadata, as common.read_value."""

    def get(key, kind, default=None):
        return read_value(meta, "metadata", prefix + key, kind, default)

    return get


def read_config(meta, tensors):
    """Metadata and tensors -> Config."""
    arch = meta.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES or "token_embd.weight" not in tensors:
        raise UserError(
            f"architecture {str(arch)[:40]!r} is not supported, or token_embd.weight is "
            f"missing; this program knows {', '.join(GGUF_ARCHITECTURES)}"
        )
    get = metadata_reader(meta, f"{arch}.")
    heads = get("attention.head_count", int, 0)
    head_dim = get("attention.key_length", int, get("embedding_length", int, 0) // max(1, heads))
    others = "attention.value_length", "rope.dimension_count"
    if get("expert_count", int, 0) or {get(key, int, head_dim) for key in others} != {head_dim}:
        raise UserError(
            f"experts, or {heads} heads whose keys ({head_dim}), values and rotary part "
            "are not of one size, are not supported"
        )
    kind = get("rope.scaling.type", str, "none")
    factor = get("rope.scaling.factor", float, get("rope.scale_linear", float, 1))
    if kind not in ("none", "linear") or factor != 1:
        raise UserError(f"rope scaling {kind!r} by {factor} is not supported, only Llama 3's")
    shape = {field: get(key, float) for key, field in shape_keys(arch).items()}
    shape |= {
        "model_type": arch,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "head_dim": head_dim,
        "rope": {"rope_type": "default", "rope_theta": get("rope.freq_base", float, 10000.0)},
    }
    config = config_from_dict(config_to_dict(Config(**shape)), arch)  # which checks it
    if arch != "gpt2":
        config.qkv_bias = "blk.0.attn_q.bias" in tensors
        config.out_bias = "blk.0.attn_output.bias" in tensors
        config.mlp_bias = "blk.0.ffn_up.bias" in tensors
        if "rope_freqs.weight" in tensors:
            slowed = tensors.pop("rope_freqs.weight").dequantize()
            original = get("rope.scaling.original_context_length", float, 8192)
            config.rope = llama3_rope(config, slowed, original)
    return config


def llama3_rope(config, slowed, original):
    """rope_freqs.weight (D/2,), by what each pair is slowed down -> Config.rope by Llama 3's rule.

    The slowest pairs tell the factor. Other programs' files do not tell the rest: 1, 4 and an
    original context of 8,192, the default of `original`, are those of all published models."""
    rope = config.rope | {
        "rope_type": "llama3",
        "factor": round(slowed.max().item(), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    expected = slowed_down(config.head_dim, rope)
    if slowed.shape != expected.shape or not torch.allclose(slowed, expected, rtol=1e-3):
        raise UserError("rope_freqs.weight is not Llama 3's rule, the only one this program knows")
    return rope


# ---- The tokenizer, as metadata.

# The keys of ids that end a text, and of Sampling's defaults -> generation_config.json's names.
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
SAMPLING_NAMES = two_columns("""
    general.sampling.temp            temperature
    general.sampling.top_p           top_p
    general.sampling.top_k           top_k
    general.sampling.min_p           min_p
    general.sampling.penalty_repeat  repetition_penalty
""")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type


class SplitRule(NamedTuple):
    """How llama.cpp splits text under one of its names."""

    patterns: tuple  # names in PATTERNS, or regular expressions
    whole_chunks: bool = False  # whether a chunk that is a token is taken as it is


# Our gpt4 differs from llama3 in spelling alone: \s*[\r\n] ends at the last newline as \s*[\r\n]+.
SPLITS = {
    "gpt-2": SplitRule(("gpt2",)),
    "llama-bpe": SplitRule(("llama3",), whole_chunks=True),
    "dbrx": SplitRule(("llama3",)),
    "qwen2": SplitRule(("qwen2",)),
    "smollm": SplitRule((r"\p{N}", "gpt2")),
    "tekken": SplitRule(("tekken",), whole_chunks=True),
    # Of models whose text is split like another's; they are read, and not written.
    "falcon3": SplitRule(("llama3",), whole_chunks=True),
    "deepseek-r1-qwen": SplitRule(("qwen2",)),
}


def tokenizer_metadata(tok, config):
    """Tokenizer -> tokenizer.* metadata, None for what it lacks; ids up to the model's that it
    lacks are unused.

    UserError, or a warning on stderr, where llama.cpp would give other ids."""
    rows = config.vocab_size
    if tok.vocab_size > rows:
        raise UserError(f"the tokenizer has {tok.vocab_size:,} ids, the model only {rows:,} rows")
    if tok.kind == "chars":
        raise UserError("llama.cpp aborts on characters that a character tokenizer lacks")
    content = to_json(tok)["model"]
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    named = dict.fromkeys(tok.special, CONTROL) | dict.fromkeys(tok.added, USER_DEFINED)
    for text, i in content["vocab"].items():
        tokens[i] = text
        is_byte = tok.kind == "pieces" and re.fullmatch("<0x[0-9A-F]{2}>", text)
        types[i] = named.get(text, BYTE if is_byte else NORMAL)
    if tok.unknown is not None:
        types[tok.unknown] = UNKNOWN
    if tok.kind == "bytes":
        meta = bytes_metadata(tok, content["merges"])
    else:
        meta = pieces_metadata(tok, rows)
    meta |= {"tokens": tokens, "token_type": types, **special_metadata(tok, config)}
    if any(kind == "unicode" for kind, *_ in tok.normalizer):
        warn("llama.cpp does not normalize Unicode: text that is not normal gets other ids there")
    meta = {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
    meta["tokenizer.chat_template"] = tok.chat_template
    return meta


def bytes_metadata(tok, merges):
    """Byte-level BPE: the merges, and the name of the split that is equal to the tokenizer's."""
    names = {pattern: name for name, pattern in PATTERNS.items()} | {PATTERNS["gpt4"]: "llama3"}
    patterns = tuple(names.get(pattern, pattern) for pattern in tok.patterns)
    found = [name for name, split in SPLITS.items() if split.patterns == patterns]
    if not found:
        raise UserError(
            f"llama.cpp has no pre-tokenizer that splits text by {' then '.join(patterns)!r}; it "
            "has those called gpt2, gpt4, llama3, qwen2 here: train the tokenizer with one of them"
        )
    same = [name for name in found if SPLITS[name].whole_chunks == tok.whole_chunks]
    pre = (same or found)[0]
    if not same:  # no difference where merging reaches every token
        warn(f"llama.cpp's {pre} takes chunks that are tokens otherwise: some ids may differ")
    if patterns == ("tekken",):
        warn(
            "llama.cpp's tekken splits words by ASCII case alone: text with other capitals gets "
            "other ids there"
        )
    return {"model": "gpt2", "pre": pre, "merges": merges}


def pieces_metadata(tok, rows):
    """SentencePiece's BPE: scores fall in the order of merging."""
    scores = [0.0] * rows
    order = [i for _, i in sorted(tok.merges.values())]
    for rank, i in enumerate(reversed(order)):
        scores[i] = float(rank - len(order))
    back = merges_by_score(tok.vocab, scores)
    same = back.keys() == tok.merges.keys() and order == [i for _, i in sorted(back.values())]
    prefix = any(kind == "prepend" for kind, *_ in tok.normalizer)
    splits = tok.patterns and not tok.spaces_lead
    if not same or splits or tok.normalizer != space_steps(prefix):
        warn(
            "this tokenizer merges or puts spaces first otherwise than SentencePiece does: some "
            "ids will differ in llama.cpp"
        )
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix}


def special_metadata(tok, config):
    """Which ids begin and end a text, and whether a beginning is put before every prompt."""
    ends = dict.fromkeys([tok.eos_id, *config.end_ids])
    ends.pop(None, None)
    meta = dict(zip(END_KEYS, ends))
    # A tokenizer without a beginning has its end do that work, as GPT-2 does.
    bos = next(iter(ends), None) if tok.bos_id is None else tok.bos_id
    meta |= {"bos_token_id": bos, "unknown_token_id": tok.unknown, "padding_token_id": tok.pad_id}
    before, after = tok.prompt_ends()
    return meta | {"add_bos_token": bool(before), "add_eos_token": bool(after)}


# ---- The tokenizer, from metadata.


def read_vocabulary(get):
    """tokenizer.* metadata -> Tokenizer, or None for a file without one."""
    model = get("ggml.model", str, "none")
    if model in ("no_vocab", "none"):
        return None
    if model not in ("gpt2", "llama"):
        raise UserError(f"tokenizer model {model!r} is not supported, only gpt2 and llama")
    tokens = get("ggml.tokens", list, [])
    groups = read_token_types(get, tokens)
    read = read_bytes_tokenizer if model == "gpt2" else read_pieces_tokenizer
    tok = read(
        get,
        groups[NORMAL] | groups[BYTE],
        special=groups[CONTROL] | groups[UNKNOWN],
        added=groups[USER_DEFINED],
        unknown=next(iter(groups[UNKNOWN].values()), None),
    )
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = get(f"ggml.{key}_token_id", int, len(tokens))
        if i < len(tokens):
            tok.config[f"{role}_token"] = tokens[i]
    tok.chat_template = get("chat_template", str)
    # llama.cpp's own defaults are SentencePiece's, and those of Llama 3's and Mistral's files
    add_bos = get("ggml.add_bos_token", bool, tok.kind == "pieces" or tok.whole_chunks)
    tok.set_prompt_ends(add_bos, get("ggml.add_eos_token", bool, False))
    return tok


def read_token_types(get, tokens):
    """-> {token type: {token: id}}"""
    types = get("ggml.token_type", list, [NORMAL] * len(tokens))
    if len(set(tokens)) < len(tokens):
        raise UserError("a token is there twice")
    if len(types) != len(tokens):
        raise UserError(f"{len(tokens):,} tokens with {len(types):,} types")
    groups = {kind: {} for kind in range(NORMAL, BYTE + 1)}
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if kind not in groups:
            raise UserError(f"token {i:,} is of type {kind!r}, expected 1 to {BYTE}")
        groups[kind][token] = i
    return groups


def read_bytes_tokenizer(get, vocab, **options):
    pre = get("ggml.pre", str, "")
    split = SPLITS.get(pre)
    if split is None:
        raise UserError(
            f"pre-tokenizer {pre!r} is not supported; this program knows {', '.join(SPLITS)}"
        )
    merges = get("ggml.merges", list, [])
    vocab, merges = read_bpe(vocab, merges, options["special"], byte_level=True)
    patterns = [PATTERNS.get(pattern, pattern) for pattern in split.patterns]
    return Tokenizer("bytes", vocab, merges, patterns, whole_chunks=split.whole_chunks, **options)


def read_pieces_tokenizer(get, vocab, **options):
    scores = get("ggml.scores", list, [])
    if len(scores) <= max(vocab.values(), default=0) or not all(map(math.isfinite, scores)):
        raise UserError(f"{len(scores):,} scores, too few for the tokens, or some are no numbers")
    prefix = get("ggml.add_space_prefix", bool, True)
    merges = merges_by_score(vocab, scores)
    options["normalizer"] = space_steps(prefix)
    return Tokenizer("pieces", vocab, merges, strip_space=prefix, **options)


# ---- The container.

ALIGNMENT = 32
TEXT, LIST = 8, 9  # types of metadata values; the others are numbers, by struct's codes
NUMBER_CODES = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd"))
VALUE_TYPES = {bool: 7, int: 4, float: 6, str: TEXT}  # of what we write
ITEM_TYPES = VALUE_TYPES | {int: 5}
# An untrusted file is refused above these.
MOST_METADATA = 1 << 26  # bytes
MOST_KEYS = 1 << 12
MOST_TENSORS = 1 << 16
MOST_ITEMS = 1 << 21  # of all lists together; 262K tokens, scores, types and 580K merges are 1.4M


def text_bytes(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value_bytes(value):
    """A metadata value with its type in front."""
    listed = isinstance(value, list)
    items = value if listed else [value]
    types = ITEM_TYPES if listed else VALUE_TYPES
    number = types[type(items[0])] if items else TEXT
    head = struct.pack("<IIQ", LIST, number, len(items)) if listed else struct.pack("<I", number)
    if number == TEXT:
        return head + b"".join(map(text_bytes, items))
    return head + struct.pack(f"<{len(items)}{NUMBER_CODES[number]}", *items)


class HeaderReader:
    """Reads the header of an untrusted file: no length is believed before it is held against what
    is left."""

    def __init__(self, data):
        self.data = data
        self.at = 0
        self.listed = 0  # items of lists

    def take(self, code):
        """The next values, in struct's spelling."""
        n = struct.calcsize("<" + code)
        left = min(len(self.data), MOST_METADATA) - self.at
        if n > left:
            refuse(f"byte {self.at:,} announces {n:,} bytes more, of which {left:,} are there")
        self.at += n
        return struct.unpack_from("<" + code, self.data, self.at - n)

    def text(self):
        (n,) = self.take("Q")
        if n > MOST_METADATA:
            refuse(f"a text of {n:,} bytes before byte {self.at:,}")
        return self.take(f"{n}s")[0].decode("utf-8", "replace")

    def value(self):
        (kind,) = self.take("I")
        if kind != LIST:
            value = self.items(kind, 1)[0]
            # float32's 1e-05 reads as 9.99999974e-06
            return float(f"{value:.7g}") if isinstance(value, float) else value
        return self.items(*self.take("IQ"))

    def items(self, kind, n):
        self.listed += n
        if self.listed > MOST_ITEMS or kind not in {TEXT, *NUMBER_CODES}:
            refuse(f"a list of {n:,} values of type {kind} (9 is a list) at {self.at:,}")
        if kind == TEXT:
            return [self.text() for _ in range(n)]
        return list(self.take(f"{n}{NUMBER_CODES[kind]}"))

    def metadata(self, n_keys):
        meta = {}
        for _ in range(n_keys):
            key = self.text()
            if key in meta:
                refuse(f"key {key[:80]!r} is there twice")
            meta[key] = self.value()
        return meta

    def tensor_info(self):
        """-> (offset among the tensors, name, shape, type number)"""
        name = self.text()
        (n_dims,) = self.take("I")
        if not 1 <= n_dims <= 4:
            refuse(f"tensor {name[:80]!r} has {n_dims:,} dimensions")
        *dims, number, offset = self.take(f"{n_dims}QIQ")
        return offset, name, tuple(dims[::-1]), number


def refuse(what):
    raise UserError(f"{what}; the file is damaged, or no GGUF that this program reads")


def open_gguf(path):
    """-> (metadata, {tensor name: GGUFTensor}); the tensors stay in the file until they are used.

    All sizes are held against the file's."""
    with open(path, "rb") as f:
        size = Path(path).stat().st_size
        if size < 24 or f.read(4) != b"GGUF":
            refuse(f"{size:,} bytes that do not begin as a GGUF does")
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    header = HeaderReader(data)
    _, version, n_tensors, n_keys = header.take("4sIQQ")
    if version not in (2, 3) or n_tensors > MOST_TENSORS or n_keys > MOST_KEYS:
        refuse(f"version {version} with {n_tensors:,} tensors and {n_keys:,} keys")
    meta = header.metadata(n_keys)
    infos = [header.tensor_info() for _ in range(n_tensors)]
    alignment = read_value(meta, "metadata", "general.alignment", int, ALIGNMENT)
    if alignment not in [1 << exponent for exponent in range(3, 17)]:
        refuse(f"alignment {alignment:,} is not a power of two from 8 to 65,536")
    start = -(-header.at // alignment) * alignment
    end = start
    tensors = {}
    for offset, name, shape, number in sorted(infos):
        kind = BLOCK_TYPES.get(TYPE_NAMES.get(number))
        whole = kind and shape[-1] % kind.block == 0 and (kind.dtype or len(shape) > 1)
        if not whole or name in tensors or not math.prod(shape):
            refuse(
                f"tensor {name[:80]!r} of {shape} is twice there, empty, no whole blocks, or of "
                f"unknown type {TYPE_NAMES.get(number, number)}"
            )
        begin = start + offset
        nbytes = kind.size(shape)
        if offset % alignment or begin < end or begin + nbytes > size:
            refuse(
                f"tensor {name[:80]!r} with {nbytes:,} bytes at {begin:,} overlaps another or "
                f"passes the end {size:,}"
            )
        end = begin + nbytes
        flat = torch.frombuffer(data, dtype=torch.uint8, offset=begin, count=nbytes)
        tensors[name] = GGUFTensor(TYPE_NAMES[number], shape, flat.view(shape[0], -1))
    return meta, tensors


def open_parts(path):
    """open_gguf of a file, or of all the parts of a split one, of which path is any."""
    meta, tensors = open_gguf(path)
    count = read_value(meta, "metadata", "split.count", int, 0)
    if count < 2:  # 0, where llama-gguf-split made one file of the parts
        return meta, tensors
    path = Path(path)
    name = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name)
    meta, tensors = {}, {}
    for i in range(1, count + 1):
        part = path.with_name(f"{name}-{i:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise UserError(f"one of {count:,} parts, which lacks {part.name} beside it")
        own_meta, own = open_gguf(part)
        twice = sorted(own.keys() & tensors.keys())
        if twice:
            raise UserError(f"{part.name} has {twice[0]}, which a part before it has too")
        meta = meta or own_meta  # the first part's, of which the others have few keys
        tensors |= own
    return meta, tensors


class PlannedTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    type: str
    shape: tuple
    make: Callable  # () -> its bytes, when its turn has come


def write_container(path, meta, plan):
    """Metadata {key: value} and PlannedTensors -> a file, all or nothing."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(plan), len(meta))]
    header += [text_bytes(key) + value_bytes(value) for key, value in meta.items()]
    offset = 0
    for tensor in plan:
        kind = BLOCK_TYPES[tensor.type]
        dims = tensor.shape[::-1]
        info = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind.number, offset)
        header.append(text_bytes(tensor.name) + info)
        offset += -(-kind.size(tensor.shape) // ALIGNMENT) * ALIGNMENT

    def save(temporary):
        with open(temporary, "wb") as f:
            f.write(b"".join(header))
            for tensor in plan:
                f.write(bytes(-f.tell() % ALIGNMENT))
                f.write(tensor.make())
            f.write(bytes(-f.tell() % ALIGNMENT))

    write_atomic(path, save)


# ---- Write and read.


def write(folder, path, mix):
    """Model folder -> GGUF file, in a mix of MIXES ("f16", "q4_k_m", ...), one tensor at a time.

    UserError: what is wrong with the folder, or what llama.cpp cannot run. On stderr a warning for
    each tensor whose rows do not fit the mix's type, and where ids would differ."""
    if mix not in MIXES:
        raise UserError(f"unknown type {mix!r}: choose one of {', '.join(MIXES)}")
    folder = Path(folder)
    model = Transformer.from_pretrained(folder)  # its tensors stay in their file until used
    config = model.config
    if model.quantization:
        method = model.quantization["quant_method"]
        raise UserError(f"{folder} is quantized already ({method}); start from the original model")
    tok = Tokenizer.load(folder)
    with naming(folder):
        meta = shape_metadata(config) | tokenizer_metadata(tok, config)
    meta["general.name"] = model_name(folder)
    for key, name in SAMPLING_NAMES.items():
        meta[key] = config.generation.get(name)
    meta["general.file_type"] = MIXES[mix]
    meta["general.quantization_version"] = 2
    plan = []
    for name, parts in by_gguf_name(model.state_dict(), config).items():
        plan.append(plan_tensor(name, list(parts.values()), mix, config))
    if config.rope.get("rope_type") == "llama3":
        freqs = slowed_down(config.head_dim, config.rope)
        plan.append(PlannedTensor("rope_freqs.weight", "F32", freqs.shape, freqs.numpy))
    said = {key: value for key, value in meta.items() if value is not None}
    write_container(path, said, plan)


def plan_tensor(name, parts, mix, config):
    """Tensors that lie end to end in the file -> PlannedTensor; they are read when it is made."""
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    wanted = type_in_mix(name, shape, mix, config)
    kind = type_that_fits(wanted, shape[-1])
    if kind != wanted:
        block = BLOCK_TYPES[wanted].block
        warn(f"{name}: rows of {shape[-1]} do not divide by {block}, so {wanted} becomes {kind}")

    def make():
        tensor = torch.cat([part.float() for part in parts])
        most = torch.linalg.vector_norm(tensor, ord=math.inf).item()
        limit = math.inf if kind in ("F32", "BF16") else 65504
        if not most < limit:  # nan is not
            raise UserError(f"{name} has values up to {most}, which {kind} cannot hold")
        rows = reorder_rows(tensor.view(len(tensor), -1), name, config)
        return encode_rows(rows, kind).numpy()

    return PlannedTensor(name, kind, shape, make)


def read_gguf(path):
    """GGUF file -> (Config, {our name: GGUFTensor}, Tokenizer or None), completeness checked.

    UserError, in bounded time and memory, for whatever is wrong with the file."""
    with naming(Path(path)):
        meta, tensors = open_parts(path)
        meta = {key: value for key, value in meta.items() if not names_no_token(key, value)}
        config = read_config(meta, tensors)
        get = metadata_reader(meta, "tokenizer.")
        tok = read_vocabulary(get)
        state = by_our_names(tensors, config)
        ends = [get(f"ggml.{key}", int, config.vocab_size) for key in END_KEYS]
        for key, name in SAMPLING_NAMES.items():
            if key in meta:
                config.generation[name] = read_value(meta, "metadata", key, SAMPLING_KEYS[name])
    asked = {key for key in meta if key.startswith("general.sampling.")}
    warn_of_unknown(asked - SAMPLING_NAMES.keys(), path)
    ends = [i for i in ends if i < config.vocab_size]
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    config.bos_token_id = tok.bos_id if tok else None
    return config, state, tok


def names_no_token(key, value):
    """Whether a key of a token's id says that there is none: -1, also where it has no sign."""
    return key.endswith("_token_id") and value in (-1, (1 << 32) - 1)


def by_our_names(tensors, config):
    """{GGUF name: tensor} -> {our name: tensor}, rows in our order. UserError for what is amiss."""
    with torch.device("meta"):
        expected = by_gguf_name(Transformer(config).state_dict(), config)
    shapes = {n: tuple(torch.cat([*parts.values()]).shape) for n, parts in expected.items()}
    compare_shapes(shapes, {name: tensor.shape for name, tensor in tensors.items()})
    state = {}
    for name, parts in expected.items():
        kind = tensors[name].type
        data = reorder_rows(tensors[name].data, name, config, back=True)
        for ours, rows in zip(parts, data.split(list(map(len, parts.values())))):
            state[ours] = GGUFTensor(kind, tuple(parts[ours].shape), rows)
    return state


def load(path, device="cpu", dtype=torch.float32, keep_packed=False):
    """GGUF file -> (Transformer, Tokenizer or None), its floats of dtype.

    keep_packed: linear layers of a block type become PackedLinear, and tensors of 16 bits keep
    their type; any other tensor becomes dtype."""
    config, state, tok = read_gguf(path)
    with torch.device("meta"):
        model = Transformer(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    if keep_packed:
        install_packed_linears(model, state)
    own = FLOATS | {"F32": dtype} if keep_packed else {}
    floats = {name: t.dequantize(own.get(t.type, dtype)) for name, t in state.items()}
    model.load_state_dict(floats, strict=False, assign=True)
    if isinstance(model.lm_head, torch.nn.Linear):
        model.tie()
    return model.to(device).eval(), tok


def install_packed_linears(model, state):
    """Linear layers of a block type become PackedLinear, and their weights leave `state`."""
    for name, layer in list(model.named_modules()):
        key = f"{name}.weight"
        if not isinstance(layer, torch.nn.Linear) or BLOCK_TYPES[state[key].type].dtype:
            continue
        model.set_submodule(name, PackedLinear(state.pop(key), layer.bias))
        model.quantization = {"quant_method": "gguf"}


# ---- The commands.


@dataclass
class Args:
    model: str = ""  # the model folder, or "show"
    file: str = "-"  # the .gguf, behind "show" alone
    type: str = "q8_0"  # f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m, q6_k
    out: str = ""  # the file to write, .gguf or not [MODEL-TYPE.gguf]


def gguf_path(out):
    """--out with .gguf at its end, which is put there where it is missing."""
    out = Path(out)
    if out.name in ("", ".."):  # a folder, whose own name it is then
        out = out.resolve()
    return out if out.suffix == ".gguf" else out.with_name(out.name + ".gguf")


def export(folder, out, mix):
    """Model folder -> OUT or OUT.gguf; what was written is said, read back and verified."""
    out = gguf_path(out)
    write(folder, out, mix)
    print(f"{out}: {out.stat().st_size:,} bytes")
    source = Transformer.from_pretrained(folder), Tokenizer.load(folder)
    verify(out, mix, source, load(out, keep_packed=True))


def show_gguf(path):
    """Print metadata and tensors, cut short."""
    with naming(Path(path)):
        meta, tensors = open_gguf(path)
    for key, value in meta.items():
        print(printable(key), repr(value)[:80])
    for name, tensor in tensors.items():
        bits = 8 * tensor.data.numel() / math.prod(tensor.shape)
        print(f"{printable(name)} {tensor.type} {tensor.shape} {bits:.2f} bits a weight")


def main():
    typed = parse_flags(Args, __doc__, positional=("model", "file"))
    args = Args(**typed)
    shows = args.model == "show"
    if shows != ("file" in typed) or (shows and len(typed) > 2):
        raise UserError("name a model folder, with --type and --out, or show and a .gguf alone")
    if shows:
        return show_gguf(args.file)
    beside = Path(args.model).parent / f"{model_name(args.model)}-{args.type}"
    export(args.model, args.out or beside, args.type)


if __name__ == "__main__":
    cli(main)
