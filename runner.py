"""The Runner: computes one batch of tokens from many sequences over the paged cache; the lean forward pass of the engine.

The model's projections are fused (q, k, v in one product, gate and up in another) and packed for the device; tokens of all
sequences lie in one flat row, so a product never sees padding. model.py's forward, which has neither, defines the result.
"""
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    norm1: nn.Module
    qkv: object             # (T, C) -> (T, (H + 2K) * D)
    q_norm: object
    k_norm: object
    out: object             # (T, H * D) -> (T, C)
    norm2: nn.Module
    up: object              # (T, C) -> (T, 2M), gate and up; GPT-2: (T, M)
    down: object            # (T, M) -> (T, C)
    window: int | None


def fuse(linears):
    """Several nn.Linear over the same input -> one; the parts' weights become views of its rows, so nothing is held twice."""
    if len(linears) == 1:
        return linears[0]
    fused = nn.Linear(1, 1, bias=linears[0].bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat([m.weight.data for m in linears]), requires_grad=False)
    if fused.bias is not None:
        fused.bias = nn.Parameter(torch.cat([m.bias.data for m in linears]), requires_grad=False)
    for m, part in zip(linears, fused.weight.data.split([m.weight.size(0) for m in linears])):
        m.weight = nn.Parameter(part, requires_grad=False)
    return fused


def pack(linear, kind):
    """nn.Linear -> function of (T, K) float32 -> (T, N) float32 with weights packed for the CPU."""
    w, b = linear.weight.data, None if linear.bias is None else linear.bias.data
    if kind == "int8":
        scale = (w.abs().amax(1) / 127).clamp(min=1e-12)
        q = torch.quantize_per_channel(w, scale, torch.zeros(len(w), dtype=torch.long), 0, torch.qint8)
        packed, op = torch.ops.quantized.linear_prepack(q, b), torch.ops.quantized.linear_dynamic.default
        return lambda x: op(x, packed)
    if kind == "16":
        packed, op = torch.ops.quantized.linear_prepack_fp16(w, b), torch.ops.quantized.linear_dynamic_fp16.default
        return lambda x: op(x, packed)
    return lambda x: F.linear(x, w, b)


class Runner:
    """A model with its cache. Call it with a Batch -> logits (rows, V) float32, or None where no row is wanted."""

    def __init__(self, model, runtime, quant=None, kv_dtype="auto", block_size=16, compile=False, adapters=None):
        c = self.config = model.config
        self.device, self.block_size, self.model = runtime.device, block_size, model
        self.H, self.K, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.kv_dtype = torch.float32 if self.device.type == "cpu" else runtime.dtype
        kind = quant or ("16" if self.device.type == "cpu" and runtime.dtype != torch.float32 else None)
        self.layers = []
        for i, block in enumerate(model.layers):
            a, m = block.self_attn, block.mlp
            qkv, up = fuse([a.q_proj, a.k_proj, a.v_proj]), fuse([m.up_proj] if c.is_gpt2 else [m.gate_proj, m.up_proj])
            self.layers.append(Layer(block.input_layernorm, pack(qkv, kind), getattr(a, "q_norm", None), getattr(a, "k_norm", None),
                                     pack(a.o_proj, kind), block.post_attention_layernorm, pack(up, kind), pack(m.down_proj, kind),
                                     c.sliding_window if i in c.sliding_layers else None))
        self.head = pack(model.lm_head, kind)
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
        shape = (2, self.K, blocks * self.block_size, self.D)  # keys and values; a head's tokens lie next to each other
        self.cache = [torch.zeros(shape, dtype=self.kv_dtype, device=self.device) for _ in self.layers]

    def copy_blocks(self, pairs):
        """Copy whole blocks: [(from, to)]."""
        source, target = (torch.tensor(side)[:, None] * self.block_size + torch.arange(self.block_size) for side in zip(*pairs))
        for cache in self.cache:
            cache[:, :, target.view(-1)] = cache[:, :, source.view(-1)]

    def spans(self, batch):
        """What attention needs to know of each sequence, found once for all layers: (tokens, where its keys are, masks)."""
        out = []
        for start, n, past, blocks in batch.spans:
            length = past + n
            used = blocks[:-(-length // self.block_size)]
            if used == list(range(used[0], used[0] + len(used))):  # one run: a view
                where = slice(used[0] * self.block_size, used[0] * self.block_size + length)
            else:
                where = (torch.tensor(used)[:, None] * self.block_size + torch.arange(self.block_size)).view(-1)[:length]
            full = sliding = None
            if n > 1:
                gap = torch.arange(past, length)[:, None] - torch.arange(length)
                full = gap >= 0
                sliding = full & (gap < self.config.sliding_window) if self.config.sliding_layers else None
            out.append((start, n, length, where, full, sliding))
        return out

    def __call__(self, batch):
        spans, slots = self.spans(batch), torch.tensor(batch.slots)
        positions = torch.tensor(batch.positions)
        x = F.embedding(torch.tensor(batch.ids), self.model.embed_tokens.weight)  # (T, C)
        rope = None
        if self.config.is_gpt2:
            x = x + F.embedding(positions, self.model.embed_positions.weight)
        else:
            rope = self.cos[positions], self.sin[positions]  # (T, 1, D)
        H, K, D = self.H, self.K, self.D
        for layer, cache in zip(self.layers, self.cache):
            qkv = layer.qkv(layer.norm1(x)).view(-1, H + 2 * K, D)
            q, k, v = qkv.split((H, K, K), 1)  # (T, H, D), (T, K, D), (T, K, D)
            if layer.q_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            if rope is not None:
                q, k = rotated(q, *rope), rotated(k, *rope)
            cache.index_copy_(2, slots, torch.stack((k, v)).transpose(1, 2).to(cache.dtype))  # (2, K, T, D)
            x = x + layer.out(self.attend(q, cache, spans, layer.window))
            h = layer.up(layer.norm2(x))
            if self.config.is_gpt2:
                h = F.gelu(h, approximate="tanh")
            else:
                gate, up = h.chunk(2, -1)
                h = F.silu(gate) * up
            x = x + layer.down(h)
        if not batch.rows:
            return None
        if len(batch.rows) < len(batch.ids):
            x = x[torch.tensor(batch.rows)]
        return self.head(self.model.norm(x)).float()

    def attend(self, q, cache, spans, window):
        """q (T, H, D) over each sequence's own keys and values -> (T, H * D)."""
        H, K, D, outs = self.H, self.K, self.D, []
        for start, n, length, where, full, sliding in spans:
            if n == 1 and window and length > window:
                where = slice(where.start + length - window, where.stop) if isinstance(where, slice) else where[-window:]
            kv = cache[:, :, where] if isinstance(where, slice) else cache.index_select(2, where)  # (2, K, length, D)
            k, v = kv.to(q.dtype).unsqueeze(1)  # (1, K, length, D) each
            if n == 1:  # the heads that share a key are the rows of one small product
                y = F.scaled_dot_product_attention(q[start].view(1, K, H // K, D), k, v)
                outs.append(y.view(1, H * D))
            else:
                mask = sliding if window and length > window else full
                y = F.scaled_dot_product_attention(q[start:start + n].transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=H != K)
                outs.append(y[0].transpose(0, 1).reshape(n, H * D))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def rotated(x, cos, sin):
    """model.rotate with the signs in the sine: x (T, h, D); cos, sin (T, 1, D)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


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
