"""The vocabulary files of others: tokenizer.json, merges.txt, .tiktoken, tekken.json, .model; and
what stands beside them: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

    python tokenizer.py show "Hello, world" --tokenizer FILE        # reads any of them

They are untrusted: sizes, types and references are checked, and what is not understood is refused
by name.
"""

import base64
import json
import math
import re
from dataclasses import dataclass, replace

from common import UserError, naming, read_json, read_limited, read_value, warn, warn_of_unknown
from tokenizer import (
    BYTES,
    LARGEST_ID,
    PATTERNS,
    PRINTABLE,
    Tokenizer,
    check_ids,
    check_lengths,
    halves,
    normalize,
    pattern_named,
)

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
LONGEST_TEMPLATE = 1 << 18  # characters; the longest in use have 20,000
MOST_STEPS = 64  # of a component; those in use have at most ten
MOST_GROWTH = 16  # times the characters, by all replacements together; in use it is 1
# How tokens that are pieces become text again; the last one where a space was put before the text.
DECODERS: list = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
ANY_CLASS = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
# What tokenizer_config.json may hold: special tokens, what else is applied, and what says nothing
# about ids (in transformers, too; clean_up_tokenization_spaces changes what it decodes). Any other
# key is named in a warning.
ROLE_KEYS = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
APPLIED_WORDS = """add_bos_token add_eos_token add_prefix_space added_tokens_decoder chat_template
    tokenizer_class""".split()
SILENT_WORDS = """backend clean_up_tokenization_spaces device_map errors from_slow is_local
    legacy local_files_only max_length model_input_names model_max_length
    model_specific_special_tokens name_or_path pad_to_multiple_of pad_token_type_id
    padding padding_side processor_class return_token_type_ids sp_model_kwargs
    spaces_between_special_tokens special_tokens_map_file split_special_tokens stride
    tokenizer_file truncation truncation_side truncation_strategy trust_remote_code
    use_default_system_prompt""".split()
TOKEN_KEYS = set("__type content id lstrip normalized rstrip single_word special".split())
KNOWN_KEYS = {*ROLE_KEYS, *MORE_TOKENS, *APPLIED_WORDS, *SILENT_WORDS}


# ---- What every reader needs.


@dataclass
class Beside:
    """What the files beside a vocabulary say."""

    config: dict  # tokenizer_config.json, over special_tokens_map.json
    tokens: list  # added tokens as a tokenizer.json lists them; "id" is None where no file says it
    kind: str | None  # transformers' class or, where that can be any, the model's

    def flag(self, key):
        """A key's true or false; None where nothing is said."""
        return read_value(self.config, "tokenizer_config.json", key, bool)


def find_tokenizer(folder):
    """The vocabulary file of a folder, or None (a .tiktoken file is read by its own path alone)."""
    for name in ("tokenizer.json", "tekken.json", "tokenizer.model*", "vocab.bpe", "merges.txt"):
        for path in sorted(folder.glob(name)):
            if path.is_file():
                return path
    return None


def read_tokenizer(path, pattern):
    """The Tokenizer in a file or folder; `pattern` is for tiktoken's files alone. UserError."""
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise UserError(f"{path} has no tokenizer.json, merges.txt or other vocabulary file")
        path = found
    if not path.is_file():
        raise UserError(f"there is no tokenizer at {path}")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: copy it again")
    config = path.with_name("tokenizer_config.json")
    with naming(config):
        beside = read_beside(path.parent)
    with naming(path):
        tokenizer = read_vocabulary_file(path, pattern, beside)
        tokenizer.config |= beside.config
        add_ends(tokenizer, beside)
    with naming(config):
        template = tokenizer.chat_template
        if not isinstance(template, str | None) or len(template or "") > LONGEST_TEMPLATE:
            raise UserError(f"its chat_template is no text of at most {LONGEST_TEMPLATE:,} letters")
    return tokenizer


