"""Conversations to token ids and a loss mask: who said what decides what a model learns to say.

    python chat.py show chat.jsonl --tokenizer FOLDER             # what is in the loss, coloured
    python chat.py convert alpaca.json --out DIR --split 85/5/10  # any layout -> DIR/train.jsonl

Top to bottom: a conversation is checked; a format by name makes pieces of it, each of which knows
whether the assistant says it; `assemble` makes ids and mask of the pieces; `render` is all of that
in one call; then records of files, and the two commands.
"""

import argparse
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from itertools import accumulate, groupby, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from common import UserError, cli, json_records, well_formed, write_atomic

CHAT_ROLES = ("system", "user", "assistant", "tool")

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


def read_chat(tok, messages, tools=None, prompt=False):
    """OpenAI-style messages -> Chat. Raises UserError naming the message at fault."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError("a conversation is a non-empty list of {role, content} messages")
    if tools and not (isinstance(tools, list) and all(map(is_tool, tools))):
        raise UserError(
            "tools must be a list of {type: function, function: {name, description, parameters}}"
        )
    checked = [read_message(i, message) for i, message in enumerate(messages)]
    system, turns = None, checked
    if checked[0]["role"] == "system":
        system, turns = checked[0]["content"], checked[1:]
    bos, eos = ("" if i is None else tok.decode([i]) for i in (tok.bos_id, tok.eos_id))
    return Chat(checked, system, turns, tools or None, prompt, bos, eos)


def is_tool(tool):
    return isinstance(tool, dict) and isinstance(tool.get("function"), dict)


def is_text_part(part):
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def read_message(i, message):
    """Message number i -> the same, checked: text is one string, arguments of calls are dicts."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in CHAT_ROLES:
        raise UserError(f"message {i}: unknown role {role!r}; roles are {', '.join(CHAT_ROLES)}")
    calls = message.get("tool_calls") or []
    calls = [read_call(i, call) for call in (calls if isinstance(calls, list) else [calls])]
    text = message.get("content")
    if text is None and calls:
        text = ""
    if isinstance(text, list) and all(map(is_text_part, text)):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise UserError(f"message {i} ({role}): content must be a string or a list of text parts")
    checked = {"role": role, "content": text}
    if calls:
        checked["tool_calls"] = calls
    for name in ("tool_call_id", "reasoning_content", "name"):
        if isinstance(message.get(name), str):
            checked[name] = message[name]
    return checked


def read_call(i, call):
    """A tool call as the templates want it: arguments a dict (OpenAI sends a string of JSON)."""
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = dict(json.loads(arguments) if isinstance(arguments, str) else arguments)
        return {**call, "function": {"name": str(name), "arguments": arguments}}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"message {i}: a tool call is {{function: {{name, arguments}}}}, "
            "arguments a JSON object"
        ) from None


# ------------------------------------------------------------ the formats: a conversation to pieces
# Each format walks the messages once and yields pieces. "said" begins where the generation prompt
# ends, so the mask is exactly what the model will have to produce: its words, the spaces its format
# puts round them, the end.
class Piece(NamedTuple):
    text: str
    said: bool = False  # the assistant has to produce this, so it is in the loss
    template: bool = True  # the template's own words, in which a marker's name means its id


words = Piece  # the template's own: `<|im_start|>` in here is the marker


def content(text, said=False):
    """What a person or a model wrote: `<|im_start|>` in here is text, whoever typed it."""
    return Piece(text, said, template=False)


def enclosed(before, text, after, said=False):
    """A text between the template's words. What the assistant says includes the words after it."""
    yield words(before)
    yield content(text, said)
    yield words(after, said)


def turn(head, message, end, tail=""):
    """One message: its head, its text, its end, and what the template puts between two messages."""
    said = message["role"] == "assistant"
    yield from enclosed(head, message["content"], end, said)
    yield words(tail)


def chatml(chat, head="<|im_start|>{}\n", end="<|im_end|>"):
    for m in chat.messages:
        yield from turn(head.format(m["role"]), m, end, "\n")
    if chat.prompt:
        yield words(head.format("assistant"))


def zephyr(chat):
    """Its <|user|> is plain text, as are [INST] and <<SYS>> below, and so a user can type those."""
    return chatml(chat, "<|{}|>\n", chat.eos)


