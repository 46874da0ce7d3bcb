"""What OpenAI's requests ask for: a body's fields become prompts, Sampling and a grammar.

serve.py speaks HTTP; here are plain functions over a tokenizer. answers.py is the way back.
"""

from typing import Annotated

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field

import chat
from engine.sampler import Sampling

# Every field of OpenAI's two endpoints is applied, ignored (nothing here depends on it) or refused
# with 400. "extra" are our own; typical_p is refused by name because other servers have it.
FIELDS = {
    "applied": "model messages prompt echo frequency_penalty logit_bias logprobs top_logprobs "
    "max_tokens presence_penalty n max_completion_tokens response_format seed stop stream "
    "stream_options temperature tool_choice tools parallel_tool_calls top_p",
    "extra": "top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids regex "
    "return_token_ids",
    "ignored": "user metadata store service_tier prediction safety_identifier prompt_cache_key "
    "verbosity prompt_cache_retention prompt_cache_options reasoning_effort",
    "refused": "audio modalities web_search_options functions function_call suffix moderation "
    "best_of typical_p",
}
FIELDS = {what: tuple(names.split()) for what, names in FIELDS.items()}
# These mean in Sampling what they mean in a request, and have its defaults.
SAME_IN_SAMPLING = set(
    "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty min_tokens n "
    "seed ignore_eos logit_bias".split()
)


class Refusal(HTTPException):
    """Is raised where a request gets an error, and holds it in OpenAI's shape."""

    def __init__(self, status, message, code=None, param=None, headers=None):
        super().__init__(status, message, headers)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# -------------------------------------------------------------------------- the bodies of requests
class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both endpoints take. null means the default, as OpenAI has it.

    Most bounds are Sampling's (see Sampling.check); here are those that keep a request small."""

    model_config = ConfigDict(extra="allow")  # for FIELDS to say what becomes of it
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = Field(None, max_length=1024)
    max_tokens: int | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = None
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


class ChatRequest(GenerationRequest):
    messages: list[dict] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict] | None = None
    tool_choice: str | dict | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None


class EmbeddingRequest(BaseModel):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: str | None = Field(None, pattern="^(float|base64)$")
    dimensions: None = None  # a vector is as long as the model is wide


class TokenizeRequest(BaseModel):
    prompt: str = ""
    messages: list[dict] | None = None


class DetokenizeRequest(BaseModel):
    tokens: list[int]


# ------------------------------------------------------------------------------------- the prompts
def prompt_lists(value, tok):
    """A prompt or input in any of OpenAI's four shapes -> lists of ids."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        value = [value]
    if not value or len(value) > 128:
        raise Refusal(400, f"{len(value)} prompts: give 1 to 128")
    prompts = []
    for prompt in value:
        if isinstance(prompt, str):
            prompt = tok.encode_prompt(prompt)
        if not prompt or min(prompt) < 0 or max(prompt) >= tok.vocab_size:
            last = tok.vocab_size - 1
            raise Refusal(400, f"a prompt needs at least one token, with ids from 0 to {last}")
        prompts.append(prompt)
    return prompts


def chat_prompt(tok, messages, tools=None):
    """Messages (and tools) -> ids, through the model's own chat format."""
    if tok.chat_template is None and "<|im_start|>" not in tok.special:
        message = "this model has no chat template: use /v1/completions with a plain prompt"
        raise Refusal(400, message, "no_chat_template")
    system = {"role": "system"}  # for which "developer" is OpenAI's newer name
    messages = [{**m, **system} if m.get("role") == "developer" else m for m in messages]
    ids, _ = chat.render(tok, messages, add_generation_prompt=True, tools=tools)
    return ids


# -------------------------------------------------------------------------- what binds the answers
def offered_functions(body):
    """The functions that the model may call: {name: OpenAI's description of it}."""
    functions = {}
    for tool in body.tools or ():
        kind = tool.get("type", "function")
        if kind != "function":
            raise Refusal(400, f"tools are functions, not of type {kind!r}", param="tools")
        function = tool.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            functions[function["name"]] = function
    return {} if body.tool_choice == "none" else functions


def forced_call(body, tok):
    """tool_choice "required", or one function -> the grammar of the only answers allowed:
    ("json", schema, and perhaps the texts before and after). None: the model may choose."""
    functions = offered_functions(body)
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return None
    if choice != "required":
        named = choice.get("function") if isinstance(choice, dict) else None
        chosen = named.get("name") if isinstance(named, dict) else None
        functions = {name: functions[name] for name in functions if name == chosen}
    if not functions:
        message = f"tool_choice {choice!r} is not none, auto, required or one of the tools"
        raise Refusal(400, message, param="tool_choice")
    arguments = "parameters" if "<|start_header_id|>" in tok.special else "arguments"
    calls = []
    for name, function in functions.items():
        parameters = function.get("parameters") or {"type": "object"}
        call = {
            "type": "object",
            "required": ["name", arguments],
            "additionalProperties": False,
            "properties": {"name": {"const": name}, arguments: parameters},
        }
        calls.append(call)
    if "<tool_call>" in (tok.chat_template or ""):
        return "json", {"anyOf": calls}, "<tool_call>\n", "\n</tool_call>"
    return "json", {"anyOf": calls}


def grammar_of(body):
    """response_format or regex -> what Worker.constraint takes, or None."""
    form = body.response_format or {"type": "text"}
    kind = form.get("type")
    if kind == "json_object":
        return "json", None
    if kind == "json_schema":
        named = form.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            message = "response_format json_schema needs json_schema.schema, an object"
            raise Refusal(400, message, param="response_format")
        return "json", schema
    if kind != "text":
        message = f"response_format {kind!r}: use text, json_object or json_schema"
        raise Refusal(400, message, param="response_format")
    return ("regex", body.regex) if body.regex else None


# ------------------------------------------------------------------------------------ the sampling
def refuse_fields(body):
    """Raise for a field that this server does not have, unless it says no more than the default."""
    for name in FIELDS["refused"]:
        if body.model_extra.get(name) not in (None, [], {}, ["text"]):
            raise Refusal(400, f"{name} is not supported by this server", "unsupported_field", name)


def request_sampling(body, prompt, tok, context, logprobs):
    """The request's fields -> Sampling.

    The answer's length is clamped to the context; only a prompt that fills it is refused."""
    room = context - len(prompt)
    if room < 1:
        message = f"the prompt has {len(prompt):,} tokens, this model's context is {context:,}"
        raise Refusal(400, message, "context_length_exceeded", "messages")
    refuse_fields(body)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    most = min(body.max_completion_tokens or body.max_tokens or room, room)
    sampling = Sampling(
        **body.model_dump(include=SAME_IN_SAMPLING, exclude_none=True),
        max_tokens=most,
        top_k=max(body.top_k or 0, 0),
        stop=tuple(text for text in stop if text),
        stop_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
    )
    sampling.min_tokens = min(sampling.min_tokens, most)
    sampling.check(tok.vocab_size)
    return sampling
