"""Text to tokens to batches: shards of token ids on disk, and full rows packed from documents.

python data.py shakespeare                     # tiny Shakespeare -> data/shakespeare.txt
python data.py wikitext-103                    # -> data/wikitext-103/{train,valid,test}.txt
python data.py wikitext-103 --tokenizer T      # the same, and shards of tokens beside it
python data.py mine/ 'more/*.jsonl' --tokenizer T --out D    # text or records -> shards
python data.py toybox --out data/toybox        # a made-up world: text, chats, preferences
python train.py --data D                       # what shards are for

From top to bottom: `make_shards` writes documents as tokens, `Split.plan` says which
documents share a row, `Batches` hands out rows and knows its place (`state`) for a resumed run.
"""

import contextlib
import functools
import itertools
import math
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import save
from tqdm import tqdm

from common import (
    BLOCK,
    UserError,
    cli,
    flags_among,
    full_disk_explained,
    in_processes,
    naming,
    parse_flags,
    read_json,
    sha256,
    write_atomic,
    write_json,
)
from runtime import read_tensors
from tokenizer import Tokenizer

# --------------------------------------------------------------------------------- shards of tokens
# A shard is a safetensors file of three arrays: ids (uint16, or uint32 above 65,536 ids), starts,
# where documents start among them, and counts, the TOTALS of the shard.
VERSION = 2
# Bytes of text after which a shard ends with a document, or after twice as many inside one: what a
# crash can cost.
SHARD_BYTES = 64 << 20
# Bytes are of UTF-8 text, for bits per byte. Words stand between white space; the papers' word
# count of WikiText is words + lines (<eos>).
TOTALS = ("tokens", "documents", "bytes", "words", "lines")


def ends_of(tok):
    """([first], [last]) special ids of a stored document: [BOS] tokens [EOS]; [] where none is.

    If a tokenizer has only one, or the same for both (GPT-2), it stands in front, and what ends a
    document is that the next one begins."""
    distinct = dict.fromkeys((tok.bos_id, tok.eos_id))
    ids = [i for i in distinct if i is not None]
    return ids[:1], ids[1:]


def make_shards(files, tok, out, documents, how, skip_bad=False, *, val_share=0.01, processes=None):
    """Tokenize {split: [path]}: shards, meta.json and the tokenizer in OUT -> what is in meta.json.

    documents(paths, cuts, bad=bad, **how) yields the text in parts (bytes, begins, ends), as
    training.corpora.documents does, and counts in `bad` what it left out. how: its other arguments.
    Without a split "val", every 1/val_share-th document of "train" becomes it, the first among
    them. The bytes depend on text and tokenizer alone, not on `processes`. Run again after a crash
    it keeps the finished shards. UserError: another job's shards are in OUT, a split without
    documents, a full disk."""
    out = Path(out)
    shared = "val" not in files
    if shared:
        files = {"val": files["train"], **files}
    versions = {}  # of files: one is the same if its path, size and time are
    for name, paths in files.items():
        status = [(path, path.stat()) for path in paths]
        versions[name] = [[str(path), s.st_size, s.st_mtime_ns] for path, s in status]
    job = {
        "version": VERSION,
        "tokenizer": tok.sha256,
        "shard_bytes": SHARD_BYTES,
        "skip_bad": skip_bad,
        "val_share": val_share if shared else None,
        "files": versions,
        **{key: str(value) for key, value in how.items()},
    }
    meta = begin_or_continue(out, job)
    if meta["complete"]:
        print(f"{out}: all there already")
        return meta
    tok.save(out)
    _ = tok.fast  # built here once, not in every process
    bad = Counter()
    for name, paths in files.items():
        parts = documents(paths, tok.cuts, bad=bad if skip_bad else None, **how)
        parts = with_progress(parts, name, sum(size for _, size, _ in versions[name]))
        if shared and name != "test":
            parts = share_of(parts, name, val_share)
        write_split(out, name, parts, tok, processes)
        meta["splits"][name] = summary_of(out, name)
    if bad:  # of files that two splits share each is found twice
        print(f"{bad.total() // (1 + shared):,} bad records left out")
    meta |= {"complete": True, "ends": ends_of(tok)}
    write_json(out / "meta.json", meta)
    return meta


