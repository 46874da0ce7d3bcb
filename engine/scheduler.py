"""The engine: many requests at once over one paged key/value cache, each answered as if it were alone.

    engine = Engine("runs/demo"); outputs = engine.generate(["Once upon", "Hello"], Sampling(max_tokens=50))

Each step: the Scheduler picks tokens to compute (prefill chunks and decodes under one budget) and gives them blocks of the
pool; the Runner (runner.py) computes them; sampler.py draws; accepted tokens become text. One thread calls it.
"""

import bisect
import hashlib
import itertools
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from engine.sampler import Sampling


# -------------------------------------------------------------------------------------------- nouns
@dataclass
class TokenLogprob:
    id: int
    logprob: float
    top: list  # [(id, logprob)], likeliest first


@dataclass
class Delta:
    """What one step added to one answer. Text that may still become a stop string is held back, so it can lag its tokens."""

    request_id: object
    index: int
    text: str
    token_ids: list
    logprobs: list | None = None  # of TokenLogprob
    finish_reason: str | None = None  # "stop", "length", "abort", "error"
    error: str | None = None  # why, where it is "error"

    def add(self, later):
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs:
            self.logprobs += later.logprobs
        self.finish_reason, self.error = later.finish_reason, later.error


@dataclass
class Output(Delta):
    """One whole answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Request:
    """What was asked, and what its answers share."""

    id: object
    prompt: list
    sampling: Sampling
    adapter: int = -1  # row of the LoRA adapters, -1 is none
    ends: frozenset = frozenset()  # token ids that end an answer
    bad_words: tuple = ()
    edits: bool = False  # logits are changed before a token is drawn
    cached_tokens: int = 0
    unfinished: int = 1  # answers still being made
    kept: dict = field(default_factory=dict)  # with best_of: {index: (sequence, its delta so far)}


@dataclass(eq=False)
class Sequence:
    """One answer being made. `computed` says how many of `ids` have their keys and values in the cache; nothing is inferred."""

    request: Request
    order: tuple  # (arrival, index): who comes first
    ids: list  # prompt and output
    seed: int
    stream: object  # ids -> text, or None without a tokenizer
    constraint: object = None
    width: int = 1  # answers that fork off when the prompt has been computed
    computed: int = 0
    drafted: int = 0  # the same for the draft model's cache
    blocks: list = field(default_factory=list)
    hashes: list = field(default_factory=list)  # of the full blocks, as far as they were needed
    published: int = 0  # how many of its blocks other requests may share
    held: str = ""  # text held back
    finish_reason: str | None = None
    error: str | None = None
    logprob_sum: float = 0.0

    @property
    def made(self):
        return len(self.ids) - len(self.request.prompt)

    @property
    def remaining(self):
        return len(self.ids) - self.computed


class BlockPool:
    """Reference counts and prefix hashes of the cache's blocks. A free block keeps its hash, and can be revived, until it is
    taken; those without a hash are taken first, then the one that was freed longest ago."""

    def __init__(self, count):
        self.refs, self.hash_of, self.by_hash = [0] * count, [None] * count, {}
        bits = (
            max(count - 1, 1).bit_length()
        )  # neighbours are handed out far apart, so that each sequence can grow in one run
        scattered = (int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits))
        self.free = OrderedDict.fromkeys(b for b in scattered if b < count)

    def take(self, after=None):
        """A block of one's own; the next one in memory where that is free (a contiguous run is read without copying)."""
        block = after + 1 if after is not None else None
        if block in self.free and self.hash_of[block] is None:
            del self.free[block]
        else:
            block = self.free.popitem(last=False)[0]
        if self.hash_of[block] is not None:
            del self.by_hash[self.hash_of[block]]
            self.hash_of[block] = None
        self.refs[block] = 1
        return block

    def share(self, block):
        self.free.pop(block, None)
        self.refs[block] += 1

    def release(self, blocks):
        """Drop one reference each; from the end, so that the end of a prefix is evicted before its beginning."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self.free[block] = None
                if self.hash_of[block] is None:
                    self.free.move_to_end(block, last=False)

    def publish(self, block, key):
        """Let others share a full block; if another one holds the same text already, that one stays."""
        if key not in self.by_hash:
            self.by_hash[key], self.hash_of[block] = block, key


# ---------------------------------------------------------------------------------------- scheduler
class Scheduler:
    """Who computes how many tokens in a step. The oldest request always comes first, so it always ends; when blocks run out
    the youngest gives all of its own back and computes again later (its text so far then counts as prompt)."""

    def __init__(self, blocks, block_size, max_seqs, step_tokens, max_draft=0, prefix_cache=True):
        self.pool, self.block_size, self.prefix_cache = BlockPool(blocks), block_size, prefix_cache
        self.max_seqs, self.step_tokens, self.max_draft = (
            max_seqs,
            max(step_tokens, max_seqs),
            max_draft,
        )
        self.waiting, self.running = [], []  # both in the order of arrival
        self.copies = []  # (from block, to block) that the runner has to do before the step
        self.counts = Counter(
            cache_hit_tokens=0,
            cache_query_tokens=0,
            preemptions=0,
            generated_tokens=0,
            prompt_tokens=0,
        )

    def add(self, seq):
        bisect.insort(self.waiting, seq, key=lambda s: s.order)

    def schedule(self):
        """-> {sequence: tokens to compute now, drafts included}. Decodes go first, then prefill chunks, then new requests."""
        plan, budget, self.copies = {}, self.step_tokens, []
        decodes = [s for s in self.running if s.remaining == 1]
        spare, preempted = budget - len(decodes), False
        for seq in decodes + [s for s in self.running if s.remaining > 1]:
            if seq not in self.running:
                continue  # preempted for an older one
            n = min(seq.remaining, budget)
            if n == 0:
                break
            while not self.reserve(seq, seq.computed + n):
                victim, preempted = self.running[-1], True
                budget += plan.pop(victim, 0)
                self.preempt(victim)
                if victim is seq:
                    break
            else:
                draft = min(self.max_draft, spare) if seq.remaining == seq.width == 1 else 0
                if draft and self.reserve(seq, seq.computed + n + draft):
                    n, spare = n + draft, spare - draft
                plan[seq] = n
                budget -= n
        if not preempted:
            self.admit(plan, budget)
        return plan

    def admit(self, plan, budget):
        """Start waiting requests, oldest first, while their whole prompt finds room."""
        promised = (
            {key for s in self.running for key in s.hashes[s.published :]}
            if self.waiting
            else set()
        )
        for seq in list(self.waiting):
            width = sum(s.width for s in self.running) + seq.width
            if budget <= 0 or width > self.max_seqs:
                break
            self.hash_blocks(
                seq, len(seq.ids) - 1
            )  # at least one token must be computed: its logits are wanted
            cached = list(
                itertools.takewhile(lambda b: b is not None, map(self.pool.by_hash.get, seq.hashes))
            )
            if len(cached) < len(seq.hashes) and seq.hashes[len(cached)] in promised:
                continue  # a running request is computing the same prefix right now: wait and share it
            new = -(-len(seq.ids) // self.block_size) - len(cached)
            if new > len(self.pool.free) - sum(self.pool.refs[b] == 0 for b in cached):
                break
            for block in cached:
                self.pool.share(block)
            seq.blocks, seq.published = cached, len(cached)
            seq.computed = seq.drafted = len(cached) * self.block_size
            if len(seq.ids) == len(
                seq.request.prompt
            ):  # not after a preemption: those would be hits on its own blocks
                seq.request.cached_tokens = seq.computed
                self.counts["cache_hit_tokens"] += seq.computed
                self.counts["cache_query_tokens"] += len(seq.ids)
            self.reserve(seq, len(seq.ids))
            self.waiting.remove(seq)
            bisect.insort(self.running, seq, key=lambda s: s.order)
            plan[seq] = min(seq.remaining, budget)
            budget -= plan[seq]
            promised.update(seq.hashes[seq.published :])

    def hash_blocks(self, seq, tokens):
        """Extend seq.hashes to all full blocks among its first `tokens`: each key covers the whole prefix and the adapter."""
        size = self.block_size
        for i in range(len(seq.hashes), tokens // size if self.prefix_cache else 0):
            parent = seq.hashes[-1] if seq.hashes else b"%d" % seq.request.adapter
            seq.hashes.append(
                hashlib.sha256(
                    parent + array("i", seq.ids[i * size : (i + 1) * size]).tobytes()
                ).digest()
            )

    def reserve(self, seq, tokens):
        """Give seq blocks for its first `tokens` tokens, all of its own from `computed` on; False if there are too few."""
        first = seq.computed // self.block_size  # the block that is written next; forks share it
        shared = first < len(seq.blocks) and self.pool.refs[seq.blocks[first]] > 1
        new = -(-tokens // self.block_size) - len(seq.blocks)
        if new + shared > len(self.pool.free):
            return False
        if shared:  # copy on write
            own = self.pool.take()
            self.copies.append((seq.blocks[first], own))
            self.pool.release([seq.blocks[first]])
            seq.blocks[first] = own
        for _ in range(new):
            seq.blocks.append(self.pool.take(seq.blocks[-1] if seq.blocks else None))
        return True

    def publish(self, seq):
        """Offer the blocks that the step has filled, those of the output too: the next turn of a chat begins with them."""
        full = min(seq.computed, seq.drafted) if self.max_draft else seq.computed
        self.hash_blocks(seq, full)
        full = min(full // self.block_size, len(seq.hashes))
        for i in range(seq.published, full):
            self.pool.publish(seq.blocks[i], seq.hashes[i])
        seq.published = max(seq.published, full)

    def release(self, seq):
        self.pool.release(seq.blocks)
        seq.blocks, seq.computed, seq.drafted, seq.published = [], 0, 0, 0

    def preempt(self, seq):
        self.copies = [(a, b) for a, b in self.copies if b not in seq.blocks]
        self.release(seq)
        self.running.remove(seq)
        self.add(seq)
        self.counts["preemptions"] += 1

    def remove(self, seq):
        """Forget a sequence in whatever state it is."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self.release(seq)

    def check_invariants(self):
        """Every block is free or referenced exactly as often as tables name it; nothing is computed that has no block."""
        pool, used = self.pool, Counter(b for s in self.running for b in s.blocks)
        assert all(
            pool.refs[b] == used[b] and (used[b] == 0) == (b in pool.free)
            for b in range(len(pool.refs))
        )
        assert all(pool.hash_of[b] == key for key, b in pool.by_hash.items())
        assert sum(key is not None for key in pool.hash_of) == len(pool.by_hash)
        for s in self.running:
            assert (
                s.computed < len(s.ids)
                and s.computed <= len(s.blocks) * self.block_size
                and len(set(s.blocks)) == len(s.blocks)
            )
            assert s.published <= s.computed // self.block_size <= len(s.blocks)
        assert not any(s.blocks or s.computed for s in self.waiting)
        assert [s.order for s in self.running] == sorted(s.order for s in self.running)


# ------------------------------------------------------------------------------------------- engine
def find_draft(ids, most):
    """Prompt lookup (Saxena 2023): what followed the last earlier occurrence of the last 3 (then 2) tokens."""
    for n in (3, 2):
        tail, data = array("i", ids[-n:]).tobytes(), array("i", ids[:-1]).tobytes()
        at = data.rfind(tail)
        while at >= 0 and at % 4:  # not on a token's border
            at = data.rfind(tail, 0, at + len(tail) - 1)
        if at >= 0:
            return ids[at // 4 + n : at // 4 + n + most]
    return []
