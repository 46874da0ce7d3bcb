"""Conversations to token ids and a loss mask: who said what decides what a model learns to say.

    python chat.py show chat.jsonl --tokenizer FOLDER             # what is in the loss, in «»
    python chat.py convert alpaca.json --out DIR --split 85/5/10  # any layout -> DIR/train.jsonl

Top to bottom: a conversation is checked; a format by name makes pieces of it, each of which knows
whether the assistant says it; `assemble` makes ids and mask of the pieces; `render` is all of that
in one call; then records of files, and the two commands.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from itertools import accumulate, compress, cycle, groupby, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from common import Parser, UserError, cli, json_records, sha256, well_formed, write_atomic

CHAT_ROLES = "system user assistant tool".split()

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


def read_chat(tok, messages, tools=None, prompt=False, options=None):
    """OpenAI-style messages -> Chat. Raises UserError naming the message at fault."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError("a conversation is a non-empty list of {role, content} messages")
    if tools and not (isinstance(tools, list) and all(map(has_function, tools))):
        raise UserError(
            "tools must be a list of {type: function, function: {name, description, parameters}}"
        )
    checked = [read_message(i, message) for i, message in enumerate(messages)]
    system, turns = None, checked
    if checked[0]["role"] == "system":
        system, turns = checked[0]["content"], checked[1:]
    bos, eos = ("" if i is None else tok.decode([i]) for i in (tok.bos_id, tok.eos_id))
    return Chat(checked, system, turns, tools or None, prompt, bos, eos, options or {})


def has_function(tool):
    return isinstance(tool, dict) and isinstance(tool.get("function"), dict)


def read_message(i, message):
    """Message number i -> the same, checked: text is one string, arguments of calls are dicts."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in CHAT_ROLES:
        raise UserError(f"message {i}: unknown role {role!r}; roles are {', '.join(CHAT_ROLES)}")
    calls = read_calls(i, message)
    text = message.get("content")
    if text is None and calls:
        text = ""
    if isinstance(text, list):
        with suppress(KeyError, TypeError):  # of a part that is no text: refused below
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


def read_calls(i, message):
    """A message's tool calls as the templates want them: arguments are a dict (OpenAI sends a
    string of JSON)."""
    calls = []
    try:
        for call in message.get("tool_calls") or []:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            function = {"name": str(name), "arguments": dict(arguments)}
            calls.append({**call, "function": function})
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"message {i}: a tool call is {{function: {{name, arguments}}}}, "
            "arguments a JSON object"
        ) from None
    return calls


# ------------------------------------------------------------ the formats: a conversation to pieces
# Each format walks the messages once and yields pieces. "said" begins where the generation prompt
# ends, so the mask is exactly what the model will have to produce: its words, the spaces its format
# puts round them, the end.
class Piece(NamedTuple):
    text: str
    said: bool | None = False  # the assistant has to produce this: it is in the loss; None: unknown
    template: bool = True  # the template's own words, in which a marker's name means its id


words = Piece  # the template's own: `<|im_start|>` in here is the marker


def content(text, said=False):
    """What a person or a model wrote: `<|im_start|>` in here is text, whoever typed it."""
    return Piece(text, said, False)


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
            yield from enclosed("", f" {text.strip()} ", chat.eos, True)


def llama3(chat, date=""):
    """Llama 3. With a date, as strftime takes it, 3.1 and later: these always have a system turn,
    put the tools into the first user turn, and know calls and results."""
    head, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
    messages = chat.messages
    yield words(chat.bos)
    if date:
        messages = chat.turns
        today = datetime.now().strftime(date)
        environment = "Environment: ipython\n" if chat.tools else ""
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {today}\n\n"
        before = head.format("system") + environment + dates
        yield from enclosed(before, (chat.system or "").strip(), end)
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
        yield from enclosed(head.format("user") + task, text, end)
    for m in messages:
        role, text = m["role"], m["content"].strip()
        calls = m.get("tool_calls", [])
        if len(calls) > 1:
            raise UserError(f"llama3.1 makes one tool call at a time, not {len(calls)}")
        if role == "tool":
            role, text = "ipython", json_text(m["content"])
        elif calls:
            text = call_text(calls[0], "parameters")
        yield from enclosed(head.format(role), text, end, role == "assistant")
    if chat.prompt:
        yield words(head.format("assistant"))


def call_text(call, arguments="arguments"):
    """A tool call as Llama's and Qwen's templates write it, the name unescaped."""
    function = call["function"]
    return f'{{"name": "{function["name"]}", "{arguments}": {json_text(function["arguments"])}}}'


def mistral(chat, space=" ", lead="", system_at=-1, trim=False):
    """v1's markers are plain text, led by a space; v3's tokens, with SentencePiece's spaces;
    tekken's without.

    Where the system prompt goes (v3 loses it if the assistant spoke last) and that the tools stand
    before every message that equals the last user's is as published."""
    yield words(chat.bos)
    users = [m for m in chat.turns if m["role"] == "user"]
    for m in chat.turns:
        text = m["content"]
        if m["role"] == "user":
            if chat.tools and m == users[-1]:
                tools = ", ".join(mistral_tool(tool["function"]) for tool in chat.tools)
                yield from enclosed("[AVAILABLE_TOOLS]" + space, f"[{tools}]", "[/AVAILABLE_TOOLS]")
            if chat.system is not None and m is chat.turns[system_at]:
                text = f"{chat.system}\n\n{text}"
            yield from enclosed(f"{lead}[INST]{space}", text, f"{lead}[/INST]")
        elif m["role"] == "tool":
            result = f'{{"content": {text}, "call_id": "{mistral_id(m.get("tool_call_id"))}"}}'
            yield from enclosed("[TOOL_RESULTS]" + space, result, "[/TOOL_RESULTS]")
        else:
            if "tool_calls" in m:
                yield words("[TOOL_CALLS]", True)
                text = "[" + ", ".join(map(mistral_call, m["tool_calls"])) + "]"
            text = text.strip() if trim else text
            yield from enclosed("", space + text, chat.eos, True)


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
    for role, run in groupby(enumerate(chat.turns), lambda turn: turn[1]["role"]):
        if role == "tool":  # results that follow one another share one user turn
            yield words("<|im_start|>user")
            for _, m in run:
                yield from enclosed("\n<tool_response>\n", m["content"], "\n</tool_response>")
            yield words("<|im_end|>\n")
            continue
        for i, m in run:
            if role == "assistant":
                # Qwen 3 drops the thoughts of turns before the last question, and shows a last
                # turn that it has none.
                thoughts, text = split_thoughts(m) if think else ("", m["content"])
                shown = think and i > asked and (thoughts or i == last)
                yield from qwen_answer(m, thoughts if shown else None, text)
            else:
                yield from turn(f"<|im_start|>{role}\n", m, "<|im_end|>", "\n")
    if chat.prompt:
        yield words("<|im_start|>assistant\n")


