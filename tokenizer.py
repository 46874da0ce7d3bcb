"""Byte-level BPE: learn a vocabulary from text, turn text into ids and back, read and write the files others use.

    python tokenizer.py train --data corpus.txt --vocab-size 10000 --out runs/tokenizer
    python tokenizer.py show "Hello, world" --tokenizer runs/tokenizer
    python tokenizer.py compare runs/tokenizer gpt2/vocab.bpe --data corpus.txt

Top to bottom: the idea in ten lines, the same thing fast, encoding and decoding, other people's files, the commands.
"""
import argparse
import base64
import codecs
import functools
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import re
import sys
import time
import unicodedata
from bisect import bisect_right
from collections import Counter, deque
from itertools import chain, filterfalse
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

from common import UserError, cli

# How text is cut into chunks before BPE: merges never cross a chunk's border, so no token spans two words. "gpt2" is
# Radford et al. 2019, "gpt4" is cl100k, which stops numbers at three digits and lets a newline end punctuation.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
            r"""|\s*[\r\n]|\s+(?!\S)|\s+""",
    "llama3": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
              r"""|\s*[\r\n]+|\s+(?!\S)|\s+""",
}
SPECIAL_TOKENS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>", "<|im_start|>", "<|im_end|>")
# The 256 bytes in GPT-2's order, printable ones first, each with the character that stands for it in vocab files.
# Base ids follow this order, as HF tokenizers' do, because ties between equally frequent pairs fall to lower ids.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
BYTE_TO_CHAR = {b: chr(b if i < len(PRINTABLE) else 256 + i - len(PRINTABLE)) for i, b in enumerate(BYTES)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}
BLOCK = 1 << 20              # bytes of a file read at a time
LARGEST_FILE = 64 << 20      # of a vocabulary file; the largest in use (Gemma 3, 262K tokens) has 33 MB
LARGEST_ID = 1 << 24


# ---- The idea: the most frequent pair of neighbours becomes a new symbol, again and again (Sennrich et al. 2016).

def learn_merges_simply(chunks, n_merges):
    """{chunk: count} -> [(left id, right id)], the i-th of which makes symbol 256 + i. Correct and slow."""
    words = {tuple(BYTES.index(b) for b in chunk.encode()): count for chunk, count in chunks.items()}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {tuple(replace_pair(word, best, 256 + len(merges))): count for word, count in words.items()}
        merges.append(best)
    return merges


def replace_pair(ids, pair, new):
    """replace_pair([1, 2, 3, 1, 2], (1, 2), 4) -> [4, 3, 4]; left to right, so a run 1 1 1 of pair (1, 1) -> 4 1."""
    out, i = [], 0
    while i < len(ids):
        matched = tuple(ids[i:i + 2]) == pair
        out.append(new if matched else ids[i])
        i += 2 if matched else 1
    return out


# ---- The same, fast. First: count every distinct chunk once, over blocks of the files, in several processes.

def split_chunks(texts, pattern):
    """Yield every chunk of every text (in any order), without a Python loop around the regular expressions."""
    findall, ascii_findall = splitter(pattern), ascii_splitter(pattern)
    if ascii_findall is None:
        return chain.from_iterable(map(findall, texts))
    return chain(chain.from_iterable(map(ascii_findall, filter(str.isascii, texts))),
                 chain.from_iterable(map(findall, filterfalse(str.isascii, texts))))


@functools.lru_cache
def splitter(pattern):
    """A function text -> list of chunks whose concatenation is the text. UserError for a pattern that cannot do that."""
    try:
        compiled = regex.compile(whole_text(pattern))
    except regex.error as error:
        raise UserError(f"the split pattern {pattern!r} is not a regular expression: {error}") from None
    if compiled.match("") or compiled.groups:
        raise UserError(f"the split pattern {pattern!r} must match no empty text and have no groups but (?: )")
    return compiled.findall


def whole_text(pattern):
    """The pattern made to match what it would leave out too, as one chunk, so that no text is ever lost."""
    return pattern if pattern in PATTERNS.values() else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