def begin_or_continue(out, job):
    """meta.json of this job: new, or of its interrupted run, whose temporary files are removed."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "meta.json"
    meta = {"complete": False, "job": job, "splits": {}}
    if path.is_file():
        meta = read_json(path)
    elif shard_paths(out):
        meta = {}  # whatever job these shards are of
    differ = [key for key in job if meta.get("job", {}).get(key) != job[key]]
    if differ:
        raise UserError(
            f"{out} has shards of another job (other {', '.join(differ)}): choose another --out, "
            "or throw them away with --overwrite"
        )
    for stale in out.glob("*.safetensors.*.tmp"):
        stale.unlink()
    write_json(path, meta)
    return meta


def shard_paths(out, split=r"\w+"):
    """Files named as ours, with `split` a regular expression. The model-00001-of-00002.safetensors
    of a model folder is none."""
    name = re.compile(rf"{split}-\d{{5}}\.safetensors")
    return sorted(path for path in Path(out).glob("*") if name.fullmatch(path.name))


def with_progress(parts, name, total):
    """The parts, and a bar that counts their bytes."""
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=None) as bar:
        for part in parts:
            bar.update(len(part[0]))
            yield part


def held_out(share, i):
    """Whether the i-th of many is held out when a share of them is; the 0-th always."""
    return math.ceil((i + 1) * share) > math.ceil(i * share)


def hold_out(share, items):
    """-> (the items to train on, those held out)"""
    sides = [], []
    for i, item in enumerate(items):
        sides[held_out(share, i)].append(item)
    return sides


def share_of(parts, split, val_share):
    """Of documents that train and val share, the parts of those that are the split's."""
    number = -1
    for part in parts:
        _, begins, _ = part
        number += begins
        if held_out(val_share, number) == (split == "val"):
            yield part


def write_split(out, name, parts, tok, processes):
    """The shards of a split that are not there yet, encoded in several processes."""
    finished = {int(path.stem[-5:]) for path in shard_paths(out, name)}
    encode = functools.partial(encode_job, tok=tok)
    jobs = shard_jobs(parts, finished)
    with contextlib.closing(in_processes(encode, jobs, processes)) as results:
        for number, encoded in itertools.groupby(results, key=lambda job: job.shard):
            write_shard(out / f"{name}-{number:05d}.safetensors", encoded)


def shard_jobs(parts, finished):
    """Yield (shard number, parts) of about a BLOCK of text each.

    A shard ends with the document that fills it; one that would fill two is cut into several
    documents, so that a shard fits into memory. Which text is in which shard depends on the text
    alone, and that of the shards in `finished` is only read over."""
    number = 0
    filled = 0  # bytes in this shard
    job = []
    size = 0  # bytes in this job
    for text, begins, ends in parts:
        full = filled >= (SHARD_BYTES if begins else 2 * SHARD_BYTES)
        if job and (full or size >= BLOCK):
            yield number, job
            job = []
            size = 0
        if full:
            number += 1
            filled = 0
        filled += len(text)
        if number not in finished:
            job.append((text, begins or full, ends))
            size += len(text)
    if job:
        yield number, job


class Encoded(NamedTuple):
    """The tokens of a job, which are a part of a shard."""

    shard: int
    ids: np.ndarray  # (tokens,) uint16 or uint32
    starts: np.ndarray  # where documents start among them
    counts: np.ndarray  # its TOTALS


IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))  # (256,) bool: is this byte white space?


def encode_job(job, tok):
    """(shard number, parts) -> Encoded."""
    shard, parts = job
    first, last = ends_of(tok)
    ids = []
    starts = []
    for text, begins, ends in parts:
        if begins:
            starts.append(len(ids))
            ids += first
        ids += tok.encode_bytes(text, "first" if begins else "inside")
        if ends:
            ids += last
    whole = b"".join(b"\n" + text for text, _, _ in parts)
    space = IS_SPACE[np.frombuffer(whole, np.uint8)]
    words = np.count_nonzero(space[:-1] & ~space[1:])  # a word begins after white space
    size = len(whole) - len(parts)
    lines = whole.count(b"\n") - len(parts)
    counts = len(ids), len(starts), size, words, lines
    return Encoded(shard, np.array(ids, tok.dtype), np.array(starts, np.int64), np.array(counts))