def read_beside(folder):
    """-> Beside. A key of tokenizer_config.json that nothing here knows is named in a warning."""
    files = {}
    for name in ("config", "tokenizer_config", "special_tokens_map", "added_tokens"):
        path = folder / f"{name}.json"
        files[name] = read_json(path) if path.is_file() else {}
    own = files["tokenizer_config"]
    kind = own.get("tokenizer_class") or ANY_CLASS[0]
    if kind in ANY_CLASS:
        kind = files["config"].get("model_type")
    config = files["special_tokens_map"] | own
    unknown = config.keys() - KNOWN_KEYS
    for token in (*(config.get("added_tokens_decoder") or {}).values(), *config.values()):
        if isinstance(token, dict) and "content" in token:
            unknown |= token.keys() - TOKEN_KEYS
    warn_of_unknown(unknown, folder / "tokenizer_config.json")
    jinja = folder / "chat_template.jinja"  # where newer folders keep it
    if jinja.is_file():
        config["chat_template"] = read_limited(jinja).decode("utf-8", "replace")
    return Beside(config, tokens_beside(config, files["added_tokens"]), kind)


def tokens_beside(config, added):
    """Added tokens as a tokenizer.json lists them: with their ids first, then those only named."""
    tokens = {}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        tokens[token["content"]] = token | {"id": int(i)}
    for text, i in added.items():
        tokens.setdefault(text, {"content": text, "id": i})
    named = [config.get(key) for key in ROLE_KEYS]
    for key in MORE_TOKENS:
        more = config.get(key) or []
        if isinstance(more, str):  # its letters are no tokens
            raise UserError(f"{key} is {more!r}, expected a list")
        named += more.values() if isinstance(more, dict) else more
    for token in filter(None, named):
        text = token["content"] if isinstance(token, dict) else token
        tokens.setdefault(text, {"content": text, "id": None})["special"] = True
    return sorted(tokens.values(), key=lambda token: (token["id"] is None, token["id"] or 0))


def add_ends(tokenizer, beside):
    """add_bos_token and add_eos_token go before what the vocabulary's file puts round a prompt."""
    flags = [beside.flag("add_bos_token"), beside.flag("add_eos_token")]
    if flags != [None, None]:
        tokenizer.set_prompt_ends(*flags)
    space = beside.flag("add_prefix_space")
    added = any(kind == "prepend" for kind, *_ in tokenizer.normalizer)
    if space is not None and space != added:
        warn(f"ignored: add_prefix_space {space}, for the vocabulary's file says {added}")


def read_vocabulary_file(path, pattern, beside):
    """What kind of file it is, its content says."""
    data = read_limited(path)
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        content = read_json(path)
        # of a vocab.json these are words, and their values ids
        if isinstance(content.get("config"), dict):
            return from_tekken(content)
        merges = path.with_name("merges.txt")
        if isinstance(content.get("model"), dict) or not merges.is_file():
            tokenizer = from_json(content, beside.tokens)
            tokenizer.source = data
            return tokenizer
        path, data = merges, read_limited(merges)  # it was their vocab.json
    if data.count(b"\n") > LARGEST_ID:
        raise UserError(f"more than {LARGEST_ID:,} lines")
    if data.startswith(b"#version") or path.suffix in (".bpe", ".txt"):
        return from_merges(path, data, beside)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):  # also Llama 3's tokenizer.model
        return from_ranks(path, data, pattern, beside.tokens)
    return from_sentencepiece(path, beside)


def unsupported(what):
    return UserError(f"{what} is not supported")


def ordinary_tokens(vocab, names):
    """{text: id} of a file, without the special and added tokens `names`, whose ids must agree."""
    ids = dict(vocab)
    for text, i in names.items():
        if ids.pop(text, i) != i:
            raise UserError(f"{text!r} has two ids: {i} and {vocab[text]}")
    return ids


