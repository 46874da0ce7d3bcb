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

import gguf
import kernels
import packed
from common import UserError
from model import Transformer
from packed import GroupLinear, Int8Linear, QuantLinear
from runtime import DTYPES, free_memory, resolve
from tokenizer import Tokenizer


def load_model(folder, device="auto", dtype="auto"):
    """A model folder or .gguf file -> (Transformer, Tokenizer or None, Runtime).

    On the CPU weights arrive in float32, to be packed."""
    runtime, folder = resolve(device, dtype, "off"), Path(folder)
    weights = torch.float32 if runtime.device.type == "cpu" else runtime.dtype
    if folder.suffix == ".gguf":
        config, state, tok = gguf.read(folder, weights)
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(state, strict=False, assign=True)
        model.tie()
        model = model.to(runtime.device).eval()
    else:
        model = Transformer.from_pretrained(folder, runtime.device, weights)
        found = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.bpe", "tekken.json"))
        tok = Tokenizer.load(folder) if found else None
    if tok and tok.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tok.vocab_size:,} ids, the model only {model.config.vocab_size:,}")
    return model, tok, runtime


GATHERED = 1 << 14  # floats of keys up to which the CPU gathers a sequence's context for one product with others


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
        if len(ids) == 1:  # decoding: the usual case, thousands of times a second
            self.ids.append(ids[0])
            self.adapters.append(adapter)
            self.positions.append(past)
            self.slots.append(blocks[past // size] * size + past % size)
            self.rows += [start] if rows else ()
            return
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
    if isinstance(linears[0], QuantLinear):
        return packed.fuse(linears)
    fused = nn.Linear(1, 1, bias=linears[0].bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat([m.weight.data for m in linears]), requires_grad=False)
    if fused.bias is not None:
        fused.bias = nn.Parameter(torch.cat([m.bias.data for m in linears]), requires_grad=False)
    for m, part in zip(linears, fused.weight.data.split([m.weight.size(0) for m in linears])):
        m.weight = nn.Parameter(part, requires_grad=False)
    return fused


def pack(linears, kind):
    """Layers over the same input -> one function of (T, K) to (T, N). On the CPU both are float32, and an operator call is all
    there is. kind: None as they are, "16" 16-bit weights multiplied in float32 (FBGEMM), "int8" weights and activations, "int4"."""
    if any(hasattr(m, "adapters") for m in linears):  # lora.LoRALinear: each with adapters of its own
        return linears[0] if len(linears) == 1 else lambda x: torch.cat([m(x) for m in linears], -1)
    kinds = {type(m) for m in linears}
    if len(kinds) > 1 or (kinds != {nn.Linear} and len({getattr(m, "group", 0) for m in linears}) > 1):
        parts = [pack([m], kind) for m in linears]
        return lambda x: torch.cat([part(x) for part in parts], -1)
    linear = fuse(linears)
    if isinstance(linear, nn.Linear) and kind == "int8":
        linear = Int8Linear.from_linear(linear, dynamic=linear.weight.device.type == "cpu")
    elif isinstance(linear, nn.Linear) and kind == "int4":
        K = linear.weight.size(1)
        linear = GroupLinear.from_linear(linear, 4, next((g for g in (64, 32) if K % g == 0), 64))
    if isinstance(linear, Int8Linear) and linear.dynamic and linear.codes.device.type == "cpu":
        return pack_int8(linear)
    if isinstance(linear, GroupLinear) and linear.packed.device.type == "cpu":
        return pack_int4(linear)
    if not isinstance(linear, nn.Linear):
        linear.prepare()
        return linear.product
    weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
    if kind == "16" and weight.device.type == "cpu":
        fp16, op = torch.ops.quantized.linear_prepack_fp16(weight, bias), torch.ops.quantized.linear_dynamic_fp16.default
        return lambda x: op(x, fp16)
    return lambda x: F.linear(x, weight, bias)


def pack_int8(layer):
    """FBGEMM's int8 product: the fastest that torch has from one row to hundreds. It rounds activations with one scale for the
    whole batch, so rows are brought to the same magnitude first: then no row's rounding is at the mercy of its neighbours."""
    bias = layer.bias if layer.bias is None else layer.bias.data
    with warnings.catch_warnings(action="ignore"):  # torch is moving these types to torchao
        zeros = torch.zeros(len(layer.scale), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(layer.codes, layer.scale.double(), zeros, 0)
    plain, op = torch.ops.quantized.linear_prepack(weight, None), torch.ops.quantized.linear_dynamic.default
    alone = plain if bias is None else torch.ops.quantized.linear_prepack(weight, bias)

    def product(x):
        if x.size(0) == 1:
            return op(x, alone)
        top = x.abs().amax(-1, True).clamp_(min=1e-30)
        y = op(x / top, plain).mul_(top)
        return y if bias is None else y.add_(bias)
    return product


def pack_int4(layer):
    """GroupLinear.product without what only other shapes and orders need: for few rows three operators."""
    layer.prepare()
    N, K = layer.out_features, layer.in_features
    if not layer.fast or layer.order is not None or layer.bias is not None or N % 16 or K % layer.group:
        return layer.product
    codes, scales, step = layer.fast
    op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    return lambda x: op(x.bfloat16(), codes, step, scales).float() if x.size(0) <= packed.FEW_ROWS else layer.product(x)


def pack_norm(norm, config):
    """LayerNorm or RMSNorm as a function of (..., C). RMSNorm in four small operators where torch's takes six:
    x / sqrt(|x|^2 / C + eps) = sqrt(C) x / hypot(|x|, sqrt(C eps))."""
    if config.is_gpt2:
        return norm
    C = norm.weight.size(-1)
    gain, floor = norm.weight.data * C ** 0.5, torch.tensor((C * norm.eps) ** 0.5, device=norm.weight.device)
    if norm.weight.device.type != "cpu":
        return norm
    return lambda x: (x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), floor)).mul_(gain)


class Runner:
    """A model with its cache. Call it with a Batch -> logits (rows, V) float32, or None where no row is wanted."""

    def __init__(self, model, runtime, kind=None, kv_dtype="auto", block_size=16, adapters=None):
        c = self.config = model.config
        self.device, self.block_size, self.model = runtime.device, block_size, model
        self.H, self.K, self.D, self.max_len = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.max_position_embeddings
        on_cpu = self.device.type == "cpu"
        kinds = {"auto": torch.float32 if on_cpu else runtime.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn} | DTYPES
        if kv_dtype not in kinds:
            raise UserError(f"--kv-dtype {kv_dtype}: use {', '.join(kinds)}")
        self.kv_dtype, self.names = kinds[kv_dtype], list(adapters or {})
        if adapters:
            from lora import load_adapter, model_adapter_rows  # only here: they bring the training scripts along
            for name, folder in adapters.items():
                load_adapter(model, folder, name)
            self.choose_adapters = model_adapter_rows
        if kind not in (None, "int8", "int4"):
            raise UserError(f"--quant {kind}: use int8 or int4")
        if kind and model.quantization:
            raise UserError(f"--quant {kind}: this folder's weights are packed already; leave --quant out")
        kind = kind or ("16" if on_cpu and runtime.dtype != torch.float32 else None)
        self.layers = [self.fused_layer(i, block, kind) for i, block in enumerate(model.layers)]
        self.head, self.norm, self.graphs = pack([model.lm_head], kind), pack_norm(model.norm, c), {}
        if not c.is_gpt2:
            angle = torch.arange(self.max_len, device=self.device)[:, None].float() * model.rope_frequency
            cos, sin = (angle.cos() * model.rope_scale)[:, None], (angle.sin() * model.rope_scale)[:, None]  # (P, 1, D/2)
            dtype = model.embed_tokens.weight.dtype
            self.cos, self.sin = torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)  # (P, 1, D)

    def fused_layer(self, i, block, kind):
        c, a, m, qk_norm = self.config, block.self_attn, block.mlp, None
        if hasattr(a, "q_norm"):  # each head over its own D channels, the gain by whether it is a query's or a key's
            qk_norm = nn.RMSNorm(self.D, eps=c.norm_eps)
            qk_norm.weight = nn.Parameter(torch.stack([a.q_norm.weight] * self.H + [a.k_norm.weight] * self.K), False)
            qk_norm = pack_norm(qk_norm, c)
        up = [m.up_proj] if c.is_gpt2 else [m.gate_proj, m.up_proj]
        return Layer(pack_norm(block.input_layernorm, c), pack([a.q_proj, a.k_proj, a.v_proj], kind), qk_norm,
                     pack([a.o_proj], kind), pack_norm(block.post_attention_layernorm, c), pack(up, kind),
                     pack([m.down_proj], kind), c.sliding_window if i in c.sliding_layers else None)

    def adapter_row(self, adapter):
        if adapter is not None and adapter not in self.names:
            raise UserError(f"adapter {adapter!r} is not loaded; loaded are {', '.join(self.names) or 'none'}")
        return -1 if adapter is None else self.names.index(adapter)

    # -- the cache
    @property
    def bytes_per_token(self):
        scales = 2 * 4 * len(self.layers) * self.K if self.kv_dtype.itemsize == 1 else 0
        return self.config.kv_bytes_per_token(self.kv_dtype.itemsize) + scales

    def allocate(self, blocks):
        """Make room for keys and values: (layers, blocks, block_size, K, D) each; 8-bit ones with a scale a token and head."""
        shape = (len(self.layers), blocks, self.block_size, self.K)
        self.keys, self.values = (torch.zeros(*shape, self.D, dtype=self.kv_dtype, device=self.device) for _ in range(2))
        small = self.kv_dtype.itemsize == 1
        self.scales = torch.zeros(2, *shape, device=self.device) if small else [[None] * len(self.layers)] * 2
        self.flat = [[t.flatten(0, 1) for t in cache] for cache in (self.keys, self.values)]  # of each layer (slots, K, D)
        self.graphs = {}

    def copy_blocks(self, pairs):
        """Copy whole blocks: [(from, to)]."""
        source, target = (torch.tensor(side, device=self.device) for side in zip(*pairs))
        for cache in (self.keys, self.values, *(self.scales if isinstance(self.scales, torch.Tensor) else ())):
            cache[:, target] = cache[:, source]

    # -- one step
    def __call__(self, batch):
        if self.device.type == "cuda":
            return self.on_gpu(batch)
        slots, many = torch.tensor(batch.slots), self.many(batch.spans)
        spans = [self.span(*s) for s in batch.spans[many[0] if many else 0:]]

        def attend(i, q, k, v, window):
            if self.kv_dtype == torch.float32:
                self.flat[0][i].index_copy_(0, slots, k)
                self.flat[1][i].index_copy_(0, slots, v)
            else:
                kernels.kv_store(k, v, self.keys[i], self.values[i], slots, self.scales[0][i], self.scales[1][i])
            return self.attend(i, q, spans, window, many)
        rows = torch.tensor(batch.rows) if len(batch.rows) < len(batch.ids) else None
        return self.forward(torch.tensor(batch.ids), torch.tensor(batch.positions), batch.adapters and torch.tensor(batch.adapters),
                            rows, attend)

    def forward(self, ids, positions, adapters, rows, attend):
        """ids, positions, adapters (T,); rows (R,), None for all -> logits (R, V). attend(layer, q, k, v, window) -> (T, H * D)
        stores k and v (T, K, D) and lets q (T, H, D) look at all that its sequence has."""
        H, K, D, T = self.H, self.K, self.D, len(ids)
        if self.names:
            self.choose_adapters(self.model, adapters)
        x = F.embedding(ids, self.model.embed_tokens.weight)  # (T, C)
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
            x += layer.out(attend(i, qk[:, :H], qk[:, H:], qkv[:, H + K:], layer.window))
            h = layer.up(layer.norm2(x))
            if self.config.is_gpt2:
                h = F.gelu(h, approximate="tanh")
            else:
                gate, up = h.chunk(2, -1)
                h = F.silu(gate).mul_(up)
            x += layer.down(h)
        if rows is not None:
            if not len(rows):
                return None
            x = x[rows]
        return self.head(self.norm(x)).float()

    # -- attention on the CPU: one product per sequence, over views of its pages where they are neighbours
    def span(self, start, n, past, blocks):
        """What attention needs to know of one sequence, found once for all layers -> (first token, tokens, context, its blocks,
        keys and values of each layer as views (1, K, context, D) if they are one run, masks of full and of sliding layers)."""
        length, views, full, sliding = past + n, None, None, None
        blocks = blocks[:-(-length // self.block_size)]
        first = blocks[0] * self.block_size
        if self.kv_dtype == torch.float32 and blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            views = [cache.flatten(1, 2)[:, None, first:first + length].transpose(2, 3).unbind(0)
                     for cache in (self.keys, self.values)]
        else:
            blocks = torch.tensor(blocks)
        if n > 1:
            gap = torch.arange(past, length)[:, None] - torch.arange(length)
            full = gap >= 0 if past else None
            sliding = (gap >= 0) & (gap < self.config.sliding_window) if self.config.sliding_layers else None
        return start, n, length, blocks, views, full, sliding

    def many(self, spans):
        """Where many short sequences decode, one gathered, padded product costs less than one product each ->
        None or (how many, their slots (S * L,), masks (S, 1, 1, L) of full and of sliding layers)."""
        S = next((i for i, (_, n, *_) in enumerate(spans) if n > 1), len(spans))
        longest = max((past + 1 for _, _, past, _ in spans[:S]), default=0)
        if S < 4 or longest * self.K * self.D > GATHERED or self.kv_dtype != torch.float32:
            return None
        width = -(-longest // self.block_size)
        blocks = torch.tensor([(blocks + [blocks[0]] * width)[:width] for *_, blocks in spans[:S]])
        slots = (blocks[:, :, None] * self.block_size + torch.arange(self.block_size)).view(S, -1)[:, :longest]
        past, at = torch.tensor([past for _, _, past, _ in spans[:S]])[:, None], torch.arange(longest)
        masks = [at <= past, (at <= past) & (at > past - (self.config.sliding_window or 0))]
        return S, slots.reshape(-1), *(torch.where(mask, 0.0, -torch.inf)[:, None, None] for mask in masks)

    def attend(self, i, q, spans, window, many=None):
        """q (T, H, D) over each sequence's keys and values in layer i -> (T, H * D)."""
        H, K, D, outs = self.H, self.K, self.D, []
        single = q.view(-1, 1, K, H // K, D).unbind(0)  # of one token: the heads that share a key are rows of one product
        if many:
            S, slots, full, sliding = many  # (S * L, K, D) -> (S, K, L, D)
            k, v = (flat[i].index_select(0, slots).view(S, -1, K, D).transpose(1, 2) for flat in self.flat)
            y = F.scaled_dot_product_attention(q[:S].view(S, K, H // K, D), k, v, attn_mask=sliding if window else full)
            outs.append(y.reshape(S, H * D))
        for start, n, length, blocks, views, full, sliding in spans:
            if views is not None:
                k, v = views[0][i], views[1][i]
            else:  # (blocks * block_size, K, D) -> (1, K, length, D)
                k, v = (kernels.read_pages(cache[i], scales[i], blocks)[None, :length].transpose(1, 2)
                        for cache, scales in ((self.keys, self.scales[0]), (self.values, self.scales[1])))
            if n == 1:
                if window and length > window:
                    k, v = k[:, :, -window:], v[:, :, -window:]
                outs.append(F.scaled_dot_product_attention(single[start], k, v).view(1, H * D))
            else:
                mask = sliding if window and length > window else full
                y = F.scaled_dot_product_attention(q[start:start + n].transpose(0, 1)[None], k, v, attn_mask=mask,
                                                   is_causal=mask is None, enable_gqa=H != K)
                outs.append(y[0].transpose(0, 1).reshape(n, H * D))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    # -- on a GPU: the kernels of kernels.py over block tables; steps of decodes alone replay a CUDA graph
    def on_gpu(self, batch):
        """Nothing here waits for the device: inputs go over in one pinned copy, and the logits stay there."""
        S, T, R, width = len(batch.spans), len(batch.ids), len(batch.rows), -(-self.max_len // self.block_size)
        decode = S == T == R
        size = bucket(S) if decode else S  # padding: slot -1 is not stored, and a context of length 0 attends to nothing
        pad, starts = size - S, [start for start, *_ in batch.spans] + list(range(T, T + size - S + 1))
        tables = torch.zeros(size, width, dtype=torch.int32)
        for s, (*_, blocks) in enumerate(batch.spans):
            tables[s, :len(blocks)] = torch.tensor(blocks[:width], dtype=torch.int32)
        parts = [batch.ids + [0] * pad, batch.positions + [0] * pad, batch.slots + [-1] * pad, batch.adapters + [-1] * pad,
                 batch.rows]
        longs = torch.tensor([x for part in parts for x in part])
        ints = torch.cat((torch.tensor([past + n for _, n, past, _ in batch.spans] + [0] * pad + starts, dtype=torch.int32),
                          tables.view(-1)))
        longs, ints = (t.pin_memory().to(self.device, non_blocking=True) for t in (longs, ints))
        if not decode:
            return self.paged(longs, ints, T, S, R)
        if size not in self.graphs:
            self.graphs[size] = self.capture(longs, ints, size)
        graph, static_longs, static_ints, logits = self.graphs[size]
        static_longs.copy_(longs[:4 * size])
        static_ints.copy_(ints)
        graph.replay()
        return logits[:R]

    def paged(self, longs, ints, T, S, R):
        """The forward pass over inputs that lie one after the other in two tensors."""
        ids, positions, slots, adapters, rows = longs.split((T, T, T, T, R))
        lengths, starts, tables = ints[:S], ints[S:2 * S + 1], ints[2 * S + 1:].view(S, -1)

        def attend(i, q, k, v, window):
            scales = self.scales[0][i], self.scales[1][i]
            kernels.kv_store(k, v, self.keys[i], self.values[i], slots, *scales)
            return kernels.paged_attention(q, self.keys[i], self.values[i], tables, lengths, starts, self.D ** -0.5, window,
                                           *scales).view(T, self.H * self.D)
        return self.forward(ids, positions, adapters, None if R == T else rows, attend)

    def capture(self, longs, ints, size):
        """Record a decode step of `size` sequences -> (graph, its inputs, its logits). Padding makes all of them harmless."""
        longs, ints = longs[:4 * size].clone(), ints.clone()
        rows = longs.new_zeros(0)

        def step():
            return self.paged(torch.cat((longs, rows.new_zeros(size))), ints, size, size, size)
        stream = torch.cuda.Stream()  # the kernels are tuned and warmed up outside the capture
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        return graph, longs, ints, logits


def bucket(n):
    """Batch sizes share a CUDA graph with the next of 1, 2, 4, 8, 16, 24, 32, ..."""
    return next((b for b in (1, 2, 4, 8) if n <= b), -(-n // 8) * 8)


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
    print(f"cache    weights {weights / 2**20:,.0f} MiB + keys and values {blocks * per_block / 2**20:,.0f} MiB = {blocks:,} "
          f"blocks of {block_size} = {blocks * block_size:,} tokens")
    return blocks
