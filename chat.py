"""Conversations to token ids and loss mask, built together in one loop: the one place that emits special tokens.

    python chat.py show chat.jsonl --tokenizer FOLDER      # conversations coloured by mask, and the share supervised
    python chat.py convert alpaca.json --out DIR --split 85/5/10      # any layout -> DIR/{train,val,test}.jsonl

Top to bottom: pieces and how they become ids, formats by name, other folders' templates, render and example(s), show, convert.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from itertools import accumulate, groupby, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from common import UserError, cli, json_records, well_formed, write_atomic

ROLES = ("system", "user", "assistant", "tool")

# What our own models are saved with (tokenizer_config.json, GGUF): ChatML as Jinja, in the spelling others recognise.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---- A conversation becomes pieces; pieces become ids and mask.


class Piece(NamedTuple):
    text: str
    said: bool = False  # the assistant has to produce this, so it is in the loss
    template: bool = True  # the template's own words, in which a marker's name means its id


words = Piece  # the template's own: `<|im_start|>` in here is the marker


def content(text, said=False):
    """Anything a person or a model wrote: `<|im_start|>` in here is twelve characters, whoever typed them."""
    return Piece(text, said, template=False)


@dataclass
class Chat:
    """One checked conversation, as the formats below see it."""

    messages: list  # dicts: role, content (a str), where present tool_calls, tool_call_id, reasoning_content
    tools: list | None
    prompt: bool  # end with the words that hand the turn to the assistant
    bos: str  # names of the two markers, "" where the tokenizer has none
    eos: str

    def split_system(self):
        """-> (the leading system prompt or None, the other messages)"""
        first, *rest = self.messages
        return (first["content"], rest) if first["role"] == "system" else (None, self.messages)


def read_chat(tok, messages, tools=None, prompt=False):
    """OpenAI-style messages -> Chat. Raises UserError naming the message at fault."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError("a conversation is a non-empty list of {role, content} messages")
    checked = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(f"message {i}: unknown role {role!r}; roles are {', '.join(ROLES)}")
        text, calls = message.get("content"), message.get("tool_calls") or []
        calls = [read_call(call, i) for call in (calls if isinstance(calls, list) else [calls])]
        if isinstance(text, list) and all(
            isinstance(p, dict) and isinstance(p.get("text"), str) for p in text
        ):
            text = "".join(part["text"] for part in text)
        if not isinstance(text, str) and not (text is None and calls):
            raise UserError(
                f"message {i} ({role}): content must be a string or a list of text parts"
            )
        kept = {
            k: message[k]
            for k in ("tool_call_id", "reasoning_content", "name")
            if isinstance(message.get(k), str)
        }
        checked.append(
            {
                "role": role,
                "content": text or "",
                **({"tool_calls": calls} if calls else {}),
                **kept,
            }
        )
    if tools and not (
        isinstance(tools, list)
        and all(isinstance(t, dict) and isinstance(t.get("function"), dict) for t in tools)
    ):
        raise UserError(
            "tools must be a list of {type: function, function: {name, description, parameters}}"
        )
    bos, eos = ("" if i is None else tok.decode([i]) for i in (tok.bos_id, tok.eos_id))
    return Chat(checked, tools or None, prompt, bos, eos)


def read_call(call, i):
    """One tool call as the templates want it: arguments a dict (OpenAI sends them as a string of JSON)."""
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = dict(json.loads(arguments) if isinstance(arguments, str) else arguments)
        return {**call, "function": {"name": str(name), "arguments": arguments}}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"message {i}: a tool call is {{function: {{name, arguments}}}}, arguments a JSON object"
        ) from None


@lru_cache(maxsize=8)
def marker_pattern(names):
    """A regex matching any of the names, the longest first; one that never matches if there are none."""
    return re.compile(
        "(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")"
        if names
        else "(?!)"
    )


