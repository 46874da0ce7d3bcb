"""A fuzzer of what comes from outside: seeded mutations of small real files, requests and schemas.

    python tests/fuzz.py --cases 2000 --seed 0
    python tests/fuzz.py --cases 1 --first 1234 --kind gguf    # one case again, with its traceback

A case may end well or in one line (a UserError, an OSError, a request's refusal), in a process of
its own, which takes at most SECONDS of computing and MEMORY more than before. Anything else is
printed, with the case's number, and the exit status is 1.
"""

import argparse
import base64
import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from conftest import forget_peak, resident  # noqa: E402
from fastapi import HTTPException  # noqa: E402
from pydantic import ValidationError  # noqa: E402

import chat  # noqa: E402
import data  # noqa: E402
import lora  # noqa: E402
import quant  # noqa: E402
import serve  # noqa: E402
from common import Metrics, UserError  # noqa: E402
from engine.grammar import json_grammar  # noqa: E402
from formats import gguf  # noqa: E402
from formats.vocab import BYTE_TO_CHAR  # noqa: E402
from model import Config, Transformer  # noqa: E402
from server import api  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from training import corpora  # noqa: E402

SECONDS = 2.0
MEMORY = 500 << 20  # bytes
TEXT = "The quick brown fox, it's 1,234 times!\n\n  def f(x):\n    return 1  # Zürich 日本語 🙂\n"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|> there"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And now?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
    },
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content|trim }}{% else %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token ~ 'assistant' }}{% endif %}{{ tools|tojson }}"
)
REQUEST = {
    "model": "m",
    "messages": MESSAGES,
    "tools": [TOOL],
    "tool_choice": "auto",
    "max_completion_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "logprobs": True,
    "top_logprobs": 2,
    "stop": ["x"],
    "logit_bias": {"3": 1.0},
    "response_format": {"type": "text"},
}
PROMPT = {"prompt": ["Hello", "you"], "max_tokens": 3, "echo": True, "logprobs": 1, "n": 2}
SCHEMA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$"},
        "nick": {"type": "string", "minLength": 1, "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", 1, None]}, "maxItems": 4},
        "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
    },
    "$defs": {"leaf": {"type": "object", "properties": {"v": {"type": "number"}}}},
}


# --------------------------------------------------------------------------- small files that work
def make_bases(folder):
    """Every kind of file, made by this project; half a second."""
    torch.manual_seed(0)
    tok = Tokenizer.train([TEXT], 300)
    tok.chat_template = TEMPLATE
    shapes = {"qwen3": (4, 2, 8), "gpt2": (4, 4, 8)}
    for kind, (heads, kv_heads, head_dim) in shapes.items():
        config = Config(kind, 300, 32, 64, 2, heads, kv_heads, head_dim, 64)
        if kind == "gpt2":
            config.qkv_bias = config.out_bias = config.mlp_bias = True
        model = Transformer(config)
        model.init_weights()
        model.save_pretrained(folder / kind)
        tok.save(folder / kind)
    for kind in ("int4", "nf4"):
        model = Transformer.from_pretrained(folder / "qwen3")
        quant.quantize(model, kind, 32)
        model.save_pretrained(folder / kind)
    for mix in ("f16", "q8_0"):
        gguf.write(folder / "qwen3", folder / f"{mix}.gguf", mix)
    model = lora.apply(Transformer.from_pretrained(folder / "qwen3"), 2, 4, dora=True)
    lora.save_adapter(model, folder / "adapter")
    texts = [TEXT * 3, "One.\nTwo."] * 20
    write_lines(folder / "text.jsonl", [{"text": text} for text in texts])
    with contextlib.redirect_stdout(None):
        files = {"train": [folder / "text.jsonl"], "val": [folder / "text.jsonl"]}
        data.make_shards(files, tok, folder / "shards", parts_of, {"texts": texts}, processes=1)
    write_lines(folder / "chat.jsonl", [{"messages": MESSAGES[:3], "tools": [TOOL]}] * 3)
    write_lines(
        folder / "metrics.jsonl", [{"step": i, "seconds": 1.0, "loss": 2} for i in range(9)]
    )
    make_vocabularies(folder / "vocabularies", tok)


