"""The Runner computes one batch of tokens from many sequences over the paged cache.

On a CPU that is one call into forward.cpp (native.py), elsewhere forward.py's pass in torch. Of
several ranks the first has the requests, the scheduler and the sampler; the others `follow` it.
"""

import atexit
import itertools
import os
import sys
from array import array
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import kernels
from common import Interrupt, UserError
from engine import native
from engine.forward import TorchForward
from engine.graphs import graph_size, on_their_way, pinned, record_draw
from engine.sampler import draw_kind, draw_settings, draw_tokens
from runtime import DTYPES, free_memory

MIB = 2**20
GRAPH_LOGITS = 1 << 24  # beyond so many, launching a draw takes no time beside its work


class StepBatch:
    """The tokens of one step, flat: those of one sequence next to each other."""

    def __init__(self):
        self.ids = []
        self.rows = []  # the tokens whose logits are wanted
        # of each sequence:
        self.counts = []  # its tokens in this step
        self.pasts = []  # its tokens that are in the cache already
        self.tables = []  # its block table: where its keys and values lie
        self.adapters = []  # its LoRA adapter, -1 is none

    def add(self, blocks, ids, past, rows, adapter=-1):
        """ids: the tokens at positions past, past + 1, ...; rows count from the first of them."""
        start = len(self.ids)
        self.counts.append(len(ids))
        self.pasts.append(past)
        self.tables.append(blocks)
        self.adapters.append(adapter)
        for row in rows:
            self.rows.append(start + row)
        self.ids += ids

    def layout(self):
        """-> int64 arrays (S,): each sequence's tokens, those before them, its first token's place,
        the blocks of its table."""
        counts = np.array(self.counts)
        starts = np.cumsum(counts) - counts
        return counts, np.array(self.pasts), starts, np.array(list(map(len, self.tables)))

    def blocks(self):
        """The block tables, one after the other -> int32 array."""
        flat = array("i")
        for table in self.tables:
            flat.extend(table)
        return np.frombuffer(flat, np.int32)