def assemble(tok, pieces):
    """Pieces -> (ids, mask): markers by id, and what stands between two markers encoded as one string, because BPE merges across
    the seams and models are trained on the merged form. mask is None if it cannot be placed exactly."""
    split = marker_pattern(tuple(tok.special)).split
    atoms = [
        (piece.said, part, tok.special.get(part) if piece.template else None)
        for piece in pieces
        for part in split(piece.text)
        if part
    ]
    ids, mask = [], []
    for is_text, run in groupby(atoms, key=lambda atom: atom[2] is None):
        if is_text:
            parts = [
                (said, "".join(text for _, text, _ in same))
                for said, same in groupby(run, key=lambda atom: atom[0])
            ]
            run_ids, run_mask = encode_run(tok, parts, "later" if ids else "first")
        else:
            run_mask, _, run_ids = zip(*run)
        ids.extend(run_ids)
        mask = None if mask is None or run_mask is None else mask + [int(said) for said in run_mask]
    return ids, mask


def encode_run(tok, parts, where):
    """[(said, text), ...] -> (ids of the joined text, mask): true where a token lies wholly in what the assistant said.

    A token across the border is not: the prompt already ends inside it, so the model is never asked to produce it.
    where: "first" if the whole text starts here, which SentencePiece may mark with a space, else "later"."""
    parts = [(said, well_formed(part).encode()) for said, part in parts]
    text = b"".join(part for _, part in parts)
    ids = tok.encode_bytes(text, where)
    if len(parts) == 1:
        return ids, [parts[0][0]] * len(ids)
    spelled = [tok.token_bytes(i) for i in ids]
    whole, head = b"".join(spelled), text[: len(text) - len(parts[-1][1])]
    space = int(not whole.startswith(head))
    if not whole.startswith(
        b" " * space + head
    ):  # of the last part only the start matters: NFC may respell the rest
        return ids, None  # not what went in, so where a part ends would be a guess
    flags = b"".join(bytes([said]) * len(part) for said, part in parts)  # one per byte
    flags = (flags[:1] * space + flags).ljust(len(whole), flags[-1:])
    ends = list(accumulate(map(len, spelled), initial=0))
    return ids, [all(flags[start:end]) for start, end in pairwise(ends)]


# ---- The formats. Each walks the messages once and yields pieces. "said" begins where the generation prompt ends, so the mask is
# exactly what the model will have to produce: its words, the spaces its format puts round them, the end.


def turn(head, message, end, tail=""):
    said = message["role"] == "assistant"
    yield from (words(head), content(message["content"], said), words(end, said), words(tail))


def chatml(chat, head="<|im_start|>{}\n", end="<|im_end|>"):
    for m in chat.messages:
        yield from turn(head.format(m["role"]), m, end, "\n")
    if chat.prompt:
        yield words(head.format("assistant"))


def zephyr(chat):
    """Its <|user|> is plain text, as are [INST] and <<SYS>> below: a user can type those, whatever we do here."""
    return chatml(chat, "<|{}|>\n", chat.eos)


def alpaca(chat):
    """github.com/tatsu-lab/stanford_alpaca, its one turn repeated as LLaMA-Factory and Unsloth repeat it."""
    system, messages = chat.split_system()
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    yield from (words(chat.bos), content(task if system is None else system), words("\n\n"))
    for m in messages:
        user = m["role"] == "user"
        yield from turn(
            "### Instruction:\n" if user else "### Response:\n", m, "" if user else chat.eos, "\n\n"
        )
    if chat.prompt:
        yield words("### Response:\n")


def llama2(chat):
    system, messages = chat.split_system()
    for i, m in enumerate(messages):
        text = (
            f"<<SYS>>\n{system}\n<</SYS>>\n\n{m['content']}"
            if i == 0 and system is not None
            else m["content"]
        )
        if m["role"] == "user":
            yield from (words(chat.bos + "[INST] "), content(text.strip()), words(" [/INST]"))
        else:
            yield from (content(f" {text.strip()} ", True), words(chat.eos, True))