def parts_of(*_, texts, bad):
    for text in texts:
        yield text.encode(), True, True


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_vocabularies(folder, tok):
    """Every format of a vocabulary that this project reads, but SentencePiece's own."""
    tok.save(folder / "bytes")
    Tokenizer.char(TEXT).save(folder / "chars")
    letters = sorted(set(TEXT.replace(" ", "▁")) | {f"<0x{b:02X}>" for b in range(256)})
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *letters, "▁t", "he"])}
    special = {name: vocab.pop(name) for name in ("<unk>", "<s>", "</s>")}
    merges = {(vocab["h"], vocab["e"]): (0, vocab["he"])}
    steps = [("prepend", "▁", "every"), ("replace", " ", "▁")]
    pieces = Tokenizer("pieces", vocab, merges, (), special, normalizer=steps, unknown=0)
    pieces.save(folder / "pieces")
    by_id = sorted((i, token) for token, i in tok.vocab.items())
    ranks = [(base64.b64encode(token).decode(), n) for n, (_, token) in enumerate(by_id)]
    (folder / "cl100k_base.tiktoken").write_text("".join(f"{t} {n}\n" for t, n in ranks))
    tekken = {
        "config": {"pattern": tok.patterns[0], "default_vocab_size": len(ranks) + 20},
        "vocab": [{"rank": n, "token_bytes": token, "token_str": None} for token, n in ranks],
        "special_tokens": None,
    }
    tekken["config"]["default_num_special_tokens"] = 20
    (folder / "tekken.json").write_text(json.dumps(tekken))
    gpt2 = folder / "gpt2"
    gpt2.mkdir()
    shown = {i: "".join(map(BYTE_TO_CHAR.get, token)) for token, i in tok.vocab.items()}
    lines = [f"{shown[left]} {shown[right]}" for left, right in tok.merges]
    (gpt2 / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    ids = {text: n for n, text in enumerate(shown.values())} | {"<|endoftext|>": len(shown)}
    (gpt2 / "encoder.json").write_text(json.dumps(ids))


# ------------------------------------------------------------------------------------- mutations
HUGE = "\x00HUGE\x00"  # stands for a number of 5,000 digits, which json.dumps does not write
ODD = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e30, 1e308, float("nan")),
    *(float("inf"), -float("inf"), 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 53, 1 << 63, 10**9),
    *(
        HUGE,
        "",
        " ",
        "a",
        "x" * 3000,
        "\ud800",
        "\x00",
        "▁",
        "../../etc/passwd",
        "/dev/zero",
        "<s>",
    ),
    *(
        "(?:a+)+$",
        "(?:\\s|\\s\\s|\\S)+x",
        "(",
        "[^\\s]*",
        "(?R)",
        ".{0,99999}x",
        "{{ 'a' * 10**9 }}",
    ),
    *("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1", "5e3"),
    *([], {}, [5], [None], {"a": 1}, [[[]]], [{}], {"": {}}, ["a"] * 300, [0] * 5000, [{}] * 400),
]


def odd(rng):
    return copy.deepcopy(rng.choice(ODD))


def nested(rng):
    """A value of many layers."""
    value = rng.choice([1, "a", None])
    for _ in range(rng.choice([3, 60, 250])):
        value = rng.choice(
            [[value], {"a": value}, {"items": value}, {"type": "Sequence", "x": [value]}]
        )
    return value


