"""What OpenAI's requests ask for: a body's fields become prompts, Sampling and a grammar.

serve.py speaks HTTP; here are plain functions over a tokenizer. answers.py is the way back.
"""

import json
import re
from typing import Annotated, Literal, TypeAlias

from fastapi import HTTPException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json
from typing_extensions import NotRequired, TypedDict  # Python 3.10's have no NotRequired

import chat
from engine.sampler import Sampling

# A field of a body is one of the classes below, or it is here, or it is refused with 400. On these
# no answer depends:
IGNORED = set(
    "user metadata store service_tier prediction safety_identifier prompt_cache_key verbosity "
    "prompt_cache_retention prompt_cache_options reasoning_effort request_id cache_prompt "
    "guided_decoding_backend spaces_between_special_tokens".split()
)
# What only other servers do is taken where it says no more than the default: this, or nothing.
DEFAULTS = {
    **dict.fromkeys(
        "audio modalities web_search_options functions function_call suffix moderation dimensions "
        "prompt_logprobs allowed_token_ids truncate_prompt_tokens documents bad_words "
        "chat_template logits_processors guided_grammar guided_whitespace_pattern structural_tag "
        "mm_processor_kwargs cache_salt kv_transfer_params vllm_xargs".split()
    ),
    **dict.fromkeys(
        "echo add_special_tokens use_beam_search include_stop_str_in_output "
        "return_tokens_as_token_ids".split(),
        False,  # echo and add_special_tokens: in chats; completions apply them
    ),
    **dict.fromkeys("skip_special_tokens include_reasoning".split(), True),
    **dict.fromkeys("best_of typical_p length_penalty".split(), 1),
    "priority": 0,
}
NEEDS = {"stream_options": "stream", "top_logprobs": "logprobs"}  # without it, it says nothing
# These mean in Sampling what they mean in a request, and have its defaults.
SAME_IN_SAMPLING = set(
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty "
    "min_tokens n seed ignore_eos".split()
)


class Refusal(HTTPException):
    """Is raised where a request gets an error, and holds it in OpenAI's shape."""

    def __init__(self, status, message, code=None, param=None, headers=None):
        super().__init__(status, message, headers)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# -------------------------------------------------------------------------- the bodies of requests
def at_most(count):
    """A list's or an object's bound, held before its items are looked at: pydantic would describe
    what is wrong with each of a million."""

    def check(value):
        if isinstance(value, (list, dict)) and len(value) > count:
            raise ValueError(f"has {len(value):,} items, and {count:,} is the most")
        return value

    return BeforeValidator(check)


Ids: TypeAlias = Annotated[list[int], Field(fail_fast=True)]
# OpenAI's four shapes of prompts
Texts: TypeAlias = (
    str | Annotated[list[str], at_most(128)] | Ids | Annotated[list[Ids], at_most(128)]
)
TokenId: TypeAlias = Annotated[int, Field(strict=False)]  # a key of JSON is a string
Messages: TypeAlias = Annotated[list[dict], at_most(10_000), Field(min_length=1)]


class NamedFunction(TypedDict):
    name: str


class Function(NamedFunction, total=False):
    description: str | None
    parameters: dict | None
    strict: bool | None  # a call that tool_choice forces always is


class Tool(TypedDict):
    type: NotRequired[Literal["function"]]
    function: Function


class ToolChoice(TypedDict):
    type: NotRequired[Literal["function"]]
    function: NamedFunction


class JsonSchema(TypedDict):
    name: NotRequired[str]
    description: NotRequired[str | None]
    strict: NotRequired[bool | None]  # all are
    schema: dict


class TextFormat(TypedDict):
    type: Literal["text"]


class ObjectFormat(TypedDict):
    type: Literal["json_object"]
    schema: NotRequired[dict | None]