def llama3(chat, date=None):
    """Llama 3; with a date, 3.1 and later: a system turn that is always there, tools, calls and results."""
    head, end, messages = (
        "<|start_header_id|>{}<|end_header_id|>\n\n".format,
        "<|eot_id|>",
        chat.messages,
    )
    yield words(chat.bos)
    if date:
        system, messages = chat.split_system()
        ipython = "Environment: ipython\n" if chat.tools else ""
        yield words(
            head("system")
            + ipython
            + f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
        )
        yield from (content((system or "").strip()), words(end))
    if chat.tools:
        if not messages:
            raise UserError("llama3.1 puts the tools in the first user message, and there is none")
        asked, *messages = messages
        yield words(
            head("user")
            + "Given the following functions, please respond with a JSON for a function call with its proper "
            'arguments that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}.Do not use variables.\n\n"
        )
        yield content(
            "".join(to_json(tool, indent=4) + "\n\n" for tool in chat.tools)
            + asked["content"].strip()
        )
        yield words(end)
    for m in messages:
        role, text, calls = m["role"], m["content"].strip(), m.get("tool_calls")
        if role == "tool":
            role, text = "ipython", to_json(m["content"])
        elif calls:
            if len(calls) > 1:
                raise UserError(f"llama3.1 makes one tool call at a time, not {len(calls)}")
            text = call_json(calls[0], "parameters")
        yield from turn(head(role), {"role": role, "content": text}, end)
    if chat.prompt:
        yield words(head("assistant"))


def call_json(call, arguments="arguments"):
    """A tool call as Llama's and Qwen's templates write it, the name unescaped."""
    return f'{{"name": "{call["function"]["name"]}", "{arguments}": {to_json(call["function"]["arguments"])}}}'


def mistral(chat, opening, closing, space, system_at=-1, trim=False):
    """v1 has its markers as plain text; v3 as tokens, with SentencePiece's spaces; tekken as tokens, without spaces.
    Where the system prompt goes (and that v3 loses it if the assistant spoke last) is as published."""
    system, messages = chat.split_system()
    yield words(chat.bos)
    last_user = [m for m in messages if m["role"] == "user"][-1:]
    for i, m in enumerate(messages):
        role, text, calls = m["role"], m["content"], m.get("tool_calls")
        if role == "user":
            if chat.tools and [m] == last_user:
                tools = ", ".join(mistral_tool(tool["function"]) for tool in chat.tools)
                yield from (
                    words("[AVAILABLE_TOOLS]" + space),
                    content(f"[{tools}]"),
                    words("[/AVAILABLE_TOOLS]"),
                )
            if system is not None and i == system_at % len(messages):
                text = f"{system}\n\n{text}"
            yield from (words(opening), content(text), words(closing))
        elif role == "tool":
            result = f'{{"content": {text}, "call_id": "{nine(m.get("tool_call_id"))}"}}'
            yield from (words("[TOOL_RESULTS]" + space), content(result), words("[/TOOL_RESULTS]"))
        else:
            if calls:
                yield words("[TOOL_CALLS]", True)
                text = ", ".join(
                    to_json(c["function"])[:-1] + f', "id": "{nine(c.get("id"))}"}}' for c in calls
                )
                text = f"[{text}]"
            yield from (
                content(space + (text.strip() if trim else text), True),
                words(chat.eos, True),
            )


def mistral_tool(function):
    """The published template writes a tool by hand: strings unescaped, and any "return" left out."""
    fields = (
        f'"{k}": ' + (f'"{v}"' if isinstance(v, str) else to_json(v))
        for k, v in function.items()
        if k != "return"
    )
    return '{"type": "function", "function": {' + ", ".join(fields) + "}}"


def nine(call_id):
    if not isinstance(call_id, str) or len(call_id) != 9:
        raise UserError(f"Mistral's tool call ids are 9 characters long, not {call_id!r}")
    return call_id


