"""Byte-level BPE, the file to open in order to understand it: the idea in ten lines, then the same thing fast.

    python tokenizer.py train --data corpus.txt --vocab-size 10000 --out runs/tokenizer        # runs it

A text is cut into chunks (about: words), equal chunks are counted once, and the most frequent pair of neighbouring symbols,
bytes at first, becomes a new symbol, again and again.
"""

import functools
import heapq
import io
import multiprocessing
import os
import re
import sys
from bisect import bisect_right
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, filterfalse, islice, pairwise

import numpy as np
import regex
from tqdm import tqdm

from common import UserError

# How text is cut into chunks before BPE: merges never cross a chunk's border, so no token spans two words. "gpt2" is Radford et
# al. 2019, "gpt4" is cl100k, which stops numbers at three digits and lets a newline end punctuation.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""",
    "llama3": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "tekken": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}
PATTERNS["qwen2"] = PATTERNS["llama3"].replace("{1,3}", "")  # digits one by one
# The 256 bytes in GPT-2's order, printable ones first. Base ids follow it, as HF tokenizers' do, because ties between equally
# frequent pairs fall to lower ids.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
BLOCK = 1 << 20  # bytes of a file read at a time


# ---- The idea: the most frequent pair of neighbours becomes a new symbol, again and again (Sennrich et al. 2016).


def learn_merges_simply(chunks, n_merges):
    """{chunk: count} -> [(left id, right id)], the i-th of which makes symbol 256 + i. Correct and slow."""
    words = {
        tuple(BYTES.index(b) for b in chunk.encode()): count for chunk, count in chunks.items()
    }
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {
            tuple(replace_pair(word, best, 256 + len(merges))): count
            for word, count in words.items()
        }
        merges.append(best)
    return merges


def replace_pair(ids, pair, new):
    """replace_pair([1, 2, 3, 1, 2], (1, 2), 4) -> [4, 3, 4]; left to right, so a run 1 1 1 of pair (1, 1) -> 4 1."""
    out, i = [], 0
    while i < len(ids):
        matched = tuple(ids[i : i + 2]) == pair
        out.append(new if matched else ids[i])
        i += 2 if matched else 1
    return out


# ---- The same, fast. First: count every distinct chunk once, over blocks of the files, in several processes.


