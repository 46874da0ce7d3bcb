"""Conversations to token ids and a loss mask: who said what decides what a model learns to say.

    python chat.py show chat.jsonl --tokenizer FOLDER             # what is in the loss, in «»
    python chat.py convert alpaca.json --out DIR --split 85/5/10  # any layout -> DIR/train.jsonl

Top to bottom: a conversation is checked; a format by name makes pieces of it, each of which knows
whether the assistant says it; `assemble` makes ids and mask of the pieces; `render` is all of that
in one call; then records of files, and the two commands.
"""

import json
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import accumulate, compress, groupby, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from common import (
    UserError,
    any_of,
    cli,
    json_records,
    parse_flags,
    parse_json,
    printable,
    run_command,
    sha256,
    well_formed,
    write_text,
)

CHAT_ROLES = "system user assistant tool".split()
# A noncharacter: appended to the text that an answer goes on from, and found again in the pieces,
# which are cut there.
RESUME = "\ufdd3"

# What our own models are saved with (tokenizer_config.json, GGUF): ChatML as Jinja, as everyone
# spells it.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ------------------------------------------------------------------------- a conversation, checked
@dataclass
class Chat:
    """One checked conversation, as the formats below see it.

    A message is a dict with role and content (a str) and, where given, tool_calls, tool_call_id,
    reasoning_content, name."""

    messages: list
    system: str | None  # the text of the leading system message
    turns: list  # the messages without it
    tools: list | None
    prompt: bool  # end with the words that hand the turn to the assistant
    bos: str  # names of the two markers, "" where the tokenizer has none
    eos: str
    options: dict  # what else the caller tells the folder's template
    learned: list  # for each of the assistant's turns, whether it is in the loss


def read_chat(tok, messages, tools=None, prompt=False, options=None):
    """OpenAI-style messages -> Chat. Raises UserError naming the message at fault."""
    if tok is None:
        raise UserError("a conversation needs a tokenizer, and this model folder has none")
    checked = read_messages(messages)
    learned = [m.pop("weight", 1) for m in checked if m["role"] == "assistant"]
    system, turns = None, checked
    if checked[0]["role"] == "system":
        system, turns = checked[0]["content"], checked[1:]
    bos, eos = ("" if i is None else tok.decode([i]) for i in (tok.bos_id, tok.eos_id))
    tools = read_tools(tools)
    return Chat(checked, system, turns, tools, prompt, bos, eos, options or {}, learned)


# The keys of a message. With a `weight` (or `train`, `loss`) of 0 a turn is not in the loss. `name`
# is for a folder's own template, `tool_call_id` for that and Mistral's formats; `id` and
# `annotations` say nothing to a model.
MESSAGE_KEYS = (
    "role from content value tool_calls reasoning_content reasoning weight train loss "
    "name tool_call_id id annotations"
).split()
KEY_NAMES = {
    "from": "role",
    "value": "content",
    "reasoning": "reasoning_content",
    "train": "weight",
    "loss": "weight",
}
ROLE_NAMES = {"human": "user", "gpt": "assistant", "developer": "system"}
# Keys whose value is a text, and the roles that have them.
TEXT_KEYS = {"reasoning_content": ["assistant"], "tool_call_id": ["tool"], "name": CHAT_ROLES}


def known_keys(what, value, keys):
    """An object without its nulls, which are as good as absent. UserError: it has another key."""
    if not isinstance(value, dict):
        raise UserError(f"{what} is a {type(value).__name__}, not an object")
    found = {key: each for key, each in value.items() if each is not None}
    unknown = [key for key in found if key not in keys]
    if unknown:
        raise UserError(f"{what} has the unknown key {quoted(unknown)}; known: {', '.join(keys)}")
    return found


def quoted(keys):
    """Keys that somebody else chose, as an error names them."""
    return ", ".join(repr(key)[:40] for key in list(keys)[:12])


