"""OpenAI's requests and answers, without a server: a request's fields become prompts and Sampling, deltas become its answer.

serve.py is what speaks HTTP; everything here is plain functions over a tokenizer and the engine's nouns.
"""

import base64
import contextlib
import json
import re
import secrets
import struct
import time
from typing import Annotated

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field

import chat
from engine.sampler import Sampling

# Every field of OpenAI's two endpoints: applied, ignored (nothing here depends on it) or refused with 400. "extra" are ours.
FIELDS = {
    what: tuple(names.split())
    for what, names in {
        "applied": "model messages prompt echo best_of frequency_penalty logit_bias logprobs top_logprobs max_tokens presence_penalty "
        "n max_completion_tokens response_format seed stop stream stream_options temperature tool_choice tools "
        "parallel_tool_calls top_p",
        "extra": "top_k min_p typical_p repetition_penalty min_tokens ignore_eos stop_token_ids regex return_token_ids",
        "ignored": "user metadata store service_tier prediction safety_identifier prompt_cache_key verbosity "
        "prompt_cache_retention prompt_cache_options reasoning_effort",
        "refused": "audio modalities web_search_options functions function_call suffix moderation",
    }.items()
}


class Refusal(HTTPException):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, status, message, code=None, param=None, headers=None):
        super().__init__(status, message, headers)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# -------------------------------------------------------------------------- what a request asks for
class StreamOptions(BaseModel):
    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take. null means the default, as OpenAI has it."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=10**6)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    max_tokens: int | None = Field(None, ge=0, le=10**9)
    min_tokens: int | None = Field(None, ge=0, le=10**6)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict | None = None
    regex: str | None = None
    return_token_ids: bool | None = None


class ChatRequest(Common):
    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "messages": [{"role": "user", "content": "Reverse this list: fox, plum, iron"}],
                "max_tokens": 32,
                "stream": False,
            }
        },
    )
    messages: list[dict] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=10**9)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict] | None = None
    tool_choice: str | dict | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Common):
    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"example": {"prompt": "Once upon a time", "max_tokens": 32}},
    )
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=16)
    echo: bool | None = None


class EmbeddingRequest(BaseModel):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: str | None = Field(None, pattern="^(float|base64)$")
    dimensions: None = None  # a vector is as long as the model is wide


class TokenizeRequest(BaseModel):
    prompt: str | None = None
    messages: list[dict] | None = None
    add_generation_prompt: bool = True


class DetokenizeRequest(BaseModel):
    tokens: list[int] = Field(max_length=1_000_000)


def prompt_lists(value, tok):
    """A prompt or input in any of OpenAI's four shapes -> [ids]."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        value = [value]
    if not value or len(value) > 128:
        raise Refusal(400, f"{len(value)} prompts: give 1 to 128")
    prompts = [
        tok.encode(p, bos=tok.bos_id is not None) if isinstance(p, str) else list(p) for p in value
    ]
    for ids in prompts:
        if not ids or not all(0 <= i < tok.vocab_size for i in ids):
            raise Refusal(
                400,
                f"a prompt must hold at least one token, with ids from 0 to {tok.vocab_size - 1}",
            )
    return prompts


def chat_prompt(tok, messages, tools=None, answer=True):
    """Messages (and tools) -> ids, through the model's own chat format."""
    if tok.chat_template is None and "<|im_start|>" not in tok.special:
        raise Refusal(
            400,
            "this model has no chat template: use /v1/completions with a plain prompt",
            "no_chat_template",
        )
    messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
    return chat.render(tok, messages, add_generation_prompt=answer, tools=tools or None)[0]


def tools_of(body):
    """The functions that may be called, by name."""
    if body.tool_choice == "none":
        return {}
    return {
        f["name"]: f
        for t in body.tools or ()
        if isinstance(f := t.get("function"), dict) and isinstance(f.get("name"), str)
    }


