"""The vocabulary files of others: tokenizer.json, vocab.bpe, .tiktoken, tekken.json, .model.

    python tokenizer.py show "Hello, world" --tokenizer FILE        # reads any of them

They are untrusted: sizes, types and references are checked, and what is not understood is refused
by name.
"""

import base64
import contextlib
import json
import re

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
RANK_FILES = {"cl100k_base": "gpt4", "tokenizer": "llama3"}
RANK_FILES |= dict.fromkeys(("r50k_base", "p50k_base", "gpt2"), "gpt2")
DECODERS = set("ByteLevel Replace ByteFallback Fuse Strip Metaspace".split())


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
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: copy it again")
    with naming(path):
        tokenizer = read_vocabulary_file(path, pattern)
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        with naming(config):
            tokenizer.config |= read_json_object(config)
    template = path.with_name("chat_template.jinja")  # where newer folders keep it
    if template.is_file():
        tokenizer.chat_template = read_limited(template).decode("utf-8", "replace")
    return tokenizer


def read_vocabulary_file(path, pattern):
    if path.suffix == ".json":
        content = read_json_object(path)
        if "config" in content and "model" not in content:
            return from_tekken(content)
        tokenizer = from_json(content)
        tokenizer.source = path.read_bytes()
        return tokenizer
    data = read_limited(path)
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