def read_messages(messages):
    """Messages as people write them -> the same as read_message makes them."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError("a conversation is a non-empty list of {role, content} messages")
    return [read_message(i, message) for i, message in enumerate(messages)]


def read_message(i, message):
    """Message number i -> the same, checked: role and content (a str), arguments of calls a dict,
    and weight, which is 0 if the assistant says it and it is not in the loss."""
    fields = {}
    for key, value in known_keys(f"message {i}", message, MESSAGE_KEYS).items():
        key = KEY_NAMES.get(key, key)
        if fields.setdefault(key, value) != value:
            raise UserError(f"message {i} says twice what its {key} is")
    role = fields.get("role")
    role = ROLE_NAMES.get(str(role), role)
    if role not in CHAT_ROLES:
        raise UserError(f"message {i}: unknown role {role!r}; roles are {', '.join(CHAT_ROLES)}")
    what = f"message {i} ({role})"
    speaks = role == "assistant"
    calls = read_calls(what, fields.pop("tool_calls", []))
    may_lack_text = calls or "reasoning_content" in fields
    text = read_text_parts(what, fields.get("content", "" if may_lack_text else None))
    checked = {"role": role, "content": text}
    if calls:
        if not speaks:
            raise UserError(f"{what}: only the assistant makes tool_calls")
        checked["tool_calls"] = calls
    for key, roles in TEXT_KEYS.items():
        if key in fields:
            if role not in roles or not isinstance(fields[key], str):
                raise UserError(f"{what}: {key} must be a text, of role {' or '.join(roles)}")
            checked[key] = fields[key]
    weight = fields.get("weight", speaks)
    if weight not in (0, 1):  # True and 1.0 are 1
        raise UserError(f"{what}: weight is {weight!r}, which is neither yes nor no: use 1 or 0")
    if weight and not speaks:
        raise UserError(f"{what}: only the assistant's turns are learned")
    if speaks and not weight:
        checked["weight"] = 0
    return checked


def read_text_parts(what, content):
    """A message's content, a text or a list of text parts -> str."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{what}: content must be a string or a list of text parts")
    text = ""
    for part in content:
        # cache_control is a hint to other servers
        part = known_keys(f"{what}: a part", part, ("type", "text", "cache_control"))
        kind, words = part.get("type", "text"), part.get("text")
        if kind != "text" or not isinstance(words, str):
            raise UserError(f"{what}: a part of type {kind!r}: only {{type: text, text}} is read")
        text += words
    return text


def read_calls(what, calls):
    """A message's tool calls as the templates want them: arguments are a dict (OpenAI sends a
    string of JSON, and "" for none)."""
    what = f"{what}: a tool call"
    checked = []
    for call in as_list(calls):
        call = known_keys(what, call, ("function", "id", "type", "index"))
        function = known_keys(f"{what}'s function", call.get("function"), ("name", "arguments"))
        name, arguments = function.get("name"), json_of(function.get("arguments", ""), "{}")
        right = isinstance(name, str) and isinstance(arguments, dict)
        if not right or call.get("type", "function") != "function":
            raise UserError(f"{what} is {{function: {{name, arguments}}}}, arguments a JSON object")
        checked.append({**call, "function": {"name": name, "arguments": arguments}})
    return checked


def read_tools(tools):
    """The functions on offer, a list or its JSON -> list, None without any."""
    tools = as_list(json_of(tools, "[]"))
    for tool in tools:
        tool = known_keys("a tool", tool, ("type", "function"))
        if tool.get("type", "function") != "function" or not isinstance(tool.get("function"), dict):
            raise UserError(
                "tools must be a list of "
                "{type: function, function: {name, description, parameters}}"
            )
    return tools or None


def json_of(value, empty):
    """What a string says as JSON, `empty` where it is blank; any other value as it is."""
    if isinstance(value, str):
        found, fault = parse_json(well_formed(value.strip() or empty).encode())
        return value if fault else found
    return value


