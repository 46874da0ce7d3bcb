"""The forward pass of a step in torch: forward.cpp's twin, for any device and any linear layer.

Tokens of all sequences lie in one flat row, so no product sees padding. Projections over one input
are fused (q, k, v in one product, gate and up in another) and attention is a kernel over block
tables. model.py's forward, which has none of this, defines the result: tests/engine/test_native.py
and test_scheduler.py hold the three equal.
"""

import copy

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import quant
from engine.graphs import Graphs, graph_size, sent
from engine.parallel import ShardedLinear
from engine.weights import rope_tables, stack_adapters
from quant import QuantLinear, TiledLinear


# ------------------------------------------------------------------------ weights, fused and packed
def in_dtype(model, dtype):
    """The model itself where all parameters have that type, else a copy of which they do."""
    if all(p.dtype == dtype for p in model.parameters()):
        return model
    model = copy.deepcopy(model)
    for p in model.parameters():  # buffers are packed weights and keep their types
        p.data = p.data.to(dtype)
    return model


def fuse_floats(layers):
    """nn.Linear layers over one input -> one layer. Their weights become views of its weight."""
    N = sum(layer.out_features for layer in layers)
    fused = nn.Linear(layers[0].in_features, N, bias=False, device="meta")
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is not None:
            whole = torch.cat([part.data for part in parts])  # N x (n, K) -> (sum of n, K)
            setattr(fused, name, nn.Parameter(whole, requires_grad=False))
            for part, rows in zip(parts, whole.split(list(map(len, parts)))):
                part.data = rows
    return fused


def fused_layers(layers, kind):
    """Layers over one input -> [one layer], or as many as there are where they differ in kind.

    kind: None, or "int8" or "int4" for those that are still in floats. A layer of another class
    (a LoRALinear) stays as it is and is simply called.
    """
    first = layers[0]
    if isinstance(first, ShardedLinear):
        (own,) = fused_layers([first.linear], kind)
        return [ShardedLinear(own, first.ranks, first.outputs)]
    kinds = {m.fuse_key() if isinstance(m, QuantLinear) else type(m) for m in layers}
    if len(kinds) > 1:
        return [fused_layers([layer], kind)[0] for layer in layers]
    packed = isinstance(first, QuantLinear)
    if isinstance(first, TiledLinear) or not (packed or isinstance(first, nn.Linear)):
        return layers
    fused = first
    if len(layers) > 1:
        fused = quant.fuse(layers) if packed else fuse_floats(layers)
    return [quant.tiled(quant.in_kind(fused, kind))]


class FusedProduct(nn.Module):
    """Layers over the same input as one product, with the LoRA adapter of each row."""

    def __init__(self, layers, kind, stacks):
        super().__init__()
        self.layers = nn.ModuleList(fused_layers(layers, kind))
        self.changes = []  # (columns of the output, AdapterStack)
        start = 0
        for layer in layers if stacks else ():
            end = start + layer.out_features
            if layer in stacks:
                self.changes.append((slice(start, end), stacks[layer]))
            start = end

    def forward(self, x, adapters):
        """x (T, K), adapters (T,) -> (T, N)."""
        outputs = [layer(x) for layer in self.layers]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        for columns, stack in self.changes:
            y[:, columns] += stack.change(x, adapters)
        return y


class ForwardLayer(nn.Module):
    """One block of the Transformer as the pass reads it."""

    def __init__(self, block, config, kind, stacks, window):
        super().__init__()
        self.window = window
        self.attention_norm = block.input_layernorm
        self.mlp_norm = block.post_attention_layernorm
        products = [FusedProduct(layers, kind, stacks) for layers in block.products()]
        self.qkv, self.out, self.up, self.down = products
        self.qk_gain = head_gains(block, config)


def head_gains(block, config):
    """-> (H + K, D): queries and keys are normalized alike; None where they are not."""
    if block.self_attn.q_norm is None:
        return None
    gains = [block.self_attn.q_norm.weight] * config.num_attention_heads
    gains += [block.self_attn.k_norm.weight] * config.num_key_value_heads
    return torch.stack(gains).detach()