def qwen_answer(m, thoughts, text):
    """An assistant's turn: its thoughts unless they are None, its text, its tool calls."""
    yield words("<|im_start|>assistant\n")
    if thoughts is not None:
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


def split_thoughts(m):
    """-> (thoughts, answer), from reasoning_content or <think>...</think>, as Qwen 3 does it."""
    thoughts, text = m.get("reasoning_content", ""), m["content"]
    if "reasoning_content" not in m and "</think>" in text:
        before, *_, after = text.split("</think>")
        thoughts, text = before.split("<think>")[-1].strip("\n"), after.lstrip("\n")
    return thoughts, text


def json_text(value, ensure_ascii=False, **options):
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class Format(NamedTuple):
    pieces: Callable  # Chat -> Iterator[Piece]
    markers: tuple = ()  # must be single tokens, or the format would be spelled out as text
    tools: bool = False  # knows tools, calls and results
    alternates: bool = False  # one leading system message at most, then user, assistant, user, ...


IM = ("<|im_start|>", "<|im_end|>")
INST = ("[INST]", "[/INST]")
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
# The name people say means this variant here.
CHAT_FORMATS["mistral"] = CHAT_FORMATS["mistral-v3"]
CHAT_FORMATS["qwen"] = CHAT_FORMATS["qwen2.5"]


def named_pieces(name, tok, chat):
    """The conversation's pieces in a format by name; UserError for what the format cannot say."""
    if name not in CHAT_FORMATS:
        raise UserError(f"unknown chat format {name!r}; there are {', '.join(CHAT_FORMATS)}")
    form = CHAT_FORMATS[name]
    missing = [marker for marker in form.markers if marker not in tok.special]
    if not chat.eos and not form.markers:
        missing = ["EOS"]
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
        if any(role != wanted for role, wanted in zip(roles, cycle(("user", "assistant")))):
            raise UserError(
                f"chat format {name}: after a system prompt user and assistant take turns, "
                f"not {roles}"
            )
    return list(form.pieces(chat))