class Runner:
    """A model with its cache. Call it with a StepBatch -> logits (rows, V) float32, or None.

    The model stays its caller's and usable: on a CPU its weights are packed into copies; in torch
    float weights that are fused become views of the fused ones, with the same values.
    """

    def __init__(self, model, runtime, kind=None, kv_dtype="auto", block_size=16, adapters=None):
        """kind: None, or "int8" or "int4" for weights in floats.

        adapters: {name: {layer's name: peft.AdapterTensors}}
        """
        if kind not in (None, "", "int8", "int4"):
            raise UserError(f"--quant {kind}: use int8 or int4")
        if kind and model.quantization:
            raise UserError(
                f"--quant {kind}: this folder's weights are packed already; leave --quant out"
            )
        self.config = model.config
        self.runtime = runtime
        self.device = runtime.device
        self.block_size = block_size
        self.adapter_names = list(adapters or ())
        self.orders = None  # the group in which the first rank tells the others what to do
        self.idle = False
        self.alone = None  # the forward pass of a text that is only read, with its cache
        if runtime.world > 1:
            self.join_ranks()
        on_cpu = self.device.type == "cpu"
        self.exact_kv_dtype = torch.float32 if on_cpu else runtime.dtype
        kinds = {"auto": self.exact_kv_dtype, **DTYPES, "int8": torch.int8}
        if kv_dtype not in kinds:
            raise UserError(f"--kv-dtype {kv_dtype}: use {', '.join(kinds)}")
        self.kv_dtype = kinds[kv_dtype]
        self.forward = None
        if on_cpu and not self.orders:
            small = kind or ("16" if runtime.dtype != torch.float32 else None)
            self.forward = self.native_forward(model, small, adapters)
            # Where weights are rounded, keys and values may be, too.
            if self.forward and kv_dtype == "auto" and (small or model.quantization):
                self.kv_dtype = torch.float16
        self.native = self.forward is not None
        if not self.native:
            dtype = self.exact_kv_dtype
            self.forward = TorchForward(model, self.device, dtype, kind, adapters, block_size)

    def native_forward(self, model, kind, adapters):
        """-> native.Native, or None, with a line that says why, where only torch can do it."""
        try:
            made = native.Native(model, kind, adapters, self.kv_dtype, self.block_size)
        except native.Unavailable as reason:
            print(f"forward  torch: {reason}")
            return None
        print(f"forward  C++ ({native.level()}), {torch.get_num_threads()} threads")
        return made

    def adapter_index(self, name):
        """A request's adapter as a batch counts it, -1 where it names none."""
        if not name:
            return -1
        if name not in self.adapter_names:
            loaded = ", ".join(self.adapter_names) or "none"
            raise UserError(f"adapter {name!r} is not loaded; loaded are {loaded}")
        return self.adapter_names.index(name)

    # -- the cache
    @property
    def block_bytes(self):
        """A key and a value for each token, layer and head; in int8 each has a float32 scale."""
        c = self.config
        size = self.kv_dtype.itemsize
        head = c.head_dim * size + 4 * (size == 1)
        return 2 * self.block_size * c.num_hidden_layers * c.num_key_value_heads * head

    def allocate(self, blocks, max_seqs=1):
        self.forward.allocate(blocks, self.kv_dtype)
        self.forward.most_sequences = max_seqs
        self.idle = True  # from here on the other ranks wait for orders

    # -- what every rank does, in the first one's order
    def step(self, longs, ints, ids):
        return self.forward.step(longs, ints, ids=ids)

    def read(self, ids, past, total, hidden):
        """The next chunk of a text by itself, in a cache of its own.

        past, total: how many of its tokens came before, and are read in all
        -> logits (T, V), or with hidden what the head reads (T, C)
        """
        blocks = -(-total // self.block_size)
        if past == 0:
            self.alone = self.forward.with_cache(blocks, self.exact_kv_dtype)
            self.alone.graphs = None  # also for a chunk of one token, which looks like a decode
        batch = StepBatch()
        batch.add(array("i", range(blocks)), ids, past, range(len(ids)))
        found = self.alone(batch, hidden)
        if past + len(ids) == total:
            self.alone = None
        return found

    def end(self):
        dist.destroy_process_group()

    def close_tuning(self):
        """From here on no step is held up by the tuning of a kernel."""
        if self.device.type == "cuda" and kernels.triton is not None:
            kernels.tuning_table(self.forward.embedding.device).closed = True

    def __call__(self, batch, ids=None):
        """-> logits (R, V) float32, on the device, or None where no row is wanted.

        ids: those of the batch, where only the device knows them; never with several ranks
        """
        if self.native:
            return self.forward(batch)
        longs, ints = self.forward.inputs(batch)
        logits = self.everywhere("step", longs, ints, ids)
        return None if logits is None else logits[: len(batch.rows)]

    def draw(self, logits, rows, u):
        """`draw_tokens`, by a CUDA graph where the logits are those of one and nothing edits them.

        -> an iterator over what `Engine.extend` takes of each row, (token, whether nothing was
        allowed, None: no logprob); the tokens on the device if a graph drew them, else None: they
        are there until the next draw
        """
        static = None if self.native else self.forward.logits
        in_place = static is not None and logits.data_ptr() == static.data_ptr()
        recorded = None
        if in_place and not any(row.sampling.edits_logits for row in rows):
            kind = draw_kind(rows)
            size = graph_size(len(rows))
            static = static[:size, : logits.size(1)]
            if static.numel() <= GRAPH_LOGITS:
                graphs = self.forward.graphs
                recorded = graphs.get(f"{kind} tokens of {size}", record_draw, graphs, kind, static)
        if recorded is None:
            tokens, failed = draw_tokens(logits, rows, u)
            return zip(tokens.tolist(), failed.tolist(), itertools.repeat(None)), None
        graph, settings, drawn = recorded
        settings.copy_(pinned(draw_settings(rows, u, size), self.device), non_blocking=True)
        graph.replay()
        return on_their_way(drawn, len(rows)), None if self.orders else drawn[0]

    # -- several ranks
    def join_ranks(self):
        # Orders are small and on the CPU; a rank that waits for one sleeps, however long it takes.
        self.orders = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        if self.runtime.rank == 0:  # a rank that dies says it by its closed connection
            atexit.register(lambda: self.idle and self.everywhere("end"))

    def everywhere(self, order, *inputs):
        """Call one of the methods above on every rank -> its result here."""
        if self.orders:
            if not self.idle:  # the others may still be in the middle of the order that failed
                raise UserError("an error has put the ranks out of step: start them again")
            self.idle = False
            dist.broadcast_object_list([(order, inputs)], 0, self.orders)
        result = getattr(self, order)(*inputs)
        self.idle = True
        return result

    @torch.inference_mode()
    def follow(self):
        """What the other ranks do, until the first one ends."""
        # What Ctrl-C means is the first rank's to say: a server finishes its answers.
        with Interrupt() as interrupt:
            try:
                order = None
                while order != "end":
                    told: list = [None]
                    dist.broadcast_object_list(told, 0, self.orders)
                    order, inputs = told[0]
                    getattr(self, order)(*inputs)
            except RuntimeError:
                if interrupt.signal:  # so has the first rank, and it could not say so any more
                    os._exit(128 + interrupt.signal)
                raise
        sys.exit()


def pool_size(runner, kv_tokens, max_seqs, max_len):
    """How many blocks to make: as many as asked, else for max_seqs answers of full length.

    Without a number asked for, keys and values take at most half of a CPU's free memory or nine
    tenths of a GPU's.
    """
    runtime = runner.runtime
    size = runner.block_size
    block_bytes = runner.block_bytes
    free = free_memory(runtime.device)
    fits = 4096
    if free and runtime.device.type == "cuda":
        fits = int(free * 0.9) // block_bytes
    elif free:
        free //= runtime.world
        fits = free // 2 // block_bytes
    blocks = -(-kv_tokens // size) if kv_tokens else min(fits, max_seqs * -(-max_len // size))
    blocks = runtime.smallest(blocks)  # all ranks' tables are the first one's
    if blocks < 1 or (free and blocks * block_bytes > free):
        advice = f"lower --kv-tokens to {fits * size:,}" if fits else "free some memory"
        raise UserError(
            f"a cache of {blocks:,} blocks does not fit into {free / 2**30:.2f} GiB: at most "
            f"{fits:,} blocks fit; {advice}"
        )
    print(
        f"cache    weights {runner.forward.weight_bytes / MIB:,.0f} MiB + keys and values "
        f"{blocks * block_bytes / MIB:,.0f} MiB = {blocks * size:,} tokens"
    )
    return blocks