def alpaca(chat):
    """github.com/tatsu-lab/stanford_alpaca, its one turn repeated as LLaMA-Factory repeats it."""
    task = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )
    yield from enclosed(chat.bos, task if chat.system is None else chat.system, "\n\n")
    for m in chat.turns:
        if m["role"] == "user":
            yield from turn("### Instruction:\n", m, "", "\n\n")
        else:
            yield from turn("### Response:\n", m, chat.eos, "\n\n")
    if chat.prompt:
        yield words("### Response:\n")


def llama2(chat):
    for i, m in enumerate(chat.turns):
        text = m["content"]
        if i == 0 and chat.system is not None:
            text = f"<<SYS>>\n{chat.system}\n<</SYS>>\n\n{text}"
        if m["role"] == "user":
            yield from enclosed(chat.bos + "[INST] ", text.strip(), " [/INST]")
        else:
            yield from enclosed("", f" {text.strip()} ", chat.eos, said=True)


LLAMA3_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3_END = "<|eot_id|>"


def llama3(chat):
    yield words(chat.bos)
    yield from llama3_turns(chat, chat.messages)


def llama31(chat, date):
    """Llama 3.1 and later: always a system turn; tools in the first user turn; calls, results."""
    yield words(chat.bos + LLAMA3_HEAD.format("system"))
    if chat.tools:
        yield words("Environment: ipython\n")
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    yield from enclosed(dates, (chat.system or "").strip(), LLAMA3_END)
    messages = chat.turns
    if chat.tools:
        if not messages:
            raise UserError("llama3.1 puts the tools in the first user message, and there is none")
        asked, *messages = messages
        task = (
            "Given the following functions, please respond with a JSON for a function call "
            "with its proper arguments that best answers the given prompt.\n\n"
            'Respond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}.Do not use variables.\n\n"
        )
        tools = "".join(json_text(tool, indent=4) + "\n\n" for tool in chat.tools)
        text = tools + asked["content"].strip()
        yield from enclosed(LLAMA3_HEAD.format("user") + task, text, LLAMA3_END)
    yield from llama3_turns(chat, messages)


def llama3_turns(chat, messages):
    for m in messages:
        role, text = m["role"], m["content"].strip()
        calls = m.get("tool_calls", [])
        if len(calls) > 1:
            raise UserError(f"llama3.1 makes one tool call at a time, not {len(calls)}")
        if role == "tool":
            role, text = "ipython", json_text(m["content"])
        elif calls:
            text = call_text(calls[0], "parameters")
        yield from turn(LLAMA3_HEAD.format(role), {"role": role, "content": text}, LLAMA3_END)
    if chat.prompt:
        yield words(LLAMA3_HEAD.format("assistant"))


def call_text(call, arguments="arguments"):
    """A tool call as Llama's and Qwen's templates write it, the name unescaped."""
    function = call["function"]
    return f'{{"name": "{function["name"]}", "{arguments}": {json_text(function["arguments"])}}}'


def mistral(chat, opening, closing, space, system_at=-1, trim=False):
    """v1's markers are plain text; v3's tokens, with SentencePiece's spaces; tekken's without.

    Where the system prompt goes (v3 loses it if the assistant spoke last) and that the tools stand
    before every message that equals the last user's is as published."""
    yield words(chat.bos)
    users = [m for m in chat.turns if m["role"] == "user"]
    for i, m in enumerate(chat.turns):
        text = m["content"]
        if m["role"] == "user":
            if chat.tools and m == users[-1]:
                tools = ", ".join(mistral_tool(tool["function"]) for tool in chat.tools)
                yield from enclosed("[AVAILABLE_TOOLS]" + space, f"[{tools}]", "[/AVAILABLE_TOOLS]")
            if chat.system is not None and i == system_at % len(chat.turns):
                text = f"{chat.system}\n\n{text}"
            yield from enclosed(opening, text, closing)
        elif m["role"] == "tool":
            result = f'{{"content": {text}, "call_id": "{mistral_id(m.get("tool_call_id"))}"}}'
            yield from enclosed("[TOOL_RESULTS]" + space, result, "[/TOOL_RESULTS]")
        else:
            if m.get("tool_calls"):
                yield words("[TOOL_CALLS]", True)
                text = "[" + ", ".join(map(mistral_call, m["tool_calls"])) + "]"
            text = text.strip() if trim else text
            yield from enclosed("", space + text, chat.eos, said=True)


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
    asked = last_question(chat.turns)
    roles = [
        None,
        *(m["role"] for m in chat.turns),
        None,
    ]  # of the message before, this one, the next
    for i, m in enumerate(chat.turns):
        if m["role"] == "tool":  # results that follow one another share one user turn
            head = "" if roles[i] == "tool" else "<|im_start|>user"
            end = "" if roles[i + 2] == "tool" else "<|im_end|>\n"
            result = m["content"]
            yield from enclosed(head + "\n<tool_response>\n", result, "\n</tool_response>" + end)
        elif m["role"] == "assistant":
            thoughts, text = split_thoughts(m) if think else ("", m["content"])
            yield words("<|im_start|>assistant\n")
            # Qwen 3 drops the thoughts of turns before the last question, and shows a last turn
            # that it has none.
            if think and i > asked and (thoughts or i == last):
                yield words("<think>", True)
                yield content("\n" + thoughts.strip("\n") + "\n", True)
                yield words("</think>\n\n", True)
                text = text.lstrip("\n")
            yield content(text, True)
            for n, call in enumerate(m.get("tool_calls", [])):
                yield words("\n<tool_call>" if n or text else "<tool_call>", True)
                yield content(f"\n{call_text(call)}\n", True)
                yield words("</tool_call>", True)
            yield words("<|im_end|>", True)
            yield words("\n")
        else:
            yield from turn(f"<|im_start|>{m['role']}\n", m, "<|im_end|>", "\n")
    if chat.prompt:
        yield words("<|im_start|>assistant\n")