# ------------------------------------------------------------------------- pieces to ids and mask
@lru_cache(maxsize=8)
def marker_pattern(names):
    """A regex that matches any of the names, the longest first; without names it never matches."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join([*map(re.escape, longest_first), "(?!)"]) + ")")


def split_at_markers(tok, pieces):
    """Yield (said, text, id of the marker or None): only the template's own words name a marker.

    Here a user's text becomes safe: what it spells stays text."""
    split = marker_pattern(tuple(tok.special)).split
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
            "tokenizer does not spell the text it was given; name a format, or render with "
            "add_generation_prompt for the ids alone"
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
    # Only the start of the last stretch matters, so a normalizer (NFC) may respell what is in it.
    head = data[: len(flags.rstrip(flags[-1:]))]
    if not head:  # all of it was said, or nothing
        return ids, [flags[0]] * len(ids)
    spelled = [tok.token_bytes(i) for i in ids]
    whole = b"".join(spelled)
    if not whole.startswith(head):
        if not whole.startswith(b" " + head):
            return ids, unknown
        flags = flags[:1] + flags  # SentencePiece's space
    flags = flags.ljust(len(whole), flags[-1:])
    ends = accumulate(map(len, spelled), initial=0)
    # The mask ends here: a token is in the loss if the assistant said all of its bytes.
    return ids, [all(flags[begin:end]) for begin, end in pairwise(ends)]


# --------------------------------------------- what others call: render to answer, example to train
def pieces_of(tok, chat, format=None):
    """The conversation's pieces in the format by name, the folder's own, or ChatML."""
    template = tok.chat_template
    if format or template in (None, "", CHATML_TEMPLATE):
        if chat.options:
            raise UserError(f"this chat format does not take {', '.join(chat.options)}")
        return named_pieces(format or "chatml", tok, chat)
    from formats.templates import pieces_of_template

    return pieces_of_template(tok, chat, template)


def render(
    tok,
    messages: list[dict],
    add_generation_prompt=False,
    tools=None,
    format=None,
    options=None,
    resume=False,
) -> tuple[list[int], list[int]]:
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
    pieces = pieces_of(tok, chat, format)
    if resume:
        pieces = pieces_to_resume(pieces, chat.messages[-1])
    return assemble(tok, pieces, not (add_generation_prompt or resume))


def pieces_to_resume(pieces, message):
    """The pieces up to the end of the last message's text, which a template may have trimmed."""
    written = message["content"]
    if message["role"] != "assistant" or not written.strip() or "tool_calls" in message:
        raise UserError("only an assistant's text can be continued, and the last message is none")
    for text in (written, written.strip()):
        for n in reversed(range(len(pieces))):
            before, found, _ = pieces[n].text.rpartition(text)
            if found:
                return [*pieces[:n], pieces[n]._replace(text=before + found)]
    raise UserError("this chat format does not show the last message as it was written")


def example(tok, messages, tools=None, format=None):
    """One conversation -> (ids, mask) to train on. UserError if it teaches nothing, or wrongly."""
    chat = read_chat(tok, messages, tools)
    roles = [m["role"] for m in chat.messages]
    if "assistant" not in roles:
        raise UserError("no assistant turn")
    if roles[-1] != "assistant":
        raise UserError(f"ends with a {roles[-1]} turn")
    for m in chat.messages:
        empty = not m["content"].strip() and "tool_calls" not in m
        if empty and m["role"] in ("user", "assistant"):
            raise UserError(f"empty {m['role']} turn")
    pieces = pieces_of(tok, chat, format)
    if chat.system and chat.system.strip() not in "".join(piece.text for piece in pieces):
        raise UserError("the format loses the system prompt here: put it into the first user turn")
    return assemble(tok, pieces, True)


def examples(tok, name, records, counts, most=sys.maxsize):
    """Yield example() of each (record, messages, tools), of at most `most` tokens.

    What is cut or left out is counted in `counts` by reason. A conversation that is too long keeps
    its start, and so loses the end of an answer that was not reached; one whose prompt alone is too
    long teaches nothing. UserError, with the source's name, at the end if none was good."""
    read = good = 0
    for _, messages, tools in records:
        read += 1
        try:
            ids, mask = example(tok, messages, tools)
            if not any(mask[1:most]):
                raise UserError("the prompt alone fills the context")
        except UserError as reason:
            counts[f"left out: {reason}"] += 1
            continue
        if len(ids) > most:
            counts["cut to the context"] += 1
        good += 1
        yield ids[:most], mask[:most]
    if not good:
        reasons = "; ".join(f"{times:,} x {why}" for why, times in counts.most_common(3))
        raise UserError(f"{name}: nothing to train on in {read:,} conversations: {reasons}")