class SchemaFormat(TypedDict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


SchemaOrText: TypeAlias = dict | Json[dict]  # vLLM takes a schema's text, too
Choices: TypeAlias = Annotated[list[str], at_most(1024), Field(min_length=1)]


class StructuredOutputs(TypedDict, total=False):
    """vLLM's newer name for guided_json, guided_regex and guided_choice."""

    json: SchemaOrText | None
    regex: str | None
    choice: Choices | None


class StreamOptions(TypedDict, total=False):
    include_usage: bool | None
    include_obfuscation: bool | None  # padding against eavesdroppers; there is none


class ModelRequest(BaseModel):
    """A body. It has no fields but these, at any depth (but in what is typed `dict`, which others
    check: messages, schemas, parameters of templates), and their values are of these types and no
    others: 1 is not true, and "1" is not 1."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str = ""


class GenerationRequest(ModelRequest):
    """What both endpoints take.

    Most bounds are Sampling's (see Sampling.check); here are those that keep a request small. No
    default can be changed: pydantic would copy it for every request."""

    temperature: float = None
    top_p: float = None
    top_k: int = None
    min_p: float = None
    repetition_penalty: float = None
    presence_penalty: float = None
    frequency_penalty: float = None
    min_tokens: int = None
    n: int = Field(1, ge=1, le=16)
    seed: int = None
    ignore_eos: bool = False
    logit_bias: Annotated[dict[TokenId, float], at_most(1024)] = None
    max_tokens: int = -1  # no limit
    max_completion_tokens: int = -1
    stop: str | Annotated[list[str], at_most(64)] = None
    stop_token_ids: Annotated[list[int], at_most(1024)] = None
    stream: bool = False
    stream_options: StreamOptions = None
    response_format: TextFormat | ObjectFormat | SchemaFormat = Field(None, discriminator="type")
    regex: str = None
    guided_regex: str = None
    guided_json: SchemaOrText = None
    guided_choice: Choices = None
    structured_outputs: StructuredOutputs = None
    return_token_ids: bool = False


class ChatRequest(GenerationRequest):
    messages: Messages  # which chat.py reads
    logprobs: bool = False
    top_logprobs: int = 0
    tools: Annotated[list[Tool], at_most(1024)] = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict = None
    add_generation_prompt: bool = None
    continue_final_message: bool = False


class CompletionRequest(GenerationRequest):
    prompt: Texts
    logprobs: int = Field(None, ge=0)
    echo: bool = False
    add_special_tokens: bool = True


class EmbeddingRequest(ModelRequest):
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeRequest(ModelRequest):
    prompt: str = None
    messages: Messages = None


class DetokenizeRequest(ModelRequest):
    tokens: Ids


def parse_body(body, kind):
    """A request's JSON -> its class `kind`. Raises ValidationError, or Refusal for a field that
    would say nothing without another."""
    if not isinstance(body, dict):
        return kind.model_validate(body)
    for name, other in NEEDS.items():
        if body.get(name) and not body.get(other):
            raise Refusal(400, f"{name} needs {other}: true", param=name)
    fields = kind.model_fields
    given = {}
    for name, value in body.items():
        if name in fields:
            dropped = value is None
        elif name in DEFAULTS:
            default = DEFAULTS[name]
            same = value == default and isinstance(value, bool) == isinstance(default, bool)
            dropped = same or value in (None, [], {}, "")
        else:
            dropped = name in IGNORED
        if not dropped:
            given[name] = value
    return kind.model_validate(given)


# ------------------------------------------------------------------------------------- the prompts
def prompt_lists(value, tok, special=True):
    """A prompt or input in any of OpenAI's four shapes -> lists of ids; special: with the token
    that begins a text."""
    if not value or isinstance(value, str) or isinstance(value[0], int):
        value = [value]
    prompts = []
    for prompt in value:
        if isinstance(prompt, str):
            prompt = tok.encode_prompt(prompt) if special else tok.encode(prompt)
        if not prompt or min(prompt) < 0 or max(prompt) >= tok.vocab_size:
            raise Refusal(400, f"a prompt needs at least one token, ids below {tok.vocab_size}")
        prompts.append(prompt)
    return prompts


def chat_prompt(tok, body):
    """A ChatRequest -> ids, through the model's own chat format."""
    if tok.chat_template is None and "<|im_start|>" not in tok.special:
        message = "this model has no chat template: use /v1/completions with a plain prompt"
        raise Refusal(400, message, "no_chat_template")
    resume = body.continue_final_message
    prompted = body.add_generation_prompt
    ids, _ = chat.render(
        tok,
        body.messages,
        add_generation_prompt=not resume if prompted is None else prompted,
        tools=body.tools if offered_functions(body) else None,
        options=body.chat_template_kwargs,
        resume=resume,
    )
    return ids


# -------------------------------------------------------------------------- what binds the answers
def offered_functions(body):
    """The functions that the model may call: {name: Function}."""
    tools = None if body.tool_choice == "none" else body.tools
    return {tool["function"]["name"]: tool["function"] for tool in tools or ()}


def forced_call(body, tok):
    """tool_choice "required", or one function -> the grammar of the only answers allowed. None: the
    model may choose."""
    functions = offered_functions(body)
    choice = body.tool_choice
    if choice in ("auto", "none"):
        return None
    if choice != "required":
        chosen = choice["function"]["name"]
        functions = {name: functions[name] for name in functions if name == chosen}
    if not functions:
        message = "tool_choice wants a function to be called that is not one of the tools"
        raise Refusal(400, message, param="tool_choice")
    arguments = "parameters" if "<|start_header_id|>" in tok.special else "arguments"
    before, after = "", "}"
    if "<tool_call>" in (tok.chat_template or ""):
        before, after = "<tool_call>\n", "}\n</tool_call>"
    calls = []
    for name, function in functions.items():
        head = f'{before}{{"name": {json.dumps(name)}, "{arguments}": '
        parameters = {"type": "object", **(function.get("parameters") or {})}
        calls.append((parameters, head, after))
    return "json", *calls


def grammar_of(body):
    """The one field that binds the answer -> what Worker.constraint takes: ("regex", pattern) or
    ("json", (schema,)). None: the model may say what it likes."""
    form = body.response_format or {}
    more = body.structured_outputs or {}
    schemas = [body.guided_json, more.get("json"), form.get("json_schema", {}).get("schema")]
    if form.get("type") == "json_object":
        schemas.append(form.get("schema") or {"type": "object"})
    patterns = [body.regex, body.guided_regex, more.get("regex")]
    for choices in (body.guided_choice, more.get("choice")):
        if choices:
            patterns.append("|".join(map(re.escape, choices)))
    grammars = [("json", (schema,)) for schema in schemas if schema is not None]
    grammars += [("regex", pattern) for pattern in patterns if pattern is not None]
    if len(grammars) > 1:
        fields = "response_format, regex, guided_* and structured_outputs"
        raise Refusal(400, f"{len(grammars)} of {fields} bind the answer: give one")
    return grammars[0] if grammars else None


# ------------------------------------------------------------------------------------ the sampling
def request_sampling(body, prompt, service, logprobs, ends=()):
    """The request's fields -> Sampling, with the service's defaults. ends: ids that end the answer,
    beside the request's own.

    The answer's length is clamped to the context; only a prompt that fills it is refused."""
    room = service.context - len(prompt)
    if room < 1:
        message = f"the prompt has {len(prompt):,} tokens, the context is {service.context:,}"
        raise Refusal(400, message, "context_length_exceeded")
    limits = [n for n in (body.max_tokens, body.max_completion_tokens) if n != -1]
    asked = body.model_fields_set & SAME_IN_SAMPLING
    given = service.defaults | {name: getattr(body, name) for name in asked}
    if given.get("top_k") == -1:  # vLLM's word for all
        given["top_k"] = 0
    sampling = Sampling(
        **given,
        max_tokens=min([*limits, room]),
        logit_bias=body.logit_bias,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_ids=(*(body.stop_token_ids or ()), *(() if body.ignore_eos else ends)),
        logprobs=logprobs,
    )
    sampling.check(service.tok.vocab_size)
    return sampling
