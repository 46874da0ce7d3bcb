"""The fast learner of BPE merges: the same merges as tokenizer.learn_merges_simply, for gigabytes.

    python tokenizer.py train --data corpus.txt --vocab-size 10000 --out runs/tokenizer    # runs it

Two steps. First every distinct chunk (about: word) is counted, over parts of the files in several
processes. Then the chunks lie end to end in flat arrays, and many merges are done at once.
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
import regex
from tqdm import tqdm

from common import BLOCK, in_processes, usable_cpus, well_formed
from tokenizer import BETWEEN_CHUNKS, BYTES, PATTERNS, splitter
from training.corpora import text_parts

# ---- Counting chunks.


def count_chunks(texts, paths, pattern, processes=None):
    """Counter of the chunks of texts, and of files, each line of which is a text, as in HF
    tokenizers."""
    size = sum(map(os.path.getsize, paths))
    n_jobs = 4 * (processes or usable_cpus())
    most = min(16 * BLOCK, size // n_jobs)  # in a job: few jobs, so that Counters stay small
    of_files = batches(text_parts(paths, (rb"\n", BETWEEN_CHUNKS)), max(BLOCK, most))
    jobs = chain(of_files, batches(parts_of_texts(texts, pattern), BLOCK))
    count = functools.partial(count_job, pattern=pattern)
    counters = in_processes(count, jobs, processes)
    total = Counter()
    for counter in tqdm(counters, "counting chunks", unit="job", disable=None):
        total.update(counter)
    return total


def batches(parts, size):
    """Lists of parts that are `size` long together, or a little more."""
    batch = []
    held = 0
    for part in parts:
        batch.append(part)
        held += len(part)
        if held >= size:
            yield batch
            batch = []
            held = 0
    if batch:
        yield batch


def parts_of_texts(texts, pattern):
    """The texts; a long one in parts of about a BLOCK of characters, if the pattern is one of ours,
    for which a letter before a space always ends a chunk."""
    known = pattern in PATTERNS.values()
    parts = re.compile(rf"(?s).{{{BLOCK},}}?[a-zA-Z](?= )|.+" if known else "(?s).+")
    for text in texts:
        for part in parts.finditer(well_formed(text)):
            yield part[0]


def count_job(job, pattern):
    """Counter of the chunks of a job: a list of texts, or of parts of files, which are bytes."""
    texts = job
    if not isinstance(job[0], str):
        text = b"".join(job).decode("utf-8", "surrogateescape")
        texts = list(io.StringIO(text, newline="\n"))  # lines
    in_ascii = map(ascii_splitter(pattern), filter(str.isascii, texts))
    others = map(splitter(pattern), filterfalse(str.isascii, texts))
    return Counter(chain.from_iterable(chain(in_ascii, others)))


@functools.lru_cache
def ascii_splitter(pattern):
    """tokenizer.splitter for ASCII text, by the standard library's `re`, which takes half the time
    of `regex` and knows no categories: \\p{L} becomes a-zA-Z."""
    if pattern not in PATTERNS.values():
        return splitter(pattern)
    letters = {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9"}
    in_sets = regex.sub(r"(?<!\[[^]]*)\\p\{(\w+)}", r"[\\p{\1}]", pattern)  # \p{L} -> [\p{L}]
    spelled = regex.sub(r"\\p\{(\w+)}", lambda match: letters.get(match[1], ""), in_sets)
    return re.compile(spelled, re.ASCII).findall


# ---- Merging.


def learn_merges(chunks, n_merges, forbidden=()):
    """As learn_merges_simply, and fast; ends early when no pair of neighbours is left.

    No merge makes one of the `forbidden` byte strings: a token that spells a special one could not
    be told from it."""
    words = Words(chunks)
    queue = MergeQueue(words)
    merges = []
    spelled = [bytes([b]) for b in BYTES]
    with tqdm(total=n_merges, desc="learning merges", disable=None) as bar:
        while len(merges) < n_merges:
            batch = queue.next_batch(n_merges - len(merges))
            if not batch:
                break
            pairs = [divmod(key, TWO_TO_32) for key in words.key[batch].tolist()]
            made = [spelled[left] + spelled[right] for left, right in pairs]
            refused = [pair for pair, token in zip(batch, made) if token in forbidden]
            if refused:
                words.count[refused] = 0  # so that they never surface again
                queue.push(np.setdiff1d(batch, refused))
                continue
            words.merge(batch, 256 + len(merges))
            merges += pairs
            spelled += made
            bar.update(len(batch))
    return merges


TWO_TO_32 = 1 << 32


class Words:
    """All distinct chunks end to end as one linked list of symbols, and every pair of neighbours.

    By position, n of them and a sentinel n before every first and after every last symbol:
        symbol          (n + 1,) int32 ids; -1 where a right half has been merged away
        next, previous  (n + 1,) int32 positions
        weight          (n,) int64: how often the chunk occurs
        pair            (n + 1,) int32: the number of the pair that starts here, -1 for none
    By pair, in the order in which pairs appeared:
        count           int64
        key             int64: left symbol * 2^32 + right symbol; keys are in the order of pairs
    A pair's positions are written once, when it appears, and only ever lose members: (x, y) can
    only appear when the younger of x and y is made, and all its copies are made together. So
    `pair[position] == p` tells which of p's positions still hold, and no dictionary is needed.
    """

    def __init__(self, chunks):
        words = [chunk.encode("utf-8", "surrogateescape") for chunk in chunks]
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        times = np.fromiter(chunks.values(), np.int64, len(words))
        ends = np.cumsum(lengths)
        byte_to_id = np.argsort(np.array(BYTES)).astype(np.int32)
        symbol = byte_to_id[np.frombuffer(b"".join(words), np.uint8)]
        n = len(symbol)
        self.symbol = np.append(symbol, np.int32(-1))
        self.next = np.arange(1, n + 2, dtype=np.int32)
        self.next[ends - 1] = n
        self.next[n] = n
        self.previous = np.arange(-1, n, dtype=np.int32)
        self.previous[ends - lengths] = n
        self.weight = np.repeat(times, lengths)
        self.pair = np.full(n + 1, -1, np.int32)
        self.n_pairs = 0
        self.count = np.zeros(0, np.int64)
        self.key = np.zeros(0, np.int64)
        # One group a call of add_pairs: its first pair, and (positions by pair, where each starts).
        self.firsts = []
        self.groups = []
        self.add_pairs(np.flatnonzero(self.symbol[self.next[:n]] >= 0).astype(np.int32))

    def add_pairs(self, at):
        """Enter the pairs that start at these positions, none of which has been seen before."""
        key = self.symbol[at].astype(np.int64) << 32 | self.symbol[self.next[at]]
        order = np.argsort(key, kind="stable")  # a pair's positions stay in ascending order
        key, at = key[order], at[order]
        starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
        first = self.n_pairs
        end = self.n_pairs = first + len(starts)
        if end > len(self.count):
            self.count = grown(self.count, end)
            self.key = grown(self.key, end)
        if len(at):
            self.count[first:end] = np.add.reduceat(self.weight[at], starts)
        self.key[first:end] = key[starts]
        copies = np.diff(starts, append=len(at))
        self.pair[at] = np.repeat(np.arange(first, end, dtype=np.int32), copies)
        self.firsts.append(first)
        self.groups.append((at, np.append(starts, len(at))))

    def positions(self, pair):
        """Where to merge this pair: its positions that still hold, every second one of a run."""
        group = bisect_right(self.firsts, pair) - 1
        at, starts = self.groups[group]
        index = pair - self.firsts[group]
        at = at[starts[index] : starts[index + 1]]
        at = at[self.pair[at] == pair]
        left, right = divmod(self.key[pair], TWO_TO_32)
        if left == right:  # in x x x x the pair is there three times
            index = np.arange(len(at))
            begins = self.pair[self.previous[at]] != pair
            run = np.maximum.accumulate(np.where(begins, index, 0))
            at = at[(index - run) % 2 == 0]
        return at

    def merge(self, batch, new):
        """Merge the pairs of the batch, all at once, into symbols new, new + 1, ..."""
        where = [self.positions(pair) for pair in batch]
        made = np.arange(new, new + len(batch), dtype=np.int32)
        at = np.concatenate(where)  # left halves, which become the new symbols
        gone = self.next[at]  # right halves
        after = self.next[gone]
        self.symbol[at] = np.repeat(made, list(map(len, where)))
        self.symbol[gone] = -1
        self.next[at] = after
        self.previous[after] = at
        before = self.previous[at]
        lefts = self.symbol[before]
        before = before[(lefts >= 0) & (lefts < new)]  # a symbol just made is in `at` already
        paired = gone[self.pair[gone] >= 0]
        for stale in (paired, before):  # (right, y) and (x, left) are no more
            np.subtract.at(self.count, self.pair[stale], self.weight[stale])
        self.pair[gone] = -1
        self.pair[at] = -1
        self.count[batch] = 0
        self.add_pairs(np.concatenate([at[self.symbol[after] >= 0], before]))


def grown(array, n):
    """The array with zeros behind it: n long at least, and by half longer, to be copied seldom."""
    more = max(n, len(array) * 3 // 2) - len(array)
    return np.append(array, np.zeros(more, array.dtype))


class MergeQueue:
    """The pairs in the order BPE takes them: most frequent first, then lowest ids.

    A heap of (-count, key, pair) with lazy invalidation: counts only fall, so an entry is
    checked when it surfaces. Only pairs whose count is at least `floor` are in it, since most pairs
    are never merged; when it runs empty, the floor sinks."""

    def __init__(self, words):
        self.words = words
        self.heap = []
        self.floor = np.inf  # until the first refill
        self.known = 0  # pairs that have been looked at

    def push(self, pairs):
        counts = (-self.words.count[pairs]).tolist()
        for entry in zip(counts, self.words.key[pairs].tolist(), pairs.tolist()):
            heapq.heappush(self.heap, entry)

    def top(self):
        """The entry of the best pair at or above the floor, or None."""
        heap, count = self.heap, self.words.count
        while heap:
            negative, key, pair = heap[0]
            now = int(count[pair])
            if -negative == now:
                return heap[0]
            if now >= self.floor:
                heapq.heapreplace(heap, (-now, key, pair))
            else:
                heapq.heappop(heap)
        return None

    def refill(self):
        """Sink the floor, so that about 4,096 pairs are at or above it, and take these in."""
        count = self.words.count[: self.known]
        best = max(0, self.known - 4096)
        self.floor = max(1, int(np.partition(count, best)[best]))
        self.push(np.flatnonzero(count >= self.floor))

    def take_new(self):
        """Look at the pairs that have appeared since the last batch."""
        start, self.known = self.known, self.words.n_pairs
        counts = self.words.count[start : self.known]
        self.push(start + np.flatnonzero(counts >= self.floor))

    def next_batch(self, most):
        """The next pairs to merge, as far ahead as their order is certain; [] when none is left.

        Merging (a, b) changes the counts of pairs (x, a) and (b, y) only, and the pairs it makes,
        (x, ab) and (ab, y), are no more frequent than (x, a) and (b, y) were. So pairs in queue
        order can be merged together as long as no left symbol among them is also a right symbol:
        none changes another's count or shares a position with it, and every (x, a) and (b, y) is
        still in the queue behind the last of them, with the pairs made behind it."""
        self.take_new()
        while self.known and self.floor != 1 and self.top() is None:
            self.refill()
        batch, lefts, rights = [], set(), set()
        while len(batch) < most:
            best = self.top()
            if best is None:  # no refill here: the pairs of the batch would come in again
                break
            _, key, pair = best
            left, right = divmod(key, TWO_TO_32)
            if batch and (left in rights or right in lefts or left == right):
                break
            heapq.heappop(self.heap)
            batch.append(pair)
            lefts.add(left)
            rights.add(right)
            if left == right:
                break
        return batch
