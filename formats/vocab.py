"""The vocabulary files of others: tokenizer.json, vocab.bpe, .tiktoken, tekken.json, .model.

    python tokenizer.py show "Hello, world" --tokenizer FILE        # reads any of them

They are untrusted: sizes, types and references are checked, and what is not understood is refused
by name.
"""

import base64
import contextlib
import json
import re
from dataclasses import dataclass

from common import UserError
from tokenizer import (
    BYTES,
    LARGEST_ID,
    PATTERNS,
    PRINTABLE,
    Tokenizer,
    check_ids,
    halves,
    normalize,
)

LARGEST_FILE = 64 << 20  # bytes; the largest in use (Gemma 3, 262K tokens) has 33 MB
# A byte is written as one visible character: itself if it is printable, else one from U+0100 on
# (as in GPT-2's files).
BYTE_TO_CHAR = dict(zip(BYTES, map(chr, PRINTABLE + list(range(256, 512 - len(PRINTABLE))))))
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}
# Those of tekken.json files that do not list theirs.
TEKKEN_SPECIAL = """<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]
    [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE]
    [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]""".split()
# How the text of tiktoken's own files is split, by the name of the file.
RANK_FILES = {
    "r50k_base": "gpt2",
    "p50k_base": "gpt2",
    "gpt2": "gpt2",
    "cl100k_base": "gpt4",
    "tokenizer": "llama3",
}
DECODERS = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


# ---- What every reader needs.


def read_tokenizer(path, pattern):
    """The Tokenizer in a file or folder; `pattern` is for tiktoken's files alone. UserError."""
    if path.is_dir():
        names = ("tokenizer.json", "tekken.json", "tokenizer.model", "vocab.bpe", "merges.txt")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} has no tokenizer: none of {', '.join(names)}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"there is no tokenizer at {path}")
    with naming(path):
        tokenizer = read_vocabulary_file(path, pattern)
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        with naming(config):
            tokenizer.config |= parse_json(read_limited(config))
    template = path.with_name("chat_template.jinja")  # where newer folders keep it
    if template.is_file():
        tokenizer.chat_template = read_limited(template).decode("utf-8", "replace")
    return tokenizer


def read_vocabulary_file(path, pattern):
    data = read_limited(path)
    if path.suffix == ".json":
        content = parse_json(data)
        if "config" in content and "model" not in content:
            return from_tekken(content)
        tokenizer = from_json(content)
        tokenizer.source = data
        return tokenizer
    if path.suffix in (".bpe", ".txt"):
        return from_vocab_bpe(path, data)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):  # also Llama 3's tokenizer.model
        return from_ranks(path, data, pattern)
    if path.suffix == ".model":
        return from_sentencepiece(path)
    raise UserError("none of tokenizer.json, tekken.json, vocab.bpe, .tiktoken, .model")


