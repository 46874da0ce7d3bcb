"""Text to tokens to batches: shards of token ids on disk, and rows packed from whole documents.

python data.py shakespeare                                   # tiny Shakespeare -> data/shakespeare.txt
python data.py wikitext-103                                  # its text -> data/wikitext-103/{train,valid,test}.txt
python data.py wikitext-103 --tokenizer T                    # the same, tokenized -> shards beside it
python data.py mine/ 'more/*.jsonl' --tokenizer T --out data/mine    # .txt, .jsonl, .parquet of your own -> shards
python data.py toybox --out data/toybox                      # a made-up world: text, chats, preferences (toybox.py)
python train.py --data data/mine                             # what shards are for
"""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import re
import struct
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import (
    BLOCK,
    UserError,
    cli,
    full_disk_explained,
    in_processes,
    parse_flags,
    read_json,
    sha256,
    usable_cpus,
    write_atomic,
    write_json,
)
from tokenizer import Tokenizer
from training import toybox
from training.corpora import ARTICLE, WIKITEXT, documents, expand, read_text, shakespeare, wikitext

SHARD_BYTES = 64 << 20  # of text in a shard: what a crash can cost


# --------------------------------------------------------------------------------- shards of tokens
# A shard: header; token ids (uint16, or uint32 above 65,536 ids), padded to 8 bytes; where documents start (uint64).
MAGIC, VERSION = b"TOKSHARD", 1
HEADER = struct.Struct("<8sII5Q32s32s8x")  # 128 bytes


class Header(NamedTuple):
    magic: bytes
    version: int
    itemsize: int  # bytes a token id takes: 2 or 4
    tokens: int
    documents: int
    bytes: int  # of UTF-8 text, for bits per byte
    words: int  # between white space; the papers' word count of WikiText is words + lines (<eos>)
    lines: int
    tokenizer: bytes  # sha256 of what decides ids
    content: bytes  # sha256 of all that follows the header


def ends_of(tok):
    """(first, last) special ids of a stored document: [BOS] tokens [EOS]. If a tokenizer has only one, or the same for
    both (GPT-2), it stands in front, and what ends a document is that the next one begins."""
    ids = [i for i in (tok.bos_id, tok.eos_id) if i is not None]
    return (ids[0] if ids else None, ids[1] if len(set(ids)) == 2 else None)


def make_shards(
    files, tok, out, *, val_share=0.01, separator=None, field="text", skip_bad=False, processes=None
):
    """Tokenize {split: [path]} into OUT/SPLIT-NNNNN.bin, meta.json and the tokenizer -> meta.json's content.

    Without a split "val", every 1/val_share-th document of "train" becomes it, the first among them. The bytes depend on text and
    tokenizer alone, not on `processes`. Run again after a crash it keeps the finished shards. UserError: another job's shards are
    in OUT, a split without documents, a full disk."""
    out, shared = Path(out), "val" not in files
    if shared:
        files = {"val": files["train"], **files}
    job = {
        "version": VERSION,
        "tokenizer": tok.sha256,
        "shard_bytes": SHARD_BYTES,
        "field": field,
        "skip_bad": skip_bad,
        "val_share": val_share if shared else None,
        "separator": separator and separator.pattern.decode(),
        "files": {
            name: [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in paths]
            for name, paths in files.items()
        },
    }
    meta = begin_or_continue(out, job)
    if meta["complete"]:
        print(f"{out}: all there already")
        return meta
    tok.save(out)
    _ = tok.fast  # built here once, not in every process
    encode = functools.partial(encode_job, tok=tok, ends=ends_of(tok))
    for name, paths in files.items():
        bad = Counter() if skip_bad else None
        done = {int(p.stem[-5:]) for p in shard_paths(out, name) if read_header(p, tok.sha256)}
        with tqdm(
            total=sum(f.stat().st_size for f in paths),
            unit="B",
            unit_scale=True,
            desc=name,
            disable=None,
        ) as bar:
            parts = chosen(
                documents(paths, tok.cuts, separator, field, bad),
                name,
                val_share if shared else 0,
                bar,
            )
            with contextlib.closing(
                in_processes(encode, shard_jobs(parts, done), processes or usable_cpus())
            ) as results:
                for number, group in itertools.groupby(results, key=lambda result: result[0]):
                    write_shard(out / f"{name}-{number:05d}.bin", group, tok)
        headers = [read_header(p) for p in shard_paths(out, name)]
        total = {
            k: sum(getattr(h, k) for h in headers)
            for k in ("tokens", "documents", "bytes", "words", "lines")
        }
        if not total["documents"]:
            raise UserError(
                f"{name}: no documents; give more text, say with --split-on what stands between documents, "
                "or name other validation text with --val FILE"
            )
        skipped = sum((bad or {}).values())
        meta["splits"][name] = {"shards": len(headers), **total, "skipped": skipped}
        print(
            f"{name:5}  {total['tokens']:,} tokens in {total['documents']:,} documents, {total['bytes']:,} bytes "
            f"({total['bytes'] / total['tokens']:.2f} a token)"
            + (f", {skipped:,} bad records left out" if bad else "")
        )
    meta |= {
        "complete": True,
        "first_id": ends_of(tok)[0],
        "last_id": ends_of(tok)[1],
        "vocab_size": tok.vocab_size,
    }
    write_json(out / "meta.json", meta)
    return meta