def read_bpe(vocab, merges, names, byte_level):
    """Tokens by text and merges by text -> (vocab, merges) as Tokenizer wants them.

    vocab {text: id}; merges ["left right"] or [(left, right)]; names {text: id} of special and
    added tokens, which may be in `vocab` and are not in what is returned."""
    if len(merges) > LARGEST_ID:
        raise UserError(f"{len(merges):,} merges, more than {LARGEST_ID:,}")
    ids = ordinary_tokens(vocab, names)
    by_ids = {}
    for rank, merge in enumerate(merges):
        texts = merge.split(" ") if isinstance(merge, str) else merge
        if len(texts) != 2:
            raise UserError(f"merge {str(merge)[:40]!r} is not two tokens")
        left, right = texts
        pair = ids.get(left), ids.get(right)
        new = ids.get(left + right)
        if None in pair or new is None or new in pair:
            raise UserError(
                f"merge {rank} of {left[:40]!r} and {right[:40]!r} joins or makes what is no "
                "ordinary token"
            )
        by_ids[pair] = (rank, new)  # of one that is listed twice the last counts, as in HF's
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
    check_lengths(vocab)
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


def from_json(content, beside=()):
    """A byte-level BPE, a SentencePiece-style BPE, or one of our character tokenizers.

    beside: added tokens that other files list, as Beside has them."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise unsupported(f"model type {model['type']!r} (only BPE)")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise unsupported(f"model option {option} = {model[option]!r}")
    normalizer = list(map(read_normalizer, flat_steps(content.get("normalizer"), "normalizers")))
    patterns, spaces, byte_level = read_pre_tokenizer(content.get("pre_tokenizer"))
    check_growth(normalizer + spaces)
    decoders = set()
    for step in flat_steps(content.get("decoder"), "decoders"):
        name = step["type"]
        if name == "Metaspace" and prepend_scheme(step) != "never":
            name = "Strip"  # what it takes back is the first space
        elif step not in DECODERS and name not in ("ByteLevel", "Metaspace"):
            raise unsupported(f"decoder {str(step)[:200]}")
        decoders.add(name)
    if byte_level:
        kind = "bytes"
    elif model["merges"] or decoders - {"Fuse"}:
        kind = "pieces"
    else:
        kind = "chars"
    vocab, merges = model["vocab"], model["merges"]
    listed = content.get("added_tokens") or []
    special, added = read_added(listed, beside, vocab, merges, normalizer + spaces)
    vocab, merges = read_bpe(vocab, merges, special | added, byte_level)
    unknown = model.get("unk_token")
    if kind == "pieces":  # bytes are used where there are any, one unknown token for a run else
        option = "byte_fallback" if "<0x00>" in vocab else "fuse_unk"
        if (unknown or option == "byte_fallback") and not model.get(option):
            raise unsupported(f"model option {option} = {model.get(option)!r}")
    before, after = read_post_processor(content.get("post_processor"), special | added)
    return Tokenizer(
        kind,
        vocab,
        merges,
        patterns,
        special,
        added,
        bool(model.get("ignore_merges")),
        normalizer + spaces,
        "Strip" in decoders,
        special.get(unknown, model["vocab"].get(unknown)),
        before=before,
        after=after,
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
        if len(steps) > MOST_STEPS:
            raise UserError(f"more than {MOST_STEPS} {key}")
    return steps


def check_growth(operations):
    """UserError if the normalizer makes far more text than it is given, or is none."""
    most = 1
    for name, *arguments in operations:
        if name == "replace":
            old, new = map(len, arguments)
            most *= max(1, new / old) if old else math.inf
        elif name == "prepend":
            most += len(arguments[0])
    if most > MOST_GROWTH:
        raise UserError(f"its normalizer makes {most:,.0f} characters of one")
    normalize("a", operations)  # TypeError where an argument is no text


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
    patterns = []
    spaces = []
    byte_level = False
    for step in flat_steps(part, "pretokenizers"):
        kind = step["type"]
        if byte_level:
            raise unsupported(f"a pre-tokenizer ({kind!r}) after ByteLevel")
        if kind == "ByteLevel" and not (step.get("add_prefix_space") and patterns):
            byte_level = True
            if step.get("add_prefix_space"):
                spaces = [("prepend", " ", "always")]
            if step.get("use_regex", True):
                patterns.append(PATTERNS["gpt2"])
        elif kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            ((how, text),) = step["pattern"].items()
            patterns.append(text if how == "Regex" else re.escape(text))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Metaspace" and not patterns:  # after a split it would change each part
            spaces = [("replace", " ", "▁"), ("prepend", "▁", prepend_scheme(step))]
            if step.get("split", True):
                patterns.append("▁[^▁]*")
        else:
            raise unsupported(f"pre-tokenizer {kind!r} with {step}")
    return patterns, spaces, byte_level


def prepend_scheme(metaspace):
    """When a Metaspace step puts a ▁ before a text: "first", "always" or "never"."""
    if metaspace["replacement"] != "▁":
        raise unsupported(f"a space spelled {metaspace['replacement'][:40]!r}")
    default = "always" if metaspace.get("add_prefix_space", True) else "never"
    return metaspace.get("prepend_scheme", default)


def read_post_processor(part, ids):
    """-> (ids put before a prompt, ids put after it); ids {text: id} of special and added tokens"""
    before = []
    after = []
    for step in flat_steps(part, "processors"):
        if step["type"] == "TemplateProcessing":
            names = [piece.get("SpecialToken", {}).get("id") for piece in step["single"]]
            at = names.index(None)  # there is the text
            for name in names[:at] + names[at + 1 :]:
                if step["special_tokens"][name]["ids"] != [ids[name]]:
                    raise unsupported(f"{name!r} round a prompt with other ids than its own")
            before += [ids[name] for name in names[:at]]
            after += [ids[name] for name in names[at + 1 :]]
        elif step["type"] != "ByteLevel":  # that one is about offsets
            raise unsupported(f"post-processor {step['type']!r}")
    return tuple(before), tuple(after)


def read_added(listed, beside, vocab, merges=(), normalizer=()):
    """The added tokens of a file and those that the files beside it have
    -> (special {text: id}, others {text: id}).

    How a special token would be matched does not matter, since it is never matched in text."""
    tokens = join_added(listed, beside, vocab, merges)
    special = {}
    added = {}
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


def join_added(listed, beside, vocab, merges):
    """The added tokens of a tokenizer.json, then those that only the files beside it have.

    Whether one is special, these say, where they say it. One without an id has the vocabulary's or,
    as in transformers, the next free one; if it is a character or merges make it, then text becomes
    it anyway, and it stays an ordinary token."""
    check_ids(vocab.values())
    joined = {token["content"]: token for token in listed}
    known = [token["id"] for token in (*listed, *beside) if isinstance(token["id"], int)]
    free = max([*vocab.values(), *known], default=-1) + 1
    made = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges}
    more = []
    for token in beside:
        text = token["content"]
        ordinary = len(text) == 1 or text in made
        if text in joined and token["id"] in (None, joined[text]["id"]):
            joined[text]["special"] = token.get("special", joined[text].get("special"))
        elif token["id"] is not None:
            more.append(token)
        elif not ordinary:
            more.append(token | {"id": vocab.get(text, free)})
            free += text not in vocab
    return listed + more


def tokenizer_file(tokenizer):
    """The bytes of its tokenizer.json: as it was read, with the special tokens added since."""
    if tokenizer.source is None:
        content = to_json(tokenizer)
    else:
        content = json.loads(tokenizer.source)
        listed = content.get("added_tokens") or []
        known = {token["content"] for token in listed}
        more = [token for token in list_added(tokenizer) if token["content"] not in known]
        if not more:
            return tokenizer.source
        # HF takes ids from there
        content["model"]["vocab"] |= {token["content"]: token["id"] for token in more}
        content["added_tokens"] = listed + more
    return json.dumps(content, ensure_ascii=False).encode()


def list_added(tokenizer):
    """Its special and added tokens as a tokenizer.json lists them, by id."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    listed = []
    for name, i in (tokenizer.special | tokenizer.added).items():
        special = name in tokenizer.special
        listed.append({"id": i, "content": name, **plain, "special": special})
    return sorted(listed, key=lambda token: token["id"])


