"""Text to ids and back by byte-pair encoding: learning a vocabulary, encoding, decoding, streaming.

    python tokenizer.py train --data corpus.txt --vocab-size 10000 --out runs/tokenizer
    python tokenizer.py show "Hello, world" --tokenizer runs/tokenizer
    python tokenizer.py compare runs/tokenizer gpt2/vocab.bpe --data corpus.txt

The plain forms come first: learn_merges_simply chooses merges, merge_by_rank applies them. Faster
ones, tested equal to them, do the work: training/bpe.py learns, and tiktoken's core encodes.
formats/vocab.py reads and writes the tokenizer files that other programs use.
"""

import codecs
import functools
import heapq
import json
import math
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex

from common import (
    UserError,
    any_of,
    cli,
    parse_flags,
    run_command,
    sha256,
    well_formed,
    write_atomic,
    write_json,
)

# ---- Split: text is cut into chunks (about: words) first.

# Merges never cross a chunk's border, so no token spans two words. "gpt2" is Radford et al. 2019;
# "gpt4" is cl100k, which stops numbers at three digits and lets a newline end punctuation. "llama3"
# cuts as gpt4 does, spelled as Llama's files spell it.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""",
    "llama3": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "tekken": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}
PATTERNS["qwen2"] = PATTERNS["llama3"].replace("{1,3}", "")  # digits one by one
# Where a large file may be cut without changing any chunk, so that its parts can be split in
# parallel: between a visible character and a space; a letter or digit and a newline; a Chinese
# character or Hangul and a space, newline, comma or full stop.
BEFORE_SPACE = rb"[!-~](?= )|[\xc3-\xdf][\x80-\xbf](?= )"
BETWEEN_CHUNKS = (
    BEFORE_SPACE + rb"|[a-zA-Z0-9](?=\n)"
    rb"|[\xe5-\xe9\xeb\xec][\x80-\xbf]{2}(?=[ \n]|\xe3\x80[\x81\x82]|\xef\xbc\x8c)"
)
# No chunk of these patterns reaches across such a place. The last two are those of a tokenizer.json
# that splits off digits, one by one or together, before its last pattern splits the rest.
CUT_THERE = {*PATTERNS.values(), r"\p{N}", r"\p{N}+"}


def pattern_named(name):
    """A name in PATTERNS, or a regular expression itself -> the regular expression."""
    if name not in PATTERNS and re.fullmatch(r"[\w.-]*\w", name):
        raise UserError(
            f"unknown pattern {name!r}: use {', '.join(PATTERNS)}, or a regular expression"
        )
    return PATTERNS.get(name, name)


MOST_PATTERN = 1 << 13  # characters


@functools.lru_cache
def splitter(pattern):
    """A function text -> list of chunks that add up to it. UserError for an unusable pattern, and
    where it takes more than a second and 10 us a character, a hundred times the usual."""
    shown = f"the split pattern {pattern[:200]!r}"
    try:
        # The library writes a{1000} out. In (?x) such a count could hide behind a comment.
        counts = map(float, regex.findall(r"\{0*([1-9]\d*)", pattern))
        if len(pattern) * math.prod(counts) > MOST_PATTERN or regex.search(r"\(\?\w*x", pattern):
            raise regex.error(
                f"it may have {MOST_PATTERN:,} characters, its counts written out, and no (?x)"
            )
        compiled = regex.compile(pattern)
        if compiled.match("", timeout=1) or compiled.groups:
            raise regex.error("it must match no empty text and have no groups but (?: )")
        # What a pattern leaves out becomes a chunk too, so that no text is lost.
        split = regex.compile(f"({pattern})").split
    except (MemoryError, RecursionError, TimeoutError, regex.error) as error:
        raise UserError(f"{shown} is not a regular expression that splits text: {error}") from None
    if pattern in PATTERNS.values():  # these leave nothing out
        return compiled.findall

    def chunks_of(text):
        try:
            chunks = list(filter(None, split(text, timeout=1 + len(text) / 1e5)))
        except (MemoryError, TimeoutError):
            chunks = []
        if "".join(chunks) != text:  # (?r) goes backwards, and what stands before \K comes twice
            raise UserError(f"{shown} takes too long on {len(text):,} characters, or changes them")
        return chunks

    for character in "a 1!\n":  # those whose time explodes mostly do so on a run of something
        chunks_of(character * 2000 + "_")
    return chunks_of