def as_list(value):
    """A list as it is, what is no list as the only one of its list, None as none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------ the formats: a conversation to pieces
# Each format walks the messages once and yields pieces; a str among them is words of the template
# that nobody says, `<|im_start|>` in it the marker. "said" begins where the generation prompt
# ends, so the mask is exactly what the model will have to produce: its words, the spaces its format
# puts round them, the end.
class Piece(NamedTuple):
    text: str
    said: bool | None = False  # the assistant has to produce this: it is in the loss; None: unknown
    template: bool = True  # the template's own words, in which a marker's name means its id


def content(text, said=False):
    """What a person or a model wrote: `<|im_start|>` in here is text, whoever typed it."""
    return Piece(text, said, False)


def turn(head, text, end, said=False, tail=""):
    """A text between the template's words, its end and what follows a message. What the assistant
    says includes its end."""
    yield head
    yield content(text, said)
    yield Piece(end, said)
    yield tail


def chatml(chat, head="<|im_start|>{}\n", end="<|im_end|>"):
    for m in chat.messages:
        said = m["role"] == "assistant"
        yield from turn(head.format(m["role"]), m["content"], end, said, "\n")
    if chat.prompt:
        yield head.format("assistant")


def zephyr(chat):
    """Its <|user|> is plain text, as are [INST] and <<SYS>> below, and so a user can type those."""
    return chatml(chat, "<|{}|>\n", chat.eos)


def alpaca(chat):
    """github.com/tatsu-lab/stanford_alpaca, its one turn repeated as LLaMA-Factory repeats it."""
    task = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )
    yield from turn(chat.bos, task if chat.system is None else chat.system, "\n\n")
    for m in chat.turns:
        if m["role"] == "user":
            yield from turn("### Instruction:\n", m["content"], "\n\n")
        else:
            yield from turn("### Response:\n", m["content"], chat.eos, True, "\n\n")
    if chat.prompt:
        yield "### Response:\n"


def llama2(chat):
    for i, m in enumerate(chat.turns):
        text = m["content"]
        if i == 0 and chat.system is not None:
            text = f"<<SYS>>\n{chat.system}\n<</SYS>>\n\n{text}"
        if m["role"] == "user":
            yield from turn(chat.bos + "[INST] ", text.strip(), " [/INST]")
        else:
            yield from turn("", f" {text.strip()} ", chat.eos, True)


def llama3(chat, date=""):
    """Llama 3. With a date, as strftime takes it, 3.1 and later: these always have a system turn,
    put the tools into the first user turn, and know calls and results."""
    head, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
    messages = chat.messages
    yield chat.bos
    if date:
        messages = chat.turns
        today = datetime.now().strftime(date)
        environment = "Environment: ipython\n" if chat.tools else ""
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {today}\n\n"
        before = head.format("system") + environment + dates
        yield from turn(before, (chat.system or "").strip(), end)
    if chat.tools:
        asked, *messages = messages or [{"role": None}]
        if asked["role"] != "user":
            raise UserError("llama3.1 puts the tools in the first message, which is not the user's")
        task = (
            "Given the following functions, please respond with a JSON for a function call "
            "with its proper arguments that best answers the given prompt.\n\n"
            'Respond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}.Do not use variables.\n\n"
        )
        tools = "".join(json_text(tool, indent=4) + "\n\n" for tool in chat.tools)
        text = tools + asked["content"].strip()
        yield from turn(head.format("user") + task, text, end)
    for m in messages:
        role, text = m["role"], m["content"].strip()
        calls = m.get("tool_calls", [])
        if len(calls) > 1:
            raise UserError(f"llama3.1 makes one tool call at a time, not {len(calls)}")
        if role == "tool":
            role, text = "ipython", json_text(m["content"])
        elif calls:
            text = call_text(calls[0], "parameters")
        yield from turn(head.format(role), text, end, role == "assistant")
    if chat.prompt:
        yield head.format("assistant")


def call_text(call, arguments="arguments"):
    """A tool call as Llama's and Qwen's templates write it, the name unescaped."""
    function = call["function"]
    return f'{{"name": "{function["name"]}", "{arguments}": {json_text(function["arguments"])}}}'


def mistral(chat, space=" ", lead="", system_at=-1, trim=False):
    """v1's markers are plain text, led by a space; v3's tokens, with SentencePiece's spaces;
    tekken's without.

    space: what follows a marker. lead: what stands before [INST] and [/INST]. system_at: the number
    of the turn that the system prompt opens (v3 loses it if the assistant spoke last). trim:
    whether answers lose outer spaces. These, and that the tools stand before every message that
    equals the last user's, are as published."""
    yield chat.bos
    users = [m for m in chat.turns if m["role"] == "user"]
    for m in chat.turns:
        text = m["content"]
        if m["role"] == "user":
            if chat.tools and m == users[-1]:
                tools = ", ".join(mistral_tool(tool["function"]) for tool in chat.tools)
                yield from turn("[AVAILABLE_TOOLS]" + space, f"[{tools}]", "[/AVAILABLE_TOOLS]")
            if chat.system is not None and m is chat.turns[system_at]:
                text = f"{chat.system}\n\n{text}"
            yield from turn(f"{lead}[INST]{space}", text, f"{lead}[/INST]")
        elif m["role"] == "tool":
            result = f'{{"content": {text}, "call_id": "{mistral_id(m.get("tool_call_id"))}"}}'
            yield from turn("[TOOL_RESULTS]" + space, result, "[/TOOL_RESULTS]")
        else:
            if "tool_calls" in m:
                yield Piece("[TOOL_CALLS]", True)
                text = "[" + ", ".join(map(mistral_call, m["tool_calls"])) + "]"
            text = text.strip() if trim else text
            yield from turn("", space + text, chat.eos, True)