def read_limited(path):
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise UserError(
            f"{path} has {size >> 20} MB; no vocabulary in use is larger than "
            f"{LARGEST_FILE >> 20} MB"
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


def unsupported(what):
    return UserError(f"{what} is not supported")


def parse_json(data):
    """bytes -> dict."""
    content = json.loads(data)
    if not isinstance(content, dict):
        raise UserError("this is not a JSON object")
    return content


def read_bpe(vocab, merges, names, byte_level):
    """Tokens by text and merges by text -> (vocab, merges) as Tokenizer wants them.

    vocab {text: id}; merges ["left right"] or [(left, right)]; names {text: id} of special and
    added tokens, which may be in `vocab` and are not in what is returned."""
    check_ids(vocab.values())
    ids = dict(vocab)
    for text, i in names.items():
        if ids.pop(text, i) != i:
            raise UserError(f"{text!r} has two ids: {i} and {vocab[text]}")
    by_ids = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pair = ids.get(left), ids.get(right)
        new = ids.get(left + right)
        if None in pair or new is None or new in pair or pair in by_ids:
            raise UserError(
                f"merge {rank} of {left[:40]!r} and {right[:40]!r} is listed twice, or joins or "
                "makes what is no ordinary token"
            )
        by_ids[pair] = (rank, new)
    if not byte_level:
        return ids, by_ids
    wrong = set("".join(ids)) - CHAR_TO_BYTE.keys()
    if wrong:
        raise UserError(f"a byte-level token has {wrong.pop()!r}, which stands for no byte")
    spelled = {bytes([CHAR_TO_BYTE[c] for c in token]): i for token, i in ids.items()}
    return spelled, by_ids


def merges_by_score(vocab, scores):
    """SentencePiece's rule as merges: every way to put a token together, the best score first.

    vocab {token: id}, scores by id."""
    merges = {}
    for token, i in sorted(vocab.items(), key=lambda item: (-scores[item[1]], item[1])):
        if not re.fullmatch("<0x[0-9A-F]{2}>", token):
            for pair in halves(token, vocab):
                merges[pair] = (len(merges), i)
    return merges


def space_steps(prefix):
    """SentencePiece's normalizer: ▁ for a space, and one before every text if `prefix`."""
    begin = [("prepend", "▁", "every")] if prefix else []
    return [*begin, ("replace", " ", "▁")]


# ---- tokenizer.json, HF tokenizers' file.


def from_json(content):
    """A byte-level BPE, a SentencePiece-style BPE, or one of our character tokenizers."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise unsupported(f"model type {model['type']!r} (only BPE)")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise unsupported(f"model option {option} = {model[option]!r}")
    normalizer = [
        read_normalizer(step) for step in flat_steps(content.get("normalizer"), "normalizers")
    ]
    split = read_pre_tokenizer(content.get("pre_tokenizer"))
    decoders = {step["type"]: step for step in flat_steps(content.get("decoder"), "decoders")}
    for name in decoders.keys() - DECODERS:
        raise unsupported(f"decoder {name!r}")
    if split.byte_level:
        kind = "bytes"
    elif model["merges"] or decoders.keys() - {"Fuse"}:
        kind = "pieces"
    else:
        kind = "chars"
    special, added = read_added(content.get("added_tokens") or [], normalizer)
    vocab, merges = read_bpe(model["vocab"], model["merges"], special | added, split.byte_level)
    unknown = model.get("unk_token")
    scheme = decoders.get("Metaspace", {}).get("prepend_scheme", "never")
    return Tokenizer(
        kind,
        vocab,
        merges,
        patterns=split.patterns,
        special=special,
        added=added,
        normalizer=normalizer + split.normalizer,
        strip_space="Strip" in decoders or scheme != "never",
        whole_chunks=bool(model.get("ignore_merges")),
        unknown=special.get(unknown, model["vocab"].get(unknown)),
    )


def flat_steps(part, key):
    """A component of a tokenizer.json as a list: null, one step, or a Sequence of steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    steps = []
    for inner in part[key]:
        steps += flat_steps(inner, key)
    return steps


def read_normalizer(step):
    kind = step["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return ("unicode", kind)
    if kind == "Prepend":
        return ("prepend", step["prepend"], "every")
    if kind == "Replace" and "String" in step["pattern"]:
        return ("replace", step["pattern"]["String"], step["content"])
    raise unsupported(f"normalizer {kind!r}, or its regular expression,")


@dataclass
class PreTokenizer:
    """What a tokenizer.json's pre-tokenizer asks for."""

    patterns: list  # to split by, in turn
    normalizer: list  # what Metaspace does to the text first
    byte_level: bool = False


def read_pre_tokenizer(part):
    split = PreTokenizer([], [])
    for step in flat_steps(part, "pretokenizers"):
        kind = step["type"]
        if split.byte_level:
            raise unsupported(f"a pre-tokenizer ({kind!r}) after ByteLevel")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            split.byte_level = True
            if step.get("use_regex", True):
                split.patterns.append(PATTERNS["gpt2"])
        elif kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            ((how, text),) = step["pattern"].items()
            split.patterns.append(text if how == "Regex" else re.escape(text))
        elif kind == "Digits":
            split.patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Metaspace":
            space = step["replacement"]
            default = "always" if step.get("add_prefix_space", True) else "never"
            scheme = step.get("prepend_scheme", default)
            split.normalizer = [("replace", " ", space), ("prepend", space, scheme)]
            if step.get("split", True):
                split.patterns.append(f"{space}[^{space}]*")
        else:
            raise unsupported(f"pre-tokenizer {kind!r} with {step}")
    return split


def read_added(tokens, normalizer):
    """-> (special {text: id}, other added tokens {text: id}).

    How a special token would be matched does not matter, since it is never matched in text."""
    special, added = {}, {}
    for token in tokens:
        text = token["content"]
        if not isinstance(text, str) or not text or text in special or text in added:
            raise unsupported(f"added token {text!r} (empty or twice)")
        if token.get("special"):
            special[text] = token["id"]
            continue
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise unsupported(f"added token {text!r} with {option}")
        if token.get("normalized") and normalize(text, normalizer) != text:
            raise unsupported(f"added token {text!r}, which the normalizer changes,")
        added[text] = token["id"]
    return special, added


def tokenizer_file(tokenizer):
    """The bytes of its tokenizer.json: as it was read, with the special tokens added since."""
    if tokenizer.source is None:
        content = to_json(tokenizer)
    else:
        content = json.loads(tokenizer.source)
        listed = content.get("added_tokens") or []
        known = {token["content"] for token in listed}
        more = {name: i for name, i in tokenizer.special.items() if name not in known}
        if not more:
            return tokenizer.source
        content["model"]["vocab"] |= more  # HF takes ids from there
        content["added_tokens"] = listed + list_added(more, special=True)
    return json.dumps(content, ensure_ascii=False).encode()


def list_added(ids, special):
    """{text: id} as a tokenizer.json lists added tokens."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": i, "content": name, **plain, "special": special} for name, i in ids.items()]


def to_json(tokenizer):
    """The tokenizer as the contents of a tokenizer.json."""
    spelled = spelled_tokens(tokenizer)
    names = {i: name for name, i in (tokenizer.special | tokenizer.added).items()}
    clash = set(names.values()) & set(spelled.values())
    if clash:
        raise UserError(f"the file would have two tokens spelled {clash.pop()!r}, one special")
    added = list_added(tokenizer.special, True) + list_added(tokenizer.added, False)
    pieces = tokenizer.kind == "pieces"
    pairs = sorted(tokenizer.merges, key=tokenizer.merges.get)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": normalizer_json(tokenizer),
        "pre_tokenizer": pre_tokenizer_json(tokenizer),
        "post_processor": None,
        "decoder": decoder_json(tokenizer),
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "unk_token": names.get(tokenizer.unknown),
            "fuse_unk": pieces,
            "byte_fallback": pieces,
            "ignore_merges": tokenizer.whole_chunks,
            # special tokens too: HF takes the ids of added tokens from here
            "vocab": {text: i for i, text in sorted((spelled | names).items())},
            "merges": [f"{spelled[left]} {spelled[right]}" for left, right in pairs],
        },
    }


def spelled_tokens(tokenizer):
    """{id: text} as a tokenizer.json spells tokens, a byte as one visible character."""
    if tokenizer.kind != "bytes":
        return {i: token for token, i in tokenizer.vocab.items()}
    return {i: "".join(map(BYTE_TO_CHAR.get, token)) for token, i in tokenizer.vocab.items()}


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def normalizer_json(tokenizer):
    steps = []
    for kind, *arguments in tokenizer.normalizer:
        if kind == "prepend":
            steps.append({"type": "Prepend", "prepend": arguments[0]})
        else:
            old, new = arguments
            steps.append({"type": "Replace", "pattern": {"String": old}, "content": new})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def pre_tokenizer_json(tokenizer):
    if tokenizer.kind != "bytes":
        return None
    steps = []
    for pattern in tokenizer.patterns:
        how = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps.append({"type": "Split", **how})
    return {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]}


def decoder_json(tokenizer):
    if tokenizer.kind == "bytes":
        return BYTE_LEVEL
    if tokenizer.kind == "chars":
        return {"type": "Fuse"}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if tokenizer.strip_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


# ---- GPT-2's two files.


def from_vocab_bpe(path, data):
    """vocab.bpe with encoder.json (or merges.txt with vocab.json, the same under newer names)."""
    merges = []
    for line in data.decode("utf-8", "replace").split("\n"):
        if line and not line.startswith("#version"):
            merges.append(line.split(" "))
            if len(merges[-1]) != 2:
                raise UserError(f"this is not a list of merges: {line[:80]!r}")
    made = [*CHAR_TO_BYTE, *map("".join, merges)]
    beside = path.with_name("encoder.json" if path.suffix == ".bpe" else "vocab.json")
    if not beside.is_file():
        raise UserError(f"there is no {beside.name} beside it, with the ids")
    with naming(beside):
        vocab = parse_json(read_limited(beside))
    special = {token: vocab[token] for token in vocab.keys() - set(made)}
    vocab, merges = read_bpe(vocab, merges, special, byte_level=True)
    return Tokenizer("bytes", vocab, merges, patterns=[PATTERNS["gpt2"]], special=special)


# ---- tiktoken's files, and Mistral's: tokens and their ranks.


def from_ranks(path, data, pattern):
    """A tiktoken file: lines of a token in base64 and its rank, which is its id."""
    pattern = pattern or RANK_FILES.get(path.stem)
    if pattern is None:
        raise UserError(
            "the file does not say how text is split: load(path, pattern=...) with one of "
            f"{', '.join(PATTERNS)} or your own"
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
    return rank_tokenizer(vocab, PATTERNS.get(pattern, pattern), {})


def from_tekken(content):
    """tekken.json: ids are ranks after the special tokens; only the first of the ranks are used."""
    config = content["config"]
    n_special = config["default_num_special_tokens"]
    n_used = config["default_vocab_size"] - n_special
    names = TEKKEN_SPECIAL
    if content.get("special_tokens"):
        listed = sorted(content["special_tokens"], key=lambda token: token["rank"])
        names = [token["token_str"] for token in listed]
    unnamed = range(len(names), min(n_special, LARGEST_ID))
    names = [*names, *(f"<SPECIAL_{i}>" for i in unnamed)]
    special = {name: i for i, name in enumerate(names)}
    used = sorted(content["vocab"], key=lambda token: token["rank"])[:n_used]
    vocab = {base64.b64decode(token["token_bytes"]): token["rank"] + n_special for token in used}
    if len(vocab) < len(used) or len(special) != n_special:
        raise UserError("a token is there twice")
    return rank_tokenizer(vocab, config["pattern"], special)


def rank_tokenizer(vocab, pattern, special):
    missing = [b for b in range(256) if bytes([b]) not in vocab]
    if missing:
        raise UserError(
            f"there is no token for {len(missing)} of the 256 bytes, the first {missing[0]:#04x}"
        )
    return Tokenizer("bytes", vocab, patterns=[pattern], special=special, whole_chunks=True)


# ---- SentencePiece's file.


def from_sentencepiece(path):
    """A .model of the BPE kind with an identity normalizer (Llama 2, Mistral)."""
    from sentencepiece import SentencePieceProcessor

    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"this is not a SentencePiece model: {str(error)[:100]}") from None
    size = sp.get_piece_size()
    special, vocab = {}, {}
    for i in range(size):
        if sp.is_control(i) or sp.is_unknown(i):
            special[sp.id_to_piece(i)] = i
        elif not sp.is_unused(i):
            vocab[sp.id_to_piece(i)] = i
    prefix = sp.encode("a", out_type=str)[0].startswith("▁")
    tokenizer = Tokenizer(
        "pieces",
        vocab,
        merges_by_score(vocab, [sp.get_score(i) for i in range(size)]),
        special=special,
        normalizer=space_steps(prefix),
        strip_space=prefix,
        unknown=sp.unk_id(),
    )
    probes = ["Hello  world ", " \tﬁ ½ Ａ\n日本 🙂"]
    probes += [piece.replace("▁", " ") for piece in list(vocab)[300::50]]
    for probe in probes:
        if tokenizer.encode(probe) != sp.encode(probe):
            raise UserError(
                f"it encodes {probe!r} otherwise than plain BPE: unigram models and normalizers "
                "that change the text are not supported"
            )
    return tokenizer