def forced_call(body, tok):
    """tool_choice "required" or one function -> (schema, text before, text after) of the only answer allowed, else None."""
    if strange := [
        t.get("type") for t in body.tools or () if t.get("type", "function") != "function"
    ]:
        raise Refusal(
            400, f"tools of type {strange[0]!r} are not supported, only functions", param="tools"
        )
    if body.tool_choice in (None, "auto", "none"):
        return None
    functions, chosen = tools_of(body), body.tool_choice
    if isinstance(chosen, dict):
        chosen = (
            chosen["function"].get("name") if isinstance(chosen.get("function"), dict) else None
        )
        functions = (
            {chosen: functions[chosen]} if isinstance(chosen, str) and chosen in functions else {}
        )
    if not functions or (isinstance(body.tool_choice, str) and chosen != "required"):
        raise Refusal(
            400,
            f"tool_choice {body.tool_choice!r} is not none, auto, required or one of the tools",
            param="tool_choice",
        )
    arguments = "parameters" if "<|start_header_id|>" in tok.special else "arguments"
    schema = {
        "anyOf": [
            {
                "type": "object",
                "required": ["name", arguments],
                "additionalProperties": False,
                "properties": {
                    "name": {"const": name},
                    arguments: f.get("parameters") or {"type": "object"},
                },
            }
            for name, f in functions.items()
        ]
    }
    return schema, *(
        ("<tool_call>\n", "\n</tool_call>")
        if "<tool_call>" in (tok.chat_template or "")
        else ("", "")
    )


def grammar_of(body, forced=None):
    """response_format, regex or a forced tool call -> what worker.Grammars makes a constraint of, or None."""
    form = body.response_format or {"type": "text"}
    kind, schema = form.get("type"), None
    if kind not in ("text", "json_object", "json_schema"):
        raise Refusal(
            400,
            f"response_format {kind!r}: use text, json_object or json_schema",
            param="response_format",
        )
    if kind == "json_schema":
        schema = (
            form["json_schema"].get("schema") if isinstance(form.get("json_schema"), dict) else None
        )
        if not isinstance(schema, dict):
            raise Refusal(
                400,
                "response_format json_schema needs json_schema.schema, an object",
                param="response_format",
            )
    if forced:
        return "json", *forced
    return ("json", schema) if kind != "text" else ("regex", body.regex) if body.regex else None


def sampling_of(body, prompt, tok, context, logprobs):
    """The request's fields -> Sampling, with the length clamped to the context; only a prompt that is too long is refused."""
    room = context - len(prompt)
    if room < 1:
        raise Refusal(
            400,
            f"the prompt has {len(prompt):,} tokens, this model's context is {context:,}: shorten it so that at "
            "least one token is left for the answer",
            "context_length_exceeded",
            "messages",
        )
    for name in FIELDS["refused"]:
        if body.model_extra.get(name) not in (None, [], {}, ["text"]):
            raise Refusal(400, f"{name} is not supported by this server", "unsupported_field", name)
    bias = {int(k): v for k, v in (body.logit_bias or {}).items() if re.fullmatch("[0-9]{1,9}", k)}
    if len(bias) < len(body.logit_bias or {}):
        raise Refusal(
            400, "logit_bias maps token ids (as strings of digits) to numbers", param="logit_bias"
        )
    asked = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
            "n",
            "seed",
            "ignore_eos",
        )
        if (value := getattr(body, name)) is not None
    }
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    most = min(getattr(body, "max_completion_tokens", None) or body.max_tokens or room, room)
    sampling = Sampling(
        **asked,
        max_tokens=most,
        top_k=max(body.top_k or 0, 0),
        stop=tuple(s for s in stop if s),
        stop_ids=tuple(body.stop_token_ids or ()),
        logit_bias=bias or None,
        logprobs=logprobs,
    )
    sampling.min_tokens = min(sampling.min_tokens, most)
    sampling.check(tok.vocab_size)
    return sampling