def mistral_tool(function):
    """A tool as the published template writes it by hand: strings unescaped, no "return"."""
    fields = []
    for name, value in function.items():
        if name != "return":
            value = f'"{value}"' if isinstance(value, str) else json_text(value)
            fields.append(f'"{name}": {value}')
    return '{"type": "function", "function": {' + ", ".join(fields) + "}}"


def mistral_call(call):
    function = json_text(call["function"])
    return f'{function[:-1]}, "id": "{mistral_id(call.get("id"))}"}}'


def mistral_id(call_id):
    if not isinstance(call_id, str) or len(call_id) != 9:
        raise UserError(f"Mistral's tool call ids are 9 characters long, not {call_id!r}")
    return call_id


def qwen(chat, default_system=None, think=False):
    """Qwen 2.5 (with its default system prompt), Qwen 3 (with its thoughts): ChatML plus tools."""
    yield from qwen_system(chat, default_system if chat.system is None else chat.system)
    last = len(chat.turns) - 1
    disguised = re.compile("(?s)<tool_response>.*</tool_response>").fullmatch  # a tool's result
    asked = last
    for i, m in enumerate(chat.turns):
        if m["role"] == "user" and not disguised(m["content"]):
            asked = i
    for role, run in groupby(enumerate(chat.turns), lambda numbered: numbered[1]["role"]):
        if role == "tool":  # results that follow one another share one user turn
            yield "<|im_start|>user"
            for _, m in run:
                yield from turn("\n<tool_response>\n", m["content"], "\n</tool_response>")
            yield "<|im_end|>\n"
            continue
        for i, m in run:
            if role == "assistant":
                # Qwen 3 drops the thoughts of turns before the last question, and shows a last
                # turn that it has none.
                thoughts, text = split_thoughts(m) if think else ("", m["content"])
                shown = think and i > asked and (thoughts or i == last)
                yield from qwen_answer(m, thoughts if shown else None, text)
            else:
                yield from turn(f"<|im_start|>{role}\n", m["content"], "<|im_end|>\n")
    if chat.prompt:
        yield "<|im_start|>assistant\n"


def qwen_answer(m, thoughts, text):
    """An assistant's turn: its thoughts unless they are None, its text, its tool calls."""
    yield "<|im_start|>assistant\n"
    if thoughts is not None:
        yield Piece("<think>", True)
        yield content("\n" + thoughts.strip("\n") + "\n", True)
        yield Piece("</think>\n\n", True)
        text = text.lstrip("\n")
    yield content(text, True)
    for n, call in enumerate(m.get("tool_calls", [])):
        yield Piece("\n<tool_call>" if n or text else "<tool_call>", True)
        yield content(f"\n{call_text(call)}\n", True)
        yield Piece("</tool_call>", True)
    yield Piece("<|im_end|>", True)
    yield "\n"