def begin_or_continue(out, job):
    """meta.json of this job: new, or that of its interrupted run, whose temporary files are swept."""
    out.mkdir(parents=True, exist_ok=True)
    path, meta = (
        out / "meta.json",
        {"complete": False, "job": {} if shard_paths(out) else job, "splits": {}},
    )
    meta = read_json(path) if path.is_file() else meta
    if differ := [k for k in job if meta.get("job", {}).get(k) != job[k]]:
        raise UserError(
            f"{out} has shards of another job (other {', '.join(differ)}): choose another --out, or throw them away "
            "with --overwrite"
        )
    for stale in out.glob("*.bin.*.tmp"):
        stale.unlink()
    if not path.is_file():
        write_json(path, meta)
    return meta


def shard_paths(out, split="*"):
    return sorted(Path(out).glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].bin"))


def held_out(share, i):
    return math.ceil((i + 1) * share) > math.ceil(i * share)


def chosen(parts, split, val_share, bar):
    """The parts of the documents that are the split's, if train and val share them."""
    number = -1
    for part in parts:
        number += part[1]
        bar.update(len(part[0]))
        if not val_share or split == "test" or held_out(val_share, number) == (split == "val"):
            yield part


def shard_jobs(parts, done):
    """Yield (shard number, parts) of about a BLOCK of text each. A shard ends with the document that fills it; which
    text is in which shard is known from the text alone, so those in `done` are only read over."""
    number, filled, job, size = 0, 0, [], 0
    for part in parts:
        text, begins, _ = part
        full = begins and filled >= SHARD_BYTES
        if job and (full or size >= BLOCK):
            yield number, job
            job, size = [], 0
        if full:
            number, filled = number + 1, 0
        filled += len(text)
        if number not in done:
            job.append(part)
            size += len(text)
    if job:
        yield number, job


SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


def encode_job(job, tok, ends):
    """(shard number, parts) -> (shard number, ids, where documents start among them, (bytes, words, lines) of text)."""
    (number, parts), (first, last) = job, ends
    ids, starts = [], []
    for text, begins, done in parts:
        if begins:
            starts.append(len(ids))
            ids += [first] if first is not None else []
        ids += tok.encode_bytes(text, "first" if begins else "inside")
        ids += [last] if done and last is not None else []
    texts = [text for text, _, _ in parts]
    space = SPACE[
        np.frombuffer(b"\n" + b"\n".join(texts), np.uint8)
    ]  # a word begins after white space
    counts = (
        sum(map(len, texts)),
        np.count_nonzero(space[:-1] & ~space[1:]),
        sum(t.count(b"\n") for t in texts),
    )
    return number, np.array(ids, tok.dtype), np.array(starts, np.int64), np.array(counts, np.int64)


def write_shard(path, results, tok):
    """Stream what `encode_job` returned for one shard to disk; the file appears when it is whole."""

    def write(temporary):
        size, starts, counts, digest = 0, [], np.zeros(3, np.int64), hashlib.sha256()
        with open(temporary, "wb") as file:

            def put(data):
                file.write(data)
                digest.update(data)

            file.write(bytes(HEADER.size))
            for _, ids, begins, more in results:
                put(ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes())
                starts.append(begins + size)
                size, counts = size + len(ids), counts + more
            starts, itemsize = np.concatenate(starts), np.dtype(tok.dtype).itemsize
            put(bytes(-size * itemsize % 8))
            put(starts.astype("<u8").tobytes())
            file.seek(0)
            file.write(
                HEADER.pack(
                    MAGIC,
                    VERSION,
                    itemsize,
                    size,
                    len(starts),
                    *map(int, counts),
                    bytes.fromhex(tok.sha256),
                    digest.digest(),
                )
            )

    with full_disk_explained(
        path, "finished shards are kept: make room and run the same command again"
    ):
        write_atomic(path, write)


