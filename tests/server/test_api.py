"""What requests may ask for: each field is applied, ignored or refused, and bad ones are told."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import json
import random

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
    post,
    real,
    running,
    stub,
    until,
)

from server import api
from tokenizer import Tokenizer


def test_every_documented_field_is_applied_ignored_or_refused(stub):
    models = {**api.ChatRequest.model_fields, **api.CompletionRequest.model_fields}
    assert set(api.FIELDS["applied"]) | set(api.FIELDS["extra"]) == set(models)
    for name in api.FIELDS["ignored"]:
        assert name not in models
        assert ask(stub, **{name: {"a": 1}}).status_code == 200
    for name in api.FIELDS["refused"]:
        assert error_of(ask(stub, **{name: {"a": 1}}), 400)["param"] == name
    assert len(sum(api.FIELDS.values(), ())) == len(set(sum(api.FIELDS.values(), ())))


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
    dict(max_tokens=-1),
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
    with running(Stub("x")) as server:
        for path, model in (
            ("/v1/chat/completions", api.ChatRequest),
            ("/v1/completions", api.CompletionRequest),
            ("/v1/embeddings", api.EmbeddingRequest),
            ("/tokenize", api.TokenizeRequest),
        ):
            names = [*model.model_fields, *api.FIELDS["refused"], *api.FIELDS["ignored"]]
            for _ in range(200):
                body = {
                    "messages": [{"role": "user", "content": "a"}],
                    "prompt": "a",
                    "input": "a",
                    "max_tokens": 5,
                }
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
    error_of(ask(stub, "/detokenize", tokens=[999_999]), 400)
    chat = ask(stub, "/tokenize", messages=[{"role": "user", "content": "hi"}]).json()["tokens"]
    assert stub.engine.tok.decode(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


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
    assert isinstance(
        json.loads(
            ask(real, response_format={"type": "json_object"}, max_tokens=40).json()["choices"][0][
                "message"
            ]["content"]
        ),
        dict,
    )
    assert (
        ask(real, "/v1/completions", prompt="a", regex="(ab){3}").json()["choices"][0]["text"]
        == "ababab"
    )
