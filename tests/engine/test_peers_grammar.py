"""Constrained output against the jsonschema package."""

import json
import random

import pytest
from test_grammar import sample, vocabulary  # noqa: F401

from engine.grammar import json_grammar

EXPR = {
    "anyOf": [
        {"type": "integer"},
        {
            "type": "object",
            "required": ["op", "left", "right"],
            "properties": {
                "op": {"enum": ["+", "-"]},
                "left": {"$ref": "#/$defs/expr"},
                "right": {"$ref": "#/$defs/expr"},
            },
        },
    ]
}
SCHEMAS = [
    {
        "type": "object",
        "required": ["name", "age"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "email": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 4},
        },
    },
    {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                {"type": "number", "minimum": -2, "exclusiveMaximum": 3},
                {"type": ["boolean", "null"]},
            ]
        },
    },
    {
        "type": "object",
        "required": ["when", "id", "ip"],
        "properties": {
            "when": {"type": "string", "format": "date-time"},
            "id": {"type": "string", "format": "uuid"},
            "ip": {"type": "string", "format": "ipv4"},
        },
    },
    {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[A-Z]{2}\\d+$"}},
    {"$ref": "#/$defs/expr", "$defs": {"expr": EXPR}},
    {"type": "object"},
    {"type": "string", "pattern": 'x["\\\\]y'},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {
        "properties": {
            "a": {
                "type": "array",
                "minItems": 2,
                "prefixItems": [{"const": 1}],
                "items": {"type": "null"},
            }
        }
    },
    {"enum": ["x", 1, None, {"k": [1, 2]}]},
    {"type": ["string", "null"], "minLength": 2, "maxLength": 3},
    {"type": "number", "minimum": -3.5, "maximum": -0.5},
]


@pytest.mark.peers
@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_a_random_model_writes_is_valid_against_its_schema(schema, vocabulary):  # noqa: F811
    from jsonschema import Draft202012Validator, FormatChecker

    validator, rng, grammar = (
        Draft202012Validator(schema, format_checker=FormatChecker()),
        random.Random(5),
        json_grammar(schema),
    )
    for i in range(40):
        out, complete = sample(grammar, vocabulary, rng, 120 + i * 5)
        assert complete, out
        validator.validate(json.loads(out))
