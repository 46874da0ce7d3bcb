"""Byte-level BPE, the file to open in order to understand it: the idea in ten lines, then the same thing fast.

    python tokenizer.py train --data corpus.txt --vocab-size 10000 --out runs/tokenizer        # runs it

A text is cut into chunks (about: words), equal chunks are counted once, and the most frequent pair of neighbouring symbols,
bytes at first, becomes a new symbol, again and again.
"""

import functools
import heapq
import io
import os
import re
from bisect import bisect_right
from collections import Counter
from itertools import chain, filterfalse

import numpy as np
from tqdm import tqdm

from common import BLOCK, blocks_of, in_processes, read_block, usable_cpus, well_formed
from tokenizer import BETWEEN_CHUNKS, BYTES, PATTERNS, splitter

# ---- The idea: the most frequent pair of neighbours becomes a new symbol, again and again (Sennrich et al. 2016).


# ---- The same, fast. First: count every distinct chunk once, over blocks of the files, in several processes.


def count_job(job, pattern):
    """Counter of the chunks of a job: a list of texts, or of blocks (path, start, end), whose lines are split one by one as HF
    tokenizers does with files."""
    counts = Counter()
    for texts in [job] if isinstance(job[0], str) else job:
        if isinstance(texts, tuple):
            data = read_block(texts, (rb"\n", BETWEEN_CHUNKS))
            texts = list(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="\n"))
        counts.update(
            chain.from_iterable(map(splitter(pattern, ascii=True), filter(str.isascii, texts)))
        )
        counts.update(chain.from_iterable(map(splitter(pattern), filterfalse(str.isascii, texts))))
    return counts