def to_json(tokenizer):
    """The tokenizer as the contents of a tokenizer.json."""
    spelled = {i: token for token, i in tokenizer.vocab.items()}
    if tokenizer.kind == "bytes":
        spelled = {i: "".join(map(BYTE_TO_CHAR.get, token)) for i, token in spelled.items()}
    names = {i: name for name, i in (tokenizer.special | tokenizer.added).items()}
    clash = set(names.values()) & set(spelled.values())
    if clash:
        raise UserError(f"the file would have two tokens spelled {clash.pop()!r}, one special")
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
        "added_tokens": list_added(tokenizer),
        **text_steps(tokenizer),
        "post_processor": post_processor(tokenizer, names),
        "model": model,
    }


def post_processor(tokenizer, names):
    """What a tokenizer.json puts round a prompt; names {id: text} of special and added tokens."""
    before, after = tokenizer.prompt_ends()
    used = {names[i]: i for i in before + after}
    if not used:
        return None
    single = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in before + after]
    single.insert(len(before), {"Sequence": {"id": "A", "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in used.items()},
    }


def text_steps(tokenizer):
    """What a tokenizer.json does to a text before its model, and to the tokens after it."""
    changes = []
    prefix = False
    for kind, *arguments in tokenizer.normalizer:
        if kind == "replace":
            old, new = arguments
            changes.append({"type": "Replace", "pattern": {"String": old}, "content": new})
        elif arguments[-1] == "always":  # GPT-2's space
            prefix = True
        elif kind == "prepend":
            changes.append({"type": "Prepend", "prepend": arguments[0]})
        else:
            changes.append({"type": arguments[0]})  # NFC and its like
    normalizer = pre_tokenizer = None
    decoder: dict = {"type": "Fuse"}
    if changes:
        normalizer = {"type": "Sequence", "normalizers": changes}
    if tokenizer.kind == "bytes":
        decoder = {
            "type": "ByteLevel",
            "add_prefix_space": prefix,
            "trim_offsets": True,
            "use_regex": prefix,
        }
        splits = []
        for pattern in () if prefix else tokenizer.patterns:  # use_regex splits by GPT-2's itself
            how = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            splits.append({"type": "Split", **how})
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [*splits, decoder]}
    if tokenizer.kind == "pieces":
        back = DECODERS if tokenizer.strip_space else DECODERS[:-1]
        decoder = {"type": "Sequence", "decoders": back}
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}


