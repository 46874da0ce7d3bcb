"""Which tokens are computed in a step, and where in the cache their keys and values lie.

Nouns: a request and its answers (Request, Sequence), what a step adds to an answer (Delta), the
cache's blocks (BlockPool; "pages" in the vLLM paper). Verbs: Scheduler.schedule picks the tokens of
a step; generate.Engine computes them, draws the next tokens, and calls `publish` and `remove`.
A block is freed in BlockPool.release and nowhere else.
"""

import bisect
import hashlib
import itertools
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from engine.sampler import Sampling


# ------------------------------------------------------------------------- requests and answers
@dataclass
class TokenLogprob:
    id: int
    logprob: float | None  # None: the first token of a text, of which the model says nothing
    top: list  # [(id, logprob)], likeliest first


@dataclass
class Delta:
    """What one step added to one answer. Text lags its tokens while it may become a stop string."""

    request_id: Any
    index: int  # which of the request's n answers
    text: str = ""
    token_ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of TokenLogprob, where the request asks for them
    finish_reason: str | None = None  # "stop", "length", "abort", "error"
    error: str | None = None  # why, where it is "error"
    end: tuple | None = None  # (id, logprob) of the token that ended it, where logprobs are asked

    def add(self, later):
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        if later.finish_reason:
            self.finish_reason = later.finish_reason
            self.error = later.error
            self.end = later.end


@dataclass
class Output(Delta):
    """One whole answer."""


@dataclass
class Request:
    """What was asked, and what its answers share."""

    id: Any
    prompt: list
    sampling: Sampling
    adapter: int  # which LoRA adapter, -1 is none
    ends: frozenset  # token ids that end an answer


@dataclass(eq=False)
class Sequence:
    """One answer being made. `computed` counts the ids whose keys and values are in the cache."""

    request: Request
    index: int  # which of the request's n answers
    arrival: int  # the place in the queue
    seed: int
    ids: list  # prompt and output
    full: int  # ids at which it is cut
    stream: Any  # ids -> text, or None without a tokenizer
    constraint: Any = None
    computed: int = 0
    # the block table: where its keys and values lie
    blocks: array = field(default_factory=lambda: array("i"))
    hashes: list = field(default_factory=list)  # of its full blocks, as far as they were needed
    published: int = 0  # how many of its blocks other requests may share
    draft: list = field(default_factory=list)  # guessed ids that this step computes, too
    held: str = ""  # text held back, because a stop string may begin in it
    finish_reason: str | None = None
    error: str | None = None

    @property
    def made(self):
        return len(self.ids) - len(self.request.prompt)

    @property
    def remaining(self):
        return len(self.ids) - self.computed