# ---- Learn: the most frequent pair of neighbours becomes a new symbol, again and again
# (Sennrich et al. 2016, arXiv:1508.07909). A chunk that occurs a thousand times is counted once.

# The 256 bytes in GPT-2's order, printable ones first. Ids follow it, as HF tokenizers' do, because
# ties between equally frequent pairs fall to lower ids.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]


def learn_merges_simply(chunks, n_merges):
    """{chunk: count} -> [(left, right)], the i-th of which makes symbol 256 + i. Correct, slow."""
    words = {
        tuple(BYTES.index(b) for b in chunk.encode()): times for chunk, times in chunks.items()
    }
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # here a merge is chosen
        new = 256 + len(merges)
        words = {tuple(replace_pair(word, best, new)): times for word, times in words.items()}
        merges.append(best)
    return merges


def replace_pair(ids, pair, new):
    """replace_pair([1, 2, 3, 1, 2], (1, 2), 4) -> [4, 3, 4]. It goes from the left:
    replace_pair([1, 1, 1], (1, 1), 4) -> [4, 1]."""
    out = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


# ---- Encode: the learned merges, applied to a new chunk in the order in which they were learned.


def merge_by_rank(ids, merges):
    """Apply {(left, right): (rank, new)} to a list of ids: lowest rank first, leftmost first.

    The ids form a linked list, and a heap holds (rank, position) of every pair that has a merge:
    O(n log n), so that a megabyte of one letter takes seconds and not days."""
    ids = [*ids, -1]  # -1 stands at the end, and wherever an id has been merged away
    after = list(range(1, len(ids) + 1))  # the position of the next id that is left
    before = list(range(-1, len(ids) - 1))  # and of the previous one; before the first: the end's
    heap = [(merges[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in merges]
    heapq.heapify(heap)

    def offer(left, right):
        pair = ids[left], ids[right]
        if pair in merges:
            heapq.heappush(heap, (merges[pair][0], left))

    while heap:
        rank, left = heapq.heappop(heap)  # here the next merge is chosen
        right = after[left]
        pair = ids[left], ids[right]
        if pair not in merges or merges[pair][0] != rank:
            continue  # one of the two has been merged since
        ids[left] = merges[pair][1]
        ids[right] = -1
        after[left] = after[right]
        before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [i for i in ids if i >= 0]


def merges_from_ranks(vocab):
    """{bytes: id} without merges, as tiktoken's files are -> merges {(left, right): (rank, new)}.

    A token is merged from the two parts that its bytes become by the merges with lower ids."""
    merges = {}
    for token, i in sorted(vocab.items(), key=lambda item: item[1]):
        parts = merge_by_rank([vocab[bytes([b])] for b in token], merges)
        if len(parts) == 2:
            merges[tuple(parts)] = (len(merges), i)
    return merges


def halves(token, vocab):
    """The pairs of ids whose tokens, put together, spell this token."""
    for k in range(1, len(token)):
        pair = vocab.get(token[:k]), vocab.get(token[k:])
        if None not in pair:
            yield pair


def stays_apart(left, right, last, merges):
    """Whether two tokens side by side are what merging their bytes comes to before they are joined:
    no merge crosses their border until both are whole. Of "a" and "aa" it is False: in "aaa" the
    leftmost "aa" is merged first.

    Takes back the later of their last merges until none is left, and looks each time whether a
    merge across the border would have come before the one taken back.
    last {id: the pair it is merged from, None for a byte}; ids ascend with ranks."""
    while last[max(left, right)]:
        if left > right:
            bound = left  # ids below it are merged before what was taken back
            left = last[left][1]
        else:
            bound = right + 1  # of equal pairs the leftmost goes first
            right = last[right][0]
        if (left, right) in merges and merges[left, right][1] < bound:
            return False
    return True


# ---- The Tokenizer.

SPECIAL_TOKENS = "<PAD> <UNK> <BOS> <EOS> <|im_start|> <|im_end|>".split()
# Which special tokens begin, end and pad a text, where no file says it: the first of these names
# that the tokenizer has.
ROLES = {
    "bos_token": "<BOS> <s> <|endoftext|>",
    "eos_token": "<EOS> </s> <|endoftext|>",
    "unk_token": "<UNK> <unk>",
    "pad_token": "<PAD> <pad>",
}
# Files are untrusted, and tables are as long as the largest id that they name, patterns as their
# special and added tokens; and every way to halve a token is tried, which takes the square of its
# length. In use: 262K ids, with squares of 16M together (Gemma 3), and 66K speech tokens.
LARGEST_ID = 1 << 20
MOST_NAMED = 80_000
MOST_SQUARES = 1 << 26


@dataclass(eq=False, repr=False)
class Tokenizer:
    """Text <-> ids. Made by load, train or char.

    kind            "bytes": tokens are bytes, text is split by `patterns` (GPT-2, Llama 3, Qwen)
                    "pieces": tokens are text with ▁ for a space, and bytes as <0x0A> where no
                    token fits (Llama 2, Mistral)
                    "chars": one token per character
    """

    kind: str
    vocab: dict  # {token: id}, keys bytes or str by kind, without special and added tokens
    listed_merges: dict | None = None  # None: ids are ranks, and `merges` are worked out if needed
    patterns: Sequence = ()
    special: dict = field(default_factory=dict)  # {text: id}: no text ever becomes one of these
    added: dict = field(default_factory=dict)  # {text: id}, matched in text first (Qwen's <think>)
    whole_chunks: bool = False  # a chunk that is a token becomes it, whatever merges say (Llama 3)
    normalizer: Sequence = ()  # (operation, arguments...), see normalize
    strip_space: bool = False  # the first space is not text but was put there
    unknown: int | None = None  # the id of what has no token
    config: dict = field(default_factory=dict)  # tokenizer_config.json: eos_token, chat_template...
    source: bytes | None = None  # the tokenizer.json this was read from, as it was
    before: tuple | None = None  # ids that a prompt begins with, if its file says it
    after: tuple = ()  # ids that it ends with

    def __post_init__(self):
        for role, names in ROLES.items():
            for name in names.split():
                if name in self.special:
                    self.config.setdefault(role, name)
        for pattern in self.patterns:
            splitter(pattern)  # an unusable one is refused now
        ids = [*self.vocab.values(), *self.added.values(), *self.special.values()]
        check_ids(ids)
        check_lengths([*self.vocab, *self.added, *self.special])
        if len(self.added) + len(self.special) > MOST_NAMED:
            raise UserError(f"more than {MOST_NAMED:,} special and added tokens")
        self.vocab_size = max(ids, default=-1) + 1
        self._bytes = [b""] * self.vocab_size  # what each id adds to a text
        for token, i in self.vocab.items():
            self._bytes[i] = self.spell(token)
        for name, i in self.added.items():
            self._bytes[i] = name.encode()
        self._shown = self._bytes.copy()  # the same with special tokens' names
        for name, i in self.special.items():
            self._shown[i] = name.encode()
        # Special tokens are not among these, so no text becomes one.
        self._split_added = any_of(tuple(self.added)).split
        self._cache = {}  # chunk -> ids, of the plain encoder

    def spell(self, token):
        """The bytes that a token of the vocabulary stands for."""
        if self.kind == "bytes":
            return token
        if self.kind == "chars":
            return token.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    # -- made from text

    @classmethod
    def train(
        cls,
        texts=(),
        vocab_size=10_000,
        pattern="gpt4",
        special_tokens=SPECIAL_TOKENS,
        *,
        files=(),
        processes=0,
    ):
        """Learn a byte-level BPE of `vocab_size` ids from an iterable of str and from files.

        pattern: a name in PATTERNS or a regular expression. special_tokens: they get ids 0, 1, ...
        A chunk never spans two texts, nor two lines of a file. The merges are those of HF
        tokenizers' BpeTrainer, for any number of processes.
        UserError: a vocabulary too small for bytes and special tokens, no text, a bad pattern."""
        pattern = pattern_named(pattern)
        for name in special_tokens:
            if len(name) < 2 or special_tokens.count(name) > 1:
                raise UserError(
                    f"special token {name!r} is listed twice or shorter than 2 characters"
                )
        special = {name: i for i, name in enumerate(special_tokens)}
        least = 256 + len(special)
        if not least <= vocab_size <= LARGEST_ID:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small or large: 256 bytes and {len(special)} "
                f"special tokens need {least}, and there may be {LARGEST_ID}"
            )
        from training import bpe

        if isinstance(texts, str):
            texts = [texts]
        chunks = bpe.count_chunks(texts, files, pattern, processes)
        if not chunks:
            raise UserError("there is no text to learn from")
        forbidden = {name.encode() for name in special}
        merges = bpe.learn_merges(chunks, vocab_size - least, forbidden)
        fits = least + len(merges)
        if fits < vocab_size:
            print(
                f"the text supports {len(merges):,} merges: stopped early with a vocabulary of "
                f"{fits:,} (--vocab-size {fits} asks for that)",
                file=sys.stderr,
            )
        tokens = [bytes([b]) for b in BYTES]
        first = len(special)  # special tokens come first, then the bytes, then what merges make
        ranked = {}
        for rank, (left, right) in enumerate(merges):
            tokens.append(tokens[left] + tokens[right])
            ranked[first + left, first + right] = (rank, least + rank)
        vocab = {token: first + i for i, token in enumerate(tokens)}
        return cls("bytes", vocab, ranked, [pattern], special)

    @classmethod
    def char(cls, text: str) -> "Tokenizer":
        """One id per distinct character, in code point order."""
        if not text:
            raise UserError("there is no text to take the characters from")
        vocab = {c: i for i, c in enumerate(sorted(set(well_formed(text))))}
        return cls("chars", vocab, {})

    # -- encoding

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """str -> ids. Never a special id but the bos and eos asked for, whatever the text says.

        UserError for a character that a character tokenizer does not know, or a bos or eos that
        this tokenizer does not have."""
        ids = self._encode(text)  # in which `special` is never looked up
        if bos:
            ids.insert(0, self._required("bos"))
        if eos:
            ids.append(self._required("eos"))
        return ids

    def prompt_ends(self):
        """-> (ids before, ids after) that encode_prompt puts round a text."""
        before = self.before
        if before is None:
            # No file says it. A model of conversations knows a bos only if its template writes one,
            # and our ChatML does not; but Llama 2's and Mistral's see one before every text.
            before = only_if(self.kind == "pieces" or not self.chat_template, self.bos_id)
        return before, self.after

    def set_prompt_ends(self, bos, eos):
        """Whether a prompt begins with bos and ends with eos, where there are such tokens."""
        self.before = only_if(bos, self.bos_id)
        self.after = only_if(eos, self.eos_id)

    def encode_prompt(self, text):
        """A prompt that is no conversation -> ids, with what the tokenizer's files put round it."""
        before, after = self.prompt_ends()
        return [*before, *self.encode(text), *after]

    def encode_bytes(self, data, where="first"):
        """Bytes of UTF-8 -> ids, without ends.

        where: "first" at the beginning of a text, "inside" further on, as for normalize."""
        return self._encode(data.decode(), where)

    def _encode(self, text, where="first"):
        text = well_formed(text)
        if not self.added:
            return self._encode_part(text, where)
        ids = []
        for i, part in enumerate(self._split_added(text)):  # every second part is an added token
            if i % 2:
                ids.append(self.added[part])
            else:
                ids += self._encode_part(part, "later" if i else where)
        return ids

    def _encode_part(self, text, where):
        text = normalize(text, self.normalizer, where)
        if self.kind == "chars":
            return self._encode_characters(text)
        if self.fast is None:
            return self.encode_slowly(text)
        encode = self.fast.encode_ordinary  # splits by the last pattern itself, then merges
        patterns = self.patterns[:-1]
        if any(text[i : i + 50_000].isspace() for i in range(0, len(text) - 50_000, 50_000)):
            # On 100,000 spaces in a row tiktoken's regular expressions can panic: split with ours.
            # Every such run has a whole block of 50,000 in it.
            encode = self.fast._encode_single_piece
            patterns = self.patterns
        if not patterns:
            return encode(text)  # a copy of the ids would take 7 % of the time
        return list(chain.from_iterable(map(encode, self._split(text, patterns))))

    def _encode_characters(self, text):
        try:
            return [self.vocab[c] for c in text]
        except KeyError:
            unknown = sorted(set(text) - self.vocab.keys())
            raise UserError(
                f"{len(unknown)} of the text's characters not in this tokenizer's "
                f"{len(self.vocab)}: {', '.join(map(repr, unknown[:10]))}; make the tokenizer from "
                "text that has them"
            ) from None

    def _split(self, text, patterns):
        if self.kind == "pieces" and not patterns and self.spaces_lead:
            return re.findall("▁*[^▁]+|▁+", text)
        chunks = [text]
        for pattern in patterns:
            chunks = chain.from_iterable(map(splitter(pattern), chunks))
        return chunks

    def encode_slowly(self, text):
        """The plain encoder, of normalized text: split, merge each chunk by rank, remember it."""
        ids = []
        for chunk in self._split(text, self.patterns):
            known = self._cache.get(chunk)
            if known is None:
                known = self._encode_chunk(chunk)
                if len(self._cache) < 1 << 16 and len(chunk) < 64:
                    self._cache[chunk] = known
            ids += known
        return ids

    def _encode_chunk(self, chunk):
        token = chunk.encode() if self.kind == "bytes" else chunk
        if self.whole_chunks and token in self.vocab:
            return [self.vocab[token]]
        if self.kind == "bytes":
            return merge_by_rank(map(self.byte_id, token), self.merges)
        ids = []
        for c in chunk:
            if c in self.vocab:
                ids.append(self.vocab[c])
            elif "<0x00>" in self.vocab:
                ids += map(self.byte_id, c.encode())
            elif self.unknown is None:
                raise UserError(f"{c!r} is not in this vocabulary, nor an unknown token or bytes")
            elif ids[-1:] != [self.unknown]:  # one unknown token for a run of unknown characters
                ids.append(self.unknown)
        return merge_by_rank(ids, self.merges)

    def byte_id(self, byte):
        token = f"<0x{byte:02X}>" if self.kind == "pieces" else bytes([byte])
        if token not in self.vocab:
            raise UserError(f"this vocabulary has no token for the byte {byte:#04x}")
        return self.vocab[token]

    @functools.cached_property
    def merges(self):
        """{(left id, right id): (rank, new id)}"""
        if self.listed_merges is None:
            return merges_from_ranks(self.vocab)
        return self.listed_merges

    @functools.cached_property
    def fast(self):
        """tiktoken's core, which is compiled Rust, where it is certain to give the ids of
        merge_by_rank; else None, and encode_slowly does the work.

        So the fast encoder is not ours: it *is* tiktoken, with our vocabulary in it. It splits by
        the last pattern itself, and only those in PATTERNS are sure to mean the same to it."""
        known = self.patterns and self.patterns[-1] in PATTERNS.values()
        if self.kind != "bytes" or not known or not self._tiktoken_agrees():
            return None
        import tiktoken

        return tiktoken.Encoding(
            "ours", pat_str=self.patterns[-1], mergeable_ranks=self.vocab, special_tokens={}
        )

    def _tiktoken_agrees(self):
        """Whether the merges give what tiktoken gives, which follows no merges: it joins any two
        neighbours whose bytes together are a token, the lowest id first.

        They do if ids ascend with ranks and every token is what merging its own bytes ends in: then
        the same bytes between the same borders always merge the same way, and no pair that is not
        listed ever stands there to be joined. A token that merges do not reach (in Llama 3's file
        only a whole chunk becomes it) tiktoken would join from any two tokens that spell it: so
        each such pair must be a listed merge, too."""
        if self.listed_merges is None:  # the file has ids alone, for tiktoken to follow
            return True
        merges = self.merges
        byte_ids = [self.vocab.get(bytes([b])) for b in range(256)]
        if None in byte_ids:
            return False
        newest = max(byte_ids)
        last = dict.fromkeys(byte_ids)  # id: the pair that merging its bytes joins last
        for pair in sorted(merges, key=merges.get):
            _, new = merges[pair]
            if new < newest:
                return False
            newest = new
            left, right = pair
            known = left in last and right in last
            if known and new not in last and stays_apart(left, right, last, merges):
                last[new] = pair
        unreached = [token for token, i in self.vocab.items() if i not in last]
        if unreached and not self.whole_chunks:
            return False
        pairs = chain.from_iterable(halves(token, self.vocab) for token in unreached)
        return all(pair in merges for pair in pairs)

    # -- ids in files

    @property
    def dtype(self):
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @functools.cached_property
    def cuts(self):
        """Regular expressions for corpora.border: where a file may be cut without changing any id.

        () if that is not certain: for unknown patterns, if an added token is cut, or if pieces get
        a space behind one, where a cut may be, too."""
        cuts = BETWEEN_CHUNKS
        certain = self.kind == "chars" or (self.patterns and {*self.patterns} <= CUT_THERE)
        if self.kind == "pieces":
            cuts = BEFORE_SPACE
            certain = self.spaces_lead and not self.added
        crossed = any(re.search(cuts, name.encode()) for name in self.added)
        return (cuts,) if certain and not crossed else ()

    @functools.cached_property
    def spaces_lead(self):
        """Whether no token has a ▁ after another character: then text can be split before each."""
        return not any("▁" in token.lstrip("▁") for token in self.vocab)

    # -- decoding

    def decode(self, ids, skip_special: bool = False) -> str:
        """ids -> str; bytes that are no UTF-8 show as U+FFFD. UserError for an id beyond the last;
        one below it that no token has is no text."""
        text = self.decode_bytes(ids, skip_special).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strip_space else text

    def decode_bytes(self, ids, skip_special=False):
        """ids -> the bytes of their text (for pieces, after the space that they add)."""
        table = self._bytes if skip_special else self._shown
        ids = list(ids)
        if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
            raise UserError(
                f"ids from {min(ids)} to {max(ids)}, but this tokenizer's are 0 to "
                f"{self.vocab_size - 1}"
            )
        return b"".join([table[i] for i in ids])

    def token_bytes(self, i):
        """The bytes this token adds to a text; b"" for special tokens."""
        return self._bytes[i]

    def stream(self, skip_special=False):
        return Stream(self, skip_special)

    # -- special tokens

    bos_id = property(lambda self: self._role("bos_token"))
    eos_id = property(lambda self: self._role("eos_token"))
    pad_id = property(lambda self: self._role("pad_token"))

    def _role(self, name):
        token = self.config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if not token:
            return None
        return self.special.get(token, self.added.get(token))

    def _required(self, role):
        i = getattr(self, role + "_id")
        if i is None:
            raise UserError(f"this tokenizer has no {role} token, only {[*self.special]}")
        return i

    def with_special(self, names):
        """The same tokenizer with these special tokens besides, which get the next free ids.
        UserError where it has one of that name, whose id would be lost."""
        for name in names:
            if name in self.special | self.added:
                raise UserError(
                    f"{name!r} is a token already; that it is special, its file must say"
                )
        ids = {name: self.vocab_size + i for i, name in enumerate(names)}
        return replace(self, special=self.special | ids, config=dict(self.config))

    @property
    def chat_template(self):
        """The Jinja chat template in tokenizer_config.json, or None."""
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t.get("name"): t.get("template") for t in template}.get("default")
        return template

    @chat_template.setter
    def chat_template(self, template):
        self.config["chat_template"] = template

    # -- files

    @staticmethod
    def load(path: str | Path, pattern=None) -> "Tokenizer":
        """Read a folder, tokenizer.json, merges.txt (vocab.json beside it), .tiktoken, tekken.json
        or SentencePiece .model; what tokenizer_config.json and its like beside it say is applied.
        How a .tiktoken file splits text is known by its name, or given as `pattern`. UserError for
        whatever is wrong with the file."""
        from formats.vocab import read_tokenizer

        return read_tokenizer(Path(path), pattern)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens
        with the same ids."""
        from formats.vocab import tokenizer_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = tokenizer_file(self)
        config = {"clean_up_tokenization_spaces": False, **self.config}
        if self.source is None or "tokenizer_class" not in config:
            # The one class to which transformers adds nothing: the file alone decides the ids.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_atomic(folder / "tokenizer.json", lambda path: path.write_bytes(content))
        write_json(folder / "tokenizer_config.json", config)
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would go before the config's

    @functools.cached_property
    def sha256(self):
        """Hex digest of everything that decides what `encode` makes of a text, whatever file it
        came from."""
        parts = [
            self.kind,
            sorted((self.spell(token).hex(), i) for token, i in self.vocab.items()),
            sorted(self.special.items()),
            sorted(self.added.items()),
            self.patterns,
            self.normalizer,
            self.whole_chunks,
            self.unknown,
            sorted((rank, *pair) for pair, (rank, _) in self.merges.items()),
        ]
        return sha256(json.dumps(parts).encode())


class Stream:
    """Ids in, text out, as a model produces them: never half a character, no id decoded twice."""

    def __init__(self, tokenizer, skip_special):
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self.strip_space = tokenizer.strip_space
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i):
        """The text that is certain now: possibly "", possibly more than this token's own."""
        return self._decode(self.tokenizer.decode_bytes([i], self.skip_special))

    def flush(self):
        """What is left: U+FFFD if a character was never finished."""
        return self._decode(b"", final=True)

    def _decode(self, data, final=False):
        text = self.decoder.decode(data, final)  # it holds back the bytes of half a character
        if self.strip_space and text:
            self.strip_space = False
            return text.removeprefix(" ")
        return text