def stop_id(tok, format=None):
    """The id that ends an assistant's turn: what the engine stops at."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    *_, end = compress(*render(tok, talk, format=format))
    return end


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
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path}: record {n} cannot be read as a conversation: {e}") from None


def as_messages(record):
    """One record -> (messages, tools or None). UserError names the keys of an unknown layout."""
    match record:
        case {"messages": talk}:
            return talk, record.get("tools")
        case {"conversations": said}:
            names = {"human": "user", "gpt": "assistant"}
            talk = [{"role": names.get(m["from"], m["from"]), "content": m["value"]} for m in said]
        case {"instruction": task, "output": answer}:
            if record.get("input"):
                task += f"\n\n### Input:\n{record['input']}"
            talk = as_turns("user", task) + as_turns("assistant", answer)
        case {"prompt": task, "completion": answer} | {"prompt": task, "response": answer}:
            talk = as_turns("user", task) + as_turns("assistant", answer)
        case dict():
            keys = ", ".join(repr(key)[:40] for key in list(record)[:12])
            raise UserError(f"its keys are {keys or 'none'}; known layouts: {LAYOUTS}")
        case _:
            raise UserError(f"it is a {type(record).__name__}, not an object")
    return as_turns("system", record.get("system") or []) + talk, record.get("tools")


def as_turns(role, said):
    """A text as one message of the role; a list is messages already."""
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def write_records(path, rows):
    """Rows -> JSONL, all or nothing."""
    text = "".join(json_text(row) + "\n" for row in rows)
    write_atomic(path, lambda path: path.write_text(text, encoding="utf-8"))


# ------------------------------------------------------------------------------------ the commands
def paint(tok, ids, mask):
    """The conversation as text; what is in the loss stands in «»."""
    text = ""
    for said, run in groupby(zip(ids, mask), lambda pair: pair[1]):
        part = printable(tok.decode([i for i, _ in run]))
        text += f"«{part}»" if said else part
    return text


def printable(text):
    """Control characters but the newline spelled out: no text may steer the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda m: repr(m[0])[1:-1], text)


def show_conversations(args):
    """Print conversations as they are trained on, and the share that is in the loss."""
    from tokenizer import Tokenizer  # here, for the formats above need no tokenizer of ours

    tok = Tokenizer.load(args.tokenizer)
    counts = Counter()
    records = islice(read_records(args.file), args.limit)
    for n, (ids, mask) in enumerate(examples(tok, args.file, records, counts), 1):
        print(paint(tok, ids, mask))
        print(f"--- {n}: {len(ids)} tokens, {sum(mask)} supervised ({sum(mask) / len(ids):.1%})\n")
    for what, times in counts.most_common():
        print(f"{times} {what}")


def convert_records(args):
    """Records of any layout -> DIR/{train,val,test}.jsonl of {messages}.

    What comes before the last answer decides, by its hash, where a record goes: the same question
    is never in two splits, and more records move none."""
    shares = re.fullmatch(r"(\d+)/(\d+)/(\d+)", args.split)
    bounds = list(accumulate(map(int, shares.groups()))) if shares else [0]
    if not bounds[-1]:
        raise UserError(f"--split {args.split}: give the shares of train, val, test, as 85/5/10")
    splits = {"train": [], "val": [], "test": []}
    for path in args.files:
        for record, messages, _ in read_records(path):
            asked = json_text(messages[:-1]).encode("utf-8", "replace")
            place = int(sha256(asked)[:16], 16) / 2**64 * bounds[-1]  # at least 0, below the last
            row = {"messages": messages}
            for key in ("tools", "family", "answer", "checks"):
                if record.get(key):
                    row[key] = record[key]
            split = next(name for name, bound in zip(splits, bounds) if place < bound)
            splits[split].append(row)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        write_records(Path(args.out, f"{name}.jsonl"), rows)
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in splits.items())
    print(f"{args.out}: {counts} conversations")


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="show|convert")
    show = commands.add_parser("show", help="print conversations as they are trained on")
    show.add_argument("file", help=LAYOUTS)
    show.add_argument("--tokenizer", required=True, help="a model folder or tokenizer file")
    show.add_argument("--limit", type=int, default=10, help="how many conversations [10]")
    show.set_defaults(run=show_conversations)
    convert = commands.add_parser("convert", help="to train.jsonl, val.jsonl, test.jsonl")
    convert.add_argument("files", nargs="+", help=LAYOUTS)
    convert.add_argument("--out", required=True, help="the folder to write")
    convert.add_argument("--split", default="85/5/10", help="shares of train, val, test [85/5/10]")
    convert.set_defaults(run=convert_records)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    import chat  # the classes that other files know: those of a script are a second copy

    cli(chat.main)