# ----------------------------------------------------------------------------- blocks of the cache
class BlockPool:
    """Reference counts and prefix hashes of the cache's blocks.

    A free block keeps its hash and can be shared again until it is taken. Blocks without a hash are
    taken first, then the one that was freed longest ago.
    """

    def __init__(self, count):
        self.refs = [0] * count
        self.hash_of = [None] * count
        self.by_hash = {}
        # Neighbours are handed out far apart (bits reversed): each sequence can grow in one run.
        bits = max(count - 1, 1).bit_length()
        scattered = (int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits))
        self.free = OrderedDict.fromkeys(b for b in scattered if b < count)

    def take(self, after):
        """A block of one's own: the one behind `after` if that is free (runs are read faster)."""
        block = after + 1
        if block in self.free and self.hash_of[block] is None:
            del self.free[block]
        else:
            block, _ = self.free.popitem(last=False)
        if self.hash_of[block] is not None:
            del self.by_hash[self.hash_of[block]]
            self.hash_of[block] = None
        self.refs[block] = 1
        return block

    def share(self, block):
        self.free.pop(block, None)
        self.refs[block] += 1

    def release(self, blocks):
        """Drop one reference to each. Going backwards, the end of a prefix is evicted first."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self.free[block] = None
                if self.hash_of[block] is None:
                    self.free.move_to_end(block, last=False)

    def publish(self, block, key):
        """Let others share a full block, unless they share one that holds the same text already."""
        if key not in self.by_hash:
            self.by_hash[key] = block
            self.hash_of[block] = key

    def forget(self):
        """Share no block that was computed so far."""
        self.by_hash = {}
        self.hash_of = [None] * len(self.hash_of)

    def find(self, keys):
        """The blocks that hold these prefixes, as far as the first one that is not there."""
        known = itertools.takewhile(self.by_hash.__contains__, keys)
        return [self.by_hash[key] for key in known]


# --------------------------------------------------------------------------------------- scheduler
class Scheduler:
    """Who computes how many tokens in a step.

    The oldest request always comes first, so it always ends. When blocks run out, the youngest
    gives all of its own back and computes again later; its text so far then counts as prompt.
    """

    def __init__(self, blocks, block_size, max_seqs, step_tokens, max_draft=0, prefix_cache=True):
        self.pool = BlockPool(blocks)
        self.block_size = block_size
        self.max_seqs = max_seqs
        self.step_tokens = max(step_tokens, max_seqs)
        self.max_draft = max_draft
        self.prefix_cache = prefix_cache
        self.waiting, self.running = [], []  # both in the order of arrival
        self.budget = 0  # tokens that this step may still take
        names = "cache_hit_tokens cache_query_tokens preemptions generated_tokens prompt_tokens"
        self.counts = dict.fromkeys(names.split(), 0)

    def add(self, seq):
        bisect.insort(self.waiting, seq, key=lambda s: s.arrival)

    def schedule(self):
        """-> {sequence: tokens to compute now, drafts included}.

        Decodes go first, then chunks of prompts, then new requests.
        """
        plan = {}
        self.budget = self.step_tokens
        before = self.counts["preemptions"]
        decodes = [s for s in self.running if s.remaining == 1]
        prefills = [s for s in self.running if s.remaining > 1]
        spare = self.budget - len(decodes)  # what drafts may take
        if prefills or self.waiting:
            spare //= 2  # prompts need the rest
        for seq in decodes + prefills:
            if not seq.blocks:
                continue  # preempted for an older one
            n = min(seq.remaining, self.budget)
            if n == 0:
                break
            fits = seq.computed + n <= len(seq.blocks) * self.block_size
            if not fits and not self.make_room(seq, seq.computed + n, plan):
                continue
            if self.max_draft and seq.remaining == 1 and seq.constraint is None:
                draft = min(self.max_draft, spare, seq.full - len(seq.ids) - 1)
                if self.reserve(seq, seq.computed + n + draft):
                    n += draft
                    spare -= draft
            plan[seq] = n
            self.budget -= n
        if self.waiting and self.counts["preemptions"] == before:
            self.admit(plan)
        return plan

    def make_room(self, seq, tokens, plan):
        """Reserve blocks, preempting the youngest if need be; False if that was seq itself."""
        while not self.reserve(seq, tokens):
            victim = self.running.pop()
            self.budget += plan.pop(victim, 0)
            self.release(victim)
            self.add(victim)
            self.counts["preemptions"] += 1
            if victim is seq:
                return False
        return True

    def admit(self, plan):
        """Start waiting requests, oldest first, while their whole prompt finds room."""
        being_computed = set()  # hashes of the blocks that running requests will publish
        for seq in self.running:
            being_computed.update(seq.hashes[seq.published :])
        for seq in list(self.waiting):
            if self.budget <= 0 or len(self.running) == self.max_seqs:
                break
            self.hash_blocks(seq, len(seq.ids) - 1)  # not the last token: its logits are wanted
            cached = self.pool.find(seq.hashes)
            if len(cached) < len(seq.hashes) and seq.hashes[len(cached)] in being_computed:
                continue  # wait until that block has been computed, and share it
            unused = sum(self.pool.refs[b] == 0 for b in cached)  # these are in the free list, too
            if self.blocks_for(len(seq.ids)) - len(cached) > len(self.pool.free) - unused:
                break
            self.start(seq, cached)
            plan[seq] = min(seq.remaining, self.budget)
            self.budget -= plan[seq]
            being_computed.update(seq.hashes[seq.published :])

    def start(self, seq, cached):
        """Let a waiting sequence run; the blocks `cached` hold its beginning."""
        for block in cached:
            self.pool.share(block)
        seq.blocks = array("i", cached)
        seq.published = len(cached)
        seq.computed = len(cached) * self.block_size
        # The other answers meet the first one's blocks; after a preemption it meets its own.
        if seq.index == seq.made == 0:
            self.counts["cache_hit_tokens"] += seq.computed
            self.counts["cache_query_tokens"] += len(seq.ids)
        self.reserve(seq, len(seq.ids))
        self.waiting.remove(seq)
        bisect.insort(self.running, seq, key=lambda s: s.arrival)

    # -- blocks of a sequence
    def blocks_for(self, tokens):
        return -(-tokens // self.block_size)

    def hash_blocks(self, seq, tokens):
        """Hash the full blocks among seq's first tokens; a key covers all before it, too."""
        if not self.prefix_cache:
            return
        size = self.block_size
        for i in range(len(seq.hashes), tokens // size):
            parent = seq.hashes[-1] if seq.hashes else b"%d" % seq.request.adapter
            own = array("i", seq.ids[i * size : (i + 1) * size]).tobytes()
            seq.hashes.append(hashlib.sha256(parent + own).digest())

    def reserve(self, seq, tokens):
        """Give seq the blocks of its first `tokens` tokens.

        -> False, and nothing changes, if too few blocks are free. What is shared are full blocks,
        and what is written lies behind them: no block is ever copied.
        """
        new = self.blocks_for(tokens) - len(seq.blocks)
        if new > len(self.pool.free):
            return False
        for _ in range(new):
            seq.blocks.append(self.pool.take(seq.blocks[-1] if seq.blocks else -1))
        return True

    def publish(self, seq):
        """Offer the blocks that the step has filled; the next turn of a chat begins with them."""
        self.hash_blocks(seq, seq.computed)
        # More may have been hashed when it was admitted, and not be computed yet.
        for key in seq.hashes[seq.published : seq.computed // self.block_size]:
            self.pool.publish(seq.blocks[seq.published], key)
            seq.published += 1

    def release(self, seq):
        self.pool.release(seq.blocks)
        seq.blocks = array("i")
        seq.computed = seq.published = 0

    def remove(self, seq):
        """Forget a sequence in whatever state it is."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self.release(seq)
