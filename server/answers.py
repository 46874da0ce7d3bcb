"""What goes back to a client in OpenAI's shapes: deltas become the events of a stream, or one body.

    answer = ChatAnswer(tok, body, request_id, model, [prompt])
    async for events in answer.stream(batches): ...    # bytes of server-sent events
    body = await answer.whole(batches)                 # or the same at once, as a dict

batches is an async iterator of lists of Delta, whose indices count the choices of all prompts.
"""

import base64
import itertools
import json
import re
import secrets
import struct
import time
from dataclasses import dataclass, field

from pydantic_core import PydanticSerializationError, to_json

from server.api import Refusal, offered_functions
from tokenizer import Stream

DONE = b"data: [DONE]\n\n"  # where a stream ends


class LazyList(list):
    """An iterator that the encoder takes for a list, so that its items are made one by one."""

    def __init__(self, items):
        super().__init__(itertools.islice(items, 1))  # what is empty must count as empty
        self.items = items

    def __iter__(self):
        return itertools.chain(super().__iter__(), self.items)


encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=LazyList)
json_pieces = encoder.iterencode  # of what may be large


def json_bytes(value):
    """JSON that any decoder takes."""
    try:
        return to_json(value, fallback=list)
    except PydanticSerializationError:  # for half a character that a caller wants repeated
        return "".join(json_pieces(value)).encode("utf-8", "replace")


# ------------------------------------------------------------------------------------- tool calls
TOOL_CALL = "<tool_call>"


class ToolCalls:
    """Splits an answer, as it streams, into text and tool calls: Qwen's <tool_call> tags, or an
    answer that is nothing but a call in JSON."""

    def __init__(self, names, most=None):
        self.names = names  # of the functions that may be called; none: all is text
        self.most = most  # so many calls at most
        self.held = ""  # what may still become a call
        self.begun = False  # something certainly was text
        self.calling = False  # what is held looks like a call

    def push(self, text):
        """-> the part that is certainly text."""
        if not self.names:
            return text
        self.held += text
        begin = self.held.lstrip()
        if self.calling or not begin:
            return ""
        if not self.begun and begin[0] in "{[":  # a call without tags, perhaps: the end will tell
            self.calling = True
            return ""
        self.begun = True
        at = self.held.find(TOOL_CALL)
        self.calling = at >= 0
        if not self.calling:
            at = self.held.rfind("<")
            if at < 0 or not TOOL_CALL.startswith(self.held[at:]):  # no tag begins at the end
                at = len(self.held)
        text = self.held[:at]
        self.held = self.held[at:]
        return text

    def finish(self):
        """-> (text left over, calls in OpenAI's shape). What only looked like a call is text."""
        if not self.calling:
            return self.held, []
        calls = []
        rest = ""
        for part in re.split(r"(<tool_call>.*?(?:</tool_call>|$))", self.held, flags=re.S):
            found = parse_calls(part.removeprefix(TOOL_CALL).removesuffix("</tool_call>"))
            known = all(call["function"]["name"] in self.names for call in found)
            if found and (known or part.startswith(TOOL_CALL)):
                calls += found
            else:
                rest += part
        return rest if rest.strip() or not calls else "", calls[: self.most]


def parse_calls(text):
    """A call in JSON, or a list of them -> calls in OpenAI's shape; [] for anything else."""
    calls = []
    try:
        parsed = json.loads(text)
        for call in parsed if isinstance(parsed, list) else [parsed]:
            arguments = call["arguments"] if "arguments" in call else call["parameters"]
            written = json.dumps(arguments, ensure_ascii=False)
            function = {"name": str(call["name"]), "arguments": written}
            call_id = "call_" + secrets.token_hex(6)
            calls.append({"id": call_id, "type": "function", "function": function})
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return calls


# --------------------------------------------------------------------------------------- logprobs
def spell(tok, i):
    """A token as (text, bytes): whole characters, or its bytes spelled out, never U+FFFD."""
    data = tok.token_bytes(i) or tok.decode([i]).encode()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return text, list(data)


def finite(logprob):
    """JSON has no infinity; None is a prompt's first token, before which nothing comes."""
    return None if logprob is None else max(logprob, -9999.0)


def chat_logprobs(tok, logprobs):
    """A list of worker.plain_logprobs in the chat's shape."""

    def entry(i, logprob):
        text, data = spell(tok, i)
        return {"token": text, "logprob": finite(logprob), "bytes": data, "id": i}

    def entry_with_top(token):
        i, logprob, top = token
        return {**entry(i, logprob), "top_logprobs": [entry(*pair) for pair in top]}

    return {"content": map(entry_with_top, logprobs), "refusal": None}


