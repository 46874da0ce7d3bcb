"""The Runner: computes one batch of tokens from many sequences over the paged cache; the lean forward pass of the engine.

Tokens of all sequences lie in one flat row, so a product never sees padding. On a CPU one call into forward.cpp does it all
(native.py); elsewhere projections are fused (q, k, v in one product, gate and up in another) and packed for the device, and
attention is a kernel over block tables. model.py's forward, which has none of this, defines the result.
"""

import atexit
import copy
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import kernels
import quant
from common import Interrupt, UserError
from engine import native
from engine.parallel import Parted
from engine.sampler import top_logprobs
from quant import QuantLinear
from runtime import DTYPES, free_memory


@dataclass
class Batch:
    """The tokens of one step, flat: those of one sequence next to each other."""

    block_size: int
    ids: list = field(default_factory=list)
    rows: list = field(default_factory=list)  # the tokens whose logits are wanted
    spans: list = field(
        default_factory=list
    )  # of each sequence: (first token, tokens, tokens before them, blocks)
    adapters: list = field(default_factory=list)  # LoRA adapter of each sequence, -1 is none

    def add(self, blocks, ids, past, rows, adapter=-1):
        """ids are the tokens at positions past, past + 1, ...; rows count from the first of them."""
        start = len(self.ids)
        self.spans.append((start, len(ids), past, blocks))
        self.rows += [start + r for r in rows]
        self.ids += ids
        self.adapters.append(adapter)

    def token_adapters(self):
        return [a for (_, n, _, _), a in zip(self.spans, self.adapters) for _ in range(n)]


# ----------------------------------------------------------------------- a model over several ranks


# ------------------------------------------------------------------------ weights, fused and packed
def fuse(linears):
    """Several layers over the same input -> one. Of float ones the parts' weights become views of it: nothing is held twice."""
    if len(linears) == 1:
        return linears[0]
    if isinstance(linears[0], QuantLinear):
        return quant.fuse(linears)
    fused = copy.copy(linears[0])
    fused._parameters = {
        name: p
        if p is None
        else nn.Parameter(torch.cat([getattr(m, name).data for m in linears]), False)
        for name, p in fused._parameters.items()
    }
    for m, part in zip(linears, fused.weight.data.split([m.weight.size(0) for m in linears])):
        m.weight = nn.Parameter(part, requires_grad=False)
    return fused


def pack(linears, kind):
    """Layers over the same input -> one function of (T, K) to (T, N). kind: None as they are, "int8", "int4"."""
    if isinstance(linears[0], Parted):
        return Parted(pack([linears[0].linear], kind), linears[0].ranks, linears[0].outputs)
    adapted = any(
        hasattr(m, "adapters") for m in linears
    )  # lora.LoRALinear: each with adapters of its own
    if len(linears) > 1 and (
        adapted
        or len({(type(m), getattr(m, "format", ""), getattr(m, "group", 0)) for m in linears}) > 1
    ):
        parts = [pack([m], kind) for m in linears]
        return lambda x: torch.cat([part(x) for part in parts], -1)
    if adapted:
        return linears[0]
    linear = quant.in_kind(fuse(linears), kind)
    if isinstance(linear, QuantLinear):
        if linear is linears[0]:
            linear = copy.copy(linear)  # the caller's own layer stays as it is
        native.install_products(linear)
        return linear.product
    return lambda x: F.linear(x, linear.weight, linear.bias)