# -------------------------------------------------------------------------------- what is sent back
class ToolCalls:
    """Splits an answer into text and tool calls as it streams: Qwen's <tool_call> tags, or an answer that is a JSON call."""

    def __init__(self, names, most=None):
        self.names, self.most, self.held, self.begun, self.calling = names, most, "", False, False

    def push(self, text):
        """-> the part that is certainly text."""
        if not self.names:
            return text
        self.held += text
        begin = self.held.lstrip()
        if self.calling or not begin:
            return ""
        if not self.begun and begin[0] in "{[":  # may be a call without tags: the end will tell
            self.calling = True
            return ""
        self.begun, at = True, self.held.find("<tool_call>")
        if at < 0:  # the tag may have begun
            at = max(
                (len(self.held) - n for n in range(1, 11) if self.held.endswith("<tool_call>"[:n])),
                default=len(self.held),
            )
        else:
            self.calling = True
        text, self.held = self.held[:at], self.held[at:]
        return text

    def finish(self):
        """-> (text left over, calls in OpenAI's shape)."""
        tagged, calls = re.findall(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", self.held, re.S), []
        for text in tagged or [self.held] if self.calling else []:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                for call in parsed if isinstance(parsed := json.loads(text), list) else [parsed]:
                    arguments = call["arguments"] if "arguments" in call else call["parameters"]
                    if tagged or call["name"] in self.names:
                        calls.append(
                            {
                                "index": len(calls),
                                "id": "call_" + secrets.token_hex(6),
                                "type": "function",
                                "function": {
                                    "name": str(call["name"]),
                                    "arguments": json.dumps(arguments, ensure_ascii=False),
                                },
                            }
                        )
        return ("", calls[: self.most]) if calls else (self.held, [])


def spell(tok, i):
    """A token as text: whole characters, or its bytes spelled out, never a replacement character."""
    data = tok.token_bytes(i) or tok.decode([i]).encode()
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data), list(data)