def places(value, found):
    """Every (container, key) inside of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(inside)[:600]:
        found.append((value, key))
        if isinstance(child, dict | list):
            places(child, found)
    return found


def mutate_value(rng, value):
    """A copy of a JSON value, changed in one to four places."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        found = places(value, [])
        if not found or rng.random() < 0.02:
            return odd(rng)
        # Half of the time near the top, where the keys that steer are.
        box, key = rng.choice(found[: 40 if rng.random() < 0.5 else None])
        how = rng.random()
        if how < 0.55:
            box[key] = odd(rng)
        elif how < 0.6:
            box[key] = nested(rng)
        elif how < 0.7:
            del box[key]
        elif how < 0.8:
            other, place = rng.choice(found)
            with contextlib.suppress(LookupError):
                box[key] = copy.deepcopy(other[place])
        elif how < 0.85 and isinstance(box[key], list) and len(box[key]) < 1000:
            box[key] = box[key] * rng.choice([2, 1000])
        elif how < 0.9 and isinstance(box[key], str):
            box[key] = mutate_text(rng, box[key])
        elif isinstance(box, dict):
            box[rng.choice(["type", "pattern", "content", "model", "x", "$ref"])] = box[key]
        else:
            box.insert(rng.randrange(len(box) + 1), odd(rng))
    return value


def to_text(rng, value):
    text = json.dumps(value).replace(json.dumps(HUGE), "9" * 5000)
    depth = rng.choice([900, 100_000]) if rng.random() < 0.02 else 0
    return "[" * depth + text + "]" * depth


def mutate_text(rng, text):
    return mutate_bytes(rng, text.encode("utf-8", "replace")).decode("utf-8", "replace")


def mutate_bytes(rng, data):
    """Bytes flipped, cut, doubled, or made a number at the edge of what its type holds."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(300))  # headers
        how = rng.randrange(6)
        if how == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del data[at : at + rng.choice([1, 8, 100])]
        elif how == 2:
            data[at:at] = data[at : at + rng.choice([1, 8, 1000])] * rng.choice([1, 50])
        elif how == 3:
            number = rng.choice([0, 1, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -1])
            data[at : at + 8] = struct.pack("<q", number)
        elif how == 4:
            data[at : at + 4] = struct.pack("<I", rng.choice([0, 2, 9, 1 << 16, 1 << 21, 1 << 31]))
        else:
            data = data[:at] if rng.random() < 0.3 else data
    return bytes(data)


def mislabel(rng, header):
    """Give tensors of a safetensors header another name, type or shape of the same size."""
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice([1, 3])):
        name, other = rng.sample(names, 2)
        how = rng.randrange(4)
        if how == 0:
            header[name], header[other] = header[other], header[name]
        elif how == 1:
            types = rng.choice(
                [["F32", "I32", "U32"], ["F16", "BF16", "I16"], ["U8", "I8", "BOOL"]]
            )
            header[name]["dtype"] = rng.choice(types)
        elif how == 2:
            header[name]["shape"] = rng.choice([header[name]["shape"][::-1], [1] * 70, [0], []])
        else:
            header[name]["data_offsets"] = header[other]["data_offsets"]


def mutate_file(rng, path):
    """Change a file: JSON mostly as JSON, a safetensors file's header too, the rest as bytes."""
    raw = path.read_bytes()
    as_bytes = rng.random() < 0.15
    if path.suffix == ".json" and not as_bytes:
        path.write_text(to_text(rng, mutate_value(rng, json.loads(raw))))
    elif path.suffix == ".jsonl" and not as_bytes:
        lines = raw.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = to_text(rng, mutate_value(rng, json.loads(lines[at]))).encode()
        path.write_bytes(b"\n".join(lines))
    elif path.suffix == ".safetensors" and not as_bytes:
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        if rng.random() < 0.5:
            header = mutate_value(rng, header)
        else:
            mislabel(rng, header)
        header = to_text(rng, header).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])
    else:
        path.write_bytes(mutate_bytes(rng, raw))