def normalize(text, operations, where="first"):
    """Change a text before it is split, as its tokenizer's file says.

    operations: ("unicode", form), ("replace", old, new) or ("prepend", prefix, when).
    where: the text stands "first", "later" after an added token, or "inside" a text encoded in
    parts, which gets no prefix. Else `when` says which does:
        "first"   one that is first and does not begin with the prefix
        "always"  one that does not begin with the prefix
        "every"   each, also one that begins with it"""
    for name, *arguments in operations:
        if name == "unicode":
            text = unicodedata.normalize(arguments[0], text)
        elif name == "replace":
            text = text.replace(*arguments)
        elif text and where != "inside":
            prefix, when = arguments
            wanted = when in ("always", where) and not text.startswith(prefix)
            if wanted or when == "every":
                text = prefix + text
    return text


def only_if(wanted, i):
    """(i,), or () where it is not wanted or is None."""
    return (i,) if wanted and i is not None else ()


def check_ids(ids):
    """UserError unless these are different ids of a sane size."""
    for i in ids:
        if type(i) is not int or not 0 <= i < LARGEST_ID:
            raise UserError(f"token id {i!r} is not a whole number from 0 to {LARGEST_ID - 1}")
    if len(set(ids)) < len(ids):
        raise UserError(f"two tokens have the same id: {Counter(ids).most_common(1)[0][0]}")