def qwen(chat, default_system=None, think=False):
    """Qwen 2.5 (with its default system prompt) and Qwen 3 (with its thoughts): ChatML plus tools."""
    system, messages = chat.split_system()
    system = default_system if system is None else system
    if system is not None or chat.tools:
        yield words("<|im_start|>system\n")
        yield content((system or "") + ("\n\n" if chat.tools and system is not None else ""))
        if chat.tools:
            yield words(
                "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
                "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
            )
            yield content("".join("\n" + to_json(tool) for tool in chat.tools))
            yield words(
                "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
                '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
                "<args-json-object>}\n</tool_call>"
            )
        yield words("<|im_end|>\n")
    roles = [m["role"] for m in messages]
    # Qwen 3 thinks afresh about a user turn that is not a tool's answer in disguise
    query = max(
        (
            i
            for i, m in enumerate(messages)
            if m["role"] == "user"
            and not re.fullmatch("(?s)<tool_response>.*</tool_response>", m["content"])
        ),
        default=len(messages) - 1,
    )
    for i, m in enumerate(messages):
        if m["role"] == "tool":  # results that follow one another share one user turn
            yield words(
                ("" if roles[i - 1 : i] == ["tool"] else "<|im_start|>user") + "\n<tool_response>\n"
            )
            yield from (content(m["content"]), words("\n</tool_response>"))
            yield words("" if roles[i + 1 : i + 2] == ["tool"] else "<|im_end|>\n")
        elif m["role"] == "assistant":
            yield words("<|im_start|>assistant\n")
            thoughts, text = split_thoughts(m) if think else ("", m["content"])
            if (
                think and i > query and (thoughts or i == len(messages) - 1)
            ):  # Qwen 3 drops the thoughts of older turns
                yield from (
                    words("<think>", True),
                    content("\n" + thoughts.strip("\n") + "\n", True),
                    words("</think>\n\n", True),
                )
                text = text.lstrip("\n")
            yield content(text, True)
            for n, call in enumerate(m.get("tool_calls", [])):
                yield words(("\n" if n or text else "") + "<tool_call>", True)
                yield from (content(f"\n{call_json(call)}\n", True), words("</tool_call>", True))
            yield from (words("<|im_end|>", True), words("\n"))
        else:
            yield from turn(f"<|im_start|>{m['role']}\n", m, "<|im_end|>", "\n")
    if chat.prompt:
        yield words("<|im_start|>assistant\n")


def split_thoughts(m):
    """-> (thoughts, answer), from reasoning_content or from <think>...</think> in the content, as Qwen 3's template."""
    if "reasoning_content" in m or "</think>" not in m["content"]:
        return m.get("reasoning_content", ""), m["content"]
    before, *_, after = m["content"].split("</think>")
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")


def to_json(value, ensure_ascii=False, **options):
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@dataclass(frozen=True)
class Format:
    pieces: Callable  # Chat -> Iterator[Piece]
    markers: tuple = ()  # must be single tokens of the tokenizer, or the format would be spelled out as text
    tools: bool = False
    alternates: bool = False  # one leading system message at most, then user, assistant, user, ...
    roles: tuple = ROLES


IM, INST, TALK = ("<|im_start|>", "<|im_end|>"), ("[INST]", "[/INST]"), ROLES[:3]
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
FORMATS = {
    "chatml": Format(chatml, IM),
    "llama2": Format(llama2, alternates=True, roles=TALK),
    "llama3": Format(llama3, HEADER, roles=TALK),
    "llama3.1": Format(partial(llama3, date="26 Jul 2024"), HEADER, tools=True),
    "llama3.2": Format(
        lambda chat: llama3(chat, date=datetime.now().strftime("%d %b %Y")), HEADER, tools=True
    ),
    "mistral-v1": Format(
        partial(mistral, opening=" [INST] ", closing=" [/INST]", space=" ", system_at=0),
        alternates=True,
        roles=TALK,
    ),
    "mistral-v3": Format(
        partial(mistral, opening="[INST] ", closing="[/INST]", space=" ", trim=True),
        INST,
        tools=True,
        alternates=True,
    ),
    "mistral-tekken": Format(
        partial(mistral, opening="[INST]", closing="[/INST]", space=""),
        INST,
        tools=True,
        alternates=True,
    ),
    "zephyr": Format(zephyr, roles=TALK),
    "qwen2.5": Format(partial(qwen, default_system=QWEN_SYSTEM), IM, tools=True),
    "qwen3": Format(partial(qwen, think=True), IM, tools=True),
    "alpaca": Format(alpaca, alternates=True, roles=TALK),
}
# the name people say -> the variant it means here
FORMATS.update(mistral=FORMATS["mistral-v3"], qwen=FORMATS["qwen2.5"])