def qwen_system(chat, system):
    if system is None and not chat.tools:
        return
    yield "<|im_start|>system\n"
    yield content(system or "")
    if chat.tools:
        if system is not None:
            yield "\n\n"
        yield (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        )
        yield content("".join("\n" + json_text(tool) for tool in chat.tools))
        yield (
            "\n</tools>\n\nFor each function call, return a json object with function name and "
            "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )
    yield "<|im_end|>\n"


def split_thoughts(m):
    """-> (thoughts, answer), from reasoning_content or <think>...</think>, as Qwen 3 does it."""
    thoughts, text = m.get("reasoning_content", ""), m["content"]
    if "reasoning_content" not in m and "</think>" in text:
        before, *_, after = text.split("</think>")
        thoughts, text = before.split("<think>")[-1].strip("\n"), after.lstrip("\n")
    return thoughts, text


def json_text(value, **options):
    return json.dumps(value, ensure_ascii=False, **options)


class Format(NamedTuple):
    pieces: Callable  # Chat -> Iterator[Piece | str]
    # Must be single tokens, or the format would be spelled out as text. EOS is the tokenizer's own.
    markers: tuple = ("EOS",)
    tools: bool = False  # knows tools, calls and results
    alternates: bool = False  # one leading system message at most, then user, assistant, user, ...


IM = ("<|im_start|>", "<|im_end|>")
INST = ("[INST]", "[/INST]", "EOS")
LLAMA3_MARKERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

CHAT_FORMATS = {
    "chatml": Format(chatml, IM),
    "llama2": Format(llama2, alternates=True),
    "llama3": Format(llama3, LLAMA3_MARKERS),
    "llama3.1": Format(partial(llama3, date="26 Jul 2024"), LLAMA3_MARKERS, tools=True),
    "llama3.2": Format(partial(llama3, date="%d %b %Y"), LLAMA3_MARKERS, tools=True),
    "mistral-v1": Format(partial(mistral, lead=" ", system_at=0), alternates=True),
    "mistral-v3": Format(partial(mistral, trim=True), INST, tools=True, alternates=True),
    "mistral-tekken": Format(partial(mistral, space=""), INST, tools=True, alternates=True),
    "zephyr": Format(zephyr),
    "qwen2.5": Format(partial(qwen, default_system=QWEN_SYSTEM), IM, tools=True),
    "qwen3": Format(partial(qwen, think=True), IM, tools=True),
    "alpaca": Format(alpaca, alternates=True),
}


def named_pieces(name, tok, chat):
    """The conversation's pieces in a format by name; UserError for what the format cannot say."""
    if name not in CHAT_FORMATS:
        raise UserError(f"unknown chat format {name!r}; there are {', '.join(CHAT_FORMATS)}")
    form = CHAT_FORMATS[name]
    own = {"EOS": chat.eos}
    missing = [marker for marker in form.markers if own.get(marker, marker) not in tok.special]
    if missing:
        raise UserError(
            f"chat format {name} needs the special token {', '.join(missing)}, "
            "which this tokenizer does not have"
        )
    calls = [m for m in chat.messages if m["role"] == "tool" or "tool_calls" in m]
    if (chat.tools or calls) and not form.tools:
        raise UserError(f"chat format {name} has no tools, nor their calls and results")
    if form.alternates:
        roles = [m["role"] for m in chat.turns if m["role"] != "tool" and "tool_calls" not in m]
        taking_turns = ["user", "assistant"] * len(roles)
        if not roles or roles != taking_turns[: len(roles)]:
            raise UserError(
                f"chat format {name}: after a system prompt user and assistant take turns, "
                f"not {roles}"
            )
    return [Piece(each) if isinstance(each, str) else each for each in form.pieces(chat)]


# ------------------------------------------------------------------------- pieces to ids and mask
def split_at_markers(tok, pieces):
    """Yield (said, text, id of the marker or None): only the template's own words name a marker.

    Here a user's text becomes safe: what it spells stays text (cut there too, to be joined by
    encode_run)."""
    split = any_of(tuple(tok.special)).split
    for piece in pieces:
        for text in filter(None, split(piece.text)):
            yield piece.said, text, tok.special.get(text) if piece.template else None


def assemble(tok, pieces, must_know):
    """Pieces -> (ids, mask), two lists of one length.

    A marker becomes its id. What stands between two markers is encoded as one string, because BPE
    merges across the seams of pieces and models are trained on the merged form. Where the mask
    would be a guess it is None, or UserError if one must know it."""
    ids, mask = [], []
    for is_text, run in groupby(split_at_markers(tok, pieces), lambda part: part[2] is None):
        said, texts, run_ids = zip(*run)
        if is_text:
            run_ids, said = encode_run(tok, texts, said, "later" if ids else "first")
        ids += run_ids
        mask += said
    if None not in mask:
        return ids, mask
    if must_know:
        raise UserError(
            "cannot tell which tokens the assistant said, and a guessed mask would train the wrong "
            "thing: the chat_template is none we know and has no {% generation %}, or this "
            "tokenizer does not spell the text it was given; put {% generation %} into the template"
        )
    return ids, None


def encode_run(tok, texts, said, where):
    """Texts without a marker, and whether each is said -> (ids of all of it as one text, mask).

    A token across the border is not in the loss: the prompt already ends inside it, so the model
    never has to produce it. where: "first" if the conversation starts here, which SentencePiece may
    mark with a space, else "later". The mask is of Nones if nobody knows what is said, or if the
    tokens do not spell the text, so that where a part ends would be a guess."""
    texts = [well_formed(text).encode() for text in texts]
    data = b"".join(texts)
    ids = tok.encode_bytes(data, where)
    unknown = [None] * len(ids)
    if None in said:
        return ids, unknown
    # For each byte of the text whether the assistant said it.
    flags = b"".join(bytes([own]) * len(text) for own, text in zip(said, texts))
    # The text up to the last change of who speaks. Behind it all bytes have one flag, and so a
    # normalizer (NFC) may respell what is there.
    mixed = data[: len(flags.rstrip(flags[-1:]))]
    if not mixed:  # all of it was said, or nothing
        return ids, [flags[0]] * len(ids)
    spelled = [tok.token_bytes(i) for i in ids]
    whole = b"".join(spelled)
    if not whole.startswith(mixed):
        if not whole.startswith(b" " + mixed):
            return ids, unknown
        flags = flags[:1] + flags  # SentencePiece's space
    flags = flags.ljust(len(whole), flags[-1:])
    ends = accumulate(map(len, spelled), initial=0)
    # A token is in the loss only if the assistant said all of its bytes.
    return ids, [all(flags[begin:end]) for begin, end in pairwise(ends)]


# --------------------------------------------- what others call: render to answer, example to train
def pieces_of(tok, chat, format=None):
    """The conversation's pieces in the format by name, the folder's own, or ChatML."""
    template = tok.chat_template
    if format or template in (None, "", CHATML_TEMPLATE):
        if chat.options:
            raise UserError(f"this chat format does not take {', '.join(chat.options)}")
        pieces = named_pieces(format or "chatml", tok, chat)
    else:
        from formats.templates import pieces_of_template

        pieces = pieces_of_template(tok, chat, template)
    if chat.prompt or all(chat.learned):  # a prompt is answered, and nothing of it is learned
        return pieces
    return out_of_the_loss(pieces, chat.learned)


def out_of_the_loss(pieces, learned):
    """The pieces, of which the assistant's n-th turn is only said if learned[n].

    No format has to know: between two turns of the assistant there is always something else."""
    pieces = [piece for piece in pieces if piece.text]
    spoken = 0  # turns of the assistant so far
    kept = []
    for said, run in groupby(pieces, key=lambda piece: piece.said):
        if said:
            said = spoken < len(learned) and learned[spoken]
            spoken += 1
        kept += [piece._replace(said=said) for piece in run]
    if spoken != len(learned):
        raise UserError(
            "this format does not tell turns apart, so none of weight 0 can be left out"
        )
    return kept


def render(
    tok, messages, add_generation_prompt=False, tools=None, format=None, options=None, resume=False
):
    """OpenAI-style messages -> (ids, mask), two lists of one length.

    mask is 1 for what the assistant has to produce: what it said and its end token. Text in
    messages never becomes a special token.

    The format is `format`, a name in CHAT_FORMATS; else what the folder's chat_template does; else
    ChatML. Where who-said-what cannot be known, mask is None with add_generation_prompt (to be
    answered, not trained on) and UserError without it.

    options: what the folder's template takes besides, as enable_thinking. resume: the ids end with
    the last message's text, and so an answer goes on from there."""
    if resume and add_generation_prompt:
        raise UserError("a generation prompt begins an answer, and so none can be continued")
    chat = read_chat(tok, messages, tools, add_generation_prompt, options)
    pieces = pieces_to_resume(tok, chat, format) if resume else pieces_of(tok, chat, format)
    return assemble(tok, pieces, must_know=not (add_generation_prompt or resume))


def pieces_to_resume(tok, chat, format):
    """The pieces up to the end of the last message's text."""
    last = chat.messages[-1]
    if last["role"] != "assistant" or "tool_calls" in last:
        raise UserError("only an assistant's text can be continued, and the last message is none")
    last["content"] += RESUME  # in chat.turns, too, which has the same dicts
    pieces = pieces_of(tok, chat, format)
    while pieces:
        piece = pieces.pop()
        text, found, _ = piece.text.rpartition(RESUME)
        if found:
            return [*pieces, piece._replace(text=text)]
    raise UserError("this chat format does not show the last message")


def training_ids(tok, chat, format=None):
    """A Chat -> (ids, mask) to train on. UserError if the format loses some of it."""
    pieces = pieces_of(tok, chat, format)
    wanted = [("system prompt", chat.system or "")]
    thoughts = []
    for m in chat.messages:
        if m["role"] == "user":
            thoughts = []  # formats drop those before the last question
        if m["role"] == "assistant":
            wanted.append(("answer", m["content"].rpartition("</think>")[2]))
            thoughts.append(("reasoning_content", m.get("reasoning_content", "")))
    spelled = "".join(piece.text for piece in pieces)
    for what, text in wanted + thoughts:
        if text.strip() not in spelled:
            raise UserError(
                f"the format loses the {what} here: put it where the format has a place"
            )
    return assemble(tok, pieces, True)


def example(tok, messages, tools=None, format=None):
    """One conversation -> (ids, mask) to train on. UserError if it teaches nothing, or wrongly."""
    chat = read_chat(tok, messages, tools)
    if not chat.learned:
        raise UserError("no assistant turn")
    last = chat.messages[-1]["role"]
    if last != "assistant":
        raise UserError(f"ends with a {last} turn")
    for m in chat.messages:
        empty = not m["content"].strip() and "tool_calls" not in m
        if empty and m["role"] in ("user", "assistant"):
            raise UserError(f"empty {m['role']} turn")
    ids, mask = training_ids(tok, chat, format)
    if not any(mask):
        raise UserError("no turn is in the loss")
    return ids, mask


def examples(tok, name, records, counts, most=None):
    """Yield example() of each (record, messages, tools), of at most `most` tokens.

    What is cut or left out is counted in `counts` by reason. A conversation that is too long keeps
    its start, and so loses the end of an answer that was not reached; one whose prompt alone is too
    long teaches nothing. UserError, with the source's name, at the end if none was good."""
    read = good = 0
    for _, messages, tools in records:
        read += 1
        try:
            ids, mask = example(tok, messages, tools)
            if not any(mask[1:most]):  # the first token is predicted from nothing
                raise UserError("the prompt alone fills the context")
        except UserError as reason:
            counts[f"left out: {reason}"] += 1
            continue
        if most and len(ids) > most:
            counts["cut to the context"] += 1
        good += 1
        yield ids[:most], mask[:most]
    if not good:
        reasons = "; ".join(f"{times:,} x {why}" for why, times in counts.most_common(3))
        raise UserError(
            f"{name}: nothing to train on in {read:,} conversations ({reasons or 'it is empty'})"
        )


def stop_id(tok, format=None):
    """The id that ends an assistant's turn: what the engine stops at. None where a template decides
    it that nobody knows, or whose {% generation %} ends in a text or is empty."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        *_, end = compress(*render(tok, talk, format=format))
    except ValueError:  # also a UserError
        return None
    return end if end in tok.special.values() else None


# -------------------------------------------------------------------------------- records of files
LAYOUTS = (
    "{messages}, ShareGPT {conversations: [{from, value}]}, Alpaca {instruction, input, output}, "
    "{prompt, completion}, {prompt, response}, {question, answer}; with system, history, tools"
)
TALKS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "completion", "response", "answer")
# Keys of a record that say nothing to a model. To an exam family and checks say something.
SAYS_NOTHING = (
    "id idx index uuid prompt_id hash source dataset meta metadata category "
    "language url license timestamp "
    "family kind answer checks"
).split()


def read_each(path, read, ignore=""):
    """Yield read(record) for each of a file; UserError names file, line and what is wrong.

    ignore: "KEY,KEY", which are left out of records and messages."""
    ignored = set(filter(None, ignore.split(",")))
    for where, record in json_records(path):
        record = without(record, ignored)
        try:
            found = read(record)
        except UserError as why:
            hint = "; --ignore-keys KEY,KEY leaves keys out" if "unknown key" in str(why) else ""
            raise UserError(f"{where}: {why}{hint}") from None
        yield found


def without(value, keys):
    """A JSON value without these keys, at any depth but in tools and arguments, which are data."""
    if isinstance(value, list):
        return [without(each, keys) for each in value]
    if not isinstance(value, dict):
        return value
    left = {}
    for key, each in value.items():
        if key not in keys:
            left[key] = each if key in ("tools", "arguments") else without(each, keys)
    return left


def read_records(path, ignore=""):
    """as_messages of each record of a file, in any of the LAYOUTS."""
    return read_each(path, as_messages, ignore)


def as_messages(record):
    """One record -> (what else it says, messages, tools or None). UserError names a key of which
    nothing is known."""
    fields = known_keys("the record", record, record)  # its own keys: all are known so far
    messages, tools = take_messages(fields)
    return known_keys("beside messages the record", fields, SAYS_NOTHING), messages, tools


def take_messages(fields):
    """Take its conversation out of a record's fields -> (messages, tools or None)."""

    def take(*names):
        for name in names:
            if name in fields:
                return fields.pop(name)

    keys = quoted(fields)
    system = take("system", "system_prompt")
    talk = [] if system in (None, "") else as_turns("system", system)
    for past in as_list(take("history")):
        match past:
            case [asked, answer]:
                talk = talk + as_turns("user", asked) + as_turns("assistant", answer)
            case _:
                talk = [*talk, past]
    given, repeated = take(*TALKS), []
    if given is None:
        asked = take(*QUESTIONS)
        answer = take(*ANSWERS)
        context = take("input", "context")
        if asked is None or answer is None:
            raise UserError(f"its keys are {keys or 'none'}; known layouts: {LAYOUTS}")
        if "answer" in fields:  # which says nothing beside a whole conversation alone
            raise UserError("beside another answer the record has the unknown key 'answer'")
        if context not in (None, ""):
            if not isinstance(asked, str) or not isinstance(context, str):
                raise UserError("an input or context goes with a text that asks")
            asked = f"{asked}\n\n### Input:\n{context}" if asked else context
        given = as_turns("user", asked) + as_turns("assistant", answer)
    elif "prompt" in fields:
        repeated = read_messages(as_turns("user", take("prompt")))
    messages = read_messages(given)
    before = read_messages(talk) if talk else []
    if system and messages[0]["role"] == "system":
        if messages.pop(0) != before[0]:
            raise UserError("it has two system prompts, which differ")
    messages = before + messages
    if not all(m in messages for m in repeated):
        raise UserError("its prompt is no part of its conversation")
    return messages, read_tools(take("tools"))


def as_turns(role, said):
    """A text as one message of the role; a list is messages already, an object one."""
    return as_list(said) if isinstance(said, (list, dict)) else [{"role": role, "content": said}]


def asked_in(messages):
    """What comes before the last answer: all of it where a conversation ends with the user."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def place_of(messages):
    """A number in [0, 1) that hangs on these messages alone."""
    return int(sha256(json_text(messages).encode())[:13], 16) / 16**13


def write_records(path, rows):
    """Rows -> JSONL, all or nothing. What JSON has not, as a date out of parquet, becomes text."""
    write_text(path, "".join(json_text(row, default=str) + "\n" for row in rows))


# ------------------------------------------------------------------------------------ the commands
def paint(tok, ids, mask):
    """The conversation as text; what is in the loss stands in «»."""
    text = ""
    for said, run in groupby(zip(ids, mask), lambda pair: pair[1]):
        part = printable(tok.decode([i for i, _ in run]))
        text += f"«{part}»" if said else part
    return text


@dataclass
class PaintArgs:
    file: str = ""  # {messages}, ShareGPT, Alpaca, {prompt, completion}, {question, answer}, ...
    tokenizer: str = "runs/tokenizer"  # a model folder or tokenizer file
    limit: int = 10  # how many conversations
    ignore_keys: str = ""  # KEY,KEY: leave these keys out


def paint_command(argv):
    """Print conversations as they are trained on, and the share that is in the loss."""
    from tokenizer import Tokenizer  # here, for the formats above need no tokenizer of ours

    args = PaintArgs(**parse_flags(PaintArgs, paint_command.__doc__, argv, ("file",)))
    if args.limit < 1:
        raise UserError(f"--limit {args.limit}: show at least 1 conversation")
    tok = Tokenizer.load(args.tokenizer)
    counts = Counter()
    records = islice(read_records(args.file, args.ignore_keys), args.limit)
    for n, (ids, mask) in enumerate(examples(tok, args.file, records, counts), 1):
        print(paint(tok, ids, mask))
        print(f"--- {n}: {len(ids)} tokens, {sum(mask)} supervised ({sum(mask) / len(ids):.1%})\n")
    for what, times in counts.most_common():
        print(f"{times} {what}")


@dataclass
class ConvertArgs:
    files: tuple = ()  # {messages}, ShareGPT, Alpaca, {prompt, completion}, ...: any layout
    out: str = "data/chats"  # the folder to write
    split: str = "85/5/10"  # shares of train, val, test
    ignore_keys: str = ""  # KEY,KEY: leave these keys out


def convert_command(argv):
    """Records of any layout -> DIR/{train,val,test}.jsonl of {messages}.

    What comes before the last answer decides, by its hash, where a record goes: the same question
    is never in two splits, and more records move none."""
    args = ConvertArgs(**parse_flags(ConvertArgs, convert_command.__doc__, argv, ("files",)))
    shares = re.fullmatch(r"(\d+)/(\d+)/(\d+)", args.split)
    bounds = list(accumulate(map(int, shares.groups()))) if shares else [0]
    if not bounds[-1]:
        raise UserError(f"--split {args.split}: give the shares of train, val, test, as 85/5/10")
    splits = [], [], []
    for path in args.files:
        for rest, messages, tools in read_records(path, args.ignore_keys):
            if tools:
                rest["tools"] = tools
            place = place_of(asked_in(messages)) * bounds[-1]
            splits[bisect(bounds, place)].append({"messages": messages, **rest})
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "val", "test"), splits):
        write_records(Path(args.out, f"{name}.jsonl"), rows)
    train, val, test = map(len, splits)
    print(f"{args.out}: {train:,} train, {val:,} val, {test:,} test conversations")


def main():
    run_command(__doc__, {"show": paint_command, "convert": convert_command})


if __name__ == "__main__":
    import chat  # the classes that other files know: those of a script are a second copy

    cli(chat.main)
