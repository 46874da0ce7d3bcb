"""The Runner: computes one batch of tokens from many sequences over the paged cache; the lean forward pass of the engine.

The model's projections are fused (q, k, v in one product, gate and up in another) and packed for the device; tokens of all
sequences lie in one flat row, so a product never sees padding. model.py's forward, which has neither, defines the result.
"""
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import quant
from common import UserError
from model import Transformer
from runtime import free_memory, resolve
from tokenizer import Tokenizer


def load_model(folder, device="auto", dtype="auto"):
    """A model folder -> (Transformer, Tokenizer or None, Runtime). On the CPU weights arrive in float32, to be packed."""
    runtime = resolve(device, dtype, "off")
    folder = Path(folder)
    model = Transformer.from_pretrained(folder, runtime.device, torch.float32 if runtime.device.type == "cpu" else runtime.dtype)
    found = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.bpe", "tekken.json"))
    tok = Tokenizer.load(folder) if found else None
    if tok and tok.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tok.vocab_size:,} ids, the model only {model.config.vocab_size:,}")
    return model, tok, runtime


@dataclass
class Batch:
    """The tokens of one step, flat: those of one sequence next to each other."""
    block_size: int
    ids: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    slots: list = field(default_factory=list)       # where in the cache each token's key and value go: block * size + offset
    rows: list = field(default_factory=list)        # the tokens whose logits are wanted
    spans: list = field(default_factory=list)       # of each sequence: (first token, tokens, tokens before them, blocks)
    adapters: list = field(default_factory=list)    # LoRA adapter of each token, -1 is none

    def add(self, blocks, ids, past, rows, adapter=-1):
        """ids are the tokens at positions past, past + 1, ...; rows count from the first of them."""
        size, start = self.block_size, len(self.ids)
        self.spans.append((start, len(ids), past, blocks))
        self.rows += [start + r for r in rows]
        self.ids += ids
        self.adapters += [adapter] * len(ids)
        positions = range(past, past + len(ids))
        self.positions += positions
        self.slots += [blocks[p // size] * size + p % size for p in positions]


@dataclass
class Layer:
    """What one block of the Transformer computes with, fused and packed."""
    norm1: object           # (T, C) -> (T, C)
    qkv: object             # (T, C) -> (T, (H + 2K) * D)
    qk_norm: object         # (T, H + K, D) -> the same, or None
    out: object             # (T, H * D) -> (T, C)
    norm2: object
    up: object              # (T, C) -> (T, 2M), gate and up; GPT-2: (T, M)
    down: object            # (T, M) -> (T, C)
    window: int | None


# ------------------------------------------------------------------------------------------------- weights, fused and packed
def fuse(linears):
    """Several layers over the same input -> one. Of float ones the parts' weights become views of it: nothing is held twice."""
    if len(linears) == 1:
        return linears[0]
    if isinstance(linears[0], quant.QuantLinear):
        return quant.fuse(linears)
    fused = nn.Linear(1, 1, bias=linears[0].bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat([m.weight.data for m in linears]), requires_grad=False)
    if fused.bias is not None:
        fused.bias = nn.Parameter(torch.cat([m.bias.data for m in linears]), requires_grad=False)
    for m, part in zip(linears, fused.weight.data.split([m.weight.size(0) for m in linears])):
        m.weight = nn.Parameter(part, requires_grad=False)
    return fused


def pack(linear, kind):
    """A linear layer -> function of (T, K) to (T, N). On the CPU both are float32, and one operator call is all there is.

    kind: None as it is, "16" for 16-bit weights (FBGEMM multiplies in float32), "int8" for 8-bit weights and activations, "int4".
    """
    if kind == "int8" and isinstance(linear, nn.Linear):
        linear = quant.Int8Linear.from_linear(linear, dynamic=True)
    elif kind == "int4" and isinstance(linear, nn.Linear):
        group = next(g for g in (64, 32) if linear.weight.size(1) % g == 0)
        linear = quant.GroupLinear.from_linear(linear, 4, group)
    bias = linear.bias if linear.bias is None else linear.bias.data
    if isinstance(linear, nn.Linear):
        weight = linear.weight.data
        if kind == "16" and weight.device.type == "cpu":
            packed, op = torch.ops.quantized.linear_prepack_fp16(weight, bias), torch.ops.quantized.linear_dynamic_fp16.default
            return lambda x: op(x, packed)
        return lambda x: F.linear(x, weight, bias)
    if isinstance(linear, quant.Int8Linear) and linear.dynamic and linear.codes.device.type == "cpu":
        return pack_int8(linear, bias)
    return linear.product


def pack_int8(layer, bias):
    """FBGEMM's int8 product: the fastest that torch has from one row to hundreds. It rounds activations with one scale for the
    whole batch, so rows are brought to the same magnitude first: then no row's rounding is at the mercy of its neighbours."""
    with warnings.catch_warnings(action="ignore"):  # torch is moving these types to torchao
        weight = torch._make_per_channel_quantized_tensor(layer.codes, layer.scale.double(), torch.zeros(len(layer.scale)).long(), 0)
    packed, op = torch.ops.quantized.linear_prepack(weight, None), torch.ops.quantized.linear_dynamic.default
    alone = packed if bias is None else torch.ops.quantized.linear_prepack(weight, bias)

    def product(x):
        if x.size(0) == 1:
            return op(x, alone)
        top = x.abs().amax(-1, True).clamp_(min=1e-30)
        y = op(x / top, packed).mul_(top)
        return y if bias is None else y.add_(bias)
    return product


def pack_norm(norm, config):
    """LayerNorm or RMSNorm as a function of (..., C). RMSNorm in four small operators where torch's takes six:
    x / sqrt(|x|^2 / C + eps) = sqrt(C) x / hypot(|x|, sqrt(C eps))."""
    if config.is_gpt2:
        return norm
    C = norm.weight.numel()
    gain, floor = norm.weight.data * C ** 0.5, torch.tensor((C * norm.eps) ** 0.5, device=norm.weight.device)
    if norm.weight.device.type != "cpu":
        return norm
    return lambda x: (x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), floor)).mul_(gain)