def named_pieces(name, tok, chat):
    """The conversation in a format by name, as a list of pieces; UserError for what the format cannot say."""
    if name not in FORMATS:
        raise UserError(f"unknown chat format {name!r}; there are {', '.join(FORMATS)}")
    form = FORMATS[name]
    missing = [marker for marker in form.markers if marker not in tok.special]
    if missing or not (chat.eos or form.markers):
        raise UserError(
            f"chat format {name} needs the special token {', '.join(missing) or 'EOS'}, which this tokenizer does not "
            "have"
        )
    for i, m in enumerate(chat.messages):
        if m["role"] not in form.roles:
            raise UserError(f"message {i}: chat format {name} has no {m['role']} role")
        if m.get("tool_calls") and not form.tools:
            raise UserError(f"message {i}: chat format {name} has no tool calls")
    if chat.tools and not form.tools:
        raise UserError(f"chat format {name} has no tools")
    if form.alternates:
        talk = [
            m["role"]
            for m in chat.split_system()[1]
            if m["role"] != "tool" and not m.get("tool_calls")
        ]
        if talk != [ROLES[1 + i % 2] for i in range(len(talk))]:
            raise UserError(
                f"chat format {name}: after a system prompt user and assistant take turns, not {talk}"
            )
    return list(form.pieces(chat))


# ---- Other people's folders: their chat_template runs in Jinja2's sandbox and is believed over all we know by name.


def pieces_of(tok, chat, format=None):
    """-> (pieces, whether they carry a mask), in the format by name, else as the folder's chat_template does, else in ChatML.

    The template renders this very conversation, and so does each format above. The one that gives the same text knows who said
    which part of it: nothing is guessed, and a template that merely resembles a known one is never taken for it. Failing that, a
    template's own {% generation %} says who spoke. Failing that there are ids but no mask."""
    template = tok.chat_template
    if format or template in (None, "", CHATML_TEMPLATE):
        return named_pieces(format or "chatml", tok, chat), True
    from formats.templates import BARE, CLOSE, GUARD, OPEN, defused, run_template

    text = run_template(template, chat).translate(BARE)
    for name in FORMATS:
        with contextlib.suppress(UserError):
            pieces = named_pieces(name, tok, chat)
            if "".join(piece.text for piece in pieces) == text:
                return pieces, True
    markers = marker_pattern(tuple(tok.special))
    safe = replace(
        chat, messages=defused(chat.messages, markers), tools=defused(chat.tools, markers)
    )
    pieces, said = [], False
    for part in re.split(f"([{OPEN}{CLOSE}])", run_template(template, safe)):
        if part in (OPEN, CLOSE):
            said = part == OPEN
        else:
            pieces += [
                Piece(p.replace(GUARD, ""), said, p in tok.special) for p in markers.split(part)
            ]
    return pieces, any(piece.said for piece in pieces)


# ---- What the others call: render to answer, example(s) to train.


def render(
    tok, messages: list[dict], add_generation_prompt=False, tools=None, format=None
) -> tuple[list[int], list[int]]:
    """OpenAI-style messages -> (ids, mask), two lists of one length; mask 1 = what the assistant has to produce: what it said and
    its end token. Text in messages never becomes a special token.

    The format is `format`, a name in FORMATS; else what the folder's chat_template does; else ChatML. Where who-said-what cannot
    be known, mask is None with add_generation_prompt (to be answered, not trained on) and UserError without it."""
    chat = read_chat(tok, messages, tools, add_generation_prompt)
    return encode(tok, chat, *pieces_of(tok, chat, format))