def write_shard(path, encoded):
    """The Encoded jobs of a shard -> a file that appears when it is whole."""
    ids = []
    starts = []
    counts = np.zeros(len(TOTALS), np.int64)
    for job in encoded:
        ids.append(job.ids)
        starts.append(job.starts + counts[0])
        counts += job.counts
    content = save({"ids": np.concatenate(ids), "starts": np.concatenate(starts), "counts": counts})
    advice = "finished shards are kept: make room and run the same command again"
    with full_disk_explained(path, advice):
        write_atomic(path, lambda temporary: temporary.write_bytes(content))


def summary_of(out, name):
    """Print and return what is known of a split: its TOTALS, and the sha256 of its content."""
    paths = shard_paths(out, name)
    if not paths:
        raise UserError(
            f"{name}: no documents; give more text, say with --split-on what stands between "
            "documents, or name other validation text with --val FILE"
        )
    counts = sum(read_tensors(path)["counts"] for path in paths)
    total = dict(zip(TOTALS, counts.tolist()))
    print(
        f"{name:5}  {total['tokens']:,} tokens in {total['documents']:,} documents, "
        f"{total['bytes']:,} bytes ({total['bytes'] / total['tokens']:.2f} a token)"
    )
    hashes = "".join(sha256(np.memmap(path, np.uint8)) for path in paths)
    return total | {"shards": len(paths), "sha256": sha256(hashes.encode())}


def open_shards(folder, tok=None):
    """{split: Split} of a folder of shards, which `tok` must have made if it is given.

    Ids are mapped, not read; the rest is checked."""
    path = Path(folder, "meta.json")
    if not path.is_file():
        raise UserError(
            f"{folder}: no shards here (no meta.json); "
            f"python data.py FILE... --tokenizer T --out {folder}"
        )
    with naming(path):
        return read_splits(path.parent, read_json(path), tok)


def read_splits(folder, meta, tok):
    """meta.json's content -> {split: Split}"""
    job = meta.get("job", {})
    if job.get("version") != VERSION:
        raise UserError(
            f"{folder}/meta.json is not that of shards of version {VERSION}: make them with data.py"
        )
    if not meta.get("complete"):
        raise UserError(
            f"{folder}: unfinished; run the data.py command that makes it again, "
            "it goes on where it was"
        )
    if tok and tok.sha256 != job["tokenizer"]:
        raise UserError(
            f"{folder}: made with tokenizer {job['tokenizer'][:12]}, not {tok.sha256[:12]}; "
            "the ids would mean other text: use the tokenizer in the folder, or make shards with "
            "yours"
        )
    first, last = meta["ends"]
    end_id = first[0] if first and not last else None
    if not isinstance(end_id, int | None):
        raise UserError(f"a document's end is {end_id!r}, expected a token's id")
    splits = {}
    for name, counts in meta["splits"].items():
        paths = shard_paths(folder, re.escape(name))
        if len(paths) != counts["shards"] or not paths:
            raise UserError(
                f"of {counts['shards']!r} {name[:40]!r} shards {len(paths):,} are there: copy the "
                "others there, or make the shards again with --overwrite"
            )
        splits[name] = map_split(paths, end_id, counts)
    return splits


def map_split(paths, end_id, counts):
    """The Split of these shards."""
    tokens = []
    starts = []
    for path in paths:
        with naming(path):
            shard = read_tensors(path)
            ids = shard["ids"].numpy()
            begin = shard["starts"].numpy()
            sizes = np.diff(begin.astype(np.int64), prepend=0, append=len(ids))  # behind a 0
            flat = ids.ndim == begin.ndim == 1 and ids.dtype.kind == "u"
            if not flat or sizes[0] or sizes.min() < 0:
                raise UserError("damaged, its documents or ids are out of order; make it again")
        tokens.append(ids)
        starts.append(begin)
    return Split(tokens, starts, end_id, counts, counts["sha256"])


