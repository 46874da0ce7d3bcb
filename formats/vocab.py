"""The vocabulary files others use: tokenizer.json, vocab.bpe, .tiktoken, tekken.json and SentencePiece .model.

    python tokenizer.py show "Hello, world" --tokenizer FILE        # reads any of them

They are untrusted: sizes, types and references are checked, and what is not understood is refused by name.
"""

import base64
import contextlib
import json
import re
from collections import Counter

from common import UserError
from tokenizer import (
    BYTES,
    LARGEST_ID,
    PATTERNS,
    PRINTABLE,
    added_tokens,
    check_ids,
    merges_by_score,
    normalize,
)

LARGEST_FILE = 64 << 20  # of a vocabulary file; the largest in use (Gemma 3, 262K tokens) has 33 MB
# A byte is written as one visible character: itself if it is printable, else one from U+0100 on (as in GPT-2's files).
BYTE_TO_CHAR = {
    b: chr(b if i < len(PRINTABLE) else 256 + i - len(PRINTABLE)) for i, b in enumerate(BYTES)
}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}
# of Mistral's tekken.json files that do not list theirs
TEKKEN_SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]


def read_tokenizer(path, pattern, make):
    """The tokenizer in a file or folder, built by `make`: the Tokenizer class, which imports this file. UserError."""
    if path.is_dir():
        names = ("tokenizer.json", "tekken.json", "tokenizer.model", "vocab.bpe", "merges.txt")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} has no tokenizer: none of {', '.join(names)}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"there is no tokenizer at {path}")
    data = read_limited(path)
    with naming(path):
        if path.suffix == ".json":
            content = parse_json(data)
            if "config" in content and "model" not in content:
                tokenizer = from_tekken(content, make)
            else:
                tokenizer = from_json(content, make)
                tokenizer.source = data
        elif path.suffix in (".bpe", ".txt"):
            tokenizer = from_vocab_bpe(path, data, make)
        elif re.match(
            rb"[A-Za-z0-9+/]+=* \d+\s", data
        ):  # Llama 3's tokenizer.model is one of these
            tokenizer = from_ranks(path, data, pattern, make)
        elif path.suffix == ".model":
            tokenizer = from_sentencepiece(path, make)
        else:
            raise UserError("none of tokenizer.json, tekken.json, vocab.bpe, .tiktoken, .model")
    if (config := path.with_name("tokenizer_config.json")).is_file():
        with naming(config):
            tokenizer.config |= parse_json(read_limited(config))
    if (template := path.with_name("chat_template.jinja")).is_file():  # where newer folders keep it
        tokenizer.chat_template = read_limited(template).decode("utf-8", "replace")
    return tokenizer


def read_limited(path):
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise UserError(
            f"{path} has {size >> 20} MB; no vocabulary in use is larger than {LARGEST_FILE >> 20} MB"
        )
    return path.read_bytes()


@contextlib.contextmanager
def naming(path):
    """Whatever is wrong inside a file from outside is one line that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a {path.name}: {type(error).__name__} {error}") from None


def refuse(what):
    raise UserError(f"{what} is not supported")


def parse_json(data):
    """bytes -> dict, of which no key may be there twice."""

    def no_twins(pairs):
        if len(made := dict(pairs)) < len(pairs):
            raise UserError(
                f"the key {Counter(k for k, _ in pairs).most_common(1)[0][0]!r} is there twice"
            )
        return made

    content = json.loads(data, object_pairs_hook=no_twins)
    if not isinstance(content, dict):
        raise UserError("this is not a JSON object")
    return content


def from_json(content, make):
    """A tokenizer.json of HF tokenizers: byte-level BPE, SentencePiece-style BPE, or our character tokenizers."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        refuse(f"model type {model['type']!r} (only BPE)")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            refuse(f"model option {option} = {model[option]!r}")
    normalizer = [
        read_normalizer(part) for part in sequence(content.get("normalizer"), "normalizers")
    ]
    patterns, prefix, byte_level = read_pre_tokenizer(content.get("pre_tokenizer"))
    decoders = {d["type"]: d for d in sequence(content.get("decoder"), "decoders")}
    for name in decoders.keys() - {
        "ByteLevel",
        "Replace",
        "ByteFallback",
        "Fuse",
        "Strip",
        "Metaspace",
    }:
        refuse(f"decoder {name!r}")
    kind = (
        "bytes"
        if byte_level
        else "pieces"
        if model["merges"] or decoders.keys() - {"Fuse"}
        else "chars"
    )
    special, added = read_added(content.get("added_tokens") or [], normalizer)
    vocab, merges = read_bpe(model, kind, special | added)
    unknown = special.get(model.get("unk_token"), model["vocab"].get(model.get("unk_token")))
    strips = (
        "Strip" in decoders
        or decoders.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    )
    return make(
        kind,
        vocab,
        merges,
        patterns=patterns,
        special=special,
        added=added,
        normalizer=normalizer + prefix,
        strip_space=strips,
        whole_chunks=bool(model.get("ignore_merges")),
        unknown=unknown,
    )