def encode(tok, chat, pieces, known):
    ids, mask = assemble(tok, pieces)
    if chat.prompt or (known and mask is not None):
        return ids, mask if known else None
    why = (
        "this tokenizer does not spell the text it was given"
        if known
        else "the chat_template is none we know and has no {% generation %}: name a format"
    )
    raise UserError(
        "cannot tell which tokens the assistant said, and a guessed mask would train the wrong thing; "
        f"{why}, or render with add_generation_prompt for the ids alone"
    )


LAYOUTS = (
    "{messages}, ShareGPT {conversations: [{from, value}]}, Alpaca {instruction, input, output}, {prompt, completion}, "
    "{prompt, response}"
)


def read_records(path):
    """Yields (record, messages, tools) for each record of a JSON list or JSONL, in any of the LAYOUTS."""
    for n, record in enumerate(json_records(path), 1):
        try:
            yield record, *as_messages(record)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path}: record {n} cannot be read as a conversation: {e}") from None


def as_messages(record):
    """One record of a dataset, in any of the LAYOUTS -> (messages, tools or None). UserError names the keys of any other."""
    if not isinstance(record, dict):
        raise UserError(f"it is a {type(record).__name__}, not an object")
    keys, tools = record.keys(), record.get("tools")
    talk = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    if "messages" in keys:
        return record["messages"], tools
    if "conversations" in keys:
        role = {"human": "user", "gpt": "assistant"}
        return talk + [
            {"role": role.get(m["from"], m["from"]), "content": m["value"]}
            for m in record["conversations"]
        ], tools
    if {"instruction", "output"} <= keys:
        task = record["instruction"] + (
            f"\n\n### Input:\n{record['input']}" if record.get("input") else ""
        )
        return [
            *talk,
            {"role": "user", "content": task},
            {"role": "assistant", "content": record["output"]},
        ], tools
    if "prompt" in keys and (
        answer := next((k for k in ("completion", "response") if k in keys), None)
    ):
        for role, part in ("user", record["prompt"]), ("assistant", record[answer]):
            talk += part if isinstance(part, list) else [{"role": role, "content": part}]
        return talk, tools
    raise UserError(
        f"its keys are {', '.join(repr(k)[:40] for k in list(keys)[:12]) or 'none'}; known layouts: {LAYOUTS}"
    )


def example(tok, messages, tools=None, format=None):
    """One conversation -> (ids, mask) to train on. UserError if it would teach nothing, or teach something wrong."""
    chat = read_chat(tok, messages, tools)
    roles = [m["role"] for m in chat.messages]
    if "assistant" not in roles:
        raise UserError("no assistant turn")
    if roles[-1] != "assistant":
        raise UserError(f"ends with a {roles[-1]} turn")
    for m in chat.messages:
        if (
            not m["content"].strip()
            and not m.get("tool_calls")
            and m["role"] in ("user", "assistant")
        ):
            raise UserError(f"empty {m['role']} turn")
    pieces, known = pieces_of(tok, chat, format)
    if roles[0] == "system" and chat.messages[0]["content"].strip() not in "".join(
        piece.text for piece in pieces
    ):
        raise UserError("the format loses the system prompt here: put it into the first user turn")
    return encode(tok, chat, pieces, known)


def examples(tok, records, skipped, strict=False, format=None):
    """Yields example() of each (record, messages, tools); counts those refused in `skipped`, a Counter of reasons.

    Raises UserError at the first bad conversation if strict, and at the end if none was good."""
    good = n = 0
    for n, (_, messages, tools) in enumerate(records, 1):
        try:
            pair = example(tok, messages, tools, format)
        except UserError as e:
            if strict:
                raise UserError(f"conversation {n}: {e}") from None
            skipped[str(e)] += 1
            continue
        good += 1
        yield pair
    if not good:
        raise UserError(
            f"none of {n} conversations can be trained on: "
            + "; ".join(f"{count} x {why}" for why, count in skipped.most_common(3))
        )


