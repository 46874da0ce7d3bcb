"""Before the first request on a GPU: kernels are tuned and CUDA graphs recorded, for all steps."""

import sys
import time
from array import array
from dataclasses import dataclass

import torch
from tqdm import tqdm

from engine.graphs import graph_size
from engine.runner import StepBatch
from engine.sampler import Sampling, SamplingRow


@dataclass
class MadeUpStep:
    """A step of made-up sequences, to warm up with."""

    sequences: int
    tokens: int  # new ones, of all together
    context: int  # tokens of a sequence, at least its new ones

    def __str__(self):
        return f"{self.tokens} new tokens of {self.sequences} texts"

    def batch(self, blocks, block_size):
        """-> StepBatch, in a pool of so many blocks that nobody uses yet."""
        batch = StepBatch()
        for i in range(self.sequences):
            new = self.tokens // self.sequences
            new += i < self.tokens % self.sequences
            past = max(self.context - new, 0)
            size = -(-(past + new) // block_size)
            table = array("i", (block % blocks for block in range(i * size, (i + 1) * size)))
            batch.add(table, [0] * new, past, [new - 1])
        return batch


def made_up_steps(max_seqs, step_tokens, max_len, room):
    """Yield a MadeUpStep for every kernel and CUDA graph that a scheduler's steps can need.

    Decodes come first, the largest in front, whose memory the graphs of the others share. Kernels
    are tuned for powers of two: of sequences the fewest that share one are taken, which leaves the
    most new tokens to each. A step of few new tokens divides the context among programs, in more
    parts the longer it is. room: tokens that the cache holds.

    With 4 sequences and 64 tokens in a step: 4, 2 and 1 decodes, then 1, 3, 7, 15, 31, 63 and 64
    tokens of one sequence, 3, 7, 15, ... of two and 5, 11, 23, 47 and 64 of three.
    """
    usual = min(1024, max_len)
    for size in sorted({graph_size(n + 1) for n in range(max_seqs)}, reverse=True):
        yield MadeUpStep(size, size, usual)
    power = 1
    while power < 2 * max_seqs:
        sequences = power // 2 + 1
        most = min(step_tokens, sequences * (max_len - 1))
        tokens = 2 * sequences - 1
        while tokens < 2 * most:
            new = min(tokens, most)
            yield MadeUpStep(sequences, new, usual)
            context = 256
            while new <= 4 * sequences and context < min(2 * max_len, 2 * room // sequences):
                yield MadeUpStep(sequences, new, min(context, max_len))
                context *= 2
            tokens = 2 * tokens + 1
        power *= 2


def warm_up(engine):
    """Compute a step of each kind, so that no request waits for what is done only once."""
    forward = engine.runner.forward
    if engine.runner.native or forward.graphs is None:
        return
    begin = time.monotonic()
    scheduler = engine.scheduler
    blocks = len(scheduler.pool.refs)
    room = blocks * scheduler.block_size
    limits = scheduler.max_seqs, scheduler.step_tokens, engine.max_model_len
    steps = list(made_up_steps(*limits, room))
    print(f"warm-up  {len(steps)} kinds of steps: kernels are tuned (the first time), graphs made")
    too_large = []
    with tqdm(steps, unit="step", disable=None) as bar:
        for step in bar:
            bar.set_description(str(step))
            try:
                logits = engine.runner(step.batch(blocks, scheduler.block_size))
                if step.tokens == step.sequences:
                    draw_all_ways(engine, logits)
            except torch.OutOfMemoryError:
                too_large.append(str(step))
    if too_large:
        found = f"no memory for {len(too_large)} of them, as for {too_large[0]}"
        print(f"warm-up  {found}; lower --kv-tokens", file=sys.stderr)
    seconds = time.monotonic() - begin
    print(f"warm-up  {forward.graphs.count()} CUDA graphs after {seconds:.1f} s", flush=True)


def draw_all_ways(engine, logits):
    for sampling in (Sampling(temperature=0), Sampling(), Sampling(top_p=0.5)):
        rows = [SamplingRow(sampling)] * len(logits)
        engine.runner.draw(logits[:, : engine.vocab_size], rows, torch.zeros(len(logits)))