# ------------------------------------------------------------------- the kinds: (rng, base, place)
def copied(rng, base, place, names=None):
    """One of the folders or files of `base`, copied to `place`, one file of it changed -> Path."""
    source = base / rng.choice(names) if names else base
    if source.is_file():
        target = shutil.copy(source, place)
        mutate_file(rng, Path(target))
        return Path(target)
    target = place / source.name
    shutil.copytree(source, target)
    files = [path for path in sorted(target.rglob("*")) if path.is_file()]
    mutate_file(rng, rng.choice(files))
    return target


def use_tokenizer(tok):
    ids = tok.encode_bytes(b"Hello  w\xc3\xb6rld 12 aaaaaaaaaaaaaaaaaaaaaaaaaaaa!\n" * 3)
    tok.decode(ids)
    with contextlib.suppress(UserError):
        chat.render(tok, MESSAGES, add_generation_prompt=True)


def use_model(model):
    with torch.inference_mode():
        model(torch.arange(4)[None] % model.config.vocab_size)


def fuzz_gguf(rng, base, place):
    path = copied(rng, base, place, ["f16.gguf", "q8_0.gguf"])
    if rng.random() < 0.6:
        change_metadata(rng, base / path.name, path)
    model, tok = gguf.load(path)
    use_model(model)
    if tok:
        use_tokenizer(tok)


def change_metadata(rng, source, path):
    """Write a GGUF with other metadata, of the types that there are."""
    meta, tensors = gguf.open_gguf(source)
    plan = []
    for name, tensor in tensors.items():
        make = tensor.data.numpy().tobytes
        plan.append(gguf.PlannedTensor(name, tensor.type, tensor.shape, make))
    meta = mutate_value(rng, meta)
    if not isinstance(meta, dict):
        return
    for key, value in list(meta.items()):
        try:
            gguf.value_bytes(value)
        except (ArithmeticError, KeyError, AttributeError, struct.error, UnicodeError):
            del meta[key]
    gguf.write_container(path, meta, plan)


def fuzz_model(rng, base, place):
    names = ["qwen3", "gpt2", "int4", "nf4"]
    folder = copied(rng, base, place, names)
    use_model(Transformer.from_pretrained(folder))


def fuzz_config(rng, base, place):
    folder = place / "model"
    shutil.copytree(base / rng.choice(["qwen3", "gpt2", "int4", "nf4"]), folder)
    mutate_file(rng, folder / "config.json")
    use_model(Transformer.from_pretrained(folder))


def fuzz_tokenizer(rng, base, place):
    names = ["bytes", "bytes", "pieces", "chars", "gpt2", "tekken.json", "cl100k_base.tiktoken"]
    use_tokenizer(Tokenizer.load(copied(rng, base / "vocabularies", place, names)))


def fuzz_template(rng, base, place):
    tok = Tokenizer.load(base / "qwen3")
    templates = sorted((ROOT / "tests" / "chat_templates").glob("*.jinja"))
    texts = [TEMPLATE, *(path.read_text() for path in templates)]
    template = rng.choice(texts)
    for _ in range(rng.choice([1, 2, 4])):
        words = re.split(r"(\W)", template)
        at = rng.randrange(len(words))
        words[at] = rng.choice([*words, "10**9", "range(99999)", "messages", "''", "'a' * 10**8"])
        template = "".join(words)
    tok.chat_template = template
    messages = mutate_value(rng, MESSAGES) if rng.random() < 0.3 else MESSAGES
    chat.render(tok, messages, add_generation_prompt=True, tools=rng.choice([None, [TOOL]]))


def fuzz_jsonl(rng, base, place):
    path = copied(rng, base, place, ["chat.jsonl", "text.jsonl", "metrics.jsonl"])
    tok = Tokenizer.load(base / "qwen3")
    if path.name == "metrics.jsonl":
        with contextlib.redirect_stdout(None):
            return Metrics(place, resume_step=5)
    if path.name == "text.jsonl":
        return list(corpora.documents([path], tok.cuts))
    return list(chat.examples(tok, path, chat.read_records(path), Counter()))


