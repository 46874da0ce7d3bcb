"""The engine: many requests at once over one paged key/value cache, each answered as if it were alone.

    engine = Engine("runs/demo"); outputs = engine.generate(["Once upon", "Hello"], Sampling(max_tokens=50))

Each step: the Scheduler picks tokens to compute (prefill chunks and decodes under one budget) and gives them blocks of the
pool; the Runner (runner.py) computes them; sampler.py draws; accepted tokens become text. One thread calls it.
"""

import bisect
import contextlib
import copy
import hashlib
import itertools
import secrets
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace

import torch

from common import UserError
from engine.native import quiet_torch
from engine.runner import Batch, Runner, load_model, pool_size
from engine.sampler import Row, Sampling, draw, top_logprobs, uniform


# ------------------------------------------------------------------------------------------------------------------- nouns
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


# --------------------------------------------------------------------------------------------------------------- scheduler
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


# ------------------------------------------------------------------------------------------------------------------ engine
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


class Engine:
    """Many requests over one model. See `submit`, `step`, `cancel`, or `generate` for whole answers at once.

    kv_tokens: how many tokens' keys and values to keep; None takes what memory allows. max_seqs: answers made at once;
    step_tokens: tokens computed in a step at most; draft: "lookup" or a folder with a smaller model of the
    same vocabulary; adapters: {name: LoRA folder}; debug_invariants: check the books after every step.

    Under torchrun only rank 0 gets an engine: the others compute their parts of its steps in here and exit when it does.
    """

    def __init__(
        self,
        folder,
        device="auto",
        dtype="auto",
        quant=None,
        kv_tokens=None,
        *,
        kv_dtype="auto",
        block_size=16,
        max_seqs=None,
        step_tokens=None,
        max_model_len=None,
        prefix_cache=True,
        draft=None,
        draft_tokens=4,
        adapters=None,
        debug_invariants=False,
    ):
        self.model, self.tok, runtime = load_model(folder, device, dtype)
        self.config, on_gpu, self.debug = (
            self.model.config,
            runtime.device.type == "cuda",
            debug_invariants,
        )
        max_seqs, step_tokens = (
            max_seqs or (256 if on_gpu else 64),
            step_tokens or (8192 if on_gpu else 512),
        )
        self.max_model_len = min(
            max_model_len or self.config.max_position_embeddings,
            self.config.max_position_embeddings,
        )
        self.runner = Runner(self.model, runtime, quant, kv_dtype, block_size, adapters)
        self.runners, self.drafter = [self.runner], None
        if draft and draft != "lookup" and runtime.rank == 0:  # small, and so on one rank
            small, small_tok, alone = load_model(draft, device, dtype, split=False)
            if small.config.vocab_size != self.config.vocab_size or (
                self.tok and small_tok and small_tok.vocab != self.tok.vocab
            ):
                raise UserError(
                    f"--draft {draft}: its vocabulary ({small.config.vocab_size:,} ids) is not that of {folder} "
                    f"({self.config.vocab_size:,}); a draft model must share the tokenizer"
                )
            self.max_model_len = min(self.max_model_len, small.config.max_position_embeddings)
            self.drafter = Runner(small, alone, quant, kv_dtype, block_size)
            self.runners.append(self.drafter)
        blocks = pool_size(self.runners, kv_tokens, block_size, max_seqs, self.max_model_len)
        for runner in self.runners:
            runner.allocate(blocks)
        if runtime.rank:
            self.runner.follow()
        self.max_model_len = min(self.max_model_len, blocks * block_size)
        self.scheduler = Scheduler(
            blocks, block_size, max_seqs, step_tokens, draft_tokens if draft else 0, prefix_cache
        )
        # ids that the model has rows for but the tokenizer does not know (padding) never come out
        self.vocab_size = (
            min(self.tok.vocab_size, self.config.vocab_size) if self.tok else self.config.vocab_size
        )
        eos = self.config.eos_token_id
        self.eos = frozenset([] if eos is None else eos if isinstance(eos, list) else [eos])
        self.requests, self.outbox, self.arrivals = {}, [], itertools.count()

    # -- requests come in
    def encode(self, prompt):
        """str -> ids with the tokenizer's begin-of-text; ids are checked and passed on."""
        if isinstance(prompt, str):
            if self.tok is None:
                raise UserError("this model folder has no tokenizer, so prompts must be token ids")
            return self.tok.encode(prompt, bos=self.tok.bos_id is not None)
        for i in prompt:
            if not isinstance(i, int) or not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i!r} is not one of this model's 0 to {self.vocab_size - 1}"
                )
        return list(prompt)

    def submit(self, prompt, sampling, request_id=None, adapter=None):
        """Queue one request -> its id. Raises UserError, at once and with the numbers, for what cannot be done."""
        sampling.check(self.vocab_size)
        ids, room = self.encode(prompt), self.max_model_len
        if not ids:
            raise UserError("the prompt has no tokens; give at least one character")
        if len(ids) >= room:
            cache = len(self.scheduler.pool.refs) * self.scheduler.block_size
            raise UserError(
                f"the prompt has {len(ids):,} tokens, but this engine holds {room:,} (model context "
                f"{self.config.max_position_embeddings:,}, cache {cache:,}) and the answer needs at least one"
            )
        width = sampling.best_of or sampling.n
        if width > self.scheduler.max_seqs:
            raise UserError(
                f"{width} answers, but this engine makes at most {self.scheduler.max_seqs} at once"
            )
        if (
            sampling.stop or any(isinstance(w, str) for w in sampling.bad_words)
        ) and self.tok is None:
            raise UserError(
                "stop strings and bad words need a tokenizer; this model folder has none"
            )
        words = [
            tuple(w)
            for word in sampling.bad_words
            for w in (
                map(self.tok.encode, (word, " " + word)) if isinstance(word, str) else (word,)
            )
        ]
        if any(
            not w or not all(isinstance(i, int) and 0 <= i < self.vocab_size for i in w)
            for w in words
        ):
            raise UserError(
                f"bad_words must be non-empty strings or lists of ids from 0 to {self.vocab_size - 1}"
            )
        request_id = next(self.arrivals) if request_id is None else request_id
        if request_id in self.requests:
            raise UserError(f"request id {request_id!r} is in use")
        ends = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos)
        edits = bool(
            sampling.counts_tokens
            or sampling.logit_bias
            or words
            or sampling.constraint
            or sampling.min_tokens
        )
        request = Request(
            request_id,
            ids,
            sampling,
            self.runner.adapter_row(adapter),
            ends,
            tuple(words),
            edits,
            unfinished=width,
        )
        seed = secrets.randbits(48) if sampling.seed is None else sampling.seed
        seq = Sequence(
            request,
            (next(self.arrivals), 0),
            list(ids),
            seed,
            self.tok and self.tok.stream(skip_special=True),
            copy.copy(sampling.constraint),
            width,
        )
        self.requests[request_id] = [seq]
        self.scheduler.counts["prompt_tokens"] += len(ids)
        self.scheduler.add(seq)
        return request_id

    def cancel(self, request_id):
        """Stop a request in whatever state it is and free all it holds; its answers end with "abort" in the next step."""
        for seq in self.requests.pop(request_id, ()):
            if seq.finish_reason is None:
                self.scheduler.remove(seq)
                self.outbox += [
                    Delta(request_id, seq.order[1] + i, "", [], None, "abort")
                    for i in range(seq.width)
                    if seq.order[1] + i < seq.request.sampling.n
                ]

    @property
    def has_work(self):
        return bool(self.outbox or self.scheduler.waiting or self.scheduler.running)

    # -- one step
    @torch.inference_mode()
    def step(self):
        """Compute one batch -> list of Delta. Never blocks on anything but the computation."""
        deltas, self.outbox = self.outbox, []
        with quiet_torch() if self.runner.native else contextlib.nullcontext():
            if plan := self.scheduler.schedule():
                for runner in self.runners if self.scheduler.copies else ():
                    runner.everywhere("copy_blocks", torch.tensor(self.scheduler.copies).flatten())
                drafts = self.propose(plan)
                deltas += self.accept(plan, drafts, *self.compute(plan, drafts))
        if self.debug:
            self.scheduler.check_invariants()
        return deltas

    def propose(self, plan):
        """{sequence: ids that may come next}, no more than the plan has room for."""
        if not self.scheduler.max_draft:
            return {}
        most = {
            s: min(n - 1, self.max_model_len - len(s.ids) - 1)
            for s, n in plan.items()
            if s.remaining == 1 and n > 1 and s.constraint is None
        }
        if self.drafter is None:
            return {s: find_draft(s.ids, k) for s, k in most.items() if k > 0}
        drafts = {s: [] for s, k in most.items() if k > 0}
        for _ in range(
            max(most.values(), default=0)
        ):  # each round adds one id to every draft, all in one batch
            live = [s for s in drafts if len(drafts[s]) < most[s]]
            batch = Batch(self.scheduler.block_size)
            for s in live:
                ids = s.ids + drafts[s]
                batch.add(
                    s.blocks,
                    ids[s.drafted :],
                    s.drafted,
                    [len(ids) - s.drafted - 1],
                    s.request.adapter,
                )
                s.drafted = len(ids)
            rows = [self.row(s, drafts[s]) for s in live]
            logits = self.drafter(batch)[:, : self.vocab_size]
            for s, token in zip(live, draw(logits, rows)[0].tolist()):
                drafts[s].append(token)
        return drafts

    def compute(self, plan, drafts):
        """Run the plan's tokens -> logits (R, V) and the sequences they are of, each with one row and one after each draft id."""
        batch, owners, catch_up = (
            Batch(self.scheduler.block_size),
            [],
            Batch(self.scheduler.block_size),
        )
        for seq, n in plan.items():
            n, draft = min(n, seq.remaining), drafts.get(seq, [])
            new, rows = seq.ids[seq.computed : seq.computed + n] + draft, []
            if seq.computed + n == len(
                seq.ids
            ):  # all known tokens: the next one can be drawn, and one after each draft
                rows = list(range(n - 1, n + len(draft)))
                owners.append(seq)
            batch.add(seq.blocks, new, seq.computed, rows, seq.request.adapter)
            if (
                self.drafter and seq not in drafts
            ):  # the draft model has to read what it did not propose from
                catch_up.add(
                    seq.blocks,
                    seq.ids[seq.drafted : seq.computed + n],
                    seq.drafted,
                    [],
                    seq.request.adapter,
                )
                seq.drafted = seq.computed + n
        if self.drafter and catch_up.ids:
            self.drafter(catch_up)
        logits = self.runner(batch)
        return (None if logits is None else logits[:, : self.vocab_size]), owners

    def row(self, seq, draft, index=None):
        """The sampler's view of one answer, `draft` further on."""
        r, s = seq.request, seq.request.sampling
        if s.temperature == 0 and not r.edits:  # nothing else matters
            return Row(s, 0.0)
        seed = seq.seed if index is None else child_seed(seq, index)
        output = seq.ids[len(r.prompt) :] + draft if r.edits else ()
        room = min(s.max_tokens, self.max_model_len - len(r.prompt)) - seq.made - len(draft)
        return Row(
            s,
            uniform(seed, len(seq.ids) + len(draft)),
            output,
            r.prompt,
            r.ends,
            r.bad_words,
            seq.constraint,
            room,
            r.edits,
        )

    def accept(self, plan, drafts, logits, owners):
        """Draw, keep drafts as far as they are what was drawn, turn tokens into text -> deltas.

        A draft is right exactly where it equals the token that the model itself drew with that position's random number, so
        speculation changes how many steps are taken and nothing else.
        """
        for seq, n in plan.items():
            seq.computed += min(n, seq.remaining)
            self.scheduler.publish(seq)
        if not owners:
            return []
        rows, source, at = [], [], 0
        for seq in owners:
            draft = drafts.get(seq, [])
            for i in range(len(draft) + 1):
                for index in range(
                    seq.width
                ):  # a prompt whose n answers begin now draws n times from the same row of logits
                    rows.append(self.row(seq, draft[:i], index if seq.width > 1 else None))
                    source.append(at)
                at += 1
        if len(source) > at:
            logits = logits[torch.tensor(source, device=logits.device)]
        wanted = [
            i
            for i, row in enumerate(rows)
            if row.sampling.logprobs is not None or row.sampling.best_of
        ]
        raw = logits[wanted].clone() if wanted else None
        tokens, failed = draw(logits, rows)
        info = (
            dict(zip(wanted, logprobs_of(raw, tokens[wanted], [rows[i] for i in wanted])))
            if wanted
            else {}
        )
        tokens, failed = tokens.tolist(), failed.tolist()
        deltas, at = [], 0
        for seq in owners:
            draft = drafts.get(seq, [])
            for answer in self.fork(seq) if seq.width > 1 else [seq]:
                new = []  # (token, its logprobs)
                for i in range(len(draft) + 1):
                    if failed[at + i]:
                        answer.finish_reason = "error"
                        answer.error = "no token is allowed here: constraint, bad words and min_tokens contradict each other"
                        break
                    new.append((tokens[at + i], info.get(at + i)))
                    if i == len(draft) or draft[i] != tokens[at + i]:
                        break
                deltas += self.extend(answer, new)
                at += len(draft) + 1
        return deltas

    def fork(self, seq):
        """The n answers of a prompt that has been computed: they share its blocks, and copy the last one when they write."""
        width, seq.width = seq.width, 1
        answers = [seq]
        for i in range(1, width):
            twin = replace(
                seq,
                order=(seq.order[0], i),
                ids=list(seq.ids),
                seed=child_seed(seq, i),
                blocks=list(seq.blocks),
                stream=self.tok and self.tok.stream(skip_special=True),
                constraint=copy.copy(seq.constraint),
                hashes=list(seq.hashes),
            )
            for block in twin.blocks:
                self.scheduler.pool.share(block)
            bisect.insort(self.scheduler.running, twin, key=lambda s: s.order)
            answers.append(twin)
        seq.seed = child_seed(seq, 0)
        self.requests[seq.request.id] = list(answers)
        return answers

    # -- tokens become text
    def extend(self, seq, new):
        """Append drawn tokens to an answer until it ends -> deltas (one, or with best_of those of the whole request)."""
        request, s, text, kept, known = seq.request, seq.request.sampling, "", [], len(seq.ids)
        for token, logprob in new:
            if token in request.ends:
                seq.finish_reason = "stop"
                break
            seq.ids.append(token)
            kept.append(logprob)
            seq.logprob_sum += logprob.logprob if logprob else 0.0
            if seq.stream:
                text += self.show(seq, seq.stream.push(token))
            if seq.constraint is not None:
                seq.constraint.advance(token)
                if seq.constraint.done:
                    seq.finish_reason = "stop"
            if seq.finish_reason is None and (
                seq.made == s.max_tokens or len(seq.ids) == self.max_model_len
            ):
                seq.finish_reason = "length"
            if seq.finish_reason:
                break
        ids = seq.ids[known:]
        self.scheduler.counts["generated_tokens"] += len(ids)
        # a draft model wrote keys for its whole draft; what was not accepted is to be written again
        seq.computed += max(len(ids) - 1, 0)
        seq.drafted = min(seq.drafted, seq.computed)
        if seq.finish_reason:
            if seq.stream and seq.held is not None:
                text += self.show(seq, seq.stream.flush()) + (seq.held or "")
            self.scheduler.remove(seq)
            request.unfinished -= 1
            if request.unfinished == 0:
                del self.requests[request.id]
        delta = Delta(
            request.id,
            seq.order[1],
            text,
            ids,
            kept if s.logprobs is not None else None,
            seq.finish_reason,
            seq.error,
        )
        return self.compare(seq, delta) if s.best_of and s.best_of > s.n else [delta]

    def show(self, seq, text):
        """New text -> what of it and of the text held back can be shown; a stop string ends the answer before itself."""
        stops = seq.request.sampling.stop
        if not stops or seq.held is None:  # None: stopped already
            return "" if stops else text
        text = seq.held + text
        found = min((at for at in map(text.find, stops) if at >= 0), default=None)
        if found is not None:
            seq.finish_reason, seq.held = "stop", None
            return text[:found]
        keep = max(
            (
                n
                for stop in stops
                for n in range(min(len(stop) - 1, len(text)), 0, -1)
                if text.endswith(stop[:n])
            ),
            default=0,
        )
        seq.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def compare(self, seq, delta):
        """best_of: answers are kept back until all are made; the n of the best mean log-probability come out, best first."""
        request = seq.request
        if delta.index in request.kept:
            request.kept[delta.index][1].add(delta)
        else:
            request.kept[delta.index] = seq, delta
        if request.unfinished:
            return []
        best = sorted(
            request.kept.values(),
            key=lambda kept: (-kept[0].logprob_sum / max(kept[0].made, 1), kept[1].index),
        )
        return [replace(delta, index=i) for i, (_, delta) in enumerate(best[: request.sampling.n])]

    # -- whole answers
    def generate(self, prompts, sampling=None):
        """prompts: one or a list of str or id lists; sampling: one for all or a list -> list of Output, in the prompts' order,
        the n answers of a prompt next to each other."""
        single = isinstance(prompts, str) or (prompts and isinstance(prompts[0], int))
        prompts = [prompts] if single else list(prompts)
        samplings = (
            sampling
            if isinstance(sampling, (list, tuple))
            else [sampling or Sampling()] * len(prompts)
        )
        if len(samplings) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but {len(samplings)} samplings")
        ids = [self.submit(p, s) for p, s in zip(prompts, samplings)]
        requests = {i: self.requests[i][0].request for i in ids}
        outputs = {
            (i, k): Output(
                i,
                k,
                "",
                [],
                None if r.sampling.logprobs is None else [],
                prompt_tokens=len(r.prompt),
            )
            for i, r in requests.items()
            for k in range(r.sampling.n)
        }
        try:
            while any(i in self.requests for i in ids) or self.outbox:
                for d in self.step():
                    if output := outputs.get((d.request_id, d.index)):
                        output.add(d)
                        output.cached_tokens = requests[d.request_id].cached_tokens
        except BaseException:  # an interrupt leaves the engine as it was
            for i in ids:
                self.cancel(i)
            raise
        return list(outputs.values())

    @torch.inference_mode()
    def embed(self, ids):
        """The mean over a text's tokens of the last hidden states (after the final norm), at length 1 -> list of C floats."""
        hidden = self.runner.everywhere("hidden", torch.tensor(ids)).mean(0)  # (T, C) -> (C,)
        return (hidden / hidden.norm()).tolist()

    @torch.inference_mode()
    def prompt_logprobs(self, ids, count):
        """What the model thought of a text itself -> a TokenLogprob for each of its tokens; of the first it thought nothing."""
        scores = self.runner.everywhere("score", torch.tensor([count, self.vocab_size, *ids]))
        return [
            TokenLogprob(ids[0], None, []),
            *(
                TokenLogprob(i, c, list(zip(t, v)))
                for i, c, v, t in zip(ids[1:], *(part.tolist() for part in scores))
            ),
        ]

    def stats(self):
        """Counters since the start and the state now, for /metrics."""
        s = self.scheduler
        return {
            "running": len(s.running),
            "waiting": len(s.waiting),
            "blocks_total": len(s.pool.refs),
            "blocks_used": len(s.pool.refs) - len(s.pool.free),
            **s.counts,
        }


def logprobs_of(logits, tokens, rows):
    """logits (R, V), tokens (R,) -> a TokenLogprob for each row."""
    counts = [row.sampling.logprobs or 0 for row in rows]
    chosen, values, ids = (t.tolist() for t in top_logprobs(logits, tokens, max(counts)))
    return [
        TokenLogprob(t, c, list(zip(i, v))[:n])
        for t, c, v, i, n in zip(tokens.tolist(), chosen, values, ids, counts)
    ]


def child_seed(seq, index):
    """The seed of one of n answers: a number of its own, the same in every run."""
    return int.from_bytes(
        hashlib.blake2b(b"%d/%d" % (seq.seed, index), digest_size=6).digest(), "little"
    )