class Runner:
    """A model with its cache. Call it with a Batch -> logits (rows, V) float32, or None where no row is wanted."""

    def __init__(self, model, runtime, kind=None, kv_dtype="auto", block_size=16, adapters=None):
        c = self.config = model.config
        self.device, self.block_size, self.model, self.runtime = (
            runtime.device,
            block_size,
            model,
            runtime,
        )
        self.orders, self.idle = None, False
        if (
            runtime.world > 1
        ):  # orders are small and on the CPU; who waits for one sleeps, for as long as it takes
            self.orders = dist.new_group(backend="gloo", timeout=timedelta(days=365))
            if runtime.rank == 0:
                atexit.register(
                    lambda: self.idle and self.everywhere("end")
                )  # else the closed connection says it
        self.H, self.K, self.D, self.max_len = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.max_position_embeddings,
        )
        on_cpu = self.device.type == "cpu"
        kinds = {
            "auto": torch.float32 if on_cpu else runtime.dtype,
            "int8": torch.int8,
            "fp8": torch.float8_e4m3fn,
        } | DTYPES
        if kv_dtype not in kinds:
            raise UserError(f"--kv-dtype {kv_dtype}: use {', '.join(kinds)}")
        self.names = list(adapters or {})
        if adapters and runtime.world > 1:
            raise UserError(
                f"LoRA adapters cannot be divided among {runtime.world} ranks; merge them first: python lora.py merge"
            )
        if adapters:
            from lora import (
                load_adapter,
                model_adapter_rows,
            )  # only here: they bring the training scripts along

            for name, folder in adapters.items():
                load_adapter(model, folder, name)
            self.choose_adapters = model_adapter_rows
        if kind not in (None, "int8", "int4"):
            raise UserError(f"--quant {kind}: use int8 or int4")
        if kind and model.quantization:
            raise UserError(
                f"--quant {kind}: this folder's weights are packed already; leave --quant out"
            )
        self.cos = self.sin = None
        if not c.is_gpt2:
            angle = (
                torch.arange(self.max_len, device=self.device)[:, None].float()
                * model.rope_frequency
            )
            cos, sin = angle.cos() * model.rope_scale, angle.sin() * model.rope_scale  # (P, D/2)
            dtype = torch.float32 if on_cpu else model.embed_tokens.weight.dtype
            self.cos, self.sin = (
                torch.cat((cos, cos), -1).to(dtype),
                torch.cat((-sin, sin), -1).to(dtype),
            )  # (P, D)
        half = runtime.dtype != torch.float32
        self.native, self.graphs = (
            on_cpu and self.in_cpp(kind or ("16" if half else None), kinds[kv_dtype]),
            {},
        )
        packs = half or kind or model.quantization
        self.kv_dtype = (
            torch.float16 if self.native and packs and kv_dtype == "auto" else kinds[kv_dtype]
        )
        if not self.native:
            if on_cpu:
                model.float()
            self.products = [
                [pack(together, kind) for together in block.products()] for block in model.layers
            ]
            # the gain of each head's norm, by whether it is a query's or a key's: (H + K, D)
            self.gains = [
                torch.stack(
                    [b.self_attn.q_norm.weight] * self.H + [b.self_attn.k_norm.weight] * self.K
                )
                for b in model.layers
                if hasattr(b.self_attn, "q_norm")
            ]
            self.head = pack([model.lm_head], kind)

    def in_cpp(self, kind, kv_dtype):
        """-> native.Native, or None, with a line that says why, where only torch can do it."""
        try:
            if self.orders:
                raise native.Unavailable("forward.cpp does not do several ranks")
            made = native.Native(
                self.model, kind, self.cos, self.sin, self.names, kv_dtype, self.block_size
            )
        except native.Unavailable as reason:
            print(f"forward  torch: {reason}")
            return None
        print(f"forward  C++ ({native.level()}), {torch.get_num_threads()} threads")
        return made

    def adapter_row(self, adapter):
        if adapter is not None and adapter not in self.names:
            raise UserError(
                f"adapter {adapter!r} is not loaded; loaded are {', '.join(self.names) or 'none'}"
            )
        return -1 if adapter is None else self.names.index(adapter)

    @property
    def weight_bytes(self):
        return (
            self.native.weight_bytes
            if self.native
            else sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        )

    @torch.inference_mode()
    def hidden(self, ids):
        """ids (T,) int64, one text by itself -> what the head reads, (T, C) float32."""
        if not self.native:
            return self.model.hidden(ids[None].to(self.device))[0].float()
        run, blocks, batch = (
            self.native.alone(),
            -(-len(ids) // self.block_size),
            Batch(self.block_size),
        )
        cache = run.allocate(blocks, torch.float32)
        batch.add(list(range(blocks)), ids.tolist(), 0, range(len(ids)))
        return (run(batch, hidden=True), cache)[0]

    def head_of(self, x):
        """(R, C) -> logits (R, V) float32."""
        return (
            self.native.head(x)
            if self.native
            else self.model.lm_head(x.to(self.model.embed_tokens.weight.dtype)).float()
        )

    # -- the cache
    @property
    def bytes_per_token(self):
        scales = (
            2 * 4 * self.config.num_hidden_layers * self.K if self.kv_dtype.itemsize == 1 else 0
        )
        return self.config.kv_bytes_per_token(self.kv_dtype.itemsize) + scales

    def allocate(self, blocks):
        """Make room for keys and values: (layers, blocks, block_size, K, D) each; 8-bit ones with a scale a token and head."""
        self.graphs, self.idle = {}, True  # from here on the other ranks wait for orders
        if self.native:  # pages in an order of its own
            self.keys, self.values = self.native.allocate(blocks, self.kv_dtype)
            self.scales = None
            return
        shape = (self.config.num_hidden_layers, blocks, self.block_size, self.K)
        self.keys, self.values = (
            torch.zeros(*shape, self.D, dtype=self.kv_dtype, device=self.device) for _ in range(2)
        )
        small = self.kv_dtype.itemsize == 1
        self.scales = (
            torch.zeros(2, *shape, device=self.device)
            if small
            else [[None] * self.config.num_hidden_layers] * 2
        )

    def copy_blocks(self, pairs):
        """Copy whole blocks; pairs (2 * n,) int64: from, to, from, to, ..."""
        source, target = pairs.view(-1, 2).t().to(self.device)
        for cache in (
            self.keys,
            self.values,
            *(self.scales if isinstance(self.scales, torch.Tensor) else ()),
        ):
            cache[:, target] = cache[:, source]

    # -- several ranks: the first has the requests, the scheduler and the sampler; the others do what it does here
    ORDERS = ("end", "step", "copy_blocks", "hidden", "score")

    def broadcast(self, tensor):
        dist.broadcast(tensor, 0, group=self.orders)
        return tensor

    def everywhere(self, order, *inputs):
        """Do one of ORDERS, a method, on every rank; inputs: flat CPU tensors, int64 and perhaps int32 -> its result here."""
        if self.orders:
            self.idle = False
            for tensor in (
                torch.tensor([self.ORDERS.index(order), *map(len, inputs), 0, 0][:3]),
                *inputs,
            ):
                self.broadcast(tensor)
        result, self.idle = getattr(self, order)(*inputs), True
        return result

    @torch.inference_mode()
    def follow(self):
        """What the other ranks do, until the first one ends."""
        with (
            Interrupt() as interrupt
        ):  # what Ctrl-C means is the first rank's to say: a server finishes its answers
            try:
                order = None
                while order != "end":
                    order, *sizes = self.broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
                    order, kinds = self.ORDERS[order], (torch.int64, torch.int32)
                    getattr(self, order)(
                        *(
                            self.broadcast(torch.zeros(n, dtype=kind))
                            for n, kind in zip(sizes, kinds)
                            if n
                        )
                    )
            except RuntimeError:
                if interrupt.signal:  # so has the first rank, and it could not say so any more
                    os._exit(128 + interrupt.signal)
                raise
        sys.exit()

    def end(self):
        dist.destroy_process_group()

    def score(self, longs):
        """longs: how many of the likeliest, the vocabulary's size, ids (T,) -> `top_logprobs` of ids[1:], T - 1 rows."""
        (count, vocab_size), ids = longs[:2].tolist(), longs[2:]
        parts = [
            top_logprobs(self.head_of(rows)[:, :vocab_size], after, count)  # (256, V) at a time
            for rows, after in zip(
                self.hidden(ids)[:-1].split(256), ids[1:].to(self.device).split(256)
            )
        ]
        return [torch.cat(part) for part in zip(*parts)]

    # -- one step
    def __call__(self, batch):
        """-> logits (R, V) float32, on the device."""
        if self.native:
            return self.native(batch)
        logits = self.everywhere("step", *self.inputs(batch))
        return logits if logits is None else logits[: len(batch.rows)]

    def inputs(self, batch):
        """The step's sizes and tokens, its sequences padded to a CUDA graph's -> two tensors of all parts one after the other, as
        `forward` splits them. Padding: slot -1 is not stored, and a context of length 0 attends to nothing."""
        S, T, R, page = len(batch.spans), len(batch.ids), len(batch.rows), self.block_size
        pad = bucket(S) - S if self.device.type == "cuda" and S == T == R else 0
        tables = torch.zeros(S + pad, -(-self.max_len // page), dtype=torch.int32)
        positions, slots = (
            [],
            [],
        )  # a slot is where in the cache a token's key and value go: block * size + offset
        for s, (_, n, past, blocks) in enumerate(batch.spans):
            tables[s, : len(blocks)] = torch.tensor(blocks[: tables.size(1)], dtype=torch.int32)
            positions += range(past, past + n)
            slots += [blocks[p // page] * page + p % page for p in range(past, past + n)]
        parts = (
            (batch.ids, 0),
            (positions, 0),
            (slots, -1),
            (batch.token_adapters(), -1),
            (batch.rows, 0),
        )
        longs = torch.tensor(
            [
                S + pad,
                T + pad,
                R + pad,
                *(x for part, filler in parts for x in part + [filler] * pad),
            ]
        )
        lengths = [past + n for _, n, past, _ in batch.spans] + [0] * pad
        starts = [start for start, *_ in batch.spans] + list(range(T, T + pad + 1))
        return longs, torch.cat(
            (torch.tensor(lengths + starts, dtype=torch.int32), tables.view(-1))
        )

    def step(self, longs, ints):
        """What `inputs` made -> logits (R, V), or None. On a GPU steps of decodes alone replay a CUDA graph, NCCL's part in them
        too; nothing here waits for the device: inputs go over in one pinned copy, and the logits stay there."""
        (S, T, R), longs = longs[:3].tolist(), longs[3:]
        if self.device.type != "cuda":
            return self.forward(longs, ints, S, T, R)
        longs, ints = (t.pin_memory().to(self.device, non_blocking=True) for t in (longs, ints))
        if not S == T == R:
            return self.forward(longs, ints, S, T, R)
        if S not in self.graphs:
            self.graphs[S] = self.capture(longs.clone(), ints.clone(), S)
        graph, static_longs, static_ints, logits = self.graphs[S]
        static_longs.copy_(longs)
        static_ints.copy_(ints)
        graph.replay()
        return logits

    def capture(self, longs, ints, S):
        """Record a decode step of S sequences -> (graph, its inputs, its logits)."""
        stream = torch.cuda.Stream()  # the kernels are tuned and warmed up outside the capture
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.forward(longs, ints, S, S, S)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.forward(longs, ints, S, S, S)
        return graph, longs, ints, logits

    def forward(self, longs, ints, S, T, R):
        """S sequences, T tokens in all -> logits (R, V), or None. Attention over block tables is a kernel of kernels.py, or its
        twin where there is no GPU."""
        c, H, K, D = self.config, self.H, self.K, self.D
        ids, positions, slots, adapters, rows = longs.split((T, T, T, T, R))
        lengths, starts, tables = ints[:S], ints[S : 2 * S + 1], ints[2 * S + 1 :].view(S, -1)
        if self.names:
            self.choose_adapters(self.model, adapters)
        x = F.embedding(ids, self.model.embed_tokens.weight)  # (T, C)
        if c.is_gpt2:
            x = x + F.embedding(positions, self.model.embed_positions.weight)
        else:
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (T, 1, D)
        for i, (block, (qkv_product, out, up_product, down)) in enumerate(
            zip(self.model.layers, self.products)
        ):
            qkv = qkv_product(block.input_layernorm(x)).view(T, H + 2 * K, D)
            qk = qkv[:, : H + K]  # queries and keys are treated alike
            if self.gains:
                qk = F.rms_norm(qk, (D,), eps=c.norm_eps) * self.gains[i]
            if not c.is_gpt2:  # model.rotate, with the signs in the sine
                qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
            cache = self.keys[i], self.values[i]
            scales, window = (
                (self.scales[0][i], self.scales[1][i]),
                c.sliding_window if i in c.sliding_layers else None,
            )
            kernels.kv_store(qk[:, H:], qkv[:, H + K :], *cache, slots, *scales)
            y = kernels.paged_attention(
                qk[:, :H], *cache, tables, lengths, starts, D**-0.5, window, *scales
            )  # (T, H, D)
            x += out(y.view(T, H * D))
            h = up_product(block.post_attention_layernorm(x))
            if c.is_gpt2:
                h = F.gelu(h, approximate="tanh")
            else:
                gate, up = h.chunk(2, -1)
                h = F.silu(gate).mul_(up)
            x += down(h)
        if not R:
            return None
        return self.head(self.model.norm(x if R == T else x[rows])).float()


def bucket(n):
    """Batch sizes share a CUDA graph with the next of 1, 2, 4, 8, 16, 24, 32, ..."""
    return next((b for b in (1, 2, 4, 8) if n <= b), -(-n // 8) * 8)


def pool_size(runners, kv_tokens, block_size, max_seqs, max_len):
    """How many blocks to make: as asked, or for max_seqs answers of full length as far as half of the free memory goes."""
    runtime, per_block = runners[0].runtime, sum(r.bytes_per_token for r in runners) * block_size
    free = free_memory(runtime.device)
    if free and runtime.device.type == "cpu":
        free //= runtime.world
    fits = (
        int(free * (0.9 if runners[0].device.type == "cuda" else 0.5)) // per_block
        if free
        else 4096
    )
    if kv_tokens is None:
        blocks = min(fits, max_seqs * -(-max_len // block_size))
    else:
        blocks = -(-kv_tokens // block_size)
    blocks = runtime.smallest(blocks)  # all ranks' tables are the first one's
    if blocks < 1 or (free and blocks * per_block > free):
        raise UserError(
            f"a cache of {blocks:,} blocks of {block_size} tokens needs {blocks * per_block / 2**30:.2f} GiB, and "
            f"{free / 2**30:.2f} GiB are free: at most {fits:,} blocks fit; lower --kv-tokens to {fits * block_size:,}"
        )
    weights = sum(r.weight_bytes for r in runners)
    print(
        f"cache    weights {weights / 2**20:,.0f} MiB + keys and values {blocks * per_block / 2**20:,.0f} MiB = {blocks:,} "
        f"blocks of {block_size} = {blocks * block_size:,} tokens"
    )
    return blocks