# ----------------------------------------------------------------------------------- tokens to rows
def split_tokens(tokens, context):
    """(training tokens, validation tokens): the last tenth is held out, as in nanoGPT."""
    cut = int(len(tokens) * 0.9)
    train, val = tokens[:cut], tokens[cut:]
    most = len(val) - 1
    if most < context:
        raise UserError(
            f"{len(val):,} validation tokens (the last tenth) allow a --context of {most:,}, "
            f"not {context:,}: lower it, or give a longer text"
        )
    return train, val


class Batch(NamedTuple):
    """x predicts y. For masking: docs, the piece of a row; positions, how far into that piece."""

    x: torch.Tensor  # (rows, context) int64
    y: torch.Tensor  # (rows, context) int64; -100 only in validation, where nothing is scored
    docs: torch.Tensor  # (rows, context) int64: 0, 1, 2, ... along a row
    positions: torch.Tensor  # (rows, context) int64: 0 where a piece begins


def moved(batch, device):
    """A NamedTuple of tensors -> the same on the device."""
    return batch._make(t.to(device, non_blocking=True) for t in batch)


class Plan(NamedTuple):
    """The rows of an epoch. Row r is the pieces first[order[r]] ... first[order[r] + 1] - 1.

    A piece is what a row has of one document: pairs (token, next token) that follow each other."""

    starts: np.ndarray  # (pieces,) where each begins, all shards end to end
    sizes: np.ndarray  # (pieces,) pairs in it
    first: np.ndarray  # (rows + 1,)
    order: np.ndarray  # (rows,)

    def row(self, r):
        """-> (starts, sizes) of the row's pieces."""
        row = self.order[r]
        pieces = slice(self.first[row], self.first[row + 1])
        return self.starts[pieces], self.sizes[pieces]


class PackedRows(NamedTuple):
    """The rows of an epoch as a list; `order` is that in which Batches takes them.

    For chats a row is (starts, sizes) of its pieces, as in Plan; for preference pairs or questions
    it is an index of one."""

    rows: list
    order: np.ndarray

    def row(self, r):
        return self.rows[self.order[r]]