def qwen_system(chat, system):
    if system is None and not chat.tools:
        return
    yield words("<|im_start|>system\n")
    yield content(system or "")
    if chat.tools:
        yield words(
            ("" if system is None else "\n\n")
            + "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        )
        yield content("".join("\n" + json_text(tool) for tool in chat.tools))
        yield words(
            "\n</tools>\n\nFor each function call, return a json object with function name and "
            "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )
    yield words("<|im_end|>\n")


def last_question(messages):
    """Where the last user turn is that isn't a tool's result in disguise, else the last index."""
    for i in reversed(range(len(messages))):
        result = re.fullmatch("(?s)<tool_response>.*</tool_response>", messages[i]["content"])
        if messages[i]["role"] == "user" and not result:
            return i
    return len(messages) - 1


def split_thoughts(m):
    """-> (thoughts, answer), from reasoning_content or <think>...</think>, as Qwen 3 does it."""
    if "reasoning_content" in m or "</think>" not in m["content"]:
        return m.get("reasoning_content", ""), m["content"]
    before, *_, after = m["content"].split("</think>")
    thoughts = before.rstrip("\n").split("<think>")[-1]
    return thoughts.lstrip("\n"), after.lstrip("\n")


def json_text(value, ensure_ascii=False, **options):
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@dataclass(frozen=True)
class Format:
    pieces: Callable  # Chat -> Iterator[Piece]
    markers: tuple = ()  # must be single tokens, or the format would be spelled out as text
    tools: bool = False
    alternates: bool = False  # one leading system message at most, then user, assistant, user, ...
    roles: tuple = CHAT_ROLES


IM = ("<|im_start|>", "<|im_end|>")
INST = ("[INST]", "[/INST]")
LLAMA3_MARKERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
NO_TOOL = CHAT_ROLES[:3]
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

mistral_v1 = partial(mistral, opening=" [INST] ", closing=" [/INST]", space=" ", system_at=0)
mistral_v3 = partial(mistral, opening="[INST] ", closing="[/INST]", space=" ", trim=True)
tekken = partial(mistral, opening="[INST]", closing="[/INST]", space="")


def llama32(chat):
    return llama31(chat, date=datetime.now().strftime("%d %b %Y"))


FORMATS = {
    "chatml": Format(chatml, IM),
    "llama2": Format(llama2, alternates=True, roles=NO_TOOL),
    "llama3": Format(llama3, LLAMA3_MARKERS, roles=NO_TOOL),
    "llama3.1": Format(partial(llama31, date="26 Jul 2024"), LLAMA3_MARKERS, tools=True),
    "llama3.2": Format(llama32, LLAMA3_MARKERS, tools=True),
    "mistral-v1": Format(mistral_v1, alternates=True, roles=NO_TOOL),
    "mistral-v3": Format(mistral_v3, INST, tools=True, alternates=True),
    "mistral-tekken": Format(tekken, INST, tools=True, alternates=True),
    "zephyr": Format(zephyr, roles=NO_TOOL),
    "qwen2.5": Format(partial(qwen, default_system=QWEN_SYSTEM), IM, tools=True),
    "qwen3": Format(partial(qwen, think=True), IM, tools=True),
    "alpaca": Format(alpaca, alternates=True, roles=NO_TOOL),
}
# The name people say means this variant here.
FORMATS["mistral"] = FORMATS["mistral-v3"]
FORMATS["qwen"] = FORMATS["qwen2.5"]


def named_pieces(name, tok, chat):
    """The conversation's pieces in a format by name; UserError for what the format cannot say."""
    if name not in FORMATS:
        raise UserError(f"unknown chat format {name!r}; there are {', '.join(FORMATS)}")
    form = FORMATS[name]
    missing = [marker for marker in form.markers if marker not in tok.special]
    if not chat.eos and not form.markers:
        missing = ["EOS"]
    if missing:
        raise UserError(
            f"chat format {name} needs the special token {', '.join(missing)}, "
            "which this tokenizer does not have"
        )
    for i, m in enumerate(chat.messages):
        if m["role"] not in form.roles:
            raise UserError(f"message {i}: chat format {name} has no {m['role']} role")
        if m.get("tool_calls") and not form.tools:
            raise UserError(f"message {i}: chat format {name} has no tool calls")
    if chat.tools and not form.tools:
        raise UserError(f"chat format {name} has no tools")
    if form.alternates:
        talk = [m for m in chat.turns if m["role"] != "tool" and not m.get("tool_calls")]
        roles = [m["role"] for m in talk]
        if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
            raise UserError(
                f"chat format {name}: after a system prompt user and assistant take turns, "
                f"not {roles}"
            )
    return list(form.pieces(chat))


# ------------------------------------------------------------------------- pieces to ids and mask
@lru_cache(maxsize=8)
def marker_pattern(names):
    """A regex that matches any of the names, the longest first; without names it never matches."""
    if not names:
        return re.compile("(?!)")
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


class Part(NamedTuple):
    said: bool
    text: str
    marker: int | None  # the id, where the template's own words name a marker


def split_at_markers(tok, pieces):
    """Yield the Parts of pieces."""
    split = marker_pattern(tuple(tok.special)).split
    for piece in pieces:
        for text in split(piece.text):
            marker = tok.special.get(text) if piece.template else None
            if text:
                yield Part(piece.said, text, marker)


def assemble(tok, pieces):
    """Pieces -> (ids, mask), two lists of one length; mask is None if it cannot be placed exactly.

    A marker becomes its id. What stands between two markers is encoded as one string, because BPE
    merges across the seams of pieces and models are trained on the merged form."""
    ids, mask, exact = [], [], True
    for is_text, run in groupby(split_at_markers(tok, pieces), lambda part: part.marker is None):
        if is_text:
            run_ids, run_mask = encode_run(tok, run, "later" if ids else "first")
        else:
            run_mask, _, run_ids = zip(*run)
        ids += run_ids
        if run_mask is None:
            exact = False
        else:
            mask += map(int, run_mask)
    return ids, mask if exact else None


def encode_run(tok, parts, where):
    """Parts without a marker -> (ids of their joined text, mask): true for tokens said as a whole.

    A token across the border is not in the loss: the prompt already ends inside it, so the model
    never has to produce it. where: "first" if the conversation starts here, which SentencePiece may
    mark with a space, else "later". mask is None if the tokens do not spell the text, so that where
    a part ends would be a guess."""
    data, flags = b"", b""  # the text, and for each of its bytes whether the assistant said it
    for part in parts:
        text = well_formed(part.text).encode()
        data += text
        flags += bytes([part.said]) * len(text)
    ids = tok.encode_bytes(data, where)
    # Only the start of the last stretch matters, so a normalizer (NFC) may respell what is in it.
    start = len(flags.rstrip(flags[-1:]))
    if start == 0:  # all of it was said, or nothing
        return ids, [flags[0]] * len(ids)
    spelled = [tok.token_bytes(i) for i in ids]
    whole = b"".join(spelled)
    if not whole.startswith(data[:start]):
        data, flags, start = b" " + data, flags[:1] + flags, start + 1  # SentencePiece's space
        if not whole.startswith(data[:start]):
            return ids, None
    flags = flags.ljust(len(whole), flags[-1:])
    ends = accumulate(map(len, spelled), initial=0)
    # The mask ends here: a token is in the loss if the assistant said all of its bytes.
    return ids, [all(flags[begin:end]) for begin, end in pairwise(ends)]


# --------------------------------------------- what others call: render to answer, example to train
def pieces_of(tok, chat, format=None):
    """-> (pieces, do they know who said what): the format by name, the folder's own, or ChatML."""
    template = tok.chat_template
    if format or template in (None, "", CHATML_TEMPLATE):
        return named_pieces(format or "chatml", tok, chat), True
    from formats.templates import pieces_of_template

    return pieces_of_template(tok, chat, template)


def render(
    tok, messages: list[dict], add_generation_prompt=False, tools=None, format=None
) -> tuple[list[int], list[int]]:
    """OpenAI-style messages -> (ids, mask), two lists of one length.

    mask is 1 for what the assistant has to produce: what it said and its end token. Text in
    messages never becomes a special token.

    The format is `format`, a name in FORMATS; else what the folder's chat_template does; else
    ChatML. Where who-said-what cannot be known, mask is None with add_generation_prompt (to be
    answered, not trained on) and UserError without it."""
    chat = read_chat(tok, messages, tools, add_generation_prompt)
    return ids_and_mask(tok, chat, *pieces_of(tok, chat, format))


def ids_and_mask(tok, chat, pieces, known):
    ids, mask = assemble(tok, pieces)
    if known and mask is not None:
        return ids, mask
    if chat.prompt:
        return ids, None
    why = "the chat_template is none we know and has no {% generation %}: name a format"
    if known:
        why = "this tokenizer does not spell the text it was given"
    raise UserError(
        "cannot tell which tokens the assistant said, and a guessed mask would train the wrong "
        f"thing; {why}, or render with add_generation_prompt for the ids alone"
    )


def example(tok, messages, tools=None, format=None):
    """One conversation -> (ids, mask) to train on. UserError if it teaches nothing, or wrongly."""
    chat = read_chat(tok, messages, tools)
    roles = [m["role"] for m in chat.messages]
    if "assistant" not in roles:
        raise UserError("no assistant turn")
    if roles[-1] != "assistant":
        raise UserError(f"ends with a {roles[-1]} turn")
    for m in chat.messages:
        empty = not m["content"].strip() and not m.get("tool_calls")
        if empty and m["role"] in ("user", "assistant"):
            raise UserError(f"empty {m['role']} turn")
    pieces, known = pieces_of(tok, chat, format)
    if chat.system and chat.system.strip() not in "".join(piece.text for piece in pieces):
        raise UserError("the format loses the system prompt here: put it into the first user turn")
    return ids_and_mask(tok, chat, pieces, known)


def examples(tok, records, skipped, format=None):
    """Yield example() of each (record, messages, tools); `skipped` counts the refused by reason.

    Raises UserError at the end if none was good."""
    good = 0
    for _, messages, tools in records:
        try:
            pair = example(tok, messages, tools, format)
        except UserError as reason:
            skipped[str(reason)] += 1
            continue
        good += 1
        yield pair
    if not good:
        reasons = "; ".join(f"{count} x {why}" for why, count in skipped.most_common(3))
        raise UserError(f"none of {skipped.total()} conversations can be trained on: {reasons}")


def stop_id(tok, format=None):
    """The id that ends an assistant's turn: what the engine stops at."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, mask = render(tok, talk, format=format)
    return [i for i, said in zip(ids, mask) if said][-1]


# -------------------------------------------------------------------------------- records of files
LAYOUTS = (
    "{messages}, ShareGPT {conversations: [{from, value}]}, Alpaca {instruction, input, output}, "
    "{prompt, completion}, {prompt, response}"
)


def read_records(path):
    """Yield (record, messages, tools) of a JSON list or JSONL, each in any of the LAYOUTS."""
    for n, record in enumerate(json_records(path), 1):
        try:
            yield record, *as_messages(record)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path}: record {n} cannot be read as a conversation: {e}") from None


def as_messages(record):
    """One record -> (messages, tools or None). UserError names the keys of an unknown layout."""
    if not isinstance(record, dict):
        raise UserError(f"it is a {type(record).__name__}, not an object")
    tools = record.get("tools")
    if "messages" in record:
        return record["messages"], tools
    talk = []
    if record.get("system"):
        talk.append({"role": "system", "content": record["system"]})
    answer = "completion" if "completion" in record else "response"
    if "conversations" in record:
        names = {"human": "user", "gpt": "assistant"}
        for m in record["conversations"]:
            talk.append({"role": names.get(m["from"], m["from"]), "content": m["value"]})
    elif "instruction" in record and "output" in record:
        task = record["instruction"]
        if record.get("input"):
            task += f"\n\n### Input:\n{record['input']}"
        talk += as_turns("user", task) + as_turns("assistant", record["output"])
    elif "prompt" in record and answer in record:
        talk += as_turns("user", record["prompt"]) + as_turns("assistant", record[answer])
    else:
        keys = ", ".join(repr(key)[:40] for key in list(record)[:12])
        raise UserError(f"its keys are {keys or 'none'}; known layouts: {LAYOUTS}")
    return talk, tools


def as_turns(role, said):
    """A text as one message of the role; a list is messages already."""
    return said if isinstance(said, list) else [{"role": role, "content": said}]


# ------------------------------------------------------------------------------------ the commands
def paint(tok, ids, mask, color=True):
    """The conversation as text; what is in the loss is green (or in guillemets)."""
    green, plain = ("\x1b[32m", "\x1b[0m") if color else ("«", "»")
    text = ""
    for said, run in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        part = printable(tok.decode([i for i, _ in run]))
        text += green + part + plain if said else part
    return text


def printable(text):
    """Control characters but the newline spelled out: no text may steer the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda m: repr(m[0])[1:-1], text)


def show_conversations(args):
    """Print conversations as they are trained on, and the share that is in the loss."""
    from tokenizer import Tokenizer  # here, for the formats above need no tokenizer of ours

    tok = Tokenizer.load(args.tokenizer)
    skipped = Counter()
    count = total = supervised = 0
    records = islice(read_records(args.file), args.limit)
    for ids, mask in examples(tok, records, skipped, args.format):
        print(paint(tok, ids, mask, color="NO_COLOR" not in os.environ))
        print(f"--- {len(ids)} tokens, {sum(mask)} supervised ({sum(mask) / len(ids):.1%})\n")
        count += 1
        total += len(ids)
        supervised += sum(mask)
    print(f"{count} conversations, {total} tokens, {supervised / total:.1%} supervised")
    for why, times in skipped.most_common():
        print(f"skipped {times}: {why}")


def read_shares(text):
    """'85/5/10' -> the three shares, as numbers with any sum."""
    try:
        shares = [float(share) for share in text.split("/")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or not sum(shares):
        raise UserError(f"--split {text}: give the three shares of train, val and test, as 85/5/10")
    return shares


def convert_records(args):
    """Records of any layout -> DIR/{train,val,test}.jsonl of {messages}.

    What comes before the last answer decides, by its hash, where a record goes: the same question
    is never in two splits, and more records move none."""
    bounds = list(accumulate(read_shares(args.split)))
    lines = {"train": [], "val": [], "test": []}
    for path in args.files:
        for record, messages, tools in read_records(path):
            asked = json_text(messages[:-1]).encode("utf-8", "replace")
            hashed = int.from_bytes(hashlib.sha256(asked).digest()[:8], "big") / 2**64
            place = hashed * bounds[-1]  # 0 <= hashed < 1
            split = list(lines)[bisect_right(bounds, place)]
            row = {"messages": messages}
            row |= {key: record[key] for key in ("family", "answer", "checks") if key in record}
            if tools:
                row["tools"] = tools
            lines[split].append(json_text(row) + "\n")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for split, rows in lines.items():
        text = "".join(rows)
        path = Path(args.out, f"{split}.jsonl")
        write_atomic(path, lambda path: path.write_text(text, encoding="utf-8"))
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in lines.items())
    print(f"{args.out}: {counts} conversations")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    show = commands.add_parser("show", help="print conversations as they are trained on")
    show.add_argument("file", help=f"JSON or JSONL: {LAYOUTS}")
    show.add_argument("--tokenizer", required=True, help="a model folder or tokenizer file")
    show.add_argument("--format", help=f"instead of the folder's own: {', '.join(FORMATS)}")
    show.add_argument("--limit", type=int, default=10, help="how many conversations [10]")
    show.set_defaults(run=show_conversations)
    convert = commands.add_parser(
        "convert", help="any layout to train.jsonl, val.jsonl, test.jsonl"
    )
    convert.add_argument("files", nargs="+", help=f"JSON or JSONL: {LAYOUTS}")
    convert.add_argument("--out", required=True, help="the folder to write")
    convert.add_argument("--split", default="85/5/10", help="shares of train, val, test [85/5/10]")
    convert.set_defaults(run=convert_records)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli(main)