@functools.lru_cache
def splitter(pattern, ascii=False):
    """A function text -> list of chunks that add up to the text. UserError for a pattern that cannot do that.

    ascii: for ASCII text, which the standard library's `re` splits in half the time of `regex`."""
    known = pattern in PATTERNS.values()
    try:
        compiled = regex.compile(pattern)
        if compiled.match("") or compiled.groups:
            raise UserError(
                f"the split pattern {pattern!r} must match no empty text and have no groups but (?: )"
            )
        if not known:  # what a pattern leaves out becomes a chunk too, so that no text is lost
            compiled = regex.compile(rf"{pattern}|(?:(?!{pattern})[\s\S])+")
    except regex.error as error:
        raise UserError(
            f"the split pattern {pattern!r} is not a regular expression: {error}"
        ) from None
    if known and ascii:
        spelled = {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9"}
        bare = regex.sub(
            r"(?<!\[[^]]*)\\p\{(\w+)}", r"[\\p{\1}]", pattern
        )  # every category inside a set
        return re.compile(
            regex.sub(r"\\p\{(\w+)}", lambda m: spelled.get(m[1], ""), bare), re.ASCII
        ).findall

    def split(text):
        chunks = compiled.findall(text)
        if sum(map(len, chunks)) != len(text):  # after an empty match a character is skipped
            raise UserError(
                f"the split pattern {pattern!r} matches empty text and loses what follows"
            )
        return chunks

    return compiled.findall if known else split


def border(file, at, cuts):
    """The first place at or after byte `at` where a block may end: it depends on the file alone, never on who asks.
    `cuts` are tried in turn on the next BLOCK bytes; between two characters is always possible."""
    if at == 0:
        return 0
    file.seek(at - 1)
    window = file.read(BLOCK)
    for cut in (*cuts, rb"(?s).(?=[\x00-\x7f\xc0-\xff])"):
        if found := re.search(cut, window):
            return at - 1 + found.end()
    return at - 1 + len(window)


# Where cutting a text leaves its chunks as they were: a visible character before a space, a letter or digit before a newline, a
# Chinese character or Hangul before a newline or comma. Lines are always cut when learning.
BEFORE_SPACE = rb"[!-~](?= )|[\xc3-\xdf][\x80-\xbf](?= )"
BETWEEN_CHUNKS = (
    BEFORE_SPACE
    + rb"|[a-zA-Z0-9](?=\n)|[\xe5-\xe9\xeb\xec][\x80-\xbf]{2}(?=[ \n]|\xe3\x80[\x81\x82]|\xef\xbc\x8c)"
)


def blocks_of(paths, step):
    """[(path, start, end)]: the files in parts of `step` bytes."""
    sizes = [os.path.getsize(path) for path in paths]
    return [
        (path, at, min(at + step, size))
        for path, size in zip(paths, sizes)
        for at in range(0, size, step)
    ]


def read_block(block, cuts):
    """The bytes of a file between the borders that belong to a block (path, start, end)."""
    with open(block[0], "rb") as file:
        start, end = (border(file, at, cuts) for at in block[1:])
        file.seek(start)
        return file.read(end - start)


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


def usable_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_job = None  # in a child process: the one function it was started to run


def _start_child(function):
    global _job
    _job = function


def _run_job(argument):
    return _job(argument)


def in_processes(function, jobs, processes=None):
    """Yield function(job) for every job, in order, from this many processes, a bounded number of jobs ahead."""
    jobs, processes = iter(jobs), processes or usable_cpus()
    first = list(islice(jobs, 2))
    if processes == 1 or len(first) < 2:
        yield from map(function, chain(first, jobs))
        return
    # fork hands the function over without pickling and works from a notebook; it does not exist on Windows
    method = "fork" if sys.platform == "linux" else None
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context(method), _start_child, (function,)
    )
    try:
        waiting = deque()
        for job in chain(first, jobs):
            waiting.append(pool.submit(_run_job, job))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:  # multiprocessing.Pool would wait for ever
        raise UserError(
            "a worker process was killed, perhaps for want of memory: use fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


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


def merge_by_rank(ids, merges):
    """Apply {(left, right): (rank, new)} to a list of ids: lowest rank first, leftmost first. O(n log n), so that a megabyte of
    one letter takes seconds, not days."""
    ids, n = list(ids), len(ids)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    waiting, ranks = {}, []  # rank -> left positions; a heap of the ranks

    def note(left, right):
        if left >= 0 and right < n and (merge := merges.get((ids[left], ids[right]))):
            if merge[0] not in waiting:
                waiting[merge[0]] = []
                heapq.heappush(ranks, merge[0])
            waiting[merge[0]].append(left)

    for i in range(n - 1):
        note(i, i + 1)
    while ranks:
        rank = heapq.heappop(ranks)
        places = sorted(waiting.pop(rank))
        for done, i in enumerate(places):
            if ranks and ranks[0] < rank:  # a merge just made way for an earlier one
                waiting[rank] = places[done:]
                heapq.heappush(ranks, rank)
                break
            j = after[i]
            merge = merges.get((ids[i], ids[j])) if j < n else None
            if merge is None or merge[0] != rank:  # one of the two has been merged since
                continue
            ids[i], ids[j], after[i] = merge[1], -1, after[j]
            if after[i] < n:
                before[after[i]] = i
            note(before[i], i)
            note(i, after[i])
    return [i for i in ids if i >= 0]


def well_formed(text):
    """Lone surrogates, which UTF-8 cannot hold, become U+FFFD, paired ones the character they mean, as in tiktoken."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