def completion_logprobs(tok, logprobs, offsets, with_ids):
    """A list of worker.plain_logprobs in the completions' shape; offsets: where in the text each
    token begins."""

    def by_text(pairs):
        named = {}
        for i, value in pairs:
            named.setdefault(spell(tok, i)[0], value)  # of equal texts the likelier stays
        return named

    def top(pairs):
        return by_text([(i, finite(logprob)) for i, logprob in pairs]) or None

    shown = {
        "tokens": (spell(tok, token)[0] for token, _, _ in logprobs),
        "token_logprobs": (finite(logprob) for _, logprob, _ in logprobs),
        "top_logprobs": (top(pairs) for _, _, pairs in logprobs),
        "text_offset": offsets,
    }
    if with_ids:
        shown["top_token_ids"] = (by_text([(i, i) for i, _ in pairs]) for _, _, pairs in logprobs)
    return shown


# ------------------------------------------------------------------------------------- one choice
@dataclass
class Choice:
    """Holds one of the answers that a request gets, as far as it has come."""

    index: int
    calls: ToolCalls
    # Of completions: a Stream behind the prompt, which tells where in the text each token begins.
    decoder: Stream | None = None
    cut: bool = False  # the prompt ends within a character, and the text has not begun
    awaited: bool = False  # that character is not whole yet
    text: str = ""
    token_ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    offsets: list = field(default_factory=list)  # where in the text each token begins
    end: int = 0  # characters that the tokens up to here decode to
    found: list = field(default_factory=list)  # tool calls, when all is said
    reason: str | None = None  # why it ended

    def take(self, delta):
        """-> (new visible text, logprobs of its tokens)"""
        text = delta.text
        logprobs = delta.logprobs
        if self.decoder and (self.cut or logprobs):
            text = self.mend(text, self.place(self.decoder, delta.token_ids))
        text = self.calls.push(text)
        if delta.finish_reason:
            rest, self.found = self.calls.finish()
            text += rest
            self.reason = delta.finish_reason
            if self.found and self.reason == "stop":
                self.reason = "tool_calls"
        self.text += text
        self.token_ids += delta.token_ids
        self.logprobs += logprobs
        return text, logprobs

    def place(self, decoder, ids):
        """Note where each token begins -> the text they are; a part of a character begins where
        the character does."""
        text = ""
        for i in ids:
            self.offsets.append(self.end + len(text))
            text += decoder.push(i)
        self.end += len(text)
        return text

    def mend(self, text, decoded):
        """Text of the engine -> the same, with the character whole within which the prompt ended.

        The engine decodes only what it makes, and shows each byte that ends that character as
        U+FFFD. The decoder, which has seen the prompt, has it whole."""
        first = ""
        if self.awaited and decoded:
            self.awaited = False
            first = decoded[0].replace("\ufffd", "")
        if self.cut:
            text = text.lstrip("\ufffd")
            self.cut = not text
        return first + text


def decoder_behind(tok, prompt):
    """A Stream for what follows a prompt, which may end within a character."""
    stream = tok.stream(skip_special=True)
    before = tok.decode_bytes(prompt[-4:], skip_special=False)  # no character is longer
    stream.decoder.decode(before)
    return stream


