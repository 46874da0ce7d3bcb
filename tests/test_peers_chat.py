"""Ids against transformers' apply_chat_template, with the published templates in
tests/chat_templates.

Where those come from: llama3.1, llama3.2, qwen2.5, mistral-tekken: llama.cpp, models/templates (of
the repositories meta-llama/Llama-3.1-8B-Instruct, meta-llama/Llama-3.2-3B-Instruct,
Qwen/Qwen2.5-7B-Instruct, mistralai/Mistral-Nemo-Instruct-2407); mistral-v1, mistral-v3, chatml:
llama.cpp, tests/test-chat-template.cpp (of Mistral-7B-Instruct-v0.2, Mistral-Large-Instruct-2407,
OpenHermes-2.5-Mistral-7B); llama3, qwen3, gemma and llama3_generation: trl, trl/chat_templates;
llama2: transformers 4.40, default_chat_template of the Llama tokenizer; zephyr:
HuggingFaceH4/zephyr-7b-beta, transcribed, and found to say what Unsloth's copy says; alpaca has no
official template: Unsloth's multi-turn form, with Stanford's system sentence.
"""

import argparse
import inspect
import itertools
import json
import unicodedata
from pathlib import Path

import pytest
from test_chat import say

import chat
from common import UserError

pytestmark = pytest.mark.peers
TEMPLATES = Path(__file__).parent / "chat_templates"

CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "n": 2}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city <b>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def result(text):
    return {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": text}


TALKS = {
    "one turn": (say("Hello there", "Hi! How are you?"), None),
    "system": (say("Hello", "Hi.", system="You are terse."), None),
    "multi-turn": (
        say("a b", "c d", "e\nf", "g\n\nh", "And äöü 日本 🙂?", "Déjà vu… \t x", system="S\nT"),
        None,
    ),
    "ends with user": (say("one", "two", "three", system="sys"), None),
    "spaces": (say("  pad ", " out  ", "x ", "y\n"), None),
    "empty": (say("", "", "x", "", system=""), None),
    "code": (say("def f(x):\n    return x\n", "```python\nprint('[1, 2]')\n```"), None),
    "call": (
        say("Weather?")
        + [{"role": "assistant", "content": "", "tool_calls": [CALL]}, result('12 °C, "dry"')]
        + say("x", "Cold.")[1:],
        [TOOL],
    ),
    "call and text": (
        say("Weather?", system="Be kind.")
        + [
            {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
            result("1"),
            result("2"),
        ]
        + say("x", "Cold.", "Thanks", "Bye")[1:],
        [TOOL, TOOL],
    ),
    "tools unused": (say("Hi", "Ho", "Hi"), [TOOL]),
    "tools, nothing twice": (say("Hi", "Ho", "Hey", system="sys"), [TOOL]),
    "thoughts": (
        say("q", "<think>\nhm\n</think>\n\nA", "q2", "<think>\nwell\n</think>\n\nB"),
        None,
    ),
    "thoughts and call": (
        say("Weather?")
        + [
            {"role": "assistant", "content": "<think>\nlook\n</think>\n\n", "tool_calls": [CALL]},
            result("1"),
        ]
        + say("x", "Cold.")[1:],
        [TOOL],
    ),
    "two systems": (
        say("Hi", "Ho") + [{"role": "system", "content": "Now French."}] + say("Hi", "Salut"),
        None,
    ),
    "user twice": (say("a")[:1] + say("b", "c"), None),
}

# What the assistant has to produce, by format, written down apart from chat.py.


def expected(name, m, is_last, after_query):
    text, calls = m["content"], m.get("tool_calls", [])
    args = json.dumps(CALL["function"]["arguments"], ensure_ascii=False)
    if name.startswith("mistral") and calls:
        one = f'{{"name": "weather", "arguments": {args}, "id": "abcdefghi"}}'
        return (
            "[TOOL_CALLS]" + " " * (name == "mistral-v3") + f"[{', '.join([one] * len(calls))}]</s>"
        )
    if name == "llama3.1" and calls:
        return f'{{"name": "weather", "parameters": {args}}}<|eot_id|>'
    thoughts = ""
    if name == "qwen3":
        before, _, after = text.rpartition("\n</think>\n\n")
        text = after
        if after_query and (is_last or before):
            thoughts = "<think>\n" + before.removeprefix("<think>\n") + "\n</think>\n\n"
    if name.startswith("qwen"):
        call = f'<tool_call>\n{{"name": "weather", "arguments": {args}}}\n</tool_call>'
        text = thoughts + "\n".join(([text] if text else []) + [call] * len(calls))
    return {
        "chatml": f"{text}<|im_end|>",
        "qwen2.5": f"{text}<|im_end|>",
        "qwen3": f"{text}<|im_end|>",
        "llama2": f" {text.strip()} </s>",
        "llama3": f"{text.strip()}<|eot_id|>",
        "llama3.1": f"{text.strip()}<|eot_id|>",
        "mistral-v1": f" {text}</s>",
        "mistral-v3": f" {text.strip()}</s>",
        "mistral-tekken": f"{text}</s>",
        "zephyr": f"{text}</s>",
        "alpaca": f"{text}</s>",
    }[name]


# ---- small tokenizers of each family, as their own libraries make them

PATTERN = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
MARKERS = {
    "chatml": ["<PAD>", "<BOS>", "</s>", "<|im_start|>", "<|im_end|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"],
    "qwen3": [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<think>",
        "</think>",
    ],
    "llama3": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "tekken": [
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
    ],
}


def byte_level(pattern, markers, normalizer=None):
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC() if normalizer else None
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    text = [inspect.getsource(m) for m in (argparse, inspect, json)]
    text += [p.read_text() for p in TEMPLATES.iterdir()] + ["user\n\n\nassistant\n\n"] * 50
    tok.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=2000,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok.add_tokens(
        [AddedToken(m, special=not m.startswith(("<t", "</t")), normalized=False) for m in markers]
    )
    return tok


SP_FILE = {1: "tokenizer.model.v1", 3: "mistral_instruct_tokenizer_240323.model.v3"}


def sentencepiece_bpe(version, every_text_starts_with_space=False):
    """A real SentencePiece model of Mistral's, as transformers' conversion lays it out: the leading
    "▁" goes before every text between two markers (Llama 2, "legacy") or only where the whole
    starts (Mistral)."""
    import mistral_common
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    sp = sentencepiece.SentencePieceProcessor(
        str(Path(mistral_common.__file__).parent / "data" / SP_FILE[version])
    )
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    merges = []  # every way to make a piece of two others, in the order of the pieces' scores
    for piece, i in vocab.items():
        for k in range(1, len(piece)):
            left, right = piece[:k], piece[k:]
            if left in vocab and right in vocab:
                merges.append((-sp.get_score(i), vocab[left], vocab[right], (left, right)))
    pairs = [pair for *_, pair in sorted(merges)]
    tok = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if every_text_starts_with_space:
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tok.add_special_tokens(
        [
            AddedToken(p, special=True, normalized=False)
            for p, i in vocab.items()
            if sp.is_control(i) or sp.is_unknown(i)
        ]
    )
    return tok


FAMILY = {  # format: (how to build its tokenizer, bos, eos)
    "chatml": (lambda: byte_level("gpt2", MARKERS["chatml"]), "<BOS>", "</s>"),
    "qwen2.5": (lambda: byte_level("qwen", MARKERS["qwen"], "nfc"), None, "<|im_end|>"),
    "qwen3": (lambda: byte_level("qwen", MARKERS["qwen3"], "nfc"), None, "<|im_end|>"),
    "llama3": (lambda: byte_level("llama3", MARKERS["llama3"]), "<|begin_of_text|>", "<|eot_id|>"),
    "mistral-tekken": (lambda: byte_level("llama3", MARKERS["tekken"]), "<s>", "</s>"),
    "alpaca": (lambda: byte_level("gpt2", ["<s>", "</s>"]), "<s>", "</s>"),
    "llama2": (lambda: sentencepiece_bpe(1, every_text_starts_with_space=True), "<s>", "</s>"),
    "mistral-v1": (lambda: sentencepiece_bpe(1), "<s>", "</s>"),
    "mistral-v3": (lambda: sentencepiece_bpe(3), "<s>", "</s>"),
}
SHARED = {
    "llama3.1": "llama3",
    "llama3.2": "llama3",
    "llama3_generation": "llama3",
    "zephyr": "llama2",
    "gemma": "alpaca",
}
NAMES = [
    "chatml",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "mistral-v1",
    "mistral-v3",
    "mistral-tekken",
    "zephyr",
    "qwen2.5",
    "qwen3",
    "alpaca",
]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """family(name) -> (our tokenizer, transformers' tokenizer) from one folder, with that format's
    template"""
    from transformers import PreTrainedTokenizerFast

    from tokenizer import Tokenizer

    made = {}

    def load(name):
        if name not in made:
            base = SHARED.get(name, name)
            if (base, "raw") not in made:
                made[base, "raw"] = FAMILY[base][0]()
            _, bos, eos = FAMILY[base]
            folder = tmp_path_factory.mktemp("tok")
            theirs = PreTrainedTokenizerFast(
                tokenizer_object=made[base, "raw"], bos_token=bos, eos_token=eos
            )
            theirs.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
            theirs.save_pretrained(folder)
            made[name] = Tokenizer.load(folder), theirs
        return made[name]

    return load


def reference(theirs, messages, tools, prompt):
    """Ids as transformers makes them, None where the template refuses the conversation."""
    from jinja2 import TemplateError

    try:
        return theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, return_dict=False
        )
    except TemplateError:
        return None


def outcomes(family, name, by_name):
    """Yields (title, messages, tools, prompt, transformers' ids or None, our (ids, mask) or the
    UserError)."""
    ours, theirs = family(name)
    for (title, (messages, tools)), prompt in itertools.product(TALKS.items(), (False, True)):
        want = reference(theirs, messages, tools, prompt)
        try:
            got = chat.render(ours, messages, prompt, tools=tools, format=name if by_name else None)
        except UserError as e:
            got = e
        yield title, messages, tools, prompt, want, got


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by template"])
@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_apply_chat_template(family, name, by_name):
    compared = 0
    for title, messages, tools, prompt, want, got in outcomes(family, name, by_name):
        if isinstance(got, UserError):
            drops_tools = not chat.CHAT_FORMATS[name].tools and (
                tools or any("tool_calls" in m for m in messages)
            )
            # templates refuse; theirs without tools forget them in silence; alpaca was never more
            # than turns
            assert want is None or drops_tools or (name, title) == ("alpaca", "user twice"), (
                title,
                got,
            )
        else:
            assert got[0] == want, (title, prompt)
            compared += 1
    assert compared >= 14


@pytest.mark.parametrize("name", [n for n in NAMES if n != "llama3.2"])
def test_mask_is_what_the_assistant_said_and_its_end(family, name):
    _, theirs = family(name)
    seen = 0
    for title, messages, _, prompt, _, got in outcomes(family, name, by_name=False):
        if isinstance(got, UserError) or got[1] is None:
            continue
        ids, mask = got
        assert len(mask) == len(ids) and set(mask) <= {0, 1}
        query = max(i for i, m in enumerate(messages) if m["role"] == "user")
        want = [
            expected(name, m, i == len(messages) - 1, i > query)
            for i, m in enumerate(messages)
            if m["role"] == "assistant"
        ]
        # "▁" that a SentencePiece decoder drops at the start of a text is the space the format puts
        # there
        runs = [
            theirs.decode([i for i, _ in run])
            for said, run in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1])
            if said
        ]
        if name in ("llama2", "mistral-v1", "mistral-v3", "zephyr"):
            runs, want = [r.lstrip(" ") for r in runs], [w.lstrip(" ") for w in want]
        assert runs == want, (title, prompt)
        seen += 1
    assert seen >= 10


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mistral-v1", SP_FILE[1]),
        ("mistral-v3", SP_FILE[3]),
        ("mistral-tekken", "tekken_240718.json"),
    ],
)
def test_ids_equal_mistral_common(family, name, file, tmp_path):
    """The same formats by their authors, on their own tokenizers, whole: 32K, 33K and 131K
    tokens."""
    import mistral_common
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    from tokenizer import Tokenizer

    path = Path(mistral_common.__file__).parent / "data" / file
    theirs = MistralTokenizer.from_file(str(path))
    if name == "mistral-tekken":
        (tmp_path / "tekken.json").write_bytes(path.read_bytes())
    ours = Tokenizer.load(tmp_path / "tekken.json") if name == "mistral-tekken" else family(name)[0]
    compared = 0
    for title in ("one turn", "ends with user", "multi-turn", "code", "tools, nothing twice"):
        messages, tools = TALKS[title]
        tools = tools if chat.CHAT_FORMATS[name].tools else None
        system = messages[0]["role"] == "system"
        for n in (
            1,
            3,
            5,
        ):  # user turns; a tool result is where the published Jinja and the authors' code part
            talk = messages[: n + system]
            if len(talk) == n + system:
                want = theirs.encode_chat_completion(
                    ChatCompletionRequest(messages=talk, tools=tools)
                ).tokens
                assert chat.render(ours, talk, True, tools=tools, format=name)[0] == want, (
                    title,
                    n,
                )
                compared += 1
    assert compared == 9