def batches(texts, pattern):
    """Lists of texts, about a BLOCK of characters in each; a longer text in parts, if the pattern is a known one."""
    parts = re.compile(
        rf"(?s).{{{BLOCK},}}?[a-zA-Z](?= )|.+" if pattern in PATTERNS.values() else "(?s).+"
    )
    batch, size = [], 0
    for part in chain.from_iterable(map(parts.finditer, map(well_formed, texts))):
        batch.append(part[0])
        size += len(part[0])
        if size > BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_chunks(texts, paths, pattern, max_bytes=None, processes=None):
    """Counter of the chunks of texts and of files; with max_bytes, of blocks spread evenly over the files."""
    share = min(1, max_bytes / max(1, sum(map(os.path.getsize, paths)))) if max_bytes else 1
    grid = blocks_of(paths, max(1 << 14, min(BLOCK, max_bytes // 64)) if share < 1 else BLOCK)
    blocks = [block for i, block in enumerate(grid) if int((i + 1) * share) > int(i * share)]
    group = min(16, -(-len(blocks) // (4 * (processes or usable_cpus())))) or 1
    jobs = [
        blocks[i : i + group] for i in range(0, len(blocks), group)
    ]  # of few blocks, so that Counters stay small
    counters = in_processes(
        functools.partial(count_job, pattern=pattern),
        chain(jobs, batches(texts, pattern)),
        processes,
    )
    total = Counter()
    for counter in tqdm(
        counters, total=len(jobs) or None, desc="counting chunks", unit="job", disable=None
    ):
        total.update(counter)
    return total


# ---- Then: merge, with all chunks in flat arrays and many merges at once.


class Words:
    """All distinct chunks end to end as one linked list of symbols, and every pair of neighbours ever seen.

    Position arrays, n long plus one sentinel at n that stands before every first and after every last symbol:
        symbol, next, previous; weight: how often the chunk occurs; pair: which pair starts here (-1: none)
    Pair arrays: count, left, right. A pair's positions are written once, when it first appears, and only ever lose members:
    (x, y) can only appear when the younger of x and y is made, and all its copies are made together. So `pair[position] == p`
    tells which of p's positions still hold, and no dictionary is needed.
    """

    def __init__(self, chunks):
        words = [chunk.encode("utf-8", "surrogateescape") for chunk in chunks]
        to_id = np.argsort(np.array(BYTES)).astype(np.int32)
        symbol = to_id[np.frombuffer(b"".join(words), np.uint8)]
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        n = len(symbol)
        self.symbol = np.append(symbol, np.int32(-1))
        self.next = np.arange(1, n + 2, dtype=np.int32)
        self.previous = np.arange(-1, n, dtype=np.int32)
        self.next[ends - 1] = self.next[n] = n
        self.previous[ends[:-1]] = self.previous[0] = n
        self.weight = np.repeat(
            np.fromiter(chunks.values(), np.int64, len(words)), np.diff(ends, prepend=0)
        )
        self.pair = np.full(n + 1, -1, np.int32)
        self.count, self.left, self.right = (
            np.zeros(0, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.int32),
        )
        self.n_pairs = 0
        self.firsts, self.groups = (
            [],
            [],
        )  # per call of add_pairs: its first pair; positions by pair, and starts
        self.add_pairs(np.flatnonzero(self.symbol[self.next[:n]] >= 0).astype(np.int32))

    def add_pairs(self, at):
        """Enter the pairs that start at these positions, none of which has been seen before."""
        key = self.symbol[at].astype(np.int64) << 32 | self.symbol[self.next[at]]
        order = np.argsort(
            key, kind="stable"
        )  # stable: the positions of one pair stay in ascending order
        key, at = key[order], at[order]
        starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
        first, self.n_pairs = self.n_pairs, self.n_pairs + len(starts)
        if self.n_pairs > len(self.count):
            room = max(self.n_pairs, len(self.count) * 3 // 2) - len(self.count)
            self.count, self.left, self.right = (
                np.append(a, np.zeros(room, a.dtype)) for a in (self.count, self.left, self.right)
            )
        if len(at):
            self.count[first : self.n_pairs] = np.add.reduceat(self.weight[at], starts)
        self.left[first : self.n_pairs], self.right[first : self.n_pairs] = (
            key[starts] >> 32,
            key[starts] & 0xFFFFFFFF,
        )
        self.pair[at] = np.repeat(
            np.arange(first, self.n_pairs, dtype=np.int32), np.diff(starts, append=len(at))
        )
        self.firsts.append(first)
        self.groups.append((at, np.append(starts, len(at))))

    def positions(self, pair):
        """Where to merge this pair: its positions that still hold, and of a run x x x x every second one."""
        group = bisect_right(self.firsts, pair) - 1
        at, starts = self.groups[group]
        at = at[slice(*starts[pair - self.firsts[group] :][:2])]
        at = at[self.pair[at] == pair]
        if self.left[pair] == self.right[pair]:
            index = np.arange(len(at))
            run = np.maximum.accumulate(np.where(self.pair[self.previous[at]] != pair, index, 0))
            at = at[(index - run) % 2 == 0]
        return at

    def merge(self, batch, new):
        """Merge the pairs of the batch, all at once, into symbols new, new + 1, ..."""
        where = [self.positions(pair) for pair in batch]
        at = np.concatenate(where)  # left halves, which become the new symbols
        gone = self.next[at]  # right halves
        after = self.next[gone]
        self.symbol[at] = np.repeat(
            np.arange(new, new + len(batch), dtype=np.int32), list(map(len, where))
        )
        self.symbol[gone] = -1
        self.next[at], self.previous[after] = after, at
        before = self.previous[at]
        before = before[
            (self.symbol[before] >= 0) & (self.symbol[before] < new)
        ]  # a merged one is in `at` already
        paired = gone[self.pair[gone] >= 0]
        for stale in (paired, before):  # (right, y) and (x, left) are no more
            np.subtract.at(self.count, self.pair[stale], self.weight[stale])
        self.pair[gone] = self.pair[at] = -1
        self.count[batch] = 0
        self.add_pairs(np.concatenate([at[self.symbol[after] >= 0], before]))


class Queue:
    """The pairs in the order BPE takes them: most frequent first, then lowest ids. A heap with lazy invalidation: counts only
    fall, so an entry is checked when it surfaces. Only pairs at or above a floor are in it, since most pairs are never merged;
    when it runs empty the floor sinks."""

    def __init__(self, words):
        self.words, self.heap, self.floor, self.known = words, [], None, 0

    def push(self, pairs):
        w = self.words
        for entry in zip(
            (-w.count[pairs]).tolist(),
            w.left[pairs].tolist(),
            w.right[pairs].tolist(),
            pairs.tolist(),
        ):
            heapq.heappush(self.heap, entry)

    def top(self, refill):
        """(-count, left, right, pair) of the best pair, or None when no pair is left (at or above the floor, unless it may sink:
        not while a batch is being gathered, whose pairs would come in again)."""
        count = self.words.count
        while True:
            while self.heap and -self.heap[0][0] != count[self.heap[0][3]]:
                _, left, right, pair = self.heap[0]
                if count[pair] >= self.floor:
                    heapq.heapreplace(self.heap, (-int(count[pair]), left, right, pair))
                else:
                    heapq.heappop(self.heap)
            if self.heap or not refill or self.floor == 1 or not self.known:
                return self.heap[0] if self.heap else None
            best = max(0, self.known - 4096)
            self.floor = max(1, int(np.partition(count[: self.known], best)[best]))
            self.push(np.flatnonzero(count[: self.known] >= self.floor))

    def next_batch(self, most):
        """The next pairs to merge, as far ahead as their order is certain.

        Merging (a, b) changes the counts of pairs (x, a) and (b, y) only, and the pairs it makes, (x, ab) and (ab, y), are no
        more frequent than (x, a) and (b, y) were. So pairs in queue order can be merged together as long as no left symbol among
        them is also a right symbol: none changes another's count or shares a position with it, and every (x, a) and (b, y) is
        still in the queue behind the last of them, with the pairs made behind it."""
        new, self.known = self.known, self.words.n_pairs
        if self.floor is not None:  # take in the pairs that have appeared since
            self.push(new + np.flatnonzero(self.words.count[new : self.known] >= self.floor))
        batch, lefts, rights = [], set(), set()
        while len(batch) < most and (entry := self.top(refill=not batch)):
            _, left, right, pair = entry
            if batch and (left in rights or right in lefts or left == right):
                break
            heapq.heappop(self.heap)
            batch.append(pair)
            lefts.add(left)
            rights.add(right)
            if left == right:
                break
        return batch


def learn_merges(chunks, n_merges, forbidden=()):
    """As learn_merges_simply, and fast. No merge makes one of the `forbidden` byte strings: a token that spells a special one
    could not be told from it. Ends early when no pair of neighbours is left."""
    words = Words(chunks)
    queue, merges, spelled = Queue(words), [], [bytes([b]) for b in BYTES]
    with tqdm(total=n_merges, desc="learning merges", disable=None) as bar:
        while len(merges) < n_merges and (batch := queue.next_batch(n_merges - len(merges))):
            pairs = list(zip(words.left[batch].tolist(), words.right[batch].tolist()))
            if forbidden and (
                bad := [
                    p for p, (a, b) in zip(batch, pairs) if spelled[a] + spelled[b] in forbidden
                ]
            ):
                words.count[bad] = 0
                queue.push(np.array([p for p in batch if p not in bad], np.int64))
                continue
            words.merge(batch, 256 + len(merges))
            merges += pairs
            spelled += [spelled[a] + spelled[b] for a, b in pairs]
            bar.update(len(batch))
    return merges


# ---- The merges applied to a text.