# ------------------------------------------------------------------------------- all of an answer
class Generation:
    """All choices of one request: `stream` and `whole` gather their deltas and show them.

    A chat and a completion differ in the class's three names (what an id begins with, and what
    OpenAI calls the body and its events) and in five methods: `new_choice`; `opening`, the bytes of
    the events that a stream begins with; `text_field`, new text in an event's choice, "" in the one
    that ends it; `whole_field`, all of the text in a body's choice; and `show_logprobs`."""

    def __init__(self, tok, body, request_id, model, prompts, scored=()):
        """scored: the logprobs of each prompt's tokens, if they are to be shown."""
        self.tok = tok
        self.body = body
        self.scored = scored
        self.n = body.n  # choices of each prompt
        self.scores = body.logprobs is not None and body.logprobs is not False
        self.prompt_tokens = sum(map(len, prompts))
        self.head = {
            "id": f"{self.kind}-{request_id}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        begun = json_bytes({**self.head, "object": self.event_object})
        self.event_head = b"data: " + begun[:-1] + b","  # the same in every event
        self.choices = []
        for prompt in prompts:
            for _ in range(self.n):
                self.choices.append(self.new_choice(len(self.choices), prompt))

    async def stream(self, batches):
        """-> bytes of server-sent events: the opening, text as it comes, finish_reason once for
        each choice, usage if asked for, and DONE, which ends the last piece and nothing else.

        Raises Refusal where that comes before anything has gone out."""
        out = self.opening()
        begun = False
        try:
            async for batch in batches:
                if not batch:
                    out += b": keep-alive\n\n"
                for delta in batch:
                    out += self.events(self.choices[delta.index], delta)
                # The last events go out together with what ends the stream.
                if out and not all(choice.reason for choice in self.choices):
                    yield out
                    begun = True
                    out = b""
            if (self.body.stream_options or {}).get("include_usage"):
                out += self.event(choices=[], usage=self.usage())
        except Refusal as refusal:
            if not begun:
                raise
            # The status line is gone, so the error is an event.
            out += b"data: " + json_bytes(refusal.body) + b"\n\n"
        yield out + DONE

    async def whole(self, batches):
        """-> the body of a request that is not streamed, as a dict."""
        async for batch in batches:
            for delta in batch:
                self.choices[delta.index].take(delta)
        choices = []
        for choice in self.choices:
            logprobs = choice.logprobs if self.scores else None
            what = self.whole_field(choice)
            choices.append(self.shown(choice, what, logprobs, choice.reason, choice.token_ids))
        return {**self.head, "object": self.body_object, "choices": choices, "usage": self.usage()}

    def usage(self):
        made = sum(len(choice.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def event(self, **what):
        return self.event_head + json_bytes(what)[1:] + b"\n\n"

    def shown(self, choice, what, logprobs=None, reason=None, ids=()):
        """A choice in OpenAI's shape; what: its field for the text."""
        if logprobs is not None:
            logprobs = self.show_logprobs(choice, logprobs)
        shown = {"index": choice.index, **what, "finish_reason": reason, "logprobs": logprobs}
        if self.body.return_token_ids:
            shown["token_ids"] = ids
        return shown

    def choice_event(self, *shown):
        return self.event(choices=[self.shown(*shown)])

    def events(self, choice, delta):
        """What a choice's new delta is as events; finish_reason comes once."""
        text, logprobs = choice.take(delta)
        ids = delta.token_ids if self.body.return_token_ids else ()
        out = b""
        if text or logprobs or ids:
            out += self.choice_event(choice, self.text_field(text), logprobs or None, None, ids)
        if choice.found:
            calls = [{"index": i, **call} for i, call in enumerate(choice.found)]
            out += self.choice_event(choice, {"delta": {"tool_calls": calls}})
        if choice.reason:
            out += self.choice_event(choice, self.text_field(""), None, choice.reason)
        choice.logprobs.clear()  # they are out
        return out


class ChatAnswer(Generation):
    kind = "chatcmpl"
    body_object = "chat.completion"
    event_object = "chat.completion.chunk"

    def new_choice(self, index, prompt):
        most = None if self.body.parallel_tool_calls else 1
        return Choice(index, ToolCalls(offered_functions(self.body), most))

    def opening(self):
        role = {"delta": {"role": "assistant", "content": ""}}
        return b"".join(self.choice_event(choice, role) for choice in self.choices)

    def text_field(self, text):
        return {"delta": {"content": text} if text else {}}

    def show_logprobs(self, choice, logprobs):
        return chat_logprobs(self.tok, logprobs)

    def whole_field(self, choice):
        content = choice.text or (None if choice.found else "")
        message = {"role": "assistant", "content": content, "refusal": None}
        if choice.found:
            message["tool_calls"] = choice.found
        return {"message": message}


class TextAnswer(Generation):
    kind = "cmpl"
    body_object = event_object = "text_completion"

    def new_choice(self, index, prompt):
        decoder = decoder_behind(self.tok, prompt)
        cut = bool(decoder.decoder.getstate()[0])
        choice = Choice(index, ToolCalls({}), decoder, cut, cut)
        if self.body.echo:
            self.repeat(choice, prompt, self.scored[index // self.n] if self.scored else [])
        return choice

    def repeat(self, choice, prompt, scored):
        """Begin a choice with its prompt, without the beginning-of-text that the caller did not
        write and the character that its last bytes only begin."""
        text = self.tok.decode(prompt)
        if self.tok.bos_id is not None:
            text = text.removeprefix(self.tok.decode([self.tok.bos_id]))
            if prompt[0] == self.tok.bos_id:
                scored = scored[1:]
        if self.body.max_tokens == 0:  # then nothing comes after it
            choice.reason = "length"
        choice.text = text.removesuffix("\ufffd") if choice.cut else text
        choice.logprobs = scored[:]  # a copy: n choices begin with them
        choice.place(self.tok.stream(), [token for token, *_ in scored])
        choice.end = len(choice.text)

    def opening(self):
        out = b""
        for choice in self.choices:
            if choice.text or choice.reason:
                prompt = self.text_field(choice.text)
                out += self.choice_event(choice, prompt, choice.logprobs or None, choice.reason)
        return out

    def text_field(self, text):
        return {"text": text}

    def show_logprobs(self, choice, logprobs):
        offsets = choice.offsets[len(choice.offsets) - len(logprobs) :]
        return completion_logprobs(self.tok, logprobs, offsets, self.body.return_token_ids)

    def whole_field(self, choice):
        return {"text": choice.text}


def encode_vector(vector, form):
    """An embedding as a client asks for it: a list, or the base64 of its float32."""
    if form != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
