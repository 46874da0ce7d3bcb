"""Constrained output against the jsonschema package."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import json
import random
from collections import Counter

import pytest
from test_grammar import sample, vocabulary  # noqa: F401

from common import UserError
from engine import grammar as engine_grammar
from engine.grammar import (
    BOUNDS,
    KEYWORDS,
    SUBSCHEMA,
    SUBSCHEMA_DICTS,
    SUBSCHEMA_LISTS,
    Constraint,
    json_grammar,
)

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
    {"type": "string", "pattern": '^x["\\\\]y'},
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
def test_what_a_random_model_writes_is_valid_against_its_schema(schema, vocabulary):
    from jsonschema import Draft202012Validator, FormatChecker

    validator = Draft202012Validator(schema, format_checker=FormatChecker())
    constraint, rng = Constraint(json_grammar(schema), vocabulary), random.Random(5)
    whole = 0
    for _ in range(40):
        out, complete = sample(constraint, vocabulary, rng, 500)
        if complete:
            validator.validate(json.loads(out))
            whole += 1
    assert whole >= 20


class RandomSchema:
    """Schemas of all keywords that are not refused by name, in any company, also where they bind
    nothing."""

    NAMES = ("a", "b", "ab", "a1")
    TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
    VALUES = (
        None,
        True,
        0,
        1,
        -1,
        2.5,
        1000.0,
        -0.0,
        "",
        "ab",
        "é😀",
        '"\\',
        "\n",
        [1, "a"],
        {"a": 1},
    )
    NUMBERS = (0, 1, -1, 3, 10, 2.5, -0.5, 0.1, 1e-3, 123456, 1e15)
    PATTERNS = ("a", "^a", "b$", "^ab*$", "[0-9]{2}", "^(a|b)?$", '["\\\\]', "^.{2}$", "(^a)|(1$)")

    KEYS = sorted(KEYWORDS - {"type", "$defs", "definitions"})

    def __init__(self, rng):
        self.rng = rng

    def some(self, make, least=0):
        return [make() for _ in range(self.rng.randrange(least, 4))]

    def named(self, names, depth):
        return {name: self.schema(depth) for name in self.rng.sample(names, self.rng.randint(1, 2))}

    def value(self, key, depth):
        rng = self.rng
        if key == "type":
            return rng.choice([rng.choice(self.TYPES), rng.sample(self.TYPES, 2)])
        if key in SUBSCHEMA:
            return self.schema(depth)
        if key in SUBSCHEMA_LISTS:
            return self.some(lambda: self.schema(depth), least=1)
        if key == "patternProperties":
            return self.named(["^a", "b$", "1"], depth)
        if key in SUBSCHEMA_DICTS:
            return self.named(self.NAMES, depth)
        if key == "required":
            return rng.sample(self.NAMES, rng.randrange(3))
        if key in ("const", "enum"):
            return rng.choice(self.VALUES) if key == "const" else rng.sample(self.VALUES, 3)
        if key == "multipleOf":  # a fraction in binary, as the validator divides doubles
            return rng.choice([1, 2, 7, 10, 0.5, 0.25])
        if key in BOUNDS:
            return rng.choice(self.NUMBERS)
        if key == "$ref":
            return rng.choice(["#", "#/$defs/a"])
        if key == "pattern":
            return rng.choice(self.PATTERNS)
        if key == "format":
            return rng.choice(["date", "uuid", "ipv4", "ipv6", "email"])
        return rng.randrange(4)  # minItems, maxLength, minProperties, ...

    def schema(self, depth=0):
        rng = self.rng
        if rng.random() < 0.1 and depth:
            return rng.random() < 0.7
        if depth == 3:
            return {"type": rng.choice(self.TYPES)}
        keys = ["type", *rng.sample(self.KEYS, rng.randrange(5))]
        rng.shuffle(keys)
        return {key: self.value(key, depth + 1) for key in keys}


@pytest.mark.peers
def test_whatever_an_accepted_schema_generates_is_valid(vocabulary, monkeypatch):
    """Nothing that binds is ignored, whatever stands beside it."""
    from jsonschema import Draft202012Validator, FormatChecker

    monkeypatch.setattr(engine_grammar, "fault_found", lambda grammar: "")
    rng = random.Random(6)
    answers, bound = 0, Counter()
    while answers < 5000:
        schema = {**RandomSchema(rng).schema(), "$defs": {"a": RandomSchema(rng).schema(1)}}
        try:
            constraint = Constraint(json_grammar(schema), vocabulary)
        except UserError:
            continue
        validator = Draft202012Validator(schema, format_checker=FormatChecker())
        for _ in range(4):
            out, complete = sample(constraint, vocabulary, rng, 200)
            if complete:
                validator.validate(json.loads(out))
                answers += 1
                bound.update(schema.keys())
    assert min(bound[key] for key in RandomSchema.KEYS) > 25, bound