def stop_id(tok, format=None):
    """The id that ends an assistant's turn: what the engine stops at."""
    ids, mask = render(
        tok,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        format=format,
    )
    return [i for i, m in zip(ids, mask) if m][-1]


def paint(tok, ids, mask, color=True):
    """The conversation as text, what is in the loss in green (or in guillemets), control characters spelled out."""
    green, plain = ("\x1b[32m", "\x1b[0m") if color else ("«", "»")
    runs = [
        (said, printable(tok.decode([i for i, _ in run])))
        for said, run in groupby(zip(ids, mask), key=lambda pair: pair[1])
    ]
    return "".join(green + text + plain if said else text for said, text in runs)


def printable(text):
    """Control characters but the newline spelled out: neither a file nor a model must steer the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda m: repr(m[0])[1:-1], text)


def show(args):
    from tokenizer import Tokenizer  # here, for the formats above need no tokenizer of ours

    tok, skipped, total, supervised = Tokenizer.load(args.tokenizer), Counter(), 0, 0
    pairs = examples(
        tok, islice(read_records(args.file), args.limit), skipped, args.strict, args.format
    )
    for n, (ids, mask) in enumerate(pairs, 1):
        print(paint(tok, ids, mask, color="NO_COLOR" not in os.environ))
        print(f"--- {len(ids)} tokens, {sum(mask)} supervised ({sum(mask) / len(ids):.1%})\n")
        total, supervised = total + len(ids), supervised + sum(mask)
    print(f"{n} conversations, {total} tokens, {supervised / total:.1%} supervised")
    for why, count in skipped.most_common():
        print(f"skipped {count}: {why}")


def convert(args):
    """Records of any layout -> DIR/{train,val,test}.jsonl of {messages}. What comes before the last answer decides, by its
    hash, where a record goes: the same question is never in two splits, and more records move none."""
    try:
        train, val, test = map(float, args.split.split("/"))
        if min(train, val, test) < 0 or not train + val + test:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--split {args.split}: give the three shares of train, val and test, as 85/5/10"
        ) from None
    lines = {"train": [], "val": [], "test": []}
    for path in args.files:
        for record, messages, tools in read_records(path):
            kept = {k: record[k] for k in ("family", "answer", "checks") if k in record} | (
                {"tools": tools} if tools else {}
            )
            asked = hashlib.sha256(to_json(messages[:-1]).encode("utf-8", "replace")).digest()
            place = int.from_bytes(asked[:8], "big") / 2**64 * (train + val + test)
            name = "train" if place < train else "val" if place < train + val else "test"
            lines[name].append(to_json({"messages": messages, **kept}) + "\n")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, of_split in lines.items():
        write_atomic(
            Path(args.out, f"{name}.jsonl"),
            lambda path: path.write_text("".join(of_split), encoding="utf-8"),
        )
    print(
        f"{args.out}: "
        + ", ".join(f"{len(of_split):,} {name}" for name, of_split in lines.items())
        + " conversations"
    )


def main():
    parser = argparse.ArgumentParser(
        description="What a chat format makes of conversations, and what is in the loss."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "show", help="print conversations, supervised tokens in green (NO_COLOR=1: in «»)"
    )
    p.add_argument("file", help=f"JSON or JSONL: {LAYOUTS}")
    p.add_argument("--tokenizer", required=True, help="a model folder or tokenizer file")
    p.add_argument("--format", help=f"instead of the folder's own: {', '.join(FORMATS)}")
    p.add_argument("--limit", type=int, default=10, help="how many conversations (default 10)")
    p.add_argument(
        "--strict", action="store_true", help="stop at a conversation that cannot be trained on"
    )
    p.set_defaults(run=show)
    p = commands.add_parser(
        "convert", help="any layout to {messages} in train.jsonl, val.jsonl and test.jsonl"
    )
    p.add_argument("files", nargs="+", help=f"JSON or JSONL: {LAYOUTS}")
    p.add_argument("--out", required=True, help="the folder to write")
    p.add_argument("--split", default="85/5/10", help="shares of train, val and test [85/5/10]")
    p.set_defaults(run=convert)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli(main)