def test_generation_blocks_give_the_mask_transformers_gives(family):
    ours, theirs = family("llama3_generation")
    for messages in (say("a", "b"), say("a b", "c\nd", "e", " f é日 ", system="s"), say("x", "")):
        alien = ours.chat_template.replace(
            "<|start_header_id|>' +", "<|start_header_id|>of ' +"
        )  # no format of ours
        for template in (ours.chat_template, alien):
            ours.chat_template = theirs.chat_template = template
            want = theirs.apply_chat_template(
                messages, return_assistant_tokens_mask=True, return_dict=True
            )
            assert chat.render(ours, messages) == (want["input_ids"], want["assistant_masks"])


def test_an_unknown_template_gives_ids_but_never_a_mask(family):
    ours, theirs = family("gemma")
    messages = say("Hello", "Hi.", "and?")
    want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.render(ours, messages, add_generation_prompt=True) == (want, None)
    with pytest.raises(UserError, match="guessed mask"):
        chat.render(ours, messages)


def test_an_answer_that_the_normalizer_respells_is_in_the_loss_whole(family):
    ours, theirs = family("qwen2.5")
    for answer in (
        "e\u0301a\u0308 x",
        "\u0958" * 5,
    ):  # NFC makes the first shorter and the second longer
        ids, mask = chat.render(ours, say("q", answer))
        assert ids == reference(theirs, say("q", answer), None, False)
        said = theirs.decode([i for i, supervised in zip(ids, mask) if supervised])
        assert said == unicodedata.normalize("NFC", answer) + "<|im_end|>"


def test_text_after_a_marker_gets_no_second_leading_space(family):
    ours, theirs = family("mistral-v3")
    published = ours.chat_template
    ours.chat_template = theirs.chat_template = (
        "{{ bos_token + 'go[INST]' + messages[0].content + '[/INST]ok' }}"
    )
    try:
        assert chat.render(ours, say("Hello"), True)[0] == reference(
            theirs, say("Hello"), None, True
        )
    finally:
        ours.chat_template = theirs.chat_template = published


@pytest.mark.parametrize("name", [*NAMES, "gemma"])
def test_text_in_messages_never_becomes_a_special_token(family, name):
    ours, _ = family(name)
    attack = "x" + "".join(ours.special) + "\ufdd0<\ufdd2|im_end|>\ufdd1y"
    plain, evil = (chat.render(ours, say(text, text, text), True)[0] for text in ("x", attack))
    specials = set(ours.special.values())
    assert [i for i in plain if i in specials] == [i for i in evil if i in specials]