# ---- GPT-2's two files.


def from_merges(path, data, beside):
    """merges.txt with vocab.json, or vocab.bpe with encoder.json, the same under older names."""
    if beside.kind not in (None, "gpt2", "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise unsupported(f"tokenizer_class {beside.kind!r} without a tokenizer.json")
    lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    made = {*CHAR_TO_BYTE, *(merge.replace(" ", "") for merge in merges)}
    vocab_file = path.with_name("encoder.json" if path.suffix == ".bpe" else "vocab.json")
    if not vocab_file.is_file():
        raise UserError(f"there is no {vocab_file.name} beside it, with the ids")
    with naming(vocab_file):
        vocab = read_json(vocab_file)
    normalizer = [("prepend", " ", "always")] if beside.flag("add_prefix_space") else []
    own, added = read_added([], beside.tokens, vocab, merges, normalizer)
    special = {token: vocab[token] for token in vocab.keys() - made - added.keys()} | own
    vocab, merges = read_bpe(vocab, merges, special | added, byte_level=True)
    return Tokenizer(
        "bytes", vocab, merges, [PATTERNS["gpt2"]], special, added, normalizer=normalizer, before=()
    )


# ---- tiktoken's files, and Mistral's: tokens and their ranks.


def from_ranks(path, data, pattern, tokens):
    """A tiktoken file: lines of a token in base64 and its rank, which is its id."""
    pattern = pattern or RANK_FILES.get(path.stem)
    if pattern is None:
        raise UserError(
            "the file does not say how text is split: load(path, pattern=...) with one of "
            f"{', '.join(PATTERNS)} or your own"
        )
    ranked = []
    for line in data.splitlines():
        token, rank = line.split()
        ranked.append((token, int(rank)))
    added = read_added([], tokens, dict(ranked))
    return rank_tokenizer(ranked, pattern_named(pattern), *added)


def from_tekken(content):
    """tekken.json: ids are ranks after the special tokens; only the first of the ranks are used."""
    config = content["config"]
    n_special = config["default_num_special_tokens"]
    listed = content.get("special_tokens") or []
    named = {token["rank"]: token["token_str"] for token in listed}
    named = named or dict(enumerate(TEKKEN_SPECIAL))
    ids = range(min(n_special, LARGEST_ID))
    special = {named.get(i, f"<SPECIAL_{i}>"): i for i in ids}
    if len(special) != n_special or named.keys() - ids:
        raise UserError(f"{len(special)} special tokens, it should have {n_special}")
    ranked = sorted(content["vocab"], key=lambda token: token["rank"])
    tokens = []
    for token in ranked[: config["default_vocab_size"] - n_special]:
        tokens.append((token["token_bytes"], token["rank"] + n_special))
    tokenizer = rank_tokenizer(tokens, config["pattern"], special, {})
    if "<s>" in special:
        tokenizer.before = (special["<s>"],)
    return tokenizer


def rank_tokenizer(tokens, pattern, special, added):
    """tokens [(base64, id)]; nothing goes round a prompt."""
    vocab = {base64.b64decode(token, validate=True): i for token, i in tokens}
    missing = {bytes([b]) for b in range(256)} - vocab.keys()
    if missing or b"" in vocab or len(vocab) < len(tokens):
        raise UserError(f"no tokens for {len(missing)} of the 256 bytes, or one is empty or twice")
    return Tokenizer("bytes", vocab, None, [pattern], special, added, whole_chunks=True, before=())


# ---- SentencePiece's file.


def from_sentencepiece(path, beside):
    """A .model of the BPE kind with an identity normalizer (Llama 2, Mistral)."""
    from sentencepiece import SentencePieceProcessor

    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"it is no vocabulary file that is known: {str(error)[:100]}") from None
    size = sp.get_piece_size()
    if size > LARGEST_ID:
        raise UserError(f"{size:,} tokens, more than {LARGEST_ID:,}")
    pieces = {}
    special = {}
    for i in range(size):
        piece = sp.id_to_piece(i)
        if not sp.is_unused(i):
            pieces[piece] = i
        if sp.is_control(i) or sp.is_unknown(i):
            special[piece] = i
    own, added = read_added([], beside.tokens, pieces)
    special |= own
    vocab = ordinary_tokens(pieces, special | added)
    prefix = sp.encode("a", out_type=str)[0].startswith("▁")
    tokenizer = Tokenizer(
        "pieces",
        vocab,
        merges_by_score(vocab, list(map(sp.get_score, range(size)))),
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
    symbols = [piece for piece, i in vocab.items() if sp.get_score(i) == 0][:1024]
    lost = [piece for piece in symbols if tokenizer.encode(piece) != sp.encode(piece)]
    warn_of_unknown(lost, f"{path}, user-defined symbols")  # these are ordinary text here
    if beside.flag("add_prefix_space") is False:
        tokenizer = replace(tokenizer, normalizer=space_steps(False), strip_space=False)
    return replace(tokenizer, added=added)  # of which sp, in the probes, knows nothing
