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
from itertools import chain, filterfalse, islice, pairwise
from itertools import count as integers
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
    "qwen2": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
             r"""|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "tekken": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
              r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"""
              r"""| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}
SPECIAL_TOKENS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>", "<|im_start|>", "<|im_end|>")
# The 256 bytes in GPT-2's order, printable ones first, each with the character that stands for it in vocab files.
# Base ids follow this order, as HF tokenizers' do, because ties between equally frequent pairs fall to lower ids.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
BYTE_TO_CHAR = {b: chr(b if i < len(PRINTABLE) else 256 + i - len(PRINTABLE)) for i, b in enumerate(BYTES)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}
LETTER_BEFORE_SPACE = re.compile("[a-zA-Z](?= )")
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
            for pair in pairwise(word):
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
    """A function text -> list of chunks that add up to the text. UserError for a pattern that cannot do that."""
    try:
        regex.compile(pattern)
        compiled = regex.compile(whole_text(pattern))
    except regex.error as error:
        raise UserError(f"the split pattern {pattern!r} is not a regular expression: {error}") from None
    if compiled.match("") or compiled.groups:
        raise UserError(f"the split pattern {pattern!r} must match no empty text and have no groups but (?: )")

    def split(text):
        chunks = compiled.findall(text)
        if sum(map(len, chunks)) != len(text):                   # after an empty match a character is skipped
            raise UserError(f"the split pattern {pattern!r} matches empty text and loses what follows")
        return chunks
    return compiled.findall if pattern in PATTERNS.values() else split


def whole_text(pattern):
    """The pattern made to match what it would leave out too, as one chunk, so that no text is ever lost."""
    return pattern if pattern in PATTERNS.values() else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


@functools.lru_cache
def ascii_splitter(pattern):
    """The same split for ASCII text by the standard library's `re`, which takes less than half the time of `regex`."""
    if pattern not in PATTERNS.values():
        return None
    ascii_part = {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9"}
    bare = regex.sub(r"(?<!\[[^]]*)\\p\{(\w+)}", r"[\\p{\1}]", pattern)             # every category inside a set
    return re.compile(regex.sub(r"\\p\{(\w+)}", lambda m: ascii_part.get(m[1], ""), bare), re.ASCII).findall


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


# Where cutting a text leaves its chunks as they were: a visible character before a space, a letter or digit before a
# newline, a Chinese character or Hangul before a newline or comma. Lines are always cut when learning.
BEFORE_SPACE = rb"[!-~](?= )|[\xc3-\xdf][\x80-\xbf](?= )"
BETWEEN_CHUNKS = (BEFORE_SPACE + rb"|[a-zA-Z0-9](?=\n)"
                  rb"|[\xe5-\xe9\xeb\xec][\x80-\xbf]{2}(?=[ \n]|\xe3\x80[\x81\x82]|\xef\xbc\x8c)")


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
        text = read_block(*block, (rb"\n", BETWEEN_CHUNKS)).decode("utf-8", "surrogateescape")
        counts.update(split_chunks(list(io.StringIO(text, newline="\n")), pattern))
    return counts


def count_texts(texts, pattern):
    return Counter(split_chunks(texts, pattern))


def batches(texts, pattern):
    """Lists of texts, about a BLOCK of characters in each; a longer text in parts, if the pattern is a known one."""
    batch, size = [], 0
    for text in map(well_formed, texts):
        start, known = 0, pattern in PATTERNS.values()
        while known and len(text) - start > BLOCK and (cut := LETTER_BEFORE_SPACE.search(text, start + BLOCK)):
            yield [text[start:cut.end()]]
            start = cut.end()
        batch.append(text[start:])
        size += len(text) - start
        if size > BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
    return add_up(in_processes(functools.partial(count_blocks, pattern=pattern), jobs, processes), len(jobs))


def add_up(counters, n=None):
    total = Counter()
    for counter in tqdm(counters, total=n, desc="counting chunks", unit="job", disable=None):
        total.update(counter)
    return total


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
    jobs = iter(jobs)
    first = list(islice(jobs, 2))
    if processes == 1 or len(first) < 2:
        yield from map(function, chain(first, jobs))
        return
    # fork hands the function over without pickling and works from a notebook; it does not exist on Windows
    method = "fork" if sys.platform == "linux" else None
    with multiprocessing.get_context(method).Pool(processes, _start_child, (function,)) as pool:
        waiting = deque()
        for job in chain(first, jobs):
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
        self.firsts, self.groups = [], []        # per call of add_pairs: its first pair; positions by pair, and starts
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
    """As learn_merges_simply, and fast. No merge makes one of the `forbidden` byte strings: a token that spells a
    special one could not be told from it. Ends early when no pair of neighbours is left."""
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


# ---- Text to ids and back.

def merge_by_rank(ids, merges):
    """Apply {(left, right): (rank, new)} to a list of ids: lowest rank first, leftmost first. O(n log n), so that a
    megabyte of one letter takes seconds, not days."""
    ids, n = list(ids), len(ids)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    waiting, ranks = {}, []                            # rank -> left positions; a heap of the ranks

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
            if ranks and ranks[0] < rank:              # a merge just made way for an earlier one
                waiting[rank] = places[done:]
                heapq.heappush(ranks, rank)
                break
            j = after[i]
            merge = merges.get((ids[i], ids[j])) if j < n else None
            if merge is None or merge[0] != rank:      # one of the two has been merged since
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


class Tokenizer:
    """Text <-> ids. Made by load, train or char.

    kind            "bytes": tokens are byte strings, text is split by `patterns` first (GPT-2, Llama 3, Qwen)
                    "pieces": tokens are text with ▁ for space, bytes as <0x0A> where no token fits (Llama 2, Mistral)
                    "chars": one token per character
    vocab           {token: id}, keys bytes or str by kind, special and added tokens not among them
    special         {text: id} of tokens that no text ever turns into; whoever wants one puts its id there
    added           {text: id} of tokens matched in text before anything else (<think> in Qwen)
    merges          {(left id, right id): (rank, new id)}
    whole_chunks    a chunk that is a token becomes it, whatever the merges say (Llama 3, tiktoken)
    normalizer      [(operation, arguments...)], see `normalize`
    config          what else tokenizer_config.json holds
    """

    def __init__(self, kind, vocab, merges=None, *, patterns=(), special=None, added=None, whole_chunks=False,
                 normalizer=(), strip_space=False, unknown=None, config=None):
        self.kind, self.vocab, self.patterns = kind, vocab, tuple(patterns)
        self.special, self.added = dict(special or {}), dict(added or {})
        self.whole_chunks, self.normalizer, self.strip_space = whole_chunks, list(normalizer), strip_space
        self.unknown, self.config = unknown, dict(config or {})
        if merges is not None:                                   # else recovered from the vocabulary when first needed
            self.merges = merges
        self.source = None                                       # the tokenizer.json this was read from, as it was
        names = dict(chain(self.added.items(), self.special.items()))
        check_ids(chain(vocab.values(), names.values()), len(vocab) + len(names))
        self.vocab_size = max(chain(vocab.values(), names.values()), default=-1) + 1
        self._bytes, self._shown = [b""] * self.vocab_size, [b""] * self.vocab_size
        for token, i in vocab.items():
            self._bytes[i] = self._shown[i] = self._spelling(token)
        for name, i in names.items():
            self._shown[i] = name.encode()
            self._bytes[i] = name.encode() if name in self.added else b""
        self.special_ids = set(self.special.values())
        by_length = sorted(map(re.escape, self.added), key=len, reverse=True)
        self._split_added = re.compile(f"({'|'.join(by_length)})").split
        self._cache = {}
        for pattern in self.patterns:
            splitter(pattern)                                    # an unusable one is refused now

    def _spelling(self, token):
        if self.kind == "bytes":
            return token
        if self.kind == "pieces":
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        return token.encode()

    # -- made from text
    @classmethod
    def train(cls, texts=(), vocab_size=10_000, pattern="gpt4", special_tokens=SPECIAL_TOKENS, *, files=(),
              max_bytes=None, processes=None):
        """Learn a byte-level BPE of `vocab_size` ids from an iterable of str and from files.

        pattern: a name in PATTERNS or a regular expression. special_tokens: a list, which gets ids 0, 1, ..., or a
        dict {text: id}. max_bytes: take this much of the files, evenly spread. A chunk never spans two texts, nor two
        lines of a file. Same merges, for the same texts or files, as HF tokenizers' BpeTrainer, for any number of
        processes. UserError: a vocabulary smaller than 256 + special tokens, no text, an unusable pattern."""
        pattern = PATTERNS.get(pattern, pattern)
        special_tokens = number_special(special_tokens)
        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(special_tokens)} special "
                            f"tokens need {256 + len(special_tokens)}")
        if max(special_tokens.values(), default=0) >= vocab_size:
            raise UserError(f"special tokens must have ids below the vocabulary size {vocab_size}: {special_tokens}")
        splitter(pattern)
        files = [files] if isinstance(files, (str, Path)) else files
        chunks = count_files(files, pattern, max_bytes, processes)
        jobs = batches([texts] if isinstance(texts, str) else texts, pattern)
        chunks.update(add_up(in_processes(functools.partial(count_texts, pattern=pattern), jobs,
                                          processes or usable_cpus())))
        if not chunks:
            raise UserError("there is no text to learn from: " + (", ".join(map(str, files)) or "no texts given"))
        merges = learn_merges(chunks, n_merges, {name.encode() for name in special_tokens})
        if len(merges) < n_merges:
            fits = 256 + len(special_tokens) + len(merges)
            print(f"asked for {n_merges:,} merges, the text supports {len(merges):,}: stopped early with a vocabulary "
                  f"of {fits:,} (--vocab-size {fits} asks for just that)", file=sys.stderr)
        taken = set(special_tokens.values())
        ids = list(islice((i for i in integers() if i not in taken), 256 + len(merges)))
        spelled = [bytes([b]) for b in BYTES]
        for left, right in merges:
            spelled.append(spelled[left] + spelled[right])
        ranked = {(ids[a], ids[b]): (rank, ids[256 + rank]) for rank, (a, b) in enumerate(merges)}
        return cls("bytes", dict(zip(spelled, ids)), ranked, patterns=[pattern], special=special_tokens,
                   config=default_config(special_tokens))

    @classmethod
    def char(cls, text, special_tokens=()):
        """One id per distinct character, in code point order, after the special tokens."""
        if not text:
            raise UserError("there is no text to take the characters from")
        special = number_special(special_tokens)
        characters = sorted(set(well_formed(text)))
        if clash := special.keys() & set(characters):
            raise UserError(f"special tokens that are characters of the text: {sorted(clash)}")
        free = (i for i in integers() if i not in special.values())
        return cls("chars", dict(zip(characters, free)), {}, special=special, config=default_config(special))

    # -- encoding
    def encode(self, text, bos=False, eos=False):
        """str -> list of ids. Never a special id but the bos and eos asked for, whatever the text says.
        UserError for a character that a character tokenizer does not know, or a bos or eos it does not have."""
        ids = self._encode(text)
        if bos:
            ids.insert(0, self._required("bos"))
        if eos:
            ids.append(self._required("eos"))
        return ids

    def encode_bytes(self, data, where="first"):
        """bytes -> ids. Bytes that are no UTF-8 become byte tokens and survive decode_bytes. where: see `normalize`."""
        try:
            return self._encode(data.decode(), where)
        except UnicodeDecodeError:
            parts = re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))
        ids = []
        for i, part in enumerate(parts):
            if i % 2 == 0:
                ids += self._encode(part, "inside" if i else where)
            else:
                ids += [self._byte_id(b) for b in part.encode("utf-8", "surrogateescape")]
        return ids

    def encode_blocks(self, paths, processes=None):
        """Yield arrays of ids (uint16, or uint32 above 65,536 ids) whose concatenation is the ids of the files, file
        after file, each as encode_bytes would have it; blocks of them are encoded in parallel processes."""
        step = BLOCK if self._cuts else sys.maxsize
        jobs = [(path, at, min(at + step, os.path.getsize(path)))
                for path in paths for at in range(0, os.path.getsize(path), step)]
        _ = self.fast                                            # built here once, not in every process
        return in_processes(self._encode_block, jobs, processes or usable_cpus())

    def encode_corpus(self, paths, processes=None):
        """All ids of the files as one array, see encode_blocks."""
        return np.concatenate([np.zeros(0, self.dtype), *self.encode_blocks(paths, processes)])

    @property
    def dtype(self):
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _encode_block(self, block):
        data = read_block(*block, self._cuts)
        return np.array(self.encode_bytes(data, "inside" if block[1] else "first"), self.dtype)

    @functools.cached_property
    def _cuts(self):
        """Where a file may be cut without changing any id, for `border`; () if that is not certain."""
        cuts = BEFORE_SPACE if self.kind == "pieces" else BETWEEN_CHUNKS
        crossed = any(re.search(cuts, name.encode()) for name in self.added)
        if crossed or (self.kind == "pieces" and not self._piece_splitter):
            return ()
        samples = [(a, b) for a in ("a", "Zb", "1", ".a", "\na", "'s", " a", "ü", "中")
                   for b in (" a", " 1", " .", " \n", "  ", "   a", "\n", "\na", "\n\na", "、a")]
        kept = all(splitter(p)(a) + splitter(p)(b) == splitter(p)(a + b) for p in self.patterns for a, b in samples)
        return (cuts,) if kept else ()

    def _encode(self, text, where="first"):
        text = well_formed(text)
        if not self.added:
            return self._encode_plain(text, where)
        ids = []
        for i, part in enumerate(self._split_added(text)):                # every second part is an added token
            ids += [self.added[part]] if i % 2 else self._encode_plain(part, "later" if i else where)
        return ids

    def _encode_plain(self, text, where):
        text = normalize(text, self.normalizer, where)
        if self.kind == "chars":
            return self._encode_chars(text)
        if self.fast is None:
            return self.encode_slowly(text)
        if long_gap(text):
            return list(chain.from_iterable(map(self.fast._encode_single_piece, self._split(text, self.patterns))))
        if len(self.patterns) == 1:
            return self.fast.encode_ordinary(text)
        return list(chain.from_iterable(map(self.fast.encode_ordinary, self._split(text, self.patterns[:-1]))))

    def _encode_chars(self, text):
        try:
            return [self.vocab[c] for c in text]
        except KeyError:
            unknown = sorted(set(text) - self.vocab.keys())
            shown = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise UserError(f"{len(unknown)} of the text's characters not in this tokenizer's {len(self.vocab)}: "
                            f"{shown}; remove them, or make the tokenizer from text that has them") from None

    def _split(self, text, patterns):
        chunks = [text]
        for pattern in patterns:
            chunks = chain.from_iterable(map(splitter(pattern), chunks))
        return chunks

    def encode_slowly(self, text):
        """The plain twin of the fast path: split (already normalized) text, merge each chunk by rank, remember it."""
        by_piece = self.kind == "pieces" and not self.patterns and self._piece_splitter
        ids, chunks = [], by_piece(text) if by_piece else self._split(text, self.patterns)
        for chunk in chunks:
            if (known := self._cache.get(chunk)) is None:
                known = self._encode_chunk(chunk)
                if len(self._cache) < 1 << 16 and len(chunk) < 64:
                    self._cache[chunk] = known
            ids += known
        return ids

    def _encode_chunk(self, chunk):
        if self.kind == "bytes":
            data = chunk.encode()
            if self.whole_chunks and data in self.vocab:
                return [self.vocab[data]]
            return merge_by_rank([self._byte_id(b) for b in data], self.merges)
        if self.whole_chunks and chunk in self.vocab:
            return [self.vocab[chunk]]
        ids = []
        for c in chunk:
            if c in self.vocab:
                ids.append(self.vocab[c])
            elif all(f"<0x{b:02X}>" in self.vocab for b in c.encode()):
                ids += [self._byte_id(b) for b in c.encode()]
            elif self.unknown is None:
                raise UserError(f"{c!r} is not in this vocabulary, which has neither bytes nor an unknown token")
            elif ids[-1:] != [self.unknown]:                     # one unknown token for a run of unknown characters
                ids.append(self.unknown)
        return merge_by_rank(ids, self.merges)

    def _byte_id(self, byte):
        token = {"bytes": bytes([byte]), "pieces": f"<0x{byte:02X}>"}.get(self.kind)
        if token not in self.vocab:
            raise UserError(f"byte {byte:#04x} is no UTF-8 text, and this tokenizer has no tokens for single bytes")
        return self.vocab[token]

    @functools.cached_property
    def _piece_splitter(self):
        """Text of a pieces tokenizer can be split before every ▁ that follows another character, which lets chunks be
        remembered; not so if some token has a ▁ there. None then."""
        return None if any(re.search("[^▁]▁", token) for token in self.vocab) else re.compile("▁*[^▁]+|▁+").findall

    @functools.cached_property
    def fast(self):
        """tiktoken's encoder in Rust where it gives the same ids as merging by rank does, else None.

        It differs in merging any two neighbours whose concatenation is a token, be it listed as a merge or not. Split
        patterns other than ours might mean something else to its regular expressions."""
        known = self.patterns and self.patterns[-1] in PATTERNS.values()
        if self.kind != "bytes" or not known or len(self.vocab) < 256:
            return None
        if "merges" in self.__dict__ and not merges_follow_vocab(self):
            return None
        import tiktoken
        return tiktoken.Encoding("ours", pat_str=self.patterns[-1], mergeable_ranks=self.vocab, special_tokens={})

    @functools.cached_property
    def merges(self):
        """For vocabularies that come as ranks alone: the two tokens that each token is merged from."""
        order = {token: i for token, i in self.vocab.items()}
        merges = {}
        for token, i in sorted(self.vocab.items(), key=lambda item: item[1]):
            if len(token) > 1 and (parts := last_merge(token, i, order)):
                merges[tuple(order[p] for p in parts)] = (len(merges), i)
        return merges

    # -- decoding
    def decode(self, ids, skip_special=False):
        """ids -> str. Bytes that are no UTF-8 show as U+FFFD. UserError for an id that no token has."""
        return self._strip(self.decode_bytes(ids, skip_special).decode("utf-8", "replace"))

    def decode_bytes(self, ids, skip_special=True):
        """ids -> bytes, exactly those that encode_bytes was given (for pieces, after the space they start with)."""
        table, ids = self._bytes if skip_special else self._shown, list(ids)
        if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
            raise UserError(f"ids from {min(ids)} to {max(ids)}, but this tokenizer's are 0 to {self.vocab_size - 1}")
        return b"".join([table[i] for i in ids])

    def _strip(self, text):
        return text[1:] if self.strip_space and text.startswith(" ") else text

    def token_bytes(self, i):
        """The bytes this token adds to a text; b"" for special tokens."""
        return self._bytes[i]

    def stream(self, skip_special=False):
        return Stream(self, skip_special)

    # -- what it is
    def _required(self, role):
        i = getattr(self, role + "_id")
        if i is None:
            raise UserError(f"this tokenizer has no {role} token, only {', '.join(self.special) or 'ordinary ones'}")
        return i

    def _role(self, name):
        token = self.config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return self.special.get(token, self.added.get(token)) if isinstance(token, str) else None

    bos_id = property(lambda self: self._role("bos_token"))
    eos_id = property(lambda self: self._role("eos_token"))
    pad_id = property(lambda self: self._role("pad_token"))

    @property
    def chat_template(self):
        """The Jinja chat template in tokenizer_config.json, or None."""
        template = self.config.get("chat_template")
        if isinstance(template, list):                           # several, by name
            template = {t.get("name"): t.get("template") for t in template}.get("default")
        return template

    @chat_template.setter
    def chat_template(self, template):
        self.config["chat_template"] = template

    @functools.cached_property
    def sha256(self):
        """Hex digest of everything that decides ids, whatever file it came from."""
        parts = [self.kind, sorted((self._spelling(t).hex(), i) for t, i in self.vocab.items()),
                 sorted(self.special.items()), sorted(self.added.items()), self.patterns, self.normalizer,
                 self.whole_chunks, self.unknown, sorted((rank, *pair) for pair, (rank, _) in self.merges.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # -- files
    @classmethod
    def load(cls, path, pattern=None):
        """Read a folder, tokenizer.json, vocab.bpe (encoder.json beside it), .tiktoken, tekken.json or SentencePiece
        .model. A .tiktoken file does not say how text is split: known by its name, or `pattern`. UserError else."""
        return read_tokenizer(Path(path), pattern)

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens with the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = self.source or json.dumps(to_json(self), ensure_ascii=False).encode()
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.config}
        for name, data in (("tokenizer.json", content),
                           ("tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2).encode())):
            with open(folder / (name + ".tmp"), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(folder / (name + ".tmp"), folder / name)


class Stream:
    """Ids in, text out, as a model produces them: never half a character, and nothing is decoded twice."""

    def __init__(self, tokenizer, skip_special):
        self.table = tokenizer._bytes if skip_special else tokenizer._shown
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.strip_space = tokenizer.strip_space

    def push(self, i):
        """The text that is certain now: possibly "", possibly more than this token's own."""
        if not 0 <= i < len(self.table):
            raise UserError(f"id {i} is not one of this tokenizer's {len(self.table)}")
        return self._strip(self.decoder.decode(self.table[i]))

    def flush(self):
        """What is left: U+FFFD if a character was never finished."""
        return self._strip(self.decoder.decode(b"", final=True))

    def _strip(self, text):
        if self.strip_space and text:
            self.strip_space = False
            return text.removeprefix(" ")
        return text


def normalize(text, operations, where="first"):
    """Apply a normalizer to what stands first in a text, or later, after an added token, or inside a text that is
    encoded in parts, where nothing is put in front."""
    for name, *arguments in operations:
        if name == "unicode":
            text = unicodedata.normalize(arguments[0], text)
        elif name == "replace":
            text = text.replace(*arguments)
        elif name == "lowercase":
            text = text.lower()
        elif name == "prepend" and text and where != "inside":
            prefix, when = arguments
            if when == "every" or when in ("always", where) and not text.startswith(prefix):
                text = prefix + text
    return text


def long_gap(text, size=50_000):
    """Whether the text has 100,000 spaces in a row, on which tiktoken's regular expressions can panic."""
    return any(text[i:i + size].isspace() for i in range(0, len(text) - size, size))


def default_config(special):
    """Which of these special tokens begin, end and pad a text, by their usual names."""
    roles = {"bos_token": ("<BOS>", "<s>", "<|endoftext|>"), "eos_token": ("<EOS>", "</s>", "<|endoftext|>"),
             "unk_token": ("<UNK>", "<unk>"), "pad_token": ("<PAD>", "<pad>")}
    return {role: name for role, names in roles.items() for name in names[::-1] if name in special}


def number_special(tokens):
    """A list of special tokens -> {text: id}, from 0; a dict that says its ids stays as it is."""
    numbered = tokens if isinstance(tokens, dict) else {name: i for i, name in enumerate(tokens)}
    if bad := [name for name in tokens if len(name) < 2 or list(tokens).count(name) > 1]:
        raise UserError(f"special token {bad[0]!r} is listed twice or shorter than two characters")
    return numbered


def check_ids(ids, n):
    """UserError unless these are n different ids of a sane size."""
    ids = list(ids)
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < LARGEST_ID]:
        raise UserError(f"token id {bad[0]!r} is not a whole number from 0 to {LARGEST_ID - 1}")
    if len(set(ids)) < n:
        raise UserError(f"two tokens have the same id: {Counter(ids).most_common(1)[0][0]}")


def merges_follow_vocab(tokenizer):
    """Whether merging any two neighbours whose concatenation is a token, lowest id first, equals following the merges.

    It does if ids ascend with ranks and every token is what merging its own bytes ends in: then the same bytes between
    the same borders always merge the same way, and an unlisted pair never stands there to be merged. A token that only
    whole chunks become must have all its pairs listed, as in Llama 3's file."""
    vocab, merges, spelling = tokenizer.vocab, tokenizer.merges, tokenizer._bytes
    ordered = sorted((rank, pair, new) for pair, (rank, new) in merges.items())
    made = [new for _, _, new in ordered]
    if made != sorted(made) or len(set(made)) + 256 != len(vocab):
        return False
    last = {}                                                # token: (rank, pair) of the merge that makes it
    for rank, pair, new in ordered:
        if new not in last and not merges_across(*pair, rank, merges, last):
            last[new] = rank, pair
    rest = [spelling[i] for i in set(made) - last.keys()]
    if rest and not tokenizer.whole_chunks:
        return False
    halves = ((vocab.get(token[:i]), vocab.get(token[i:])) for token in rest for i in range(1, len(token)))
    return all(None in pair or pair in merges for pair in halves)


def merges_across(left, right, rank, merges, parts):
    """Whether, in the bytes of two tokens side by side, some merge would cross their border before both are whole.
    Takes back the later of the two tokens' last merges until none is left, looking across the border each time."""
    while left in parts or right in parts:
        take_left = right not in parts or (left in parts and parts[left][0] > parts[right][0])
        if take_left:
            undone, (_, left) = parts[left]
        else:
            undone, (right, _) = parts[right]
        across = merges.get((left, right), (rank + 1,))[0]
        if across < undone or (across == undone and not take_left):     # of equals the leftmost goes first
            return True
    return False


def last_merge(token, limit, ranks):
    """The two parts a token is merged from in the end, using only tokens ranked below it; None if it stays in more."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], limit))
        if ranks.get(parts[best] + parts[best + 1], limit) >= limit:
            return None
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


# ---- Other people's files. They are untrusted: sizes, types and references are checked, the unknown is refused.

def read_tokenizer(path, pattern):
    if path.is_dir():
        names = ("tokenizer.json", "tekken.json", "tokenizer.model", "vocab.bpe", "merges.txt")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} has no tokenizer: none of {', '.join(names)}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"there is no tokenizer at {path}")
    data = read_limited(path)
    if path.suffix == ".json":
        content = parse_json(data, path)
        if "config" in content and "model" not in content:
            return from_tekken(content)
        tokenizer = from_json(content, path)
        tokenizer.source = data
    elif path.suffix in (".bpe", ".txt"):
        tokenizer = from_vocab_bpe(data, path)
    elif re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):                       # Llama 3's tokenizer.model is one of these
        tokenizer = from_ranks(data, path, pattern)
    elif path.suffix == ".model":
        tokenizer = from_sentencepiece(path)
    else:
        raise UserError(f"{path} is none of tokenizer.json, tekken.json, vocab.bpe, .tiktoken, .model")
    tokenizer.config.update(read_config(path.parent))
    return tokenizer


def read_limited(path):
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise UserError(f"{path} has {size >> 20} MB; no vocabulary in use is larger than {LARGEST_FILE >> 20} MB")
    return path.read_bytes()


def parse_json(data, path):
    def no_twins(pairs):
        if len(made := dict(pairs)) < len(pairs):
            raise UserError(f"{path} has the key {Counter(k for k, _ in pairs).most_common(1)[0][0]!r} twice")
        return made
    try:
        content = json.loads(data, object_pairs_hook=no_twins)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_config(folder):
    """tokenizer_config.json, and the chat template where newer folders keep it."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = parse_json(read_limited(path), path) if path.is_file() else {}
    if template.is_file():
        config["chat_template"] = read_limited(template).decode("utf-8", "replace")
    return config


def from_json(content, path):
    """A tokenizer.json of HF tokenizers: byte-level BPE, SentencePiece-style BPE, or our character tokenizers."""
    def refuse(what):
        raise UserError(f"{path}: {what} is not supported")

    try:
        model = content["model"]
        if model.get("type", "BPE") != "BPE":
            refuse(f"model type {model['type']!r} (only BPE)")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                refuse(f"model option {option} = {model[option]!r}")
        normalizer = [step for part in sequence(content.get("normalizer"), "normalizers")
                      for step in read_normalizer(part, refuse)]
        patterns, prefix, byte_level = read_pre_tokenizer(content.get("pre_tokenizer"), refuse)
        decoders = {d["type"]: d for d in sequence(content.get("decoder"), "decoders")}
        for name in decoders.keys() - {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
            refuse(f"decoder {name!r}")
        kind = "bytes" if byte_level else "pieces" if model["merges"] or decoders.keys() - {"Fuse"} else "chars"
        special, added = read_added(content.get("added_tokens") or [], normalizer, refuse)
        vocab, merges = read_bpe(model, kind, special, path)
        unknown = special.get(model.get("unk_token"), model["vocab"].get(model.get("unk_token")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a tokenizer.json: {type(error).__name__} {error}") from None
    strips = "Strip" in decoders or decoders.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    return Tokenizer(kind, vocab, merges, patterns=patterns, special=special, added=added, strip_space=strips,
                     whole_chunks=bool(model.get("ignore_merges")), normalizer=normalizer + prefix, unknown=unknown,
                     config=default_config(special))


def sequence(part, key):
    """A component of a tokenizer.json as a flat list: null, one thing, or a Sequence of things."""
    if part is None:
        return []
    return [p for inner in part[key] for p in sequence(inner, key)] if part["type"] == "Sequence" else [part]


def read_normalizer(part, refuse):
    kind = part["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return [("unicode", kind)]
    if kind == "Prepend":
        return [("prepend", part["prepend"], "every")]
    if kind == "Replace" and "String" in part["pattern"]:
        return [("replace", part["pattern"]["String"], part["content"])]
    if kind == "Lowercase":
        return [("lowercase",)]
    return refuse(f"normalizer {kind!r}" + (" with a regular expression" if kind == "Replace" else ""))


def read_pre_tokenizer(part, refuse):
    """-> (split patterns, what Metaspace does to the text first, whether it is byte-level)"""
    patterns, prefix, byte_level = [], [], False
    for step in sequence(part, "pretokenizers"):
        kind = step["type"]
        if byte_level:
            refuse(f"a pre-tokenizer ({kind!r}) after ByteLevel")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            byte_level = True
            patterns += [PATTERNS["gpt2"]] if step.get("use_regex", True) else []
        elif kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            (how, text), = step["pattern"].items()
            patterns.append(text if how == "Regex" else re.escape(text))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            prefix = [("replace", " ", step["replacement"]), ("prepend", step["replacement"], scheme)]
            patterns += [f"{step['replacement']}[^{step['replacement']}]*"] if step.get("split", True) else []
        else:
            details = ", ".join(f"{k}={v!r}" for k, v in step.items() if k != "type")
            refuse(f"pre-tokenizer {kind!r} with {details or 'no options'}")
    return patterns, prefix, byte_level


def read_added(tokens, normalizer, refuse):
    """-> (special {text: id}, other added tokens {text: id}). How special ones would be matched does not matter here:
    they never are."""
    special, added = {}, {}
    for token in tokens:
        text, options = token["content"], [o for o in ("single_word", "lstrip", "rstrip") if token.get(o)]
        if not isinstance(text, str) or not text or text in special or text in added:
            refuse(f"added token {text!r} (empty or twice)")
        if not token.get("special") and options:
            refuse(f"added token {text!r} with {options[0]}")
        if not token.get("special") and token.get("normalized") and normalize(text, normalizer) != text:
            refuse(f"added token {text!r}, which the normalizer changes")
        (special if token.get("special") else added)[text] = token["id"]
    return special, added


def read_bpe(model, kind, special, path):
    """-> (vocab, merges) of a tokenizer.json's model, by ids and without special tokens."""
    check_ids(model["vocab"].values(), len(model["vocab"]))
    ids = dict(model["vocab"])
    for text, i in special.items():
        if ids.pop(text, i) != i:
            raise UserError(f"{path} gives {text!r} two ids: {i} and {model['vocab'][text]}")
    merges = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pair, new = (ids.get(left), ids.get(right)), ids.get(left + right)
        if None in pair or new is None or new in pair or pair in merges:
            raise UserError(f"{path}: merge {rank} of {left[:40]!r} and {right[:40]!r} is listed twice, or joins or "
                            "makes what is no ordinary token")
        merges[pair] = (rank, new)
    if kind != "bytes":
        return ids, merges
    try:
        return {bytes([CHAR_TO_BYTE[c] for c in token]): i for token, i in ids.items()}, merges
    except KeyError as error:
        raise UserError(f"{path}: a byte-level token has {error.args[0]!r}, which stands for no byte") from None


def from_vocab_bpe(data, path):
    """GPT-2's vocab.bpe with encoder.json (or merges.txt with vocab.json, the same under newer names)."""
    lines = [line.split(" ") for line in data.decode("utf-8", "replace").split("\n")
             if line and not line.startswith("#version")]
    if bad := [line for line in lines if len(line) != 2]:
        raise UserError(f"{path} is not a list of merges: {' '.join(bad[0])[:80]!r}")
    beside = path.with_name("encoder.json" if path.suffix == ".bpe" else "vocab.json")
    made = dict.fromkeys([*BYTE_TO_CHAR.values(), *map("".join, lines)])
    if beside.is_file():
        vocab = parse_json(read_limited(beside), beside)
    else:                                        # in GPT-2's own, ids are in order of making
        vocab = {token: i for i, token in enumerate([*made, "<|endoftext|>"])}
    special = {token: i for token, i in vocab.items() if token not in made}
    vocab, merges = read_bpe({"vocab": vocab, "merges": lines}, "bytes", special, path)
    return Tokenizer("bytes", vocab, merges, patterns=[PATTERNS["gpt2"]], special=special,
                     config=default_config(special))


def from_ranks(data, path, pattern):
    """A tiktoken file: lines of a token in base64 and its rank, which is its id."""
    known = {"r50k_base": "gpt2", "p50k_base": "gpt2", "gpt2": "gpt2", "cl100k_base": "gpt4", "tokenizer": "llama3"}
    pattern = pattern or known.get(path.stem)
    if pattern is None:
        raise UserError(f"{path} does not say how text is split: load(path, pattern=...) with one of "
                        f"{', '.join(PATTERNS)} or your own")
    vocab = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if not token or token in vocab:
                raise ValueError("empty or twice")
            vocab[token] = int(rank)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not a token in base64 and its rank: {error}") from None
    return rank_tokenizer(vocab, PATTERNS.get(pattern, pattern), {}, path)


def from_tekken(content):
    """Mistral's tekken.json: ranks, which are ids after the special tokens. Only the first of the ranks are used."""
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
             "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
             "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]    # in files that do not list them
    try:
        config = content["config"]
        n = config["default_num_special_tokens"]
        if content.get("special_tokens"):
            names = [token["token_str"] for token in sorted(content["special_tokens"], key=lambda token: token["rank"])]
        names += [f"<SPECIAL_{i}>" for i in range(len(names), min(n, LARGEST_ID))]
        used = sorted(content["vocab"], key=lambda t: t["rank"])[:config["default_vocab_size"] - n]
        vocab = {base64.b64decode(token["token_bytes"]): token["rank"] + n for token in used}
        special = {name: i for i, name in enumerate(names)}
        if len(vocab) < len(used) or len(special) != n:
            raise ValueError("a token twice")
        tokenizer = rank_tokenizer(vocab, config["pattern"], special, "tekken.json")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"this tekken.json cannot be read: {error}") from None
    return tokenizer


def rank_tokenizer(vocab, pattern, special, path):
    if missing := [b for b in range(256) if bytes([b]) not in vocab]:
        raise UserError(f"{path} has no token for {len(missing)} of the 256 bytes, the first {missing[0]:#04x}")
    return Tokenizer("bytes", vocab, patterns=[pattern], special=special, whole_chunks=True,
                     config=default_config(special))


def from_sentencepiece(path):
    """A SentencePiece .model of the BPE kind with an identity normalizer (Llama 2, Mistral), read by sentencepiece."""
    from sentencepiece import SentencePieceProcessor
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a SentencePiece model: {str(error)[:100]}") from None
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    special = {p: i for i, p in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
    vocab = {p: i for i, p in enumerate(pieces) if p not in special and not sp.is_unused(i)}
    by_score = sorted((i for p, i in vocab.items() if len(p) > 1 and not sp.is_byte(i)),
                      key=lambda i: (-sp.get_score(i), i))
    merges = {}
    for i in by_score:                # every way to put a piece together is a merge, ranked by the piece's score
        halves = [(vocab.get(pieces[i][:k]), vocab.get(pieces[i][k:])) for k in range(1, len(pieces[i]))]
        for pair in halves:
            if None not in pair:
                merges[pair] = (len(merges), i)
    prefix = sp.encode("a", out_type=str)[0].startswith("▁")
    normalizer = ([("prepend", "▁", "every")] if prefix else []) + [("replace", " ", "▁")]
    tokenizer = Tokenizer("pieces", vocab, merges, special=special, normalizer=normalizer, strip_space=prefix,
                          unknown=sp.unk_id(), config=default_config(special))
    for probe in ("Hello  world ", " \tﬁ ½ Ａ\n日本 🙂", *(p.replace("▁", " ") for p in list(vocab)[300::50])):
        if tokenizer.encode(probe) != sp.encode(probe):
            raise UserError(f"{path} encodes {probe!r} otherwise than plain BPE: unigram models and normalizers that "
                            "change the text are not supported")
    return tokenizer


# ---- Our files.

def to_json(tokenizer):
    """The tokenizer as the contents of a tokenizer.json of HF tokenizers."""
    kind, spelled = tokenizer.kind, {}
    for token, i in tokenizer.vocab.items():
        spelled[i] = "".join(BYTE_TO_CHAR[b] for b in token) if kind == "bytes" else token
    merges = sorted((rank, pair) for pair, (rank, _) in tokenizer.merges.items())
    names = sorted(chain(tokenizer.special.items(), tokenizer.added.items()), key=lambda item: item[1])
    if clash := {name for name, _ in names} & set(spelled.values()):
        raise UserError(f"the file would have two tokens spelled {clash.pop()!r}, one of them special")
    normalizers = [{"type": "Prepend", "prepend": step[1]} if step[0] == "prepend" else
                   {"type": "Replace", "pattern": {"String": step[1]}, "content": step[2]}
                   for step in tokenizer.normalizer]
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
              for p in tokenizer.patterns]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    decoders = {"bytes": [byte_level], "chars": [{"type": "Fuse"}],
                "pieces": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                           {"type": "Fuse"}] +
                          [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * tokenizer.strip_space}[kind]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": name in tokenizer.special} for name, i in names],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]} if kind == "bytes" else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders} if kind == "pieces" else decoders[0],
        "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "unk_token": {i: name for name, i in names}.get(tokenizer.unknown), "fuse_unk": kind == "pieces",
                  "byte_fallback": kind == "pieces", "ignore_merges": tokenizer.whole_chunks,
                  # special tokens too: HF takes the ids of added tokens from here
                  "vocab": dict(sorted([*names, *((t, i) for i, t in spelled.items())], key=lambda item: item[1])),
                  "merges": [f"{spelled[a]} {spelled[b]}" for _, (a, b) in merges]},
    }


# ---- The commands.

def text_files(paths):
    """Files, and the .txt files of folders."""
    found = [f for path in map(Path, paths) for f in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if not found:
        raise UserError(f"no .txt files in {', '.join(map(str, paths))}")
    for file in found:
        with open(file, "rb") as f:
            if b"\0" in f.read(BLOCK):
                raise UserError(f"{file} is a binary file: it has zero bytes")
    return found


def train_command(args):
    files, start = text_files(args.data), time.perf_counter()
    special = args.special_tokens
    tokenizer = Tokenizer.train(vocab_size=args.vocab_size, pattern=args.pattern, special_tokens=special, files=files,
                                max_bytes=args.max_bytes, processes=args.processes)
    tokenizer.save(args.out)
    seconds, size = time.perf_counter() - start, min(sum(f.stat().st_size for f in files), args.max_bytes or 1 << 62)
    print(f"{tokenizer.vocab_size:,} ids from {size / 1e6:.1f} MB in {seconds:.2f} s ({size / 1e6 / seconds:.1f} MB/s) "
          f"-> {args.out}, sha256 {tokenizer.sha256[:12]}")


def show_command(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    ids = tokenizer.encode(args.text)
    for n, i in enumerate(ids):                      # background colours in turn, so that borders show
        print(f"\033[30;4{1 + n % 6}m{tokenizer.token_bytes(i).decode('utf-8', 'replace')}\033[0m", end="")
    print("\n" + " ".join(map(str, ids)))
    print(f"{len(ids)} tokens, {len(args.text.encode()) / max(1, len(ids)):.2f} bytes per token")


def compare_command(args):
    files = text_files(args.data)
    data = b"".join(file.read_bytes() for file in files)
    print(f"{len(data):,} bytes of {', '.join(map(str, files))}\n")
    print("| tokenizer | ids | tokens | bytes per token | MB/s |\n|---|---|---|---|---|")
    for path in args.tokenizers:
        tokenizer = Tokenizer.load(path)
        tokenizer.encode("warm up")
        start = time.perf_counter()
        n = len(tokenizer.encode_bytes(data))
        speed = len(data) / 1e6 / (time.perf_counter() - start)
        print(f"| {path} | {tokenizer.vocab_size:,} | {n:,} | {len(data) / max(1, n):.3f} | {speed:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="train|show|compare")
    train = commands.add_parser("train", help="learn a byte-level BPE vocabulary")
    train.set_defaults(run=train_command)
    train.add_argument("--data", nargs="+", default=["data/wikitext-2"], help="text files, or folders of .txt files")
    train.add_argument("--vocab-size", type=int, default=10_000, help="ids in all, bytes and special tokens included")
    train.add_argument("--pattern", default="gpt4", help=f"{', '.join(PATTERNS)}, or a regular expression")
    train.add_argument("--special-tokens", nargs="*", default=SPECIAL_TOKENS, help="they get the first ids")
    train.add_argument("--max-bytes", type=int, help="learn from this much of the data, evenly spread over it")
    train.add_argument("--processes", type=int, help="to split text in; default: one per usable CPU")
    train.add_argument("--out", default="runs/tokenizer", help="folder to write")
    show = commands.add_parser("show", help="print a text's tokens, coloured, and their ids")
    show.set_defaults(run=show_command)
    show.add_argument("text")
    show.add_argument("--tokenizer", default="runs/tokenizer", help="folder or file")
    compare = commands.add_parser("compare", help="bytes per token of several tokenizers on the same text")
    compare.set_defaults(run=compare_command)
    compare.add_argument("tokenizers", nargs="+", help="folders or files")
    compare.add_argument("--data", nargs="+", required=True, help="text files, or folders of .txt files")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli(main)