class Split:
    """The documents of one split: a text in memory (one document), or mapped shards."""

    def __init__(self, tokens, starts=None, end_id=None, counts=None, sha256=None):
        """tokens: arrays of ids; starts: where documents start in each.

        end_id: what a document's last id predicts, if one special id begins and ends documents."""
        self.tokens = tokens
        self.starts = starts or [np.zeros(1, np.int64)]
        self.end_id = end_id
        self.counts = counts or {}
        self.sha256 = sha256
        self.bases = np.cumsum([0, *map(len, tokens)])  # of the shards, when laid end to end

    def __len__(self):
        return self.bases[-1]

    @functools.cached_property
    def documents(self):
        """-> (where each document starts, end to end; how many (token, next token) pairs it has):
        int64.

        A document of n tokens has n - 1 pairs: its EOS predicts nothing, least of all the next
        document's BOS, so it is never an input. With an end_id the last token predicts it: n."""
        begin = [starts + base for starts, base in zip(self.starts, self.bases)]
        begin = np.concatenate(begin).astype(np.int64)
        sizes = np.diff(begin, append=len(self))
        return begin, np.maximum(sizes - (self.end_id is None), 0)

    @functools.cached_property
    def pair_ends(self):
        """Where each document ends when all pairs are laid end to end: int64."""
        _, pairs = self.documents
        return np.cumsum(pairs)

    def read(self, start, size):
        """`size` tokens from `start` on and one more; after the end of a shard that is end_id."""
        shard = np.searchsorted(self.bases, start, "right") - 1
        start = start - self.bases[shard]
        window = self.tokens[shard][start : start + size + 1]
        return window if len(window) > size else np.append(window, self.end_id)

    def documents_of_epoch(self, rng, context):
        """`documents`; a text that is a single one begins at a new offset each epoch."""
        begin, pairs = self.documents
        if len(begin) > 1:
            return begin, pairs
        offset = rng.integers(max(1, min(context, pairs[0] - context + 1)))
        return begin + offset, pairs - offset

    def plan(self, context, seed, epoch):
        """What a row is: exactly `context` pairs, as a function of (seed, epoch) -> Plan.

        A document gives as many full rows as it has, from its start. The remainders of all
        documents are shuffled, laid end to end and cut into rows too. In such a row a piece that
        begins a document goes first: a row begins as every prompt does where it can. So nothing is
        padded or masked, and nothing dropped but the less than one row that is over in the end,
        other text each epoch. With a context of 4, remainders of 3, 2 and 3 pairs:

            line    a0 a1 a2 b0 | b1 c0 c1 c2
            rows    a0-a2 b0, and c0-c2 b1 if c0 begins its document (b1 cannot)

        It is in whole arrays, for millions of documents; tests/test_data.py has the same as plain
        loops."""
        rng = np.random.default_rng([seed, epoch])
        begin, pairs = self.documents_of_epoch(rng, context)
        full = pairs // context  # rows that each document fills alone
        alone = np.repeat(begin, full)  # where the document of each such row begins
        alone += context * (np.arange(len(alone)) - np.repeat(np.cumsum(full) - full, full))
        mixed = rng.permutation(np.flatnonzero(pairs % context))  # documents with a remainder
        sizes = pairs[mixed] % context
        right = np.cumsum(sizes)  # on the line, remainder i is the pairs left[i] ... right[i] - 1
        left = right - sizes
        rows = sizes.sum() // context  # and row r begins at r * context
        # A piece begins where a remainder begins and where a row begins.
        cuts = np.append(left[left < rows * context], np.arange(rows) * context)
        cuts.sort(kind="stable")  # merges the two sorted runs; np.unique takes a second
        cuts = cuts[np.diff(cuts, prepend=-1) > 0]
        remainder = np.searchsorted(right, cuts, "right")  # that each piece is of
        document = mixed[remainder]
        into = full[document] * context + cuts - left[remainder]  # how far into its document
        row = cuts // context
        by_row = np.argsort(row * 2 - (into == 0), kind="stable")  # within a row, beginnings first
        starts = np.append(alone, (begin[document] + into)[by_row])
        sizes = np.diff(cuts, append=rows * context)[by_row]
        sizes = np.append(np.full(len(alone), context), sizes)
        first = len(alone) + np.searchsorted(row, np.arange(rows + 1))
        first = np.append(np.arange(len(alone)), first)
        return Plan(starts, sizes, first, rng.permutation(len(first) - 1))

    def fill(self, rows, context):
        """[(starts, sizes) of the pieces of a row] -> Batch.

        Rows that are not full end in tokens 0 with target -100, which are a piece of their own."""
        x, docs, positions = np.zeros((3, len(rows), context), np.int64)
        y = np.full_like(x, -100)
        for i, (starts, sizes) in enumerate(rows):
            at = 0
            for piece, (start, size) in enumerate(zip(starts, sizes)):
                window = self.read(start, size)
                place = i, slice(at, at + size)
                x[place] = window[:-1]
                y[place] = window[1:]
                docs[place] = piece
                positions[place] = np.arange(size)
                at += size
            docs[i, at:] = len(starts)
        return Batch(*map(torch.from_numpy, (x, y, docs, positions)))

    def validation(self, rows, context, stride=None, rank=0, world=1):
        """Yield Batches of (rows, context) that score every pair of the split once, in order.

        Windows begin every `stride` pairs (default: context, no overlap); each scores only what the
        one before did not reach, with context - stride pairs to look back on. What is not scored,
        and what fills the last batch, is target -100. Ranks take turns; all get as many."""
        stride = stride or context
        if not 0 < stride <= context:
            raise UserError(
                f"a stride of {stride:,} does not suit a context of {context:,}: "
                f"use 1 to {context:,}"
            )
        step = rows * stride  # pairs that a batch scores
        batches = -(-self.pair_ends[-1] // (step * world)) * world
        for b in range(rank, batches, world):
            lefts = range(b * step, (b + 1) * step, stride)
            batch = self.fill([self.pieces_from(left, context) for left in lefts], context)
            # The split's first window has nothing before it, so it scores everything.
            looks_back = batch.y[1:] if b == 0 else batch.y
            looks_back[:, : context - stride] = -100
            yield batch

    def pieces_from(self, left, context):
        """Where the `context` pairs from `left` on lie -> (starts, sizes), a piece a document.

        There are less at the end, and none behind it."""
        begin, pairs = self.documents
        ends = self.pair_ends
        right = min(left + context, ends[-1])
        first = np.searchsorted(ends, left, "right")
        last = np.searchsorted(ends, right, "left")
        these = slice(first, last + 1)
        lefts = ends[these] - pairs[these]
        into = np.maximum(left - lefts, 0)  # how far into the first document the window begins
        return begin[these] + into, np.minimum(ends[these], right) - lefts - into


# ---------------------------------------------------------------------------------- rows to batches
class Batches:
    """Batches of rows: every row of the split once an epoch, in an order fixed by the seed.

    `split` has `plan`, `fill` and `validation` as Split has them: what an epoch's rows are, and how
    some of them become a NamedTuple of tensors, is its business; order, place, ranks and working
    ahead are done here.

    The position is two integers: the epoch, and the row among those of all ranks. A step takes
    world * rows rows, of which rank r gets the r-th part; their order depends on (seed, epoch)
    alone. So a resumed run goes on with exactly the batch it would have seen, on any number of
    ranks with the same rows in all. A thread works `prefetch` batches ahead. For a CUDA `device`
    batches are in pinned memory."""

    ahead: tuple  # (epoch, row) at which the next batch to be made begins

    def __init__(self, split, rows, context, seed, rank=0, world=1, device="cpu", prefetch=2):
        self.split = split
        self.rows = rows
        self.context = context
        self.rank = rank
        self.world = world
        self.prefetch = prefetch
        self.device = torch.device(device)
        plan = functools.partial(split.plan, context, seed)
        self.plan = functools.lru_cache(2)(plan)  # a batch can span two epochs
        self.pool = ThreadPoolExecutor(1)
        self.load_state({"epoch": 0, "row": 0})
        have = len(self.plan(0).order)
        if have < rows * world:
            raise UserError(
                f"{len(split):,} tokens make {have:,} rows of {context:,}, but a step takes "
                f"{rows * world:,}: give more data, or use a smaller --batch or --context"
            )

    def locate(self, epoch, row):
        """The same place, with a row that lies in the epoch."""
        while row >= len(self.plan(epoch).order):
            row -= len(self.plan(epoch).order)
            epoch += 1
        return epoch, row

    def make(self):
        """In the thread: this rank's part of the batch at `ahead`, and where the next begins."""
        epoch, row = self.ahead
        rows = []
        for i in range(self.rows):
            its_epoch, its_row = self.locate(epoch, row + self.rank * self.rows + i)
            rows.append(self.plan(its_epoch).row(its_row))
        batch = self.split.fill(rows, self.context)
        if self.device.type == "cuda":
            # A new thread is on GPU 0, where pinning would make a context.
            torch.cuda.set_device(self.device.index or 0)
            batch = batch._make(t.pin_memory() for t in batch)
        self.ahead = self.locate(epoch, row + self.rows * self.world)
        return batch, self.ahead

    def next(self):
        """The next batch. Raises what went wrong in the thread, and again if asked again."""
        while len(self.made) <= self.prefetch:
            self.made.append(self.pool.submit(self.make))
        batch, (self.epoch, self.row) = self.made.popleft().result()
        return batch

    def state(self):
        """Where the next batch to be handed out begins, whatever has been made ahead."""
        return {"epoch": self.epoch, "row": self.row}

    def load_state(self, state):
        self.epoch, self.row = state["epoch"], state["row"]
        self.close()

    def close(self):
        """End the thread and forget what it made ahead; next() makes it again."""
        self.pool.shutdown(cancel_futures=True)
        self.pool = ThreadPoolExecutor(1)
        self.made = deque()
        self.ahead = self.epoch, self.row


# -------------------------------------------------------------------------------------- the command
@dataclass
class Args:
    data: tuple = ()  # shakespeare, wikitext-2, wikitext-103, toybox, or files, folders and globs
    tokenizer: str = ""  # make shards with this tokenizer: a folder or file
    out: str = ""  # the folder to write, data/NAME for a named corpus
    val: tuple = ()  # files to validate on, and not to train on, instead of a share
    val_share: float = 0.01  # share of the documents to validate on
    split_on: str = ""  # what stands between the documents of a text file; \n is a newline
    field: str = "text"  # where records (JSON Lines, a JSON list, parquet) have their text
    skip_bad: bool = False  # count and leave out records without a text
    overwrite: bool = False  # throw away the shards in --out
    processes: int = 0  # to tokenize in; 0 is one per CPU
    data_dir: str = ""  # a folder that may hold a local copy of a named corpus, else $LLM_DATA_DIR


NAMED = ("shakespeare", "toybox", "wikitext-2", "wikitext-103")


def check_data_args(args, typed):
    """UserError for flags that do not go together, or were typed and would do nothing."""
    named = [name for name in args.data if name in NAMED]
    if named and len(args.data) > 1:
        raise UserError(f"{named[0]} goes alone")
    if not named and not (args.tokenizer and args.out):
        raise UserError(
            "shards of your own text need --tokenizer T (python tokenizer.py train makes one) "
            "and --out D"
        )
    name = args.data[0]
    unread = {"val_share"} if args.val else set()
    if not named:
        unread.add("data_dir")
    elif name == "toybox" or not args.tokenizer:  # no documents become shards
        unread = typed.keys() - {"data", "data_dir", "out"}
        if name == "shakespeare":
            unread.add("out")
    elif name != "shakespeare":  # WikiText brings a validation split
        unread.add("val_share")
    given = flags_among(typed, unread)
    if given:
        raise UserError(f"{name} does nothing with {given} here: leave it out")
    if not 0 < args.val_share < 1 or args.processes < 0:
        raise UserError(
            f"--val-share {args.val_share} must be between 0 and 1, "
            f"--processes {args.processes} not negative"
        )


def main():
    from training import corpora, toybox

    typed = parse_flags(Args, __doc__, positional=("data",))
    args = Args(**typed)
    check_data_args(args, typed)
    name = args.data[0]
    out = Path(args.out or f"data/{name}")
    if name == "toybox":
        return toybox.write_toybox(out, corpora.read_text("shakespeare", args.data_dir))
    tok = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    split_on = args.split_on.replace(r"\n", "\n").encode()
    separator = re.compile(re.escape(split_on)) if split_on else None
    if name in corpora.WIKITEXT:  # without a tokenizer --out is where the text goes, not the shards
        text = corpora.wikitext(name, f"data/{name}" if tok else out, args.data_dir)
        files = {"val": [text["valid"]], "test": [text["test"]], "train": [text["train"]]}
        separator = separator or corpora.ARTICLE
    elif name == "shakespeare":
        files = {"train": [corpora.shakespeare(args.data_dir)]}
    else:
        files = {"train": corpora.expand(args.data)}
    if not tok:
        return
    if args.val:
        files["val"] = corpora.expand(args.val)
        held = {path.resolve() for path in files["val"]}
        files["train"] = [path for path in files["train"] if path.resolve() not in held]
    if Path(out, "config.json").is_file():
        raise UserError(f"{out} holds a model, whose tokenizer would be lost: choose another --out")
    if args.overwrite:
        for path in [*shard_paths(out), out / "meta.json"]:
            path.unlink(missing_ok=True)
    how = {"separator": separator, "field": args.field}
    make_shards(
        files,
        tok,
        out,
        corpora.documents,
        how,
        args.skip_bad,
        val_share=args.val_share,
        processes=args.processes,
    )


if __name__ == "__main__":
    cli(main)