# ----------------------------------------------------------------------------------------- the pass
class TorchForward(nn.Module):
    """A model as torch runs it for the engine, with its cache; the twin of native.Native."""

    def __init__(self, model, device, dtype, kind=None, adapters=None, block_size=16):
        super().__init__()
        model = in_dtype(model, dtype)
        config = self.config = model.config
        self.device = device
        self.block_size = block_size
        self.embedding = model.embed_tokens.weight
        self.embed_positions = model.embed_positions if config.is_gpt2 else None
        self.cos, self.sin = rope_tables(model, dtype)
        stacks = stack_adapters(model, adapters or {}, dtype)
        self.layers = nn.ModuleList()
        for i, block in enumerate(model.layers):
            window = config.sliding_window if i in config.sliding_layers else None
            self.layers.append(ForwardLayer(block, config, kind, stacks, window))
        self.norm = model.norm
        self.head = FusedProduct([model.lm_head], kind, stacks)
        self.floats = [] if kind else list(model.parameters())  # what `refresh` writes to

    def refresh(self, model):
        """Take the values of a model that was trained on; most are views of its own already."""
        for own, p in zip(self.floats, model.parameters(), strict=True):
            if own is not p:
                own.data.copy_(p.data)
        for layer, block in zip(self.layers, model.layers):
            if layer.qk_gain is not None:
                layer.qk_gain.copy_(head_gains(block, self.config))

    @property
    def weight_bytes(self):
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    def allocate(self, blocks, dtype):
        """Room for keys and values: (2, layers, blocks, block_size, K, D).

        int8 ones have a scale for each token and head: (2, layers, blocks, block_size, K).
        """
        c = self.config
        shape = 2, c.num_hidden_layers, blocks, self.block_size, c.num_key_value_heads
        self.cache = torch.zeros(*shape, c.head_dim, dtype=dtype, device=self.device)
        self.scales = torch.zeros(shape, device=self.device) if dtype.itemsize == 1 else None
        # of a decode step: (graph, its inputs, its logits) for each number of sequences
        self.graphs = Graphs() if self.device.type == "cuda" else None
        self.most_sequences = 0  # of a decode step
        self.logits = None  # (most_sequences, V) float32, where these graphs write

    def with_cache(self, blocks, dtype):
        """The same weights with another cache."""
        twin = copy.copy(self)
        twin.allocate(blocks, dtype)
        return twin

    def forward(self, batch, hidden=False):
        """A runner.StepBatch -> logits (R, V) float32, or None; with hidden what the head reads."""
        longs, ints = self.inputs(batch)
        return self.step(longs, ints, hidden)

    def inputs(self, batch):
        """A step's numbers as two flat arrays, which the first rank can send to others.

        int64: S, T, R; each token's id, position, slot and adapter; the rows wanted.
        int32: of each sequence its length, where its tokens start, and its block table.
        On a GPU a step of S decodes is padded to the next size that has a CUDA graph. Padding is
        not stored (slot -1) and attends to nothing (length 0).
        """
        S, T, R = len(batch.counts), len(batch.ids), len(batch.rows)
        page = self.block_size
        pad = graph_size(S) - S if self.graphs and S == T == R else 0
        counts, pasts, starts, sizes = batch.layout()
        width = table_width(int(sizes.max()))
        tables = np.zeros((S + pad, width), np.int32)
        tables[:S][np.arange(width) < sizes[:, None]] = batch.blocks()
        owners = np.repeat(np.arange(S), counts)  # (T,)
        positions = np.arange(T) + (pasts - starts)[owners]
        slots = tables[owners, positions // page] * page + positions % page
        adapters = np.array(batch.adapters)[owners]
        longs = [np.array([S + pad, T + pad, R + pad])]
        numbers = batch.ids, positions, slots, adapters, batch.rows
        for own, filler in zip(numbers, (0, 0, -1, -1, 0)):
            longs += [own, [filler] * pad]
        ints = [pasts + counts, [0] * pad, starts, np.arange(T, T + pad + 1)]
        longs = np.concatenate(longs, dtype=np.int64, casting="unsafe")
        ints = np.concatenate(ints, dtype=np.int32, casting="unsafe")
        return longs, np.append(ints, tables)

    def step(self, longs, ints, hidden=False, ids=None):
        """What `inputs` made -> logits (R, V), or None.

        ids: those of its sequences in their order (the padding has none), on the device.
        On a GPU a step of decodes alone replays a CUDA graph, with NCCL's part in it. Nothing waits
        for the device: the inputs go over in one pinned copy, and the logits stay there until the
        next step of decodes writes its own in their place.
        """
        S, T, R = longs[:3].tolist()
        longs = sent(torch.from_numpy(longs[3:]), self.device)
        ints = sent(torch.from_numpy(ints), self.device)
        if ids is not None:
            longs[: len(ids)] = ids
        recorded = None
        if self.graphs and S == T == R and not hidden:
            recorded = self.graphs.get(f"{S} sequences", self.decode_graph, longs, ints, S)
        if recorded is None:
            result = self.compute(longs, ints, S, T, R, hidden)
            return None if result is None else result.float()
        graph, static_longs, static_ints, logits = recorded
        static_longs.copy_(longs)
        put_ints(static_ints, ints, S)
        graph.replay()
        return logits

    def decode_graph(self, longs, ints, S):
        """Record a decode step of S sequences -> (graph, its inputs, its logits)."""
        blocks = -(-self.config.max_position_embeddings // self.block_size)
        room = ints.new_zeros(2 * S + 1 + S * table_width(blocks))
        put_ints(room, ints, S)
        longs = longs.clone()
        if self.logits is None:
            most = graph_size(self.most_sequences)
            self.logits = torch.empty(most, self.config.vocab_size, device=self.device)
        logits = self.logits[:S]
        graph = self.graphs.record(lambda: logits.copy_(self.compute(longs, room, S, S, S)))
        return graph, longs, room, logits

    def compute(self, longs, ints, S, T, R, hidden=False):
        """S sequences, T tokens, R rows wanted; the parts of longs and ints as `inputs` says.

        -> logits (R, V) of the head's type; with hidden (T, C) float32.
        """
        c = self.config
        ids, positions, slots, adapters, rows = longs.split((T, T, T, T, R))
        lengths, starts, tables = ints.split((S, S + 1, len(ints) - 2 * S - 1))
        where = tables.view(S, -1), lengths, starts  # (S, blocks), (S,), (S + 1,)
        x = F.embedding(ids, self.embedding)  # (T, C)
        rope = None
        if c.is_gpt2:
            added = F.embedding(positions, self.embed_positions.weight)
        else:
            added = torch.zeros_like(x)
            rope = self.cos[positions][:, None], self.sin[positions][:, None]  # (T, 1, D)
        for i, layer in enumerate(self.layers):  # add_norm adds to x in place
            qkv = layer.qkv(kernels.add_norm(x, added, layer.attention_norm), adapters)
            y = self.attend(i, layer, qkv, rope, slots, where)
            added = layer.out(y, adapters)
            h = layer.up(kernels.add_norm(x, added, layer.mlp_norm), adapters)
            h = F.gelu(h, approximate="tanh") if c.is_gpt2 else kernels.swiglu(h)
            added = layer.down(h, adapters)
        if hidden:
            return kernels.add_norm(x, added, self.norm).float()
        if R == 0:
            return None
        if R != T:
            x, added, adapters = x[rows], added[rows], adapters[rows]
        return self.head(kernels.add_norm(x, added, self.norm), adapters)

    def attend(self, i, layer, qkv, rope, slots, where):
        """Layer i's queries, keys and values (T, (H + 2K) D) -> (T, H D), over the paged cache."""
        D = self.config.head_dim
        eps = self.config.norm_eps
        cache = self.cache[:, i]
        scales = None if self.scales is None else self.scales[:, i]
        qkv = qkv.view(len(qkv), -1, D)  # (T, (H + 2K) D) -> (T, H + 2K, D)
        q = kernels.store_heads(qkv, layer.qk_gain, eps, rope, slots, cache, scales)
        how = dict(scale=D**-0.5, window=layer.window, scales=scales)
        y = kernels.paged_attention(q, cache, *where, **how)
        return y.flatten(1)  # (T, H, D) -> (T, H D)


def table_width(blocks):
    """Columns of the block tables of a step: a power of two, so kernels are not compiled anew."""
    return max(16, 1 << (blocks - 1).bit_length())


def put_ints(into, ints, S):
    """Copy a step's int32 numbers to where tables may be wider: lengths end what is read there."""
    first = 2 * S + 1
    tables = ints[first:].view(S, -1)
    into[:first] = ints[:first]
    into[first:].view(S, -1)[:, : tables.size(1)] = tables