@functools.lru_cache
def ascii_splitter(pattern):
    """The same split for ASCII text by the standard library's `re`, which takes less than half the time of `regex`."""
    if pattern not in PATTERNS.values():
        return None
    in_sets = regex.sub(r"\[[^]]*]", lambda m: m[0].replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9"), pattern)
    return re.compile(in_sets.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]"), re.ASCII).findall


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


AFTER_NEWLINE = (rb"\n", rb"[!-~](?= )")
BEFORE_SPACE = (rb"[a-zA-Z0-9](?= )",)


def read_block(path, start, end, cuts):
    """The bytes of `path` between the borders that belong to [start, end)."""
    with open(path, "rb") as file:
        start, end = border(file, start, cuts), border(file, end, cuts)
        file.seek(start)
        return file.read(end - start)


def count_blocks(blocks, pattern):
    """[(path, start, end)] -> Counter of chunks. Lines are split one by one, as HF tokenizers does with files."""
    counts = Counter()
    for block in blocks:
        text = read_block(*block, AFTER_NEWLINE).decode("utf-8", "surrogateescape")
        counts.update(split_chunks(list(io.StringIO(text, newline="\n")), pattern))
    return counts


def count_files(paths, pattern, max_bytes=None, processes=None):
    """Counter of the chunks of all files; with max_bytes, of blocks spread evenly over them."""
    sizes = [os.path.getsize(path) for path in paths]
    share = min(1, max_bytes / max(1, sum(sizes))) if max_bytes else 1
    step = BLOCK if share == 1 else max(1 << 14, min(BLOCK, max_bytes // 64))
    grid = [(path, at, min(at + step, size)) for path, size in zip(paths, sizes) for at in range(0, size, step)]
    blocks = [block for i, block in enumerate(grid) if int((i + 1) * share) > int(i * share)]
    processes = processes or usable_cpus()
    group = min(16, -(-len(blocks) // (4 * processes))) or 1     # blocks a job: few enough to keep its Counter small
    jobs = [blocks[i:i + group] for i in range(0, len(blocks), group)]
    counts = Counter()
    with tqdm(total=len(blocks), desc="counting chunks", unit="block", disable=None) as bar:
        for part in in_processes(functools.partial(count_blocks, pattern=pattern), jobs, processes):
            for chunk, count in part.items():
                counts[chunk] += count
            bar.update(group)
    return counts


def usable_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_job = None        # in a child process: the one function it was started to run


def _start_child(function):
    global _job
    _job = function


def _run_job(argument):
    return _job(argument)


def in_processes(function, jobs, processes):
    """Yield function(job) for every job, in order, from this many processes, a bounded number of jobs ahead."""
    if processes == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    # fork hands the function over without pickling and works from a notebook; it does not exist on Windows
    method = "fork" if sys.platform == "linux" else None
    with multiprocessing.get_context(method).Pool(processes, _start_child, (function,)) as pool:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.apply_async(_run_job, (job,)))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


# ---- Then: merge, with all chunks in flat arrays and many merges at once.

class Words:
    """All distinct chunks end to end as one linked list of symbols, and every pair of neighbours ever seen.

    Position arrays, n long plus one sentinel at n that stands before every first and after every last symbol:
        symbol, next, previous; weight: how often the chunk occurs; pair: which pair starts here (-1: none)
    Pair arrays: count, left, right. A pair's positions are written once, when it first appears, and only ever lose
    members: (x, y) can only appear when the younger of x and y is made, and all its copies are made together. So
    `pair[position] == p` tells which of p's positions still hold, and no dictionary is needed.
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
        self.weight = np.repeat(np.fromiter(chunks.values(), np.int64, len(words)), np.diff(ends, prepend=0))
        self.pair = np.full(n + 1, -1, np.int32)
        self.count, self.left, self.right = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32)
        self.n_pairs = 0
        self.firsts, self.groups = [], []        # per call of add_pairs: its first pair; positions by pair, their starts
        self.add_pairs(np.flatnonzero(self.symbol[self.next[:n]] >= 0).astype(np.int32))

    def add_pairs(self, at):
        """Enter the pairs that start at these positions, none of which has been seen before."""
        key = self.symbol[at].astype(np.int64) << 32 | self.symbol[self.next[at]]
        order = np.argsort(key, kind="stable")       # stable: the positions of one pair stay in ascending order
        key, at = key[order], at[order]
        starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])[:len(key)])
        first, self.n_pairs = self.n_pairs, self.n_pairs + len(starts)
        if self.n_pairs > len(self.count):
            room = max(self.n_pairs, len(self.count) * 3 // 2) - len(self.count)
            self.count, self.left, self.right = (
                np.append(a, np.zeros(room, a.dtype)) for a in (self.count, self.left, self.right))
        if len(at):
            self.count[first:self.n_pairs] = np.add.reduceat(self.weight[at], starts)
        self.left[first:self.n_pairs], self.right[first:self.n_pairs] = key[starts] >> 32, key[starts] & 0xffffffff
        self.pair[at] = np.repeat(np.arange(first, self.n_pairs, dtype=np.int32), np.diff(starts, append=len(at)))
        self.firsts.append(first)
        self.groups.append((at, np.append(starts, len(at))))

    def positions(self, pair):
        """Where to merge this pair: its positions that still hold, and of a run x x x x every second one."""
        group = bisect_right(self.firsts, pair) - 1
        at, starts = self.groups[group]
        at = at[slice(*starts[pair - self.firsts[group]:][:2])]
        at = at[self.pair[at] == pair]
        if self.left[pair] == self.right[pair]:
            index = np.arange(len(at))
            run = np.maximum.accumulate(np.where(self.pair[self.previous[at]] != pair, index, 0))
            at = at[(index - run) % 2 == 0]
        return at

    def merge(self, batch, new):
        """Merge the pairs of the batch, all at once, into symbols new, new + 1, ..."""
        where = [self.positions(pair) for pair in batch]
        at = np.concatenate(where)                                        # left halves, which become the new symbols
        gone = self.next[at]                                              # right halves
        after = self.next[gone]
        self.symbol[at] = np.repeat(np.arange(new, new + len(batch), dtype=np.int32), list(map(len, where)))
        self.symbol[gone] = -1
        self.next[at], self.previous[after] = after, at
        before = self.previous[at]
        before = before[(self.symbol[before] >= 0) & (self.symbol[before] < new)]  # a merged one is in `at` already
        paired = gone[self.pair[gone] >= 0]
        for stale in (paired, before):                                    # (right, y) and (x, left) are no more
            np.subtract.at(self.count, self.pair[stale], self.weight[stale])
        self.pair[gone] = self.pair[at] = -1
        self.count[batch] = 0
        self.add_pairs(np.concatenate([at[self.symbol[after] >= 0], before]))


class Queue:
    """The pairs in the order BPE takes them: most frequent first, then lowest ids. A heap with lazy invalidation:
    counts only fall, so an entry is checked when it surfaces. Only pairs at or above a floor are in it, since most
    pairs are never merged; when it runs empty the floor sinks."""

    def __init__(self, words):
        self.words, self.heap, self.floor, self.known = words, [], None, 0

    def push(self, pairs):
        w = self.words
        for entry in zip((-w.count[pairs]).tolist(), w.left[pairs].tolist(), w.right[pairs].tolist(), pairs.tolist()):
            heapq.heappush(self.heap, entry)

    def refresh(self):
        """Take in the pairs that have appeared since."""
        new, self.known = self.known, self.words.n_pairs
        if self.floor is not None:
            self.push(new + np.flatnonzero(self.words.count[new:self.known] >= self.floor))

    def top(self, refill):
        """(-count, left, right, pair) of the best pair, or None when no pair is left (at or above the floor, unless
        it may sink: not while a batch is being gathered, whose pairs would come in again)."""
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
            self.floor = max(1, int(np.partition(count[:self.known], best)[best]))
            self.push(np.flatnonzero(count[:self.known] >= self.floor))

    def next_batch(self, most):
        """The next pairs to merge, as far ahead as their order is certain.

        Merging (a, b) changes the counts of pairs (x, a) and (b, y) only, and the pairs it makes, (x, ab) and (ab, y),
        are no more frequent than (x, a) and (b, y) were. So pairs in queue order can be merged together as long as no
        left symbol among them is also a right symbol: none changes another's count or shares a position with it, and
        every (x, a) and (b, y) is still in the queue behind the last of them, with the pairs made behind it."""
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
    """As learn_merges_simply, some 10,000 times faster. No merge makes one of the `forbidden` byte strings: a token that
    spells a special one could not be told from it. Ends early when no pair of neighbours is left."""
    words = Words(chunks)
    queue, merges, spelled = Queue(words), [], [bytes([b]) for b in BYTES]
    with tqdm(total=n_merges, desc="learning merges", disable=None) as bar:
        while len(merges) < n_merges:
            queue.refresh()
            batch = queue.next_batch(n_merges - len(merges))
            if not batch:
                break
            pairs = list(zip(words.left[batch].tolist(), words.right[batch].tolist()))
            if forbidden and (bad := [p for p, (a, b) in zip(batch, pairs) if spelled[a] + spelled[b] in forbidden]):
                words.count[bad] = 0
                queue.push(np.array([p for p in batch if p not in bad], np.int64))
                continue
            words.merge(batch, 256 + len(merges))
            merges += pairs
            spelled += [spelled[a] + spelled[b] for a, b in pairs]
            bar.update(len(batch))
    return merges
