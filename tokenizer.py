"""Text to ids and back: the Tokenizer that every other file uses, and the commands that make, show and compare them.

    python tokenizer.py train --data corpus.txt --vocab-size 10000 --out runs/tokenizer
    python tokenizer.py show "Hello, world" --tokenizer runs/tokenizer
    python tokenizer.py compare runs/tokenizer gpt2/vocab.bpe --data corpus.txt

How BPE learns is in bpe.py; vocab_files.py reads and writes the files that others use.
"""

import argparse
import codecs
import functools
import hashlib
import heapq
import json
import re
import sys
import time
import unicodedata
from collections import Counter
from itertools import chain, count, islice, pairwise
from pathlib import Path

import numpy as np
import regex

from common import (
    BLOCK,
    UserError,
    blocks_of,
    cli,
    in_processes,
    read_block,
    well_formed,
    write_atomic,
    write_json,
)

SPECIAL_TOKENS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>", "<|im_start|>", "<|im_end|>")
# Which special tokens begin, end and pad a text, by the names they usually have.
ROLES = {
    "bos_token": ("<BOS>", "<s>", "<|endoftext|>"),
    "eos_token": ("<EOS>", "</s>", "<|endoftext|>"),
    "unk_token": ("<UNK>", "<unk>"),
    "pad_token": ("<PAD>", "<pad>"),
}


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
    normalizer      [(operation, arguments...)], see vocab_files.normalize
    config          what tokenizer_config.json holds: bos_token, eos_token, chat_template, ...
    """

    def __init__(
        self,
        kind,
        vocab,
        merges=None,
        *,
        patterns=(),
        special=None,
        added=None,
        whole_chunks=False,
        normalizer=(),
        strip_space=False,
        unknown=None,
    ):
        self.kind, self.vocab, self.patterns, self.unknown = kind, vocab, tuple(patterns), unknown
        self.special, self.added = dict(special or {}), dict(added or {})
        self.whole_chunks, self.normalizer, self.strip_space = (
            whole_chunks,
            list(normalizer),
            strip_space,
        )
        self.config = {
            role: name
            for role, names in ROLES.items()
            for name in names[::-1]
            if name in self.special
        }
        if merges is not None:  # else recovered from the vocabulary when first needed
            self.merges = merges
        self.source = None  # the tokenizer.json this was read from, as it was
        names = self.added | self.special
        ids = [*vocab.values(), *names.values()]
        check_ids(ids, len(vocab) + len(names))
        self.vocab_size = max(ids, default=-1) + 1
        self._bytes, self._shown = [b""] * self.vocab_size, [b""] * self.vocab_size
        for token, i in vocab.items():
            self._bytes[i] = self._shown[i] = self._spelling(token)
        for name, i in names.items():
            self._shown[i] = name.encode()
            self._bytes[i] = name.encode() if name in self.added else b""
        by_length = sorted(map(re.escape, self.added), key=len, reverse=True)
        self._split_added = re.compile(f"({'|'.join(by_length)})").split
        self._cache = {}
        for pattern in self.patterns:
            splitter(pattern)  # an unusable one is refused now

    def _spelling(self, token):
        if self.kind == "bytes":
            return token
        if self.kind == "pieces" and (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)):
            return bytes([int(byte[1], 16)])
        return (token.replace("▁", " ") if self.kind == "pieces" else token).encode()

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
        max_bytes=None,
        processes=None,
    ):
        """Learn a byte-level BPE of `vocab_size` ids from an iterable of str and from files.

        pattern: a name in PATTERNS or a regular expression. special_tokens: a list, which gets ids 0, 1, ..., or a dict
        {text: id}. max_bytes: take this much of the files, evenly spread. A chunk never spans two texts, nor two lines of a file.
        Same merges, for the same texts or files, as HF tokenizers' BpeTrainer, for any number of processes.
        UserError: a vocabulary smaller than 256 + special tokens, no text, an unusable pattern."""
        pattern, special = PATTERNS.get(pattern, pattern), number_special(special_tokens)
        least = 256 + len(special)
        if vocab_size < least:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(special)} special tokens need {least}"
            )
        if max(special.values(), default=0) >= vocab_size:
            raise UserError(
                f"special tokens must have ids below the vocabulary size {vocab_size}: {special}"
            )
        splitter(pattern)
        from training import bpe

        chunks = bpe.count_chunks(
            [texts] if isinstance(texts, str) else texts, files, pattern, max_bytes, processes
        )
        if not chunks:
            raise UserError(
                "there is no text to learn from: "
                + (", ".join(map(str, files)) or "no texts given")
            )
        merges = bpe.learn_merges(chunks, vocab_size - least, {name.encode() for name in special})
        if (fits := least + len(merges)) < vocab_size:
            print(
                f"asked for {vocab_size - least:,} merges, the text supports {len(merges):,}: stopped early with a vocabulary "
                f"of {fits:,} (--vocab-size {fits} asks for just that)",
                file=sys.stderr,
            )
        ids, spelled = (
            list(islice(free_ids(special), 256 + len(merges))),
            [bytes([b]) for b in BYTES],
        )
        for left, right in merges:
            spelled.append(spelled[left] + spelled[right])
        ranked = {(ids[a], ids[b]): (rank, ids[256 + rank]) for rank, (a, b) in enumerate(merges)}
        return cls("bytes", dict(zip(spelled, ids)), ranked, patterns=[pattern], special=special)

    @classmethod
    def char(cls, text: str, special_tokens=()) -> "Tokenizer":
        """One id per distinct character, in code point order, after the special tokens."""
        if not text:
            raise UserError("there is no text to take the characters from")
        special = number_special(special_tokens)
        return cls(
            "chars",
            dict(zip(sorted(set(well_formed(text))), free_ids(special))),
            {},
            special=special,
        )

    # -- encoding
    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """str -> list of ids. Never a special id but the bos and eos asked for, whatever the text says.
        UserError for a character that a character tokenizer does not know, or a bos or eos it does not have."""
        ids = self._encode(text)
        if bos:
            ids.insert(0, self._required("bos"))
        if eos:
            ids.append(self._required("eos"))
        return ids

    def encode_bytes(self, data, where="first"):
        """bytes -> ids. Bytes that are no UTF-8 become byte tokens and survive decode_bytes. where: see normalize."""
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

    def encode_corpus(self, paths, processes=None):
        """All ids of the files, file after file, each as encode_bytes would have it, as one array: uint16, or uint32 above 65,536
        ids. Blocks of them are encoded in parallel processes."""
        _ = self.fast  # built here once, not in every process
        blocks = blocks_of(paths, BLOCK if self.cuts else sys.maxsize)
        return np.concatenate(
            [np.zeros(0, self.dtype), *in_processes(self._encode_block, blocks, processes)]
        )

    @property
    def dtype(self):
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _encode_block(self, block: tuple[str, int, int]):
        data = read_block(block, self.cuts)
        return np.array(self.encode_bytes(data, "inside" if block[1] else "first"), self.dtype)

    @functools.cached_property
    def cuts(self):
        """Where a file may be cut without changing any id, for common.border; () if that is not certain."""
        cuts = BEFORE_SPACE if self.kind == "pieces" else BETWEEN_CHUNKS
        crossed = any(re.search(cuts, name.encode()) for name in self.added)
        if crossed or (self.kind == "pieces" and not self._piece_splitter):
            return ()
        samples = [
            (a, b)
            for a in ("a", "Zb", "1", ".a", "\na", "'s", " a", "ü", "中")
            for b in (" a", " 1", " .", " \n", "  ", "   a", "\n", "\na", "\n\na", "、a")
        ]
        kept = all(
            splitter(p)(a) + splitter(p)(b) == splitter(p)(a + b)
            for p in self.patterns
            for a, b in samples
        )
        return (cuts,) if kept else ()

    def _encode(self, text, where="first"):
        text = well_formed(text)
        if not self.added:
            return self._encode_plain(text, where)
        ids = []
        for i, part in enumerate(self._split_added(text)):  # every second part is an added token
            ids += (
                [self.added[part]] if i % 2 else self._encode_plain(part, "later" if i else where)
            )
        return ids

    def _encode_plain(self, text, where):
        text = normalize(text, self.normalizer, where)
        if self.kind == "chars":
            return self._encode_chars(text)
        if self.fast is None:
            return self.encode_slowly(text)
        if any(text[i : i + 50_000].isspace() for i in range(0, len(text) - 50_000, 50_000)):
            # on 100,000 spaces in a row tiktoken's regular expressions can panic: split with ours
            return list(
                chain.from_iterable(
                    map(self.fast._encode_single_piece, self._split(text, self.patterns))
                )
            )
        if len(self.patterns) == 1:
            return self.fast.encode_ordinary(text)
        return list(
            chain.from_iterable(
                map(self.fast.encode_ordinary, self._split(text, self.patterns[:-1]))
            )
        )

    def _encode_chars(self, text):
        try:
            return [self.vocab[c] for c in text]
        except KeyError:
            unknown = sorted(set(text) - self.vocab.keys())
            shown = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise UserError(
                f"{len(unknown)} of the text's characters not in this tokenizer's {len(self.vocab)}: {shown}; remove "
                "them, or make the tokenizer from text that has them"
            ) from None

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
        token = chunk.encode() if self.kind == "bytes" else chunk
        if self.whole_chunks and token in self.vocab:
            return [self.vocab[token]]
        if self.kind == "bytes":
            return merge_by_rank([self._byte_id(b) for b in token], self.merges)
        ids = []
        for c in chunk:
            fallback = [self.vocab.get(f"<0x{b:02X}>") for b in c.encode()]
            if c in self.vocab:
                ids.append(self.vocab[c])
            elif None not in fallback:
                ids += fallback
            elif self.unknown is None:
                raise UserError(
                    f"{c!r} is not in this vocabulary, which has neither bytes nor an unknown token"
                )
            elif ids[-1:] != [self.unknown]:  # one unknown token for a run of unknown characters
                ids.append(self.unknown)
        return merge_by_rank(ids, self.merges)

    def _byte_id(self, byte):
        token = f"<0x{byte:02X}>" if self.kind == "pieces" else bytes([byte])
        if token not in self.vocab:
            raise UserError(
                f"byte {byte:#04x} is no UTF-8 text, and this tokenizer has no tokens for single bytes"
            )
        return self.vocab[token]

    @functools.cached_property
    def _piece_splitter(self):
        """Text of a pieces tokenizer can be split before every ▁ that follows another character, which lets chunks be remembered;
        not so if some token has a ▁ there. None then."""
        return (
            None
            if any(re.search("[^▁]▁", token) for token in self.vocab)
            else re.compile("▁*[^▁]+|▁+").findall
        )

    @functools.cached_property
    def fast(self):
        """tiktoken's encoder in Rust where it gives the same ids as merging by rank does, else None. Split patterns other than ours
        might mean something else to its regular expressions."""
        known = self.patterns and self.patterns[-1] in PATTERNS.values()
        if self.kind != "bytes" or not known or not self._merges_follow_vocab():
            return None
        import tiktoken

        return tiktoken.Encoding(
            "ours", pat_str=self.patterns[-1], mergeable_ranks=self.vocab, special_tokens={}
        )

    def _merges_follow_vocab(self):
        """Whether following the merges equals what tiktoken does: merge any two neighbours whose concatenation is a token, lowest
        id first.

        It does if ids ascend with ranks and every token is what merging its own bytes ends in: then the same bytes between the
        same borders always merge the same way, and an unlisted pair never stands there to be merged. A token that only whole
        chunks become must have all its pairs listed, as in Llama 3's file."""
        if "merges" not in self.__dict__:  # the file says ids alone, for tiktoken to follow
            return True
        made = [new for _, new in sorted(self.merges.values())]
        if made != sorted(made) or not all(bytes([b]) in self.vocab for b in range(256)):
            return False
        last = last_merges(self.vocab, self.merges)
        rest = [token for token, i in self.vocab.items() if i not in last]
        halves = (
            (self.vocab.get(t[:k]), self.vocab.get(t[k:])) for t in rest for k in range(1, len(t))
        )
        return (self.whole_chunks or not rest) and all(
            None in pair or pair in self.merges for pair in halves
        )

    @functools.cached_property
    def merges(self):
        """For vocabularies that come as ids alone: the two tokens that each token is merged from."""
        last = last_merges(self.vocab, merges_by_score(self.vocab, range(0, -self.vocab_size, -1)))
        made = [(pair, i) for i, pair in last.items() if pair]
        return {pair: (rank, i) for rank, (pair, i) in enumerate(made)}

    # -- decoding
    def decode(self, ids, skip_special: bool = False) -> str:
        """ids -> str. Bytes that are no UTF-8 show as U+FFFD. UserError for an id that no token has."""
        text = self.decode_bytes(ids, skip_special).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strip_space else text

    def decode_bytes(self, ids, skip_special=True):
        """ids -> bytes, exactly those that encode_bytes was given (for pieces, after the space they start with)."""
        table, ids = self._bytes if skip_special else self._shown, list(ids)
        if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
            raise UserError(
                f"ids from {min(ids)} to {max(ids)}, but this tokenizer's are 0 to {self.vocab_size - 1}"
            )
        return b"".join([table[i] for i in ids])

    def token_bytes(self, i):
        """The bytes this token adds to a text; b"" for special tokens."""
        return self._bytes[i]

    def stream(self, skip_special=False):
        return Stream(self, skip_special)

    # -- what it is
    def _required(self, role):
        i = getattr(self, role + "_id")
        if i is None:
            raise UserError(
                f"this tokenizer has no {role} token, only {', '.join(self.special) or 'ordinary ones'}"
            )
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
        if isinstance(template, list):  # several, by name
            template = {t.get("name"): t.get("template") for t in template}.get("default")
        return template

    @chat_template.setter
    def chat_template(self, template):
        self.config["chat_template"] = template

    @functools.cached_property
    def sha256(self):
        """Hex digest of everything that decides ids, whatever file it came from."""
        parts = [
            self.kind,
            sorted((self._spelling(t).hex(), i) for t, i in self.vocab.items()),
            sorted(self.special.items()),
            sorted(self.added.items()),
            self.patterns,
            self.normalizer,
            self.whole_chunks,
            self.unknown,
            sorted((rank, *pair) for pair, (rank, _) in self.merges.items()),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def with_special(self, names):
        """A tokenizer with these special tokens besides, which get the next free ids. All else, and its file, stays."""
        more = {name: self.vocab_size + i for i, name in enumerate(names)}
        made = Tokenizer(
            self.kind,
            self.vocab,
            self.merges,
            patterns=self.patterns,
            special=self.special | more,
            added=self.added,
            whole_chunks=self.whole_chunks,
            normalizer=self.normalizer,
            strip_space=self.strip_space,
            unknown=self.unknown,
        )
        made.config = dict(self.config)
        if self.source:  # also in the model's vocabulary: HF takes ids from there
            content = json.loads(self.source)
            content["model"]["vocab"] |= more
            content["added_tokens"] = (content.get("added_tokens") or []) + added_tokens(
                more, special=True
            )
            made.source = json.dumps(content, ensure_ascii=False).encode()
        return made

    # -- files
    @classmethod
    def load(cls, path: str | Path, pattern=None) -> "Tokenizer":
        """Read a folder, tokenizer.json, vocab.bpe (encoder.json beside it), .tiktoken, tekken.json or SentencePiece
        .model. A .tiktoken file does not say how text is split: known by its name, or `pattern`. UserError else."""
        from formats.vocab import read_tokenizer

        return read_tokenizer(Path(path), pattern, cls)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens with the same ids."""
        from formats.vocab import to_json

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = self.source or json.dumps(to_json(self), ensure_ascii=False).encode()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.config,
        }
        write_atomic(folder / "tokenizer.json", lambda path: path.write_bytes(content))
        write_json(folder / "tokenizer_config.json", config)


class Stream:
    """Ids in, text out, as a model produces them: never half a character, and nothing is decoded twice."""

    def __init__(self, tokenizer, skip_special):
        self.tokenizer, self.skip_special, self.strip_space = (
            tokenizer,
            skip_special,
            tokenizer.strip_space,
        )
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i):
        """The text that is certain now: possibly "", possibly more than this token's own."""
        return self._decode(self.tokenizer.decode_bytes([i], self.skip_special))

    def flush(self):
        """What is left: U+FFFD if a character was never finished."""
        return self._decode(b"", final=True)

    def _decode(self, data, final=False):
        text = self.decoder.decode(data, final)
        if self.strip_space and text:
            self.strip_space = False
            return text.removeprefix(" ")
        return text


def number_special(tokens):
    """A list of special tokens -> {text: id}, from 0; a dict that says its ids stays as it is."""
    numbered = tokens if isinstance(tokens, dict) else {name: i for i, name in enumerate(tokens)}
    if bad := [name for name in tokens if len(name) < 2 or list(tokens).count(name) > 1]:
        raise UserError(f"special token {bad[0]!r} is listed twice or shorter than two characters")
    return numbered


def free_ids(special):
    """0, 1, 2, ... without the ids of the special tokens."""
    taken = set(special.values())
    return (i for i in count() if i not in taken)


def last_merges(vocab, merges):
    """{id: pair}: the two tokens that merging a token's own bytes joins last, None for a byte, without the tokens that it never
    makes. merges: {pair: (rank, id)}, the ids ascending with the ranks."""
    last = {i: None for token, i in vocab.items() if len(token) == 1}
    for pair, (_, new) in sorted(merges.items(), key=lambda item: item[1]):
        if new not in last and last.keys() >= {*pair} and not border_crossed(pair, last, merges):
            last[new] = pair
    return last


def border_crossed(pair, last, merges):
    """Whether, in the bytes of two tokens side by side, some merge would cross their border before both are whole.
    Takes back the later of the two tokens' last merges until none is left, looking across the border each time."""
    left, right = pair
    while last[left] or last[right]:
        take_left = not last[right] or (last[left] and left > right)
        if take_left:
            undone, left = left, last[left][1]
        else:
            undone, right = right, last[right][0]
        across = merges[left, right][1] if (left, right) in merges else undone + 1
        if across < undone or (
            across == undone and not take_left
        ):  # of equals the leftmost goes first
            return True
    return False


# ---- The commands.


def text_files(paths):
    """Files, and the .txt files of folders."""
    found = [
        f
        for path in map(Path, paths)
        for f in (sorted(path.glob("*.txt")) if path.is_dir() else [path])
    ]
    if not found:
        raise UserError(f"no .txt files in {', '.join(map(str, paths))}")
    for file in found:
        with open(file, "rb") as f:
            if b"\0" in f.read(1 << 20):
                raise UserError(f"{file} is a binary file: it has zero bytes")
    return found


def train_command(args):
    files, start = text_files(args.data), time.perf_counter()
    tokenizer = Tokenizer.train(
        files=files,
        vocab_size=args.vocab_size,
        pattern=args.pattern,
        max_bytes=args.max_bytes,
        special_tokens=args.special_tokens,
        processes=args.processes,
    )
    tokenizer.save(args.out)
    seconds, size = (
        time.perf_counter() - start,
        min(sum(f.stat().st_size for f in files), args.max_bytes or 1 << 62),
    )
    print(
        f"{tokenizer.vocab_size:,} ids from {size / 1e6:.1f} MB in {seconds:.2f} s ({size / 1e6 / seconds:.1f} MB/s) "
        f"-> {args.out}, sha256 {tokenizer.sha256[:12]}"
    )


def show_command(args):
    tokenizer = Tokenizer.load(args.tokenizer)
    ids = tokenizer.encode(args.text)
    for n, i in enumerate(ids):  # background colours in turn, so that borders show
        print(
            f"\033[30;4{1 + n % 6}m{tokenizer.token_bytes(i).decode('utf-8', 'replace')}\033[0m",
            end="",
        )
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
        print(
            f"| {path} | {tokenizer.vocab_size:,} | {n:,} | {len(data) / max(1, n):.3f} | {speed:.1f} |"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="train|show|compare")
    train = commands.add_parser("train", help="learn a byte-level BPE vocabulary")
    train.set_defaults(run=train_command)
    train.add_argument(
        "--data",
        nargs="+",
        default=["data/wikitext-2"],
        help="text files, or folders of .txt files",
    )
    train.add_argument(
        "--vocab-size",
        type=int,
        default=10_000,
        help="ids in all, bytes and special tokens included",
    )
    train.add_argument(
        "--pattern", default="gpt4", help=f"{', '.join(PATTERNS)}, or a regular expression"
    )
    train.add_argument(
        "--special-tokens", nargs="*", default=SPECIAL_TOKENS, help="they get the first ids"
    )
    train.add_argument(
        "--max-bytes", type=int, help="learn from this much of the data, evenly spread over it"
    )
    train.add_argument(
        "--processes", type=int, help="to split text in; default: one per usable CPU"
    )
    train.add_argument("--out", default="runs/tokenizer", help="folder to write")
    show = commands.add_parser("show", help="print a text's tokens, coloured, and their ids")
    show.set_defaults(run=show_command)
    show.add_argument("text")
    show.add_argument("--tokenizer", default="runs/tokenizer", help="folder or file")
    compare = commands.add_parser(
        "compare", help="bytes per token of several tokenizers on the same text"
    )
    compare.set_defaults(run=compare_command)
    compare.add_argument("tokenizers", nargs="+", help="folders or files")
    compare.add_argument(
        "--data", nargs="+", required=True, help="text files, or folders of .txt files"
    )
    args = parser.parse_args()
    args.run(args)


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


def learn_merges_simply(chunks, n_merges):
    """{chunk: count} -> [(left id, right id)], the i-th of which makes symbol 256 + i. Correct and slow."""
    words = {
        tuple(BYTES.index(b) for b in chunk.encode()): count for chunk, count in chunks.items()
    }
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {tuple(replace_pair(word, best, 256 + len(merges))): n for word, n in words.items()}
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


def merges_by_score(vocab, scores):
    """{token: id} and each id's score -> merges: every way to put a token together, ranked by the token's score."""
    merges = {}
    for token, i in sorted(vocab.items(), key=lambda item: (-scores[item[1]], item[1])):
        if isinstance(token, str) and re.fullmatch("<0x[0-9A-F]{2}>", token):
            continue
        for k in range(1, len(token)):
            pair = vocab.get(token[:k]), vocab.get(token[k:])
            if None not in pair:
                merges[pair] = (len(merges), i)
    return merges


def normalize(text, operations, where="first"):
    """Apply a normalizer to what stands first in a text, or later, after an added token, or inside a text that is encoded in
    parts, where nothing is put in front."""
    for name, *arguments in operations:
        if name == "unicode":
            text = unicodedata.normalize(arguments[0], text)
        elif name == "replace":
            text = text.replace(*arguments)
        elif name == "prepend" and text and where != "inside":
            prefix, when = arguments
            if when == "every" or when in ("always", where) and not text.startswith(prefix):
                text = prefix + text
    return text


def check_ids(ids, n):
    """UserError unless these are n different ids of a sane size."""
    ids = list(ids)
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < LARGEST_ID]:
        raise UserError(f"token id {bad[0]!r} is not a whole number from 0 to {LARGEST_ID - 1}")
    if len(set(ids)) < n:
        raise UserError(f"two tokens have the same id: {Counter(ids).most_common(1)[0][0]}")


def added_tokens(ids, special):
    """{text: id} as a tokenizer.json lists added tokens."""
    return [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        for name, i in ids.items()
    ]


LARGEST_ID = 1 << 24


# Where cutting a text leaves its chunks as they were: a visible character before a space, a letter or digit before a newline, a
# Chinese character or Hangul before a newline or comma. Lines are always cut when learning.
BEFORE_SPACE = rb"[!-~](?= )|[\xc3-\xdf][\x80-\xbf](?= )"


BETWEEN_CHUNKS = (
    BEFORE_SPACE
    + rb"|[a-zA-Z0-9](?=\n)|[\xe5-\xe9\xeb\xec][\x80-\xbf]{2}(?=[ \n]|\xe3\x80[\x81\x82]|\xef\xbc\x8c)"
)


if __name__ == "__main__":
    cli(main)
