"""CUDA graphs: the launches of a step, recorded once and replayed without Python."""

import itertools
import sys

import torch

from engine.sampler import draw_by_settings


class Graphs:
    """What was recorded, by key. All graphs share one pool of memory, as one runs at a time."""

    def __init__(self):
        self.known = {}
        self.pool = None

    def count(self):
        return sum(graph is not None for graph in self.known.values())

    def get(self, key, make, *inputs):
        """make(*inputs), kept under the key; None if that could not be recorded, and the caller
        computes without a graph. The first time a line says why."""
        if key not in self.known:
            told = None in self.known.values()
            self.known[key] = None
            try:
                self.known[key] = make(*inputs)
            except RuntimeError as error:  # torch.OutOfMemoryError is one, too
                why = (str(error).splitlines() or [type(error).__name__])[0][:150]
                if not told:
                    print(f"graphs   {key}: not recorded, runs without ({why})", file=sys.stderr)
        return self.known[key]

    def record(self, function):
        """The function's launches as a torch.cuda.CUDAGraph; it has run before, so that kernels
        are compiled and tuned."""
        before = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):  # which also comes back to `before` if recording fails
            # What is made at a first use, as cuBLAS's workspace, is no part of the graph.
            for _ in range(2):
                function()
            before.wait_stream(stream)
            with torch.cuda.graph(graph, pool=self.pool):
                function()
        self.pool = graph.pool()
        return graph


def record_draw(graphs, kind, logits):
    """`draw_by_settings` from these logits -> (graph, its settings, its result)."""
    settings = torch.zeros(len(logits), 5, device=logits.device)
    drawn = torch.zeros(2, len(logits), dtype=torch.int64, device=logits.device)
    graph = graphs.record(lambda: drawn.copy_(draw_by_settings(kind, logits, settings)))
    return graph, settings, drawn


def sent(tensor, device):
    """A CPU tensor on the device, in one pinned copy that nothing waits for."""
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor, device):
    """A CPU tensor from which a GPU can copy while Python goes on."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def on_their_way(drawn, count):
    """What `record_draw` draws goes to the CPU while Python goes on -> an iterator over (token,
    whether nothing was allowed, None), which waits for it."""
    here = drawn.to("cpu", non_blocking=True, copy=True)  # from a GPU into pinned memory
    arrived = torch.cuda.current_stream().record_event() if drawn.is_cuda else None

    def rows():
        if arrived:
            arrived.synchronize()
        tokens, failed = here[:, :count].tolist()
        yield from zip(tokens, failed, itertools.repeat(None))

    return rows()


def graph_size(sequences):
    """Decode steps share a CUDA graph with the next of 1, 2, 4, 8, 16, 24, 32, ... sequences."""
    if sequences > 4:
        return -(-sequences // 8) * 8
    return 4 if sequences == 3 else sequences