def read_header(path, tokenizer_sha256=None):
    """The Header of a shard. UserError: no shard, another version, not the size it says, another tokenizer's."""
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
    if not raw.startswith(MAGIC) or len(raw) < HEADER.size:
        raise UserError(f"{path}: not a shard of tokens, it begins with {raw[:8]!r}")
    header = Header(*HEADER.unpack(raw))
    if header.version != VERSION or header.itemsize not in (2, 4):
        raise UserError(
            f"{path}: format version {header.version} with {header.itemsize} bytes a token; this program reads version "
            f"{VERSION} with 2 or 4: make the shards again"
        )
    expected = HEADER.size + -(-header.tokens * header.itemsize // 8) * 8 + 8 * header.documents
    if (size := os.path.getsize(path)) != expected:
        raise UserError(
            f"{path}: {size:,} bytes, but its header says {expected:,}; delete it and run data.py again"
        )
    if tokenizer_sha256 not in (None, header.tokenizer.hex()):
        raise UserError(
            f"{path}: made with tokenizer {header.tokenizer.hex()[:12]}, not {tokenizer_sha256[:12]}; the ids would "
            "mean other text: use the tokenizer in its folder, or make shards with yours"
        )
    return header


def open_shards(folder, tokenizer_sha256=None):
    """{split: Split} of a folder of shards, mapped, not read; headers and sizes are checked here."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise UserError(
            f"{folder}: no shards here (no meta.json); python data.py FILE... --tokenizer T --out {folder}"
        )
    meta = read_json(folder / "meta.json")
    if (
        not isinstance(meta, dict)
        or not isinstance(meta.get("job"), dict)
        or meta["job"].get("version") != VERSION
    ):
        raise UserError(
            f"{folder}/meta.json is not that of shards of version {VERSION}: make them with data.py"
        )
    if not meta.get("complete"):
        raise UserError(
            f"{folder}: unfinished; run the data.py command that makes it again, it goes on where it was"
        )
    splits = {}
    for name, counts in meta["splits"].items():
        paths = [folder / f"{name}-{i:05d}.bin" for i in range(counts["shards"])]
        if lost := [p.name for p in paths if not p.is_file()]:
            raise UserError(
                f"{folder}: {', '.join(lost[:3])} of {len(paths)} {name} shards missing; copy them there, "
                "or make the shards again with --overwrite"
            )
        headers = [read_header(p, tokenizer_sha256) for p in paths]
        tokens = [
            np.memmap(p, f"<u{h.itemsize}", "r", HEADER.size, (h.tokens,))
            for p, h in zip(paths, headers)
        ]
        starts = [
            np.memmap(p, "<u8", "r", p.stat().st_size - 8 * h.documents, (h.documents,))
            for p, h in zip(paths, headers)
        ]
        digest = sha256(b"".join(h.tokenizer + h.content for h in headers))
        end_id = meta["first_id"] if meta["last_id"] is None else None
        splits[name] = Split(tokens, starts, end_id, counts, digest, paths)
    return splits


# ------------------------------------------------------------------------------ tokens into batches
def split_tokens(tokens, context, share=0.1):
    """(training tokens, validation tokens): the last `share` is held out, as in nanoGPT. Refuses what is too short."""
    cut = int(len(tokens) * (1 - share))
    train, val = tokens[:cut], tokens[cut:]
    for part, have in (("training", len(train)), ("validation", len(val))):
        if have < context + 1:
            fits = max(
                (2**k for k in range(3, 20) if 2**k < min(len(train), len(val))), default=None
            )
            hint = f"use --context {fits}" if fits else "give a longer text"
            raise UserError(
                f"{have:,} {part} tokens, but a context of {context:,} needs at least {context + 1:,}: {hint}"
            )
    return train, val


class Batch(NamedTuple):
    """x predicts y. docs and positions are for masking: which piece of a document a token is in, and how far."""

    x: torch.Tensor  # (rows, context) int64
    y: torch.Tensor  # (rows, context) int64; -100 only in validation, where nothing is scored
    docs: torch.Tensor  # (rows, context) int32: 0, 1, 2, ... along a row
    positions: torch.Tensor  # (rows, context) int64: 0 where a piece begins

    def to(self, device):
        return Batch(*(t.to(device, non_blocking=True) for t in self))


class Plan(NamedTuple):
    """The rows of an epoch. Row r is the pieces first[order[r]] ... first[order[r] + 1] - 1."""

    starts: np.ndarray  # (pieces,) where each begins, all shards end to end
    sizes: np.ndarray  # (pieces,) pairs in it
    first: np.ndarray  # (rows + 1,)
    order: np.ndarray  # (rows,)

    def row(self, r):
        pieces = slice(self.first[self.order[r]], self.first[self.order[r] + 1])
        return self.starts[pieces], self.sizes[pieces]


class Split:
    """The documents of one split: a text in memory (one document), or mapped shards, read only where asked."""

    def __init__(self, tokens, starts=None, end_id=None, counts=None, sha256=None, paths=None):
        """tokens: arrays of ids; starts: where documents start in each; end_id: what a document's last id predicts."""
        self.tokens, self.starts, self.end_id = tokens, starts or [np.zeros(1, np.int64)], end_id
        self.counts, self.sha256, self.paths = counts or {}, sha256, paths or ["text"]
        self.bases = np.cumsum(
            [0, *map(len, tokens)]
        )  # of the shards, when they are thought end to end

    def __len__(self):
        return int(self.bases[-1])

    @functools.cached_property
    def documents(self):
        """-> (where each document starts, end to end; how many (token, next token) pairs it has): int64.

        A document of n tokens has n - 1 pairs: its EOS predicts nothing, least of all the next document's BOS, and so is never an
        input. Where one id does for both, the last token predicts that id: n pairs."""
        for starts, tokens, path in zip(self.starts, self.tokens, self.paths):
            if starts[0] != 0 or starts[-1] >= len(tokens) or (starts[1:] < starts[:-1]).any():
                raise UserError(
                    f"{path}: damaged, its document starts are out of order; make it again with data.py"
                )
        begin = np.concatenate(
            [starts.astype(np.int64) + base for starts, base in zip(self.starts, self.bases)]
        )
        return begin, np.maximum(np.diff(begin, append=len(self)) - (self.end_id is None), 0)

    def read(self, start, size):
        """`size` tokens from `start` on and the one after. After the last of a shard comes what begins the next."""
        shard = int(np.searchsorted(self.bases, start, "right")) - 1
        start = int(start - self.bases[shard])
        window = self.tokens[shard][start : start + size + 1]
        return window if len(window) > size else np.append(window, window.dtype.type(self.end_id))

    def plan(self, context, seed, epoch):
        """The rows of an epoch, each of exactly `context` pairs, as a function of (seed, epoch) -> Plan.

        A document gives as many full rows as it has, from its start. What remains of all documents is shuffled, put end to end and
        cut into rows too; in such a row a piece that begins a document goes first. So nothing is padded or masked, and nothing
        dropped but the less than one row that is over in the end, other text each epoch. A text that is one document is cut at a
        new offset each epoch instead."""
        rng = np.random.default_rng([seed, epoch])
        begin, pairs = self.documents
        if len(begin) == 1:
            offset = rng.integers(max(1, min(context, pairs[0] - context + 1)))
            begin, pairs = begin + offset, pairs - offset
        full = pairs // context
        of = np.repeat(np.arange(len(full)), full)  # the document of each full row
        starts = begin[of] + context * (
            np.arange(len(of)) - np.repeat(np.cumsum(full) - full, full)
        )
        rest = rng.permutation(
            np.flatnonzero(pairs % context)
        )  # documents of which something remains
        rest_starts, sizes = begin[rest] + full[rest] * context, pairs[rest] % context
        ends = np.cumsum(sizes)
        packed = int(ends[-1]) // context if len(ends) else 0  # rows made of them
        cuts = np.append(
            (ends - sizes)[ends - sizes < packed * context], np.arange(packed) * context
        )
        cuts = np.sort(cuts, kind="stable")  # merges sorted runs; np.unique takes a second
        cuts = cuts[np.diff(cuts, prepend=-1) > 0]  # where pieces begin
        piece = np.searchsorted(ends, cuts, "right")  # which remainder begins or goes on here
        into = cuts - (ends - sizes)[piece]
        fresh = (into == 0) & (full[rest][piece] == 0)  # a document begins here
        by_row = np.argsort(
            cuts // context * 2 - fresh, kind="stable"
        )  # within each row, these first
        first = np.append(
            np.arange(len(of)), len(of) + np.searchsorted(cuts // context, np.arange(packed + 1))
        )
        return Plan(
            np.append(starts, (rest_starts[piece] + into)[by_row]),
            np.append(np.full(len(of), context), np.diff(cuts, append=packed * context)[by_row]),
            first,
            rng.permutation(len(first) - 1),
        )

    def fill(self, rows, context):
        """[(starts, sizes) of the pieces of a row] -> Batch; rows that are not full end in tokens 0 with target -100."""
        x, positions = (np.zeros((len(rows), context), np.int64) for _ in range(2))
        y, docs, count = np.full_like(x, -100), np.zeros_like(x, np.int32), np.arange(context)
        for i, (starts, sizes) in enumerate(rows):
            at = 0
            for piece, (start, size) in enumerate(zip(starts, sizes)):
                window, end = self.read(start, size), at + size
                x[i, at:end], y[i, at:end] = window[:-1], window[1:]
                docs[i, at:end], positions[i, at:end] = piece, count[:size]
                at = end
            docs[i, at:] = len(starts)
        return Batch(*map(torch.from_numpy, (x, y, docs, positions)))

    def validation(self, rows, context, stride=None, rank=0, world=1):
        """Yield Batches of (rows, context) that score every pair of the split exactly once, in order.

        Windows begin every `stride` pairs (default: context, no overlap); each scores only what the one before did not reach, with
        context - stride pairs to look back on. What is not scored, and what fills the last batch, is target -100. Rank r gets every
        world-th batch; all ranks get as many."""
        stride = stride or context
        if not 0 < stride <= context:
            raise UserError(
                f"a stride of {stride:,} does not suit a context of {context:,}: use 1 to {context:,}"
            )
        begin, pairs = self.documents
        ends = np.cumsum(pairs)
        windows = 1 + -(-max(0, int(ends[-1]) - context) // stride)
        for at in range(rank * rows, -(-windows // (rows * world)) * rows * world, rows * world):
            pieces = []
            for left in range(at * stride, (at + rows) * stride, stride):
                right = min(left + context, int(ends[-1])) if left // stride < windows else left
                last = np.searchsorted(ends, right, "left") + 1 if right > left else 0
                these = np.arange(
                    np.searchsorted(ends, left, "right"), last
                )  # the documents in the window
                offset = np.maximum(left - (ends - pairs)[these], 0)  # into the first of them
                pieces.append(
                    (
                        begin[these] + offset,
                        np.minimum(ends[these], right) - (ends - pairs)[these] - offset,
                    )
                )
            batch = self.fill(pieces, context)
            batch.y[
                int(at == 0) :, : context - stride
            ] = -100  # all but the very first window look back only
            yield batch


def as_split(tokens):
    return tokens if hasattr(tokens, "plan") else Split([tokens])


class Batches:
    """Batches of rows: every row of the split once an epoch, in an order fixed by the seed.

    `split` is an array of ids or anything with `plan`, `fill` and `validation` as Split has them: what an epoch's rows are, and
    how some of them become a NamedTuple of tensors, is its business; order, place, ranks and working ahead are done here.

    The position is two integers: the epoch, and the row among those of all ranks. A step takes world * rows rows, of which rank r
    gets the r-th part; their order depends on (seed, epoch) alone. So a resumed run goes on with exactly the batch it would have
    seen, on any number of ranks with the same rows in all. A thread works `prefetch` batches ahead. For a CUDA `device` batches are
    in pinned memory."""

    def __init__(self, split, rows, context, seed, rank=0, world=1, prefetch=2, device=None):
        self.split, self.rows, self.context = as_split(split), rows, context
        self.rank, self.world, self.prefetch = rank, world, prefetch
        self.plan = functools.lru_cache(2)(
            functools.partial(self.split.plan, context, seed)
        )  # a batch can span two epochs
        self.pool, self.made, self.device = (
            ThreadPoolExecutor(1),
            deque(),
            torch.device(device or "cpu"),
        )
        self.epoch, self.row = self.ahead = (
            0,
            0,
        )  # where the next batch to be handed out begins, and the next to be made
        if (have := len(self.plan(0).order)) < rows * world:
            raise UserError(
                f"{len(self.split):,} tokens make {have:,} rows of {context:,}, but a step takes {rows * world:,}: "
                "give more data, or use a smaller --batch or --context"
            )

    def locate(self, epoch, row):
        while row >= (have := len(self.plan(epoch).order)):
            epoch, row = epoch + 1, row - have
        return epoch, row

    def make(self):
        """In the thread: this rank's part of the batch that begins at `ahead` -> (Batch, where the next begins)."""
        epoch, row = self.ahead
        places = [self.locate(epoch, row + self.rank * self.rows + i) for i in range(self.rows)]
        batch = self.split.fill([self.plan(e).row(r) for e, r in places], self.context)
        if self.device.type == "cuda":
            torch.cuda.set_device(
                self.device.index or 0
            )  # a new thread starts on GPU 0, where pinning would then make a context
            batch = batch._make(t.pin_memory() for t in batch)
        self.ahead = self.locate(epoch, row + self.rows * self.world)
        return batch, self.ahead

    def next(self):
        """-> Batch. Raises what went wrong in the thread, and again if asked again."""
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
        self.pool, self.made = ThreadPoolExecutor(1), deque()
        self.epoch, self.row = self.ahead = self.locate(self.epoch, self.row)


@dataclass
class Args:
    data: tuple = ()  # shakespeare, wikitext-2, wikitext-103, toybox, or files, folders and globs
    tokenizer: str = ""  # make shards with this tokenizer: a folder or file
    out: str = ""  # the folder to write, data/NAME for a named corpus
    val: tuple = ()  # files to validate on, not a share of the documents
    val_share: float = 0.01  # share of the documents to validate on
    split_on: str = ""  # what stands between the documents of a text file; \n is a newline
    field: str = "text"  # where a .jsonl or .parquet has its text
    skip_bad: bool = False  # count and leave out records without a text
    overwrite: bool = False  # throw away the shards in --out
    processes: int = 0  # to tokenize in; 0 is one per CPU
    data_dir: str = ""  # a folder that may hold a local copy of a named corpus, else $LLM_DATA_DIR


def main():
    args = Args(**parse_flags(Args, __doc__, positional=("data",)))
    named = [n for n in args.data if n in (*WIKITEXT, "shakespeare", "toybox")]
    if named and len(args.data) > 1:
        raise UserError(f"{named[0]} goes alone, without {len(args.data) - 1} more")
    if not named and not (args.tokenizer and args.out):
        raise UserError(
            "shards of your own text need --tokenizer T (python tokenizer.py train makes one) and --out D"
        )
    if not 0 < args.val_share < 1 or args.processes < 0:
        raise UserError(
            f"--val-share {args.val_share} must be between 0 and 1, --processes {args.processes} not negative"
        )
    name = args.data[0]
    out = Path(args.out or f"data/{name}")
    if name == "toybox":
        return toybox.write_toybox(out, read_text("shakespeare", args.data_dir)[0])
    tok = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    separator = (
        re.compile(re.escape(args.split_on.replace(r"\n", "\n").encode()))
        if args.split_on
        else None
    )
    if (
        name in WIKITEXT
    ):  # without a tokenizer --out is where the text goes, with one it is where the shards go
        text = wikitext(name, f"data/{name}" if tok else out, args.data_dir)
        files, separator = (
            {"val": [text["valid"]], "test": [text["test"]], "train": [text["train"]]},
            ARTICLE,
        )
    else:
        files = {
            "train": [shakespeare(args.data_dir)] if name == "shakespeare" else expand(args.data)
        }
    if not tok:
        return
    if args.val:
        files = {"val": expand(args.val), **{k: v for k, v in files.items() if k != "val"}}
    if args.overwrite:
        for path in [*shard_paths(out), out / "meta.json"]:
            path.unlink(missing_ok=True)
    make_shards(
        files,
        tok,
        out,
        val_share=args.val_share,
        separator=separator,
        field=args.field,
        skip_bad=args.skip_bad,
        processes=args.processes,
    )


if __name__ == "__main__":
    cli(main)