def check_lengths(tokens):
    """UserError if looking at every way to halve every token would take long."""
    lengths = list(map(len, tokens))
    if sum(n * n for n in lengths) > MOST_SQUARES:
        raise UserError(
            f"its tokens have {sum(lengths):,} characters, the longest {max(lengths):,}: "
            "more than any vocabulary in use"
        )


# ---- The commands.


@dataclass
class LearnArgs:
    data: tuple = ("data/wikitext-2",)  # files of text or of records with a text, folders, globs
    vocab_size: int = 10_000  # ids, with bytes and special tokens
    pattern: str = "gpt4"  # gpt2, gpt4, llama3, qwen2, tekken, or a regular expression
    special_tokens: tuple = tuple(SPECIAL_TOKENS)  # they get the first ids
    processes: int = 0  # to split text in; 0 is one per usable CPU
    out: str = "runs/tokenizer"  # folder to write


def train_command(argv):
    """Learn a byte-level BPE vocabulary."""
    from training.corpora import expand

    args = LearnArgs(**parse_flags(LearnArgs, train_command.__doc__, argv))
    start = time.perf_counter()
    files = expand(args.data)
    tokenizer = Tokenizer.train(
        files=files,
        vocab_size=args.vocab_size,
        pattern=args.pattern,
        special_tokens=args.special_tokens,
        processes=args.processes,
    )
    tokenizer.save(args.out)
    seconds = time.perf_counter() - start
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(
        f"{tokenizer.vocab_size:,} ids from {megabytes:.1f} MB in {seconds:.2f} s "
        f"({megabytes / seconds:.1f} MB/s) -> {args.out}, sha256 {tokenizer.sha256[:12]}"
    )