class Runner:
    """A model with its cache. Call it with a Batch -> logits (rows, V) float32, or None where no row is wanted."""

    def __init__(self, model, runtime, kind=None, kv_dtype="auto", block_size=16, compile=False, adapters=None):
        c = self.config = model.config
        self.device, self.block_size, self.model = runtime.device, block_size, model
        self.H, self.K, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.kv_dtype = torch.float32 if self.device.type == "cpu" else runtime.dtype
        kind = kind or ("16" if self.device.type == "cpu" and runtime.dtype != torch.float32 else None)
        self.layers = []
        for i, block in enumerate(model.layers):
            a, m = block.self_attn, block.mlp
            qk_norm = None
            if hasattr(a, "q_norm"):  # each head over its own D channels, the gain by whether it is a query's or a key's
                joint = nn.RMSNorm(self.D, eps=c.norm_eps)
                joint.weight = nn.Parameter(torch.stack([a.q_norm.weight] * self.H + [a.k_norm.weight] * self.K), False)
                qk_norm = pack_norm(joint, c)
            qkv, up = fuse([a.q_proj, a.k_proj, a.v_proj]), fuse([m.up_proj] if c.is_gpt2 else [m.gate_proj, m.up_proj])
            self.layers.append(Layer(pack_norm(block.input_layernorm, c), pack(qkv, kind), qk_norm, pack(a.o_proj, kind),
                                     pack_norm(block.post_attention_layernorm, c), pack(up, kind), pack(m.down_proj, kind),
                                     c.sliding_window if i in c.sliding_layers else None))
        self.head, self.norm = pack(model.lm_head, kind), pack_norm(model.norm, c)
        if not c.is_gpt2:
            angle = torch.arange(c.max_position_embeddings, device=self.device)[:, None].float() * model.rope_frequency
            cos, sin = (angle.cos() * model.rope_scale)[:, None], (angle.sin() * model.rope_scale)[:, None]  # (P, 1, D/2)
            self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (P, 1, D)

    def adapter_row(self, adapter):
        if adapter is None:
            return -1
        raise UserError(f"adapter {adapter!r} is not loaded")

    @property
    def bytes_per_token(self):
        return self.config.kv_bytes_per_token(self.kv_dtype.itemsize)

    def allocate(self, blocks):
        shape = (len(self.layers), blocks * self.block_size, 2 * self.K, self.D)  # a token's keys, then its values
        self.cache = torch.zeros(shape, dtype=self.kv_dtype, device=self.device)

    def copy_blocks(self, pairs):
        """Copy whole blocks: [(from, to)]."""
        source, target = (self.slots_of(side, len(side) * self.block_size) for side in zip(*pairs))
        self.cache[:, target] = self.cache[:, source]

    def slots_of(self, blocks, tokens):
        """The cache slots of the first `tokens` tokens in these blocks -> (tokens,) int64, or a slice if they are one run."""
        first, size = blocks[0] * self.block_size, self.block_size
        if list(blocks) == list(range(blocks[0], blocks[0] + len(blocks))):
            return slice(first, first + tokens)
        return (torch.tensor(blocks)[:, None] * size + torch.arange(size)).view(-1)[:tokens]

    def spans(self, batch):
        """What attention needs to know of each sequence, found once for all layers:
        (first token, tokens, context, keys and values of all layers as views or where they are, masks of full and sliding layers)."""
        out = []
        for start, n, past, blocks in batch.spans:
            length = past + n
            where, full, sliding = self.slots_of(blocks[:-(-length // self.block_size)], length), None, None
            if isinstance(where, slice) and self.cache.dtype == torch.float32:
                kv = self.cache[:, where].view(-1, length, 2, 1, self.K, self.D).permute(2, 0, 3, 4, 1, 5)  # (2, layers, 1, K, L, D)
                where = list(zip(*(half.unbind(0) for half in kv)))
            if n > 1:
                gap = torch.arange(past, length)[:, None] - torch.arange(length)
                full = gap >= 0
                sliding = full & (gap < self.config.sliding_window) if self.config.sliding_layers else None
            out.append((start, n, length, where, full, sliding))
        return out

    def __call__(self, batch):
        spans, slots, positions = self.spans(batch), torch.tensor(batch.slots), torch.tensor(batch.positions)
        H, K, D, T = self.H, self.K, self.D, len(batch.ids)
        x = F.embedding(torch.tensor(batch.ids), self.model.embed_tokens.weight)  # (T, C)
        if self.config.is_gpt2:
            x = x + F.embedding(positions, self.model.embed_positions.weight)
        else:
            cos, sin = self.cos[positions], self.sin[positions]  # (T, 1, D)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm1(x)).view(T, H + 2 * K, D)
            qk = qkv[:, :H + K]  # queries and keys are treated alike
            if layer.qk_norm is not None:
                qk = layer.qk_norm(qk)
            if not self.config.is_gpt2:  # model.rotate, with the signs in the sine
                qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
            kv = torch.cat((qk[:, H:], qkv[:, H + K:]), 1)  # (T, 2K, D)
            self.cache[i].index_copy_(0, slots, kv.to(self.kv_dtype))
            x += layer.out(self.attend(qk, i, spans, layer.window))
            h = layer.up(layer.norm2(x))
            if self.config.is_gpt2:
                h = F.gelu(h, approximate="tanh")
            else:
                gate, up = h.chunk(2, -1)
                h = F.silu(gate).mul_(up)
            x += layer.down(h)
        if not batch.rows:
            return None
        if len(batch.rows) < T:
            x = x[torch.tensor(batch.rows)]
        return self.head(self.norm(x)).float()

    def attend(self, qk, i, spans, window):
        """Queries qk[:, :H] (T, H + K, D) over each sequence's own keys and values in layer i -> (T, H * D)."""
        H, K, D, outs = self.H, self.K, self.D, []
        q = qk[:, :H]
        single = q.view(-1, 1, K, H // K, D).unbind(0)  # of one token: the heads that share a key are rows of one product
        for start, n, length, where, full, sliding in spans:
            if isinstance(where, list):
                k, v = where[i]
            else:
                k, v = self.cache[i][where].to(qk.dtype).view(length, 2, 1, K, D).permute(1, 2, 3, 0, 4)  # (1, K, length, D)
            if n == 1:
                if window and length > window:
                    k, v = k[:, :, -window:], v[:, :, -window:]
                outs.append(F.scaled_dot_product_attention(single[start], k, v).view(1, H * D))
            else:
                mask = sliding if window and length > window else full
                y = F.scaled_dot_product_attention(q[start:start + n].transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=H != K)
                outs.append(y[0].transpose(0, 1).reshape(n, H * D))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def pool_size(runners, kv_tokens, block_size, max_seqs, max_len):
    """How many blocks to make: as asked, or for max_seqs answers of full length as far as half of the free memory goes."""
    free, per_block = free_memory(runners[0].device), sum(r.bytes_per_token for r in runners) * block_size
    fits = int(free * (0.9 if runners[0].device.type == "cuda" else 0.5)) // per_block if free else 4096
    if kv_tokens is None:
        blocks = min(fits, max_seqs * -(-max_len // block_size))
    else:
        blocks = -(-kv_tokens // block_size)
    if blocks < 1 or (free and blocks * per_block > free):
        raise UserError(f"a cache of {blocks:,} blocks of {block_size} tokens needs {blocks * per_block / 2**30:.2f} GiB, and "
                        f"{free / 2**30:.2f} GiB are free: at most {fits:,} blocks fit; lower --kv-tokens to {fits * block_size:,}")
    weights = sum(p.numel() * p.element_size() for r in runners for p in r.model.parameters())
    print(f"cache    weights {weights / 2**20:,.0f} MiB + keys and values {blocks * per_block / 2**20:,.0f} MiB = {blocks:,} blocks of "
          f"{block_size} = {blocks * block_size:,} tokens")
    return blocks
