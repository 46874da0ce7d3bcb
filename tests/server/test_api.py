"""What requests may ask for: each field is applied, ignored or refused, and bad ones are told."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import json
import random
from types import SimpleNamespace

import pytest
from conftest import ROOT  # noqa: F401  (puts the root on the path)
from serving import (  # noqa: F401
    HTTP,
    SAID,
    TEMPLATE_WITH_TOOLS,
    TOOLS,
    Stub,
    ask,
    error_of,
    json_schema,
    make_tokenizer,
    post,
    real,
    running,
    stub,
    until,
)

from chat import CHATML_TEMPLATE
from common import UserError
from server import api
from tokenizer import Tokenizer


def test_every_field_is_applied_ignored_or_refused_by_its_name(stub):
    for name in api.IGNORED:
        assert ask(stub, **{name: {"a": 1}}).status_code == 200
    for name, default in api.DEFAULTS.items():
        for says_nothing in (default, None):
            assert ask(stub, **{name: says_nothing}).status_code == 200
        for value in ({"a": 1}, 2, "zz"):
            assert error_of(ask(stub, **{name: value}), 400)["param"] == name
    fields = [*api.ChatRequest.model_fields, *api.CompletionRequest.model_fields]
    assert not {*fields} & api.IGNORED


# Bodies that are good, of which every object is given a field more. In a schema, what is below
# "properties" are names; what is below "parameters" is shown to the model as it is.
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"enum": ["x"]}},
    "required": ["a"],
    "additionalProperties": False,
}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "7"},
]
NAMED = {"type": "function", "function": {"name": "add"}}
FORMS = [
    {"type": "text"},
    {"type": "json_object", "schema": SCHEMA},
    {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}},
]
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
GOOD = [
    ("/v1/chat/completions", {"messages": TALK, "tools": TOOLS, "tool_choice": NAMED, **STREAM}),
    ("/v1/completions", {"prompt": "a", **STREAM}),
    ("/v1/completions", {"prompt": "a", "guided_json": SCHEMA}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": SCHEMA}}),
    *[("/v1/chat/completions", {"response_format": form}) for form in FORMS],
    ("/v1/embeddings", {"input": "a"}),
    ("/tokenize", {"messages": TALK}),
    ("/detokenize", {"tokens": [5]}),
]


def objects_of(value, below=None):
    """Every object within a JSON value whose fields have a meaning."""
    if isinstance(value, list):
        for each in value:
            yield from objects_of(each)
    if isinstance(value, dict) and below != "parameters":
        if below != "properties":
            yield value
        for key, each in value.items():
            yield from objects_of(each, key)


def test_an_unknown_field_at_any_depth_is_refused_by_its_name():
    rng = random.Random(3)
    tok = make_tokenizer()
    tok.chat_template = TEMPLATE_WITH_TOOLS
    letters = "abcdefgz_-"
    values = [True, 0, "x", 1.5, [], {}, {"type": "text"}, [1]]
    with running(Stub("x", tok=tok)) as server:
        for path, good in GOOD:
            assert ask(server, path, **good).status_code == 200
            count = len([*objects_of(good)])
            for n in range(count * 5):
                body = json.loads(json.dumps(good))
                name = "zq" + "".join(rng.choices(letters, k=rng.randint(1, 9)))
                [*objects_of(body)][n % count][name] = rng.choice(values)
                assert name in error_of(ask(server, path, **body), 400)["message"], body


def test_a_value_that_only_equals_a_right_one_is_refused(stub):
    wrong = {bool: (0, 1, "true"), int: (True, False, "1", 1.5), float: (True, False, "1")}
    for path, kind in (
        ("/v1/chat/completions", api.ChatRequest),
        ("/v1/completions", api.CompletionRequest),
    ):
        for name, field in kind.model_fields.items():
            for value in wrong.get(field.annotation, ()):
                body = {"prompt": "a"} if kind is api.CompletionRequest else {}
                assert error_of(ask(stub, path, **body, **{name: value}), 400)["param"] == name
    for name, value in (("echo", 0), ("best_of", True), ("skip_special_tokens", 1)):
        assert error_of(ask(stub, **{name: value}), 400)["param"] == name
    for key in ("5.5", "true", "0x5", ""):
        error_of(ask(stub, logit_bias={key: 1}), 400)


def test_null_is_the_default_of_every_field(stub):
    for path, kind, needed in (
        ("/v1/chat/completions", api.ChatRequest, {"messages": TALK[:2]}),
        ("/v1/completions", api.CompletionRequest, {"prompt": "a"}),
    ):
        body = {**dict.fromkeys(kind.model_fields), **dict.fromkeys(api.IGNORED), **needed}
        assert ask(stub, path, **body).status_code == 200


def test_no_limit_is_null_or_minus_one_and_of_two_limits_the_smaller_counts(stub):
    for none in (None, -1):
        answer = ask(stub, max_tokens=none, max_completion_tokens=none).json()
        assert answer["choices"][0]["message"]["content"] == SAID
    for limits in ((3, 9), (9, 3), (3, -1), (-1, 3)):
        answer = ask(stub, max_tokens=limits[0], max_completion_tokens=limits[1]).json()
        assert answer["usage"]["completion_tokens"] == 3
    error_of(ask(stub, max_tokens=-2), 400)
    error_of(ask(stub, max_tokens=5, min_tokens=6), 400)


def sampling_of(tok, defaults=(), **fields):
    service = SimpleNamespace(tok=tok, context=100, defaults=dict(defaults))
    body = api.parse_body({"prompt": "a", **fields}, api.CompletionRequest)
    return api.request_sampling(body, [5], service, None)


def test_the_folders_sampling_counts_where_the_request_says_nothing():
    tok = make_tokenizer()
    defaults = {"temperature": 0.5, "top_k": 7}
    assert sampling_of(tok).top_k == 0
    assert sampling_of(tok, defaults).top_k == 7
    assert sampling_of(tok, defaults, top_k=-1, temperature=None).temperature == 0.5
    assert sampling_of(tok, defaults, top_k=-1).top_k == 0
    assert sampling_of(tok, defaults, top_k=3, temperature=0).temperature == 0


def prompt_of(template, **fields):
    tok = make_tokenizer()
    tok.chat_template = template
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is "}]
    body = api.parse_body({"messages": messages, **fields}, api.ChatRequest)
    return tok.decode(api.chat_prompt(tok, body))


def test_the_last_message_can_be_continued():
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nIt is"
    whole = asked + " <|im_end|>\n"
    assert prompt_of(CHATML_TEMPLATE, add_generation_prompt=False) == whole
    assert prompt_of(CHATML_TEMPLATE) == whole + "<|im_start|>assistant\n"
    assert prompt_of(CHATML_TEMPLATE, continue_final_message=True) == asked + " "
    trims = CHATML_TEMPLATE.replace("message['content']", "message['content'] | trim")
    assert prompt_of(trims, continue_final_message=True) == asked + " "
    for text in ("im_end", "assistant", "hi", "", "<|im_end|>"):
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
        begun = asked.removesuffix("It is") + text
        for template in (CHATML_TEMPLATE, trims):
            assert prompt_of(template, continue_final_message=True, messages=talk) == begun
    for wrong in (
        dict(add_generation_prompt=True),
        dict(messages=[{"role": "user", "content": "hi"}]),
        dict(messages=[{"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    ):
        with pytest.raises(UserError):
            prompt_of(trims, continue_final_message=True, **wrong)


def test_template_kwargs_reach_the_template_and_unknown_ones_are_refused():
    template = "{% if think %}<{{ name }}>{% endif %}{{ messages[0].content }}"
    assert prompt_of(template) == "hi"
    assert prompt_of(template, chat_template_kwargs={"think": True, "name": "x"}) == "<x>hi"
    marker = {"think": True, "name": "<|im_end|>"}
    assert prompt_of(template, chat_template_kwargs=marker) == "<<|im_end|>>hi"
    tok = make_tokenizer()
    tok.chat_template = template
    body = api.ChatRequest(messages=TALK[:1], chat_template_kwargs=marker)
    assert tok.special["<|im_end|>"] not in api.chat_prompt(tok, body)
    for name in ("thinking", "messages", "add_generation_prompt"):
        for each in (template, CHATML_TEMPLATE):
            with pytest.raises(UserError, match=name):
                prompt_of(each, chat_template_kwargs={name: True})


def test_guided_fields_bind_a_real_model_and_only_one_may(real):
    def said(**fields):
        answer = ask(real, max_tokens=40, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    choices = ["yes. or", "no\n(", "ü?", "[x]+"]
    for fields in ({"guided_choice": choices}, {"structured_outputs": {"choice": choices}}):
        assert {said(seed=seed, **fields) for seed in range(12)} <= {*choices}
    for regex in ({"guided_regex": "(ab){3}"}, {"structured_outputs": {"regex": "(ab){3}"}}):
        assert said(**regex) == "ababab"
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3}
    for fields in (
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"structured_outputs": {"json": schema}},
        {"response_format": {"type": "json_object", "schema": schema}},
    ):
        assert len(json.loads(said(**fields))) == 3
    text = {"response_format": {"type": "text"}}
    assert ask(real, guided_regex="a", **text).status_code == 200
    for two in (
        dict(guided_regex="a", regex="a"),
        dict(guided_json=schema, response_format={"type": "json_object"}),
        dict(structured_outputs={"regex": "a", "choice": ["a"]}),
    ):
        assert "give one" in error_of(ask(real, **two), 400)["message"]
    for field in (dict(guided_choice=[]), dict(guided_json="{"), dict(guided_grammar="root ::= x")):
        assert error_of(ask(real, **field), 400)["param"] == [*field][0]


def test_the_end_of_a_turn_ends_a_chat_though_it_is_not_the_models_end_of_text(real):
    tok = real.engine.tok
    end = tok.special["<|im_end|>"]
    assert end not in real.engine.eos
    body = dict(logit_bias={str(end): 100}, max_tokens=4, temperature=0)
    chat = ask(real, **body).json()["choices"][0]
    assert chat["finish_reason"] == "stop"
    assert chat["message"]["content"] == ""
    going_on = ask(real, ignore_eos=True, **body).json()["choices"][0]
    text = ask(real, "/v1/completions", prompt="a", **body).json()["choices"][0]
    assert going_on["finish_reason"] == text["finish_reason"] == "length"


BAD = [
    dict(messages=[]),
    dict(messages="x"),
    dict(messages=[{"role": "user"}]),
    dict(messages=[1]),
    dict(messages=[{"role": "wizard", "content": "a"}]),
    dict(temperature=-1),
    dict(temperature="hot"),
    dict(n=0),
    dict(n=10**9),
    dict(max_tokens=-2),
    dict(max_completion_tokens=0),
    dict(stream_options={"include_usage": True}),
    dict(stream=True, stream_options={"include_usage": 1}),
    dict(top_k=-2),
    dict(stop=[""]),
    dict(tools=[{"type": "function", "function": {}}]),
    dict(tools=TOOLS, tool_choice="required", regex="a"),
    dict(response_format={"type": "text", "schema": {}}),
    dict(response_format={"type": "json_object", "json_schema": {"schema": {}}}),
    dict(max_tokens=0),
    dict(top_p=0),
    dict(stop=[1]),
    dict(stop=["a"] * 65),
    dict(logit_bias={"x": 1}),
    dict(regex="(" * 50),
    dict(logit_bias={"999999": 1}),
    dict(top_logprobs=2),
    dict(response_format={"type": "xml"}),
    dict(seed=1.5),
    dict(response_format={"type": "json_schema", "json_schema": []}),
    dict(stream_options=3),
    dict(response_format=json_schema(1)),
    dict(response_format=json_schema({"$ref": "#"})),
    *(
        dict(response_format=json_schema(schema))
        for schema in (
            {"enum": 5},
            {"type": {}},
            {"required": 5},
            {"$ref": 5},
            {"minimum": [1]},
            {"unknown": 1},
            {"const": "\ud800"},
            {"properties": {"\ud800": 3}},
            {"maximum": 10**400},
        )
    ),
    dict(regex="\ud800"),
    dict(regex="(?=a)b"),
    dict(regex="(?=a)b", stream=True),
    dict(tools=TOOLS, tool_choice="sub"),
    dict(tools=TOOLS, tool_choice={"function": "x"}),
    dict(tools=[{"type": "custom", "custom": {"name": "x"}}]),
    dict(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": {}}),
]


@pytest.mark.parametrize("body", BAD, ids=[str(b)[:50] for b in BAD])
def test_a_bad_field_is_a_400_in_openais_shape(stub, body):
    error_of(ask(stub, **body), 400)


def test_a_schema_with_nan_is_a_400(stub):
    form = '{"type": "json_schema", "json_schema": {"schema": {"minimum": NaN}}}'
    body = f'{{"prompt": "a", "response_format": {form}}}'
    assert "not JSON compliant" in error_of(post(stub, "/v1/completions", body), 400)["message"]


def test_bad_bodies_and_unknown_places_are_errors_in_openais_shape(stub):
    for content in (
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"null",
        b'{"messages": [NaN]}',
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": {}, "temperature": NaN}',
    ):
        for path in (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/embeddings",
            "/tokenize",
            "/detokenize",
        ):
            error_of(post(stub, path, content), 400)
    error_of(HTTP.get(stub.url + "/v1/nothing"), 404)
    error_of(HTTP.get(stub.url + "/v1/completions"), 405)
    assert "gpt-5" in error_of(ask(stub, model="gpt-5"), 404)["message"]
    assert error_of(ask(stub, "/v1/completions", prompt=[999_999]), 400)
    assert error_of(ask(stub, "/v1/completions", prompt="a", max_tokens=0), 400)
    echo = {"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": -1}
    assert error_of(ask(stub, "/v1/completions", **echo), 400)["param"] == "logprobs"
    error_of(ask(stub, model="\ud800"), 404)
    assert (
        ask(
            stub, messages=[{"role": "user", "content": "half a \ud800 pair"}], user="\ud800"
        ).status_code
        == 200
    )


def test_a_body_of_another_type_than_json_is_refused(stub):
    """A page of another origin may send text/plain without asking first."""
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert ask(stub, headers={"content-type": kind}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error = error_of(ask(stub, headers={"content-type": kind}), 400)
        assert "application/json" in error["message"]


@pytest.mark.slow
def test_any_value_in_any_field_is_answered_or_refused():
    rng = random.Random(6)
    values = [
        None,
        True,
        0,
        1,
        -1,
        2**70,
        1.5,
        1e308,
        "",
        "x",
        "\u0000",
        [],
        {},
        [None],
        [[]],
        {"": {}},
        ["a"] * 99,
        "required",
        [{"role": "user"}],
        {"type": "function"},
        [{"type": "function", "function": {"name": "f", "parameters": 3}}],
        json_schema({"enum": []}),
    ]
    good = dict(GOOD)
    with running(Stub("x")) as server:
        for path, model in (
            ("/v1/chat/completions", api.ChatRequest),
            ("/v1/completions", api.CompletionRequest),
            ("/v1/embeddings", api.EmbeddingRequest),
            ("/tokenize", api.TokenizeRequest),
        ):
            names = [*model.model_fields, *api.DEFAULTS, *api.IGNORED]
            for _ in range(200):
                body = dict(good[path])
                body |= {name: rng.choice(values) for name in rng.sample(names, rng.randint(1, 3))}
                answer = post(server, path, json.dumps(body))
                assert answer.status_code in (200, 400, 404), (body, answer.text)
                assert answer.status_code == 200 or error_of(answer, answer.status_code)
        until(lambda: len(server.service.client.jobs) == 0)


def test_a_long_prompt_is_refused_with_the_numbers_and_a_long_answer_is_clamped(stub):
    error = error_of(ask(stub, "/v1/completions", prompt=[5] * 4096), 400)
    assert "4,096" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert (
        ask(stub, "/v1/completions", prompt=[5] * 4090, max_tokens=10**6).json()["usage"][
            "completion_tokens"
        ]
        == 6
    )


def test_tokenize_and_detokenize_are_inverse(stub):
    ids = ask(stub, "/tokenize", prompt=SAID).json()["tokens"]
    assert ask(stub, "/detokenize", tokens=ids).json()["prompt"] == SAID
    assert ask(stub, "/detokenize", tokens=[]).json()["prompt"] == ""
    error_of(ask(stub, "/detokenize", tokens=[999_999]), 400)
    error_of(ask(stub, "/detokenize", tokens=ids, model="another"), 404)
    chat = ask(stub, "/tokenize", messages=[{"role": "user", "content": "hi"}]).json()["tokens"]
    assert stub.engine.tok.decode(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_lists_and_objects_are_counted_but_not_those_within_strings(stub):
    code = '\\"{' * 150_000
    assert ask(stub, "/tokenize", prompt=code).status_code == 200
    body = '{"user": "\\\\\\"", "stop": [' + "[]," * 100_000 + "[]]}"
    assert "lists" in error_of(post(stub, "/v1/completions", body), 400)["message"]


def test_a_model_without_a_chat_template_says_so_and_completes(tmp_path):
    tok = Tokenizer.train(["abc"], 260, special_tokens=["<|endoftext|>"])
    with running(Stub(tok=tok)) as server:
        assert error_of(ask(server), 400)["code"] == "no_chat_template"
        assert ask(server, "/v1/completions", prompt="a").status_code == 200


def test_a_forced_call_has_the_arguments_of_its_function(real, monkeypatch):
    """References in its parameters are to the parameters."""
    monkeypatch.setattr(real.engine.tok, "chat_template", TEMPLATE_WITH_TOOLS)
    parameters = {
        "properties": {"x": {"$ref": "#/$defs/digit"}},
        "required": ["x"],
        "additionalProperties": False,
        "$defs": {"digit": {"enum": [1, 2]}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for i in range(3):
        answer = ask(real, tools=tools, tool_choice="required", max_tokens=80, seed=i).json()
        call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
        assert call["name"] == "f"
        assert json.loads(call["arguments"])["x"] in (1, 2)


def test_json_schema_and_regex_and_json_object_bind_a_real_model(real):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for i in range(5):
        answer = json.loads(
            ask(real, response_format=form, max_tokens=60, seed=i).json()["choices"][0]["message"][
                "content"
            ]
        )
        assert isinstance(answer["a"], int)
        assert answer["b"] in ("x", "y")
        assert len(answer) == 2
    body = dict(response_format={"type": "json_object"}, max_tokens=40, n=8, seed=1)
    choices = ask(real, **body).json()["choices"]
    whole = [c["message"]["content"] for c in choices if c["finish_reason"] == "stop"]
    assert {type(json.loads(text)) for text in whole} == {dict}
    assert (
        ask(real, "/v1/completions", prompt="a", regex="(ab){3}").json()["choices"][0]["text"]
        == "ababab"
    )