def read_json_object(path):
    content = json.loads(read_limited(path))
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
    normalizer = list(map(read_normalizer, flat_steps(content.get("normalizer"), "normalizers")))
    patterns, spaces, byte_level = read_pre_tokenizer(content.get("pre_tokenizer"))
    decoders = {step["type"]: step for step in flat_steps(content.get("decoder"), "decoders")}
    for name in decoders.keys() - DECODERS:
        raise unsupported(f"decoder {name!r}")
    if byte_level:
        kind = "bytes"
    elif model["merges"] or decoders.keys() - {"Fuse"}:
        kind = "pieces"
    else:
        kind = "chars"
    special, added = read_added(content.get("added_tokens") or [], normalizer)
    vocab, merges = read_bpe(model["vocab"], model["merges"], special | added, byte_level)
    unknown = model.get("unk_token")
    scheme = decoders.get("Metaspace", {}).get("prepend_scheme", "never")
    return Tokenizer(
        kind,
        vocab,
        merges,
        patterns,
        special,
        added,
        bool(model.get("ignore_merges")),
        normalizer + spaces,
        "Strip" in decoders or scheme != "never",
        special.get(unknown, model["vocab"].get(unknown)),
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


def read_pre_tokenizer(part):
    """-> (patterns to split by in turn, what is done to spaces before, whether it is byte-level)"""
    patterns, spaces = [], []
    byte_level = False
    for step in flat_steps(part, "pretokenizers"):
        kind = step["type"]
        if byte_level:
            raise unsupported(f"a pre-tokenizer ({kind!r}) after ByteLevel")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            byte_level = True
            if step.get("use_regex", True):
                patterns.append(PATTERNS["gpt2"])
        elif kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            ((how, text),) = step["pattern"].items()
            patterns.append(text if how == "Regex" else re.escape(text))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Metaspace":
            space = step["replacement"]
            default = "always" if step.get("add_prefix_space", True) else "never"
            scheme = step.get("prepend_scheme", default)
            spaces = [("replace", " ", space), ("prepend", space, scheme)]
            if step.get("split", True):
                patterns.append(f"{space}[^{space}]*")
        else:
            raise unsupported(f"pre-tokenizer {kind!r} with {step}")
    return patterns, spaces, byte_level


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
        changed = token.get("normalized") and normalize(text, normalizer) != text
        if changed or any(map(token.get, ("single_word", "lstrip", "rstrip"))):
            raise unsupported(f"added token {text!r}, which changes or takes in what is around it,")
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
    spelled = {i: token for token, i in tokenizer.vocab.items()}
    if tokenizer.kind == "bytes":
        spelled = {i: "".join(map(BYTE_TO_CHAR.get, token)) for i, token in spelled.items()}
    names = {i: name for name, i in (tokenizer.special | tokenizer.added).items()}
    clash = set(names.values()) & set(spelled.values())
    if clash:
        raise UserError(f"the file would have two tokens spelled {clash.pop()!r}, one special")
    added = list_added(tokenizer.special, True) + list_added(tokenizer.added, False)
    pieces = tokenizer.kind == "pieces"
    pairs = sorted(tokenizer.merges, key=tokenizer.merges.get)
    model = {
        "type": "BPE",
        "unk_token": names.get(tokenizer.unknown),
        "fuse_unk": pieces,
        "byte_fallback": pieces,
        "ignore_merges": tokenizer.whole_chunks,
        # special tokens too: HF takes the ids of added tokens from here
        "vocab": {text: i for i, text in sorted((spelled | names).items())},
        "merges": [f"{spelled[left]} {spelled[right]}" for left, right in pairs],
    }
    return {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        **text_steps(tokenizer),
        "post_processor": None,
        "model": model,
    }


def text_steps(tokenizer):
    """What a tokenizer.json does to a text before its model, and to the tokens after it."""
    changes = []
    for kind, *arguments in tokenizer.normalizer:
        if kind == "replace":
            changes.append(replace_json(*arguments))
        elif kind == "prepend":
            changes.append({"type": "Prepend", "prepend": arguments[0]})
        else:
            changes.append({"type": arguments[0]})  # NFC and its like
    steps: dict[str, dict | None] = {"normalizer": None, "pre_tokenizer": None}
    steps["decoder"] = {"type": "Fuse"}
    if changes:
        steps["normalizer"] = {"type": "Sequence", "normalizers": changes}
    if tokenizer.kind == "bytes":
        plain = {"type": "ByteLevel", "add_prefix_space": False}
        byte_level = plain | {"trim_offsets": True, "use_regex": False}
        splits = []
        for pattern in tokenizer.patterns:
            how = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            splits.append({"type": "Split", **how})
        splits.append(byte_level)
        steps["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splits}
        steps["decoder"] = byte_level
    if tokenizer.kind == "pieces":
        back = [replace_json("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
        if tokenizer.strip_space:
            back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        steps["decoder"] = {"type": "Sequence", "decoders": back}
    return steps


def replace_json(old, new):
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


# ---- GPT-2's two files.


def from_vocab_bpe(path, data):
    """vocab.bpe with encoder.json (or merges.txt with vocab.json, the same under newer names)."""
    lines = data.decode("utf-8", "replace").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    made = {*CHAR_TO_BYTE, *(merge.replace(" ", "") for merge in merges)}
    beside = path.with_name("encoder.json" if path.suffix == ".bpe" else "vocab.json")
    if not beside.is_file():
        raise UserError(f"there is no {beside.name} beside it, with the ids")
    with naming(beside):
        vocab = read_json_object(beside)
    special = {token: vocab[token] for token in vocab.keys() - made}
    vocab, merges = read_bpe(vocab, merges, special, byte_level=True)
    return Tokenizer("bytes", vocab, merges, [PATTERNS["gpt2"]], special)


# ---- tiktoken's files, and Mistral's: tokens and their ranks.


def from_ranks(path, data, pattern):
    """A tiktoken file: lines of a token in base64 and its rank, which is its id."""
    pattern = pattern or RANK_FILES.get(path.stem)
    if pattern is None:
        raise UserError(
            "the file does not say how text is split: load(path, pattern=...) with one of "
            f"{', '.join(PATTERNS)} or your own"
        )
    tokens = []
    for line in data.splitlines():
        token, rank = line.split()
        tokens.append((base64.b64decode(token, validate=True), int(rank)))
    return rank_tokenizer(tokens, PATTERNS.get(pattern, pattern), {})


def from_tekken(content):
    """tekken.json: ids are ranks after the special tokens; only the first of the ranks are used."""
    config = content["config"]
    n_special = config["default_num_special_tokens"]
    listed = sorted(content.get("special_tokens") or [], key=lambda token: token["rank"])
    names = [token["token_str"] for token in listed] or TEKKEN_SPECIAL
    unnamed = range(len(names), min(n_special, LARGEST_ID))
    names = [*names, *(f"<SPECIAL_{i}>" for i in unnamed)]
    special = {name: i for i, name in enumerate(names)}
    if len(special) != n_special:
        raise UserError(f"{len(special)} special tokens, it should have {n_special}")
    ranked = sorted(content["vocab"], key=lambda token: token["rank"])
    tokens = []
    for token in ranked[: config["default_vocab_size"] - n_special]:
        tokens.append((base64.b64decode(token["token_bytes"]), token["rank"] + n_special))
    return rank_tokenizer(tokens, config["pattern"], special)


def rank_tokenizer(tokens, pattern, special):
    """tokens [(bytes, id)]"""
    vocab = dict(tokens)
    missing = {bytes([b]) for b in range(256)} - vocab.keys()
    if missing or b"" in vocab or len(vocab) < len(tokens):
        raise UserError(f"no tokens for {len(missing)} of the 256 bytes, or one is empty or twice")
    return Tokenizer("bytes", vocab, None, [pattern], special, whole_chunks=True)


# ---- SentencePiece's file.


def from_sentencepiece(path):
    """A .model of the BPE kind with an identity normalizer (Llama 2, Mistral)."""
    from sentencepiece import SentencePieceProcessor

    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"this is not a SentencePiece model: {str(error)[:100]}") from None
    special, vocab = {}, {}
    for i in range(sp.get_piece_size()):
        if sp.is_control(i) or sp.is_unknown(i):
            special[sp.id_to_piece(i)] = i
        elif not sp.is_unused(i):
            vocab[sp.id_to_piece(i)] = i
    prefix = sp.encode("a", out_type=str)[0].startswith("▁")
    tokenizer = Tokenizer(
        "pieces",
        vocab,
        merges_by_score(vocab, list(map(sp.get_score, range(sp.get_piece_size())))),
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