@dataclass
class ShowArgs:
    text: str = ""  # what to encode
    tokenizer: str = "runs/tokenizer"  # folder or file


def show_command(argv):
    """Print a text's tokens, coloured, and their ids."""
    args = ShowArgs(**parse_flags(ShowArgs, show_command.__doc__, argv, ("text",)))
    tokenizer = Tokenizer.load(args.tokenizer)
    text = well_formed(args.text)
    ids = tokenizer.encode(text)
    for n, i in enumerate(ids):  # background colours in turn, so that borders show
        token = tokenizer.token_bytes(i).decode("utf-8", "replace")
        print(f"\033[30;4{1 + n % 6}m{token}\033[0m", end="")
    print("\n" + " ".join(map(str, ids)))
    print(f"{len(ids)} tokens, {len(text.encode()) / max(1, len(ids)):.2f} bytes per token")


@dataclass
class CompareArgs:
    tokenizers: tuple = ()  # folders or files
    data: tuple = ("data/wikitext-2",)  # as for train


def compare_command(argv):
    """Bytes per token, and speed, of several tokenizers on one text."""
    from training.corpora import expand, text_parts

    args = CompareArgs(**parse_flags(CompareArgs, compare_command.__doc__, argv, ("tokenizers",)))
    files = expand(args.data)
    text = b"".join(text_parts(files, ())).decode("utf-8", "replace")
    size = len(text.encode())
    print(f"{size:,} bytes of {', '.join(map(str, files))}\n")
    print("| tokenizer | ids | tokens | bytes per token | MB/s |\n|---|---|---|---|---|")
    for path in args.tokenizers:
        tokenizer = Tokenizer.load(path)
        tokenizer.encode("")  # makes the fast encoder
        start = time.perf_counter()
        n = len(tokenizer.encode(text))
        speed = size / 1e6 / (time.perf_counter() - start)
        ratio = size / max(1, n)
        print(f"| {path} | {tokenizer.vocab_size:,} | {n:,} | {ratio:.3f} | {speed:.1f} |")


def main():
    commands = {"train": train_command, "show": show_command, "compare": compare_command}
    run_command(__doc__, commands)


if __name__ == "__main__":
    import tokenizer  # the classes that other files know: those of a script are a second copy

    cli(tokenizer.main)