def fuzz_shards(rng, base, place):
    for split in data.open_shards(copied(rng, base, place, ["shards"])).values():
        split.plan(16, 0, 0)


def fuzz_adapter(rng, base, place):
    model = Transformer.from_pretrained(base / "qwen3")
    lora.load_adapter(model, copied(rng, base, place, ["adapter"]))
    use_model(model)


def json_of(rng, value):
    """A changed value as it comes out of a request that is JSON."""
    try:
        return json.loads(to_text(rng, mutate_value(rng, value)))
    except (ValueError, RecursionError) as error:
        raise UserError("the server refuses what is no JSON") from error


def fuzz_request(rng, base, place):
    tok = Tokenizer.load(base / "qwen3")
    service = SimpleNamespace(tok=tok, context=64, defaults={}, turn_ends=())
    kind, plan, body = rng.choice(
        [
            (api.ChatRequest, serve.plan_chat, REQUEST),
            (api.CompletionRequest, serve.plan_completion, PROMPT),
        ]
    )
    body = kind.model_validate(json_of(rng, body))
    api.grammar_of(body)
    if kind is api.ChatRequest:
        api.forced_call(body, service.tok)
    plan(body, service)


def fuzz_schema(rng, base, place):
    json_grammar(json_of(rng, SCHEMA))


KINDS = {
    name.removeprefix("fuzz_"): run for name, run in globals().items() if name.startswith("fuzz_")
}


# ------------------------------------------------------------------------------------ the bounds
def run_case(number, args, base):
    """-> what is wrong with how the case ended, or None."""
    rng = random.Random(f"{args.seed} {number}")
    kind = args.kind or list(KINDS)[number % len(KINDS)]
    wrong = None
    with tempfile.TemporaryDirectory() as place:
        forget_peak()
        before = resident("VmRSS")
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)  # at its end the system ends the process
        try:
            KINDS[kind](rng, base, Path(place))
        except (UserError, OSError, ValidationError, HTTPException) as error:
            told = str(error)
            if isinstance(error, UserError) and ("\n" in told or len(told) > 2000):
                wrong = f"{len(told):,} letters or several lines: {told[:300]!r}"
        except BaseException as error:
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
            if args.cases == 1:
                traceback.print_exc()
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - begin
        grown = resident("VmHWM") - before
    if seconds > SECONDS or grown > MEMORY:
        wrong = f"{seconds:.1f} s, {grown >> 20} MB; {wrong or ''}"
    return wrong and f"case {number} ({kind}): {wrong}"


def serve_cases(numbers, args, base, pipe):
    """Run cases one after the other, and say of each how it ended."""
    for number in numbers:
        wrong = run_case(number, args, base)
        os.write(pipe, (json.dumps(wrong) + "\n").encode())


def run_cases(args, base):
    """-> what is wrong, a line each. A child runs the cases; where one ends it, another goes on."""
    failures = []
    number = args.first
    end = args.first + args.cases
    while number < end:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with contextlib.redirect_stderr(sys.stderr if args.cases == 1 else None):
                serve_cases(range(number, end), args, base, writer)
            os._exit(0)
        os.close(writer)
        with open(reader) as answers:
            for line in answers:
                failures += filter(None, [json.loads(line)])
                number += 1
        _, status = os.waitpid(child, 0)
        if number < end:
            kind = args.kind or list(KINDS)[number % len(KINDS)]
            failures.append(f"case {number} ({kind}): ended its process with status {status}")
            number += 1
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--kind", choices=KINDS, help="only these")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a child that forks off has no other threads
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as base:
        make_bases(Path(base))
        failures = run_cases(args, Path(base))
    print(*failures, f"{args.cases:,} cases, {len(failures)} failures", sep="\n")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main())