def sequence(part, key):
    """A component of a tokenizer.json as a flat list: null, one thing, or a Sequence of things."""
    if part is None:
        return []
    return (
        [p for inner in part[key] for p in sequence(inner, key)]
        if part["type"] == "Sequence"
        else [part]
    )


def read_normalizer(part):
    kind = part["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return ("unicode", kind)
    if kind == "Prepend":
        return ("prepend", part["prepend"], "every")
    if kind == "Replace" and "String" in part["pattern"]:
        return ("replace", part["pattern"]["String"], part["content"])
    return refuse(
        f"normalizer {kind!r}" + (" with a regular expression" if kind == "Replace" else "")
    )


def read_pre_tokenizer(part):
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
            ((how, text),) = step["pattern"].items()
            patterns.append(text if how == "Regex" else re.escape(text))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Metaspace":
            space, always = step["replacement"], step.get("add_prefix_space", True)
            scheme = step.get("prepend_scheme", "always" if always else "never")
            prefix = [("replace", " ", space), ("prepend", space, scheme)]
            patterns += [f"{space}[^{space}]*"] if step.get("split", True) else []
        else:
            refuse(
                f"pre-tokenizer {kind!r} with {', '.join(f'{k}={v!r}' for k, v in step.items() if k != 'type') or 'no options'}"
            )
    return patterns, prefix, byte_level


def read_added(tokens, normalizer):
    """-> (special {text: id}, other added tokens {text: id}). How special ones would be matched does not matter: they never are."""
    special, added = {}, {}
    for token in tokens:
        text, options = (
            token["content"],
            [o for o in ("single_word", "lstrip", "rstrip") if token.get(o)],
        )
        if not isinstance(text, str) or not text or text in special or text in added:
            refuse(f"added token {text!r} (empty or twice)")
        if not token.get("special") and options:
            refuse(f"added token {text!r} with {options[0]}")
        if (
            not token.get("special")
            and token.get("normalized")
            and normalize(text, normalizer) != text
        ):
            refuse(f"added token {text!r}, which the normalizer changes")
        (special if token.get("special") else added)[text] = token["id"]
    return special, added


def read_bpe(model, kind, special):
    """-> (vocab, merges) of a tokenizer.json's model, by ids and without special and added tokens."""
    check_ids(model["vocab"].values(), len(model["vocab"]))
    ids = dict(model["vocab"])
    for text, i in special.items():
        if ids.pop(text, i) != i:
            raise UserError(f"{text!r} has two ids: {i} and {model['vocab'][text]}")
    merges = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pair, new = (ids.get(left), ids.get(right)), ids.get(left + right)
        if None in pair or new is None or new in pair or pair in merges:
            raise UserError(
                f"merge {rank} of {left[:40]!r} and {right[:40]!r} is listed twice, or joins or makes what is no "
                "ordinary token"
            )
        merges[pair] = (rank, new)
    if kind != "bytes":
        return ids, merges
    if wrong := set("".join(ids)) - CHAR_TO_BYTE.keys():
        raise UserError(f"a byte-level token has {wrong.pop()!r}, which stands for no byte")
    return {bytes([CHAR_TO_BYTE[c] for c in token]): i for token, i in ids.items()}, merges


def from_vocab_bpe(path, data, make):
    """GPT-2's vocab.bpe with encoder.json (or merges.txt with vocab.json, the same under newer names)."""
    lines = [
        line.split(" ")
        for line in data.decode("utf-8", "replace").split("\n")
        if line and not line.startswith("#version")
    ]
    if bad := [line for line in lines if len(line) != 2]:
        raise UserError(f"this is not a list of merges: {' '.join(bad[0])[:80]!r}")
    beside = path.with_name("encoder.json" if path.suffix == ".bpe" else "vocab.json")
    made = dict.fromkeys([*BYTE_TO_CHAR.values(), *map("".join, lines)])
    vocab = {
        token: i for i, token in enumerate([*made, "<|endoftext|>"])
    }  # GPT-2's own ids, in order of making
    if beside.is_file():
        with naming(beside):
            vocab = parse_json(read_limited(beside))
    special = {token: i for token, i in vocab.items() if token not in made}
    vocab, merges = read_bpe({"vocab": vocab, "merges": lines}, "bytes", special)
    return make("bytes", vocab, merges, patterns=[PATTERNS["gpt2"]], special=special)


def from_ranks(path, data, pattern, make):
    """A tiktoken file: lines of a token in base64 and its rank, which is its id."""
    known = {
        "r50k_base": "gpt2",
        "p50k_base": "gpt2",
        "gpt2": "gpt2",
        "cl100k_base": "gpt4",
        "tokenizer": "llama3",
    }
    pattern = pattern or known.get(path.stem)
    if pattern is None:
        raise UserError(
            f"the file does not say how text is split: load(path, pattern=...) with one of {', '.join(PATTERNS)} or "
            "your own"
        )
    vocab = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if not token or token in vocab:
                raise ValueError("empty or twice")
            vocab[token] = int(rank)
        except ValueError as error:
            raise UserError(
                f"line {number} is not a token in base64 and its rank: {error}"
            ) from None
    return rank_tokenizer(vocab, PATTERNS.get(pattern, pattern), {}, make)


def from_tekken(content, make):
    """Mistral's tekken.json: ranks, which are ids after the special tokens. Only the first of the ranks are used."""
    config, names = content["config"], TEKKEN_SPECIAL
    n = config["default_num_special_tokens"]
    if content.get("special_tokens"):
        names = [
            token["token_str"]
            for token in sorted(content["special_tokens"], key=lambda token: token["rank"])
        ]
    names = [*names, *(f"<SPECIAL_{i}>" for i in range(len(names), min(n, LARGEST_ID)))]
    used = sorted(content["vocab"], key=lambda token: token["rank"])[
        : config["default_vocab_size"] - n
    ]
    vocab = {base64.b64decode(token["token_bytes"]): token["rank"] + n for token in used}
    special = {name: i for i, name in enumerate(names)}
    if len(vocab) < len(used) or len(special) != n:
        raise UserError("a token is there twice")
    return rank_tokenizer(vocab, config["pattern"], special, make)


def rank_tokenizer(vocab, pattern, special, make):
    if missing := [b for b in range(256) if bytes([b]) not in vocab]:
        raise UserError(
            f"there is no token for {len(missing)} of the 256 bytes, the first {missing[0]:#04x}"
        )
    return make("bytes", vocab, patterns=[pattern], special=special, whole_chunks=True)


def from_sentencepiece(path, make):
    """A SentencePiece .model of the BPE kind with an identity normalizer (Llama 2, Mistral), read by sentencepiece."""
    from sentencepiece import SentencePieceProcessor

    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"this is not a SentencePiece model: {str(error)[:100]}") from None
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    special = {p: i for i, p in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
    vocab = {p: i for i, p in enumerate(pieces) if p not in special and not sp.is_unused(i)}
    merges = merges_by_score(vocab, [sp.get_score(i) for i in range(len(pieces))])
    prefix = sp.encode("a", out_type=str)[0].startswith("▁")
    normalizer = [("prepend", "▁", "every")] * prefix + [("replace", " ", "▁")]
    tokenizer = make(
        "pieces",
        vocab,
        merges,
        special=special,
        normalizer=normalizer,
        strip_space=prefix,
        unknown=sp.unk_id(),
    )
    for probe in (
        "Hello  world ",
        " \tﬁ ½ Ａ\n日本 🙂",
        *(p.replace("▁", " ") for p in list(vocab)[300::50]),
    ):
        if tokenizer.encode(probe) != sp.encode(probe):
            raise UserError(
                f"it encodes {probe!r} otherwise than plain BPE: unigram models and normalizers that change the text "
                "are not supported"
            )
    return tokenizer


def to_json(tokenizer):
    """The tokenizer as the contents of a tokenizer.json of HF tokenizers."""
    kind, spelled = tokenizer.kind, {}
    for token, i in tokenizer.vocab.items():
        spelled[i] = "".join(BYTE_TO_CHAR[b] for b in token) if kind == "bytes" else token
    names = {i: name for name, i in (tokenizer.special | tokenizer.added).items()}
    if clash := set(names.values()) & set(spelled.values()):
        raise UserError(
            f"the file would have two tokens spelled {clash.pop()!r}, one of them special"
        )
    normalizers = [
        {"type": "Prepend", "prepend": step[1]}
        if step[0] == "prepend"
        else {"type": "Replace", "pattern": {"String": step[1]}, "content": step[2]}
        for step in tokenizer.normalizer
    ]
    splits = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in tokenizer.patterns
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    pieces = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoder = {
        "bytes": byte_level,
        "chars": {"type": "Fuse"},
        "pieces": {"type": "Sequence", "decoders": pieces + [strip] * tokenizer.strip_space},
    }[kind]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(
            added_tokens(tokenizer.special, True) + added_tokens(tokenizer.added, False),
            key=lambda t: t["id"],
        ),
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]}
        if kind == "bytes"
        else None,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "unk_token": names.get(tokenizer.unknown),
            "fuse_unk": kind == "pieces",
            "byte_fallback": kind == "pieces",
            "ignore_merges": tokenizer.whole_chunks,
            # special tokens too: HF takes the ids of added tokens from here
            "vocab": {token: i for i, token in sorted((spelled | names).items())},
            "merges": [
                f"{spelled[a]} {spelled[b]}"
                for a, b in sorted(tokenizer.merges, key=tokenizer.merges.get)
            ],
        },
    }