def chat_logprobs(tok, logprobs):
    """[TokenLogprob] -> OpenAI's chat shape."""

    def entry(i, logprob):
        text, data = spell(tok, i)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": data, "id": i}

    return {
        "content": [
            {**entry(t.id, t.logprob), "top_logprobs": [entry(i, p) for i, p in t.top]}
            for t in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(tok, logprobs, offsets, ids):
    """[TokenLogprob] -> the completions' shape; offsets: where in the text each begins; ids: also give the alternatives' ids."""
    tops = [
        {spell(tok, i)[0]: (max(p, -9999.0), i) for i, p in reversed(t.top)} for t in logprobs
    ]  # the likelier of two that
    tops = [
        dict(sorted(top.items(), key=lambda item: -item[1][0])) for top in tops
    ]  # read the same stays
    return {
        "tokens": [spell(tok, t.id)[0] for t in logprobs],
        "text_offset": offsets,
        "top_logprobs": [{text: p for text, (p, _) in top.items()} or None for top in tops],
        "token_logprobs": [
            None if t.logprob is None else max(t.logprob, -9999.0) for t in logprobs
        ],  # None: a prompt's first
        **(
            {"top_token_ids": [{text: i for text, (_, i) in top.items()} for top in tops]}
            if ids
            else {}
        ),
    }


def after(tok, prompt):
    """A Stream for what follows a prompt, which may end within a character."""
    before, stream = tok.stream(), tok.stream(skip_special=True)
    for i in prompt[-4:]:
        before.push(i)
    stream.decoder.setstate(before.decoder.getstate())
    return stream


ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
DONE, MARK = b"data: [DONE]\n\n", "the text's place"


def sse(value):
    return b"data: " + ENCODE(value).encode("utf-8", "replace") + b"\n\n"


class Answer:
    """The choices of one request, gathered from deltas: as events of a stream, or as one body. kind: "chat" or "text".

    prompts: lists of ids; echo: their texts, if they are to be repeated, and scored: their tokens' TokenLogprobs."""

    def __init__(self, tok, body, kind, name, model, prompts, echo=(), scored=()):
        self.tok, self.body, self.kind, self.n = tok, body, kind, body.n or 1
        self.prompt_tokens = sum(map(len, prompts))
        tools = tools_of(body) if kind == "chat" else {}
        most = 1 if getattr(body, "parallel_tool_calls", None) is False else None
        self.choices = [
            dict(
                index=i,
                text="",
                ids=[],
                logprobs=[],
                reason=None,
                calls=ToolCalls(tools, most),
                found=[],
                offsets=[],
                end=0,
                stream=after(tok, prompts[i // self.n]),
            )
            for i in range(self.n * len(prompts))
        ]
        begin = (
            tok.decode([tok.bos_id]) if tok.bos_id is not None else ""
        )  # not the caller's words: it is not repeated
        for i, choice in enumerate(self.choices):
            choice["lead"] = choice["cut"] = kind == "text" and bool(
                choice["stream"].decoder.getstate()[0]
            )
            if echo:
                choice["text"] = (
                    echo[i // self.n]
                    .removeprefix(begin)
                    .removesuffix("\ufffd" if choice["cut"] else "")
                )
                choice["logprobs"] = (
                    [t for k, t in enumerate(scored[i // self.n]) if k or t.id != tok.bos_id]
                    if scored
                    else []
                )
                self.place(choice, tok.stream(), [t.id for t in choice["logprobs"]])
            choice["end"] = len(choice["text"])
        self.object = "chat.completion" if kind == "chat" else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{name}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self.around = {}  # most events differ in their text alone: {choice: what is before it and after}

    def take(self, number, deltas):
        """Deltas of one choice, in order -> (choice, new visible text, new ids, their logprobs)."""
        choice, text = self.choices[number], "".join([d.text for d in deltas])
        ids, logprobs, reason = [], [], deltas[-1].finish_reason
        for d in deltas:
            ids += d.token_ids
            logprobs += d.logprobs or []
        if choice["cut"] or (logprobs and self.kind == "text"):
            text = self.mend(choice, text, self.place(choice, choice["stream"], ids))
        if reason:  # an answer that ends within a character ends before it
            text = choice["calls"].push(text.removesuffix("\ufffd"))
            rest, choice["found"] = choice["calls"].finish()
            text, choice["reason"] = (
                text + rest,
                "tool_calls" if choice["found"] else {"abort": "stop"}.get(reason, reason),
            )
        else:
            text = choice["calls"].push(text)
        choice["text"] += text
        choice["ids"] += ids
        choice["logprobs"] += logprobs
        return choice, text, ids, logprobs

    def place(self, choice, stream, ids):
        """Note where in the text each token begins -> the text they are; part of a character begins where that does."""
        text = ""
        for i in ids:
            choice["offsets"].append(choice["end"] + len(text))
            text += stream.push(i)
        choice["end"] += len(text)
        return text

    def mend(self, choice, text, decoded):
        """text, but if the prompt ends within a character: the engine, which decodes only what it makes, shows each of the bytes
        that end it as U+FFFD; instead comes the whole character, or nothing where it was not ended."""
        first = ""
        if choice["lead"] and decoded:
            choice["lead"], first = False, decoded[0].replace("\ufffd", "")
        if choice["cut"]:
            text = text.lstrip("\ufffd")
            choice["cut"] = not text
        return first + text

    def usage(self):
        made = sum(len(c["ids"]) for c in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def logprobs_of(self, choice, logprobs):
        if not logprobs:
            return None
        if self.kind == "chat":
            return chat_logprobs(self.tok, logprobs)
        return completion_logprobs(
            self.tok, logprobs, choice["offsets"][-len(logprobs) :], self.body.return_token_ids
        )

    def chunk(self, choice, delta, logprobs=None, reason=None, ids=()):
        """One event of a stream: delta is OpenAI's {"content": ...} of a chat, or the text of a completion."""
        shown = {
            "index": choice["index"],
            "delta" if self.kind == "chat" else "text": delta,
            "finish_reason": reason,
            "logprobs": logprobs,
        }
        if self.body.return_token_ids:
            shown["token_ids"] = list(ids)
        return self.event(choices=[shown])

    def event(self, **what):
        return sse(
            {
                **self.head,
                "object": self.object + ".chunk" if self.kind == "chat" else self.object,
                **what,
            }
        )

    def opening(self):
        """Role first, or the prompts that are to be repeated."""
        if self.kind == "chat":
            return b"".join(
                self.chunk(c, {"role": "assistant", "content": ""}) for c in self.choices
            )
        return b"".join(
            self.chunk(c, c["text"], self.logprobs_of(c, c["logprobs"]))
            for c in self.choices
            if c["text"]
        )

    def chunks(self, number, deltas):
        """What a choice's new deltas are as events: they may be many, one event is enough; finish_reason comes once."""
        choice, text, ids, new = self.take(number, deltas)
        out, logprobs, whole = b"", self.logprobs_of(choice, new), self.body.return_token_ids
        if text and not (logprobs or whole):
            if number not in self.around:
                marked = self.chunk(choice, {"content": MARK} if self.kind == "chat" else MARK)
                self.around[number] = marked.split(ENCODE(MARK).encode())
            out = ENCODE(text).encode("utf-8", "replace").join(self.around[number])
        elif text or logprobs or (whole and ids):
            out = self.chunk(
                choice, {"content": text} if self.kind == "chat" else text, logprobs, ids=ids
            )
        if choice["found"]:
            out += self.chunk(choice, {"tool_calls": choice["found"]})
        if choice["reason"]:
            out += self.chunk(choice, {} if self.kind == "chat" else "", reason=choice["reason"])
        return out

    async def stream(self, batches):
        """batches: async iterator of [(prompt's number, Delta)], empty when nothing came for a while -> bytes of server-sent
        events: role, text as it comes, finish_reason once for each choice, usage if asked for, [DONE]."""
        out, usage = (
            self.opening(),
            self.body.stream_options and self.body.stream_options.include_usage,
        )
        try:
            async for batch in batches:
                by_choice = {}
                for position, delta in batch:
                    by_choice.setdefault(position * self.n + delta.index, []).append(delta)
                out += (
                    b"".join([self.chunks(c, deltas) for c, deltas in by_choice.items()])
                    if batch
                    else b": keep-alive\n\n"
                )
                if out and not all(
                    c["reason"] for c in self.choices
                ):  # the last goes out with what ends the stream
                    yield out
                    out = b""
            out += self.event(choices=[], usage=self.usage()) if usage else b""
        except Refusal as refusal:  # the status line is long gone: the error is an event
            out += sse(refusal.body)
        yield out + DONE

    async def whole(self, batches):
        """The same as one JSON body."""
        async for batch in batches:
            for position, delta in batch:
                self.take(position * self.n + delta.index, [delta])
        shown = []
        for c in self.choices:
            one = {
                "index": c["index"],
                "finish_reason": c["reason"] or "length",
                "logprobs": self.logprobs_of(c, c["logprobs"]),
            }
            if self.kind == "chat":
                calls = [{k: v for k, v in call.items() if k != "index"} for call in c["found"]]
                one["message"] = {
                    "role": "assistant",
                    "content": c["text"] or (None if calls else ""),
                    "refusal": None,
                    **({"tool_calls": calls} if calls else {}),
                }
            else:
                one["text"] = c["text"]
            if self.body.return_token_ids:
                one["token_ids"] = c["ids"]
            shown.append(one)
        return {**self.head, "object": self.object, "choices": shown, "usage": self.usage()}


def encode_vector(vector, form):
    """An embedding as OpenAI's clients ask for it: a list, or the base64 of its float32."""
    return (
        vector
        if form != "base64"
        else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    )
