"""Constrained output: the automaton accepts what the standard library accepts, and no answer is cut
off half way."""

import json
import random
import re

import pytest
import torch
from conftest import ROOT  # noqa: F401  (puts the root on the path)

from common import UserError
from engine.grammar import WORK, Constraint, Vocabulary, json_grammar, regex_grammar
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def vocabulary():
    text = (
        'name {"a": [1, 2.5], "city": "Zürich"} true false null 😀 the quick brown fox, "x": "y"} '
        * 20
    )
    return Vocabulary(Tokenizer.train([text], 400, special_tokens=["<|endoftext|>"]))


def matches(grammar, data):
    """Whether a whole byte string matches: the plain twin of what Constraint does by tokens."""
    grammar.left = WORK
    state = grammar.start
    for byte in data:
        state = grammar.step(state, byte)
    return grammar.end in state.positions


def sample(grammar, vocabulary, rng, limit):
    """Any allowed token with equal chance, the worst of models -> (bytes, whether whole)."""
    constraint, out, eos = Constraint(grammar, vocabulary), b"", min(vocabulary.ends)
    for left in range(limit, 0, -1):
        if constraint.done:
            break
        mask = constraint.allowed(left)
        ids = torch.nonzero(mask)[:, 0].tolist() + [eos] * constraint.complete
        token = rng.choice(ids)
        if token == eos:
            break
        constraint.advance(token)
        out += vocabulary.spelled[token]
    return out, constraint.complete


@pytest.mark.parametrize(
    "pattern",
    [
        r"(ab|a)*c?",
        r"[^a-c]{2,3}",
        r"\d+(\.\d{1,2})?",
        r"(yes|no)( maybe)*",
        r".{0,3}é.?",
        r"[α-ω😀-😅]+x",
        r"a{3}|b+?",
        r"[\w-]+@[a-z]+",
        r"(?:)",
    ],
)
def test_a_regex_accepts_what_re_fullmatch_accepts(pattern):
    grammar, rng = regex_grammar(pattern), random.Random(1)
    alphabet = "abcx019.é@- \nyesno maybeαω😀😆"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(7))) for _ in range(3000)]
    texts += ["yes maybe", "no", "aaa", "12.34", "ab@abc", "α😀x"]
    verdicts = [
        (matches(grammar, t.encode()), bool(re.fullmatch(pattern, t, re.ASCII))) for t in texts
    ]
    assert all(ours == theirs for ours, theirs in verdicts)
    assert any(theirs for _, theirs in verdicts)


def test_what_a_random_model_writes_under_a_regex_matches_it(vocabulary):
    rng = random.Random(2)
    for pattern in (
        r"[A-Z][a-z]{2,8} is \d{1,3} years old\.",
        r"(\w+ ){3}end",
        r"[^\"x]{5}",
        r"\D\S\W",
    ):
        grammar = regex_grammar(pattern)
        for _ in range(20):
            out, complete = sample(grammar, vocabulary, rng, 200)
            assert complete, out
            assert re.fullmatch(pattern, out.decode(), re.ASCII | re.DOTALL), out


@pytest.mark.parametrize(
    "lo, hi", [(0, 0), (3, 7), (-5, 5), (7, 1234), (-120, -7), (99, 100), (-1, 10), (1000, 1000)]
)
def test_an_integer_range_is_exact(lo, hi):
    grammar = json_grammar({"type": "integer", "minimum": lo, "maximum": hi})
    accepted = {n for n in range(-2000, 2001) if matches(grammar, str(n).encode())}
    assert accepted == set(range(lo, hi + 1))
    assert not matches(grammar, b"03")
    assert not matches(grammar, b"-")


def test_any_json_is_accepted_and_nothing_else():
    grammar = json_grammar({"anyOf": [{}]})
    for value in (
        {},
        [],
        'a"\\\n😀',
        0,
        -1.5,
        True,
        None,
        {"a": [1, {"b": "é"}, []], "c": {}},
        [[[[]]]],
        "\u0007",
    ):
        for text in (
            json.dumps(value),
            json.dumps(value, ensure_ascii=False),
            json.dumps(value, indent=2),
        ):
            assert matches(grammar, text.encode()), text
    for text in (
        "",
        "{",
        "[1,]",
        "{a: 1}",
        "01",
        "1.",
        "+1",
        '"\n"',
        "'a'",
        "nul",
        '{"a" 1}',
        '"\\x"',
        '"\\ud800"',
        "[1 2]",
        "{} {}",
    ):
        assert not matches(grammar, text.encode()), text


def test_objects_have_their_required_members_in_order_and_optional_ones_or_not():
    grammar = json_grammar(
        {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"]}
    )
    texts = ['{"b":2}', '{"a":1,"b":2}', '{"b":2,"c":3}', '{"a": 1, "b": 2, "c": 3}']
    assert all(matches(grammar, t.encode()) for t in texts)
    assert not any(
        matches(grammar, t)
        for t in (b"{}", b'{"a":1}', b'{"b":2,"a":1}', b'{"b":2,}', b'{,"b":2}', b'{"b":2,"d":4}')
    )


def test_arrays_count_their_items():
    grammar = json_grammar({"type": "array", "items": {"const": 0}, "minItems": 2, "maxItems": 3})
    assert [n for n in range(6) if matches(grammar, json.dumps([0] * n).encode())] == [2, 3]
    grammar = json_grammar(
        {
            "type": "array",
            "prefixItems": [{"const": "x"}, {"const": "y"}],
            "items": {"type": "boolean"},
            "minItems": 1,
        }
    )
    assert all(
        matches(grammar, json.dumps(v).encode())
        for v in (["x"], ["x", "y"], ["x", "y", True, False])
    )
    assert not any(
        matches(grammar, json.dumps(v).encode()) for v in ([], ["y"], ["x", True], ["x", "y", 1])
    )


def test_an_answer_is_brought_to_its_end_within_the_tokens_left(vocabulary):
    rng, grammar = random.Random(3), json_grammar()
    for limit in (2, 3, 7, 25, 60):
        for _ in range(10):
            out, complete = sample(grammar, vocabulary, rng, limit)
            assert complete, out
            assert isinstance(json.loads(out), dict), out
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 5},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["name", "children"],
            }
        },
    }
    for _ in range(10):
        out, complete = sample(json_grammar(tree), vocabulary, rng, 150)
        assert complete
        assert 1 <= len(json.loads(out)["name"]) <= 5


def test_without_the_count_of_tokens_left_a_random_model_is_cut_off(vocabulary):
    grammar, constraint, rng = json_grammar(), None, random.Random(4)
    constraint = Constraint(grammar, vocabulary)
    for _ in range(25):
        constraint.advance(rng.choice(torch.nonzero(constraint.allowed())[:, 0].tolist()))
    assert not constraint.complete


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "object", "minProperties": 2}, "minProperties is not supported"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported"),
        ({"type": "strin"}, "unknown type 'strin'"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "nothing in between"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer lies between 5 and 4"),
        ({"type": "string", "pattern": "(?=a)b"}, "assert is not supported"),
        ({"type": "string", "pattern": "("}, "regular expression '('"),
        ({"allOf": [{}, {}]}, "allOf of 2 is not supported"),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
            },
            "infinite",
        ),
        ({"type": "string", "maxLength": 10**9}, "up to 4,096"),
        ({"properties": {"a": 3}}, "#/properties/a: 3 is not a schema"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(schema, words):
    with pytest.raises(UserError, match=re.escape(words)):
        json_grammar(schema)


def test_a_thousand_properties_are_built_and_nesting_has_an_end():
    grammar = json_grammar(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}
    )
    assert all(matches(grammar, t) for t in (b"{}", b'{"p0":"x"}', b'{"p3":"x","p999":"y"}'))
    assert not matches(grammar, b'{"p9":"","p1":""}')
    nested = {}
    for _ in range(5000):
        nested = {"anyOf": [nested]}
    with pytest.raises(UserError, match="nested too deeply"):
        json_grammar(nested)
    grammar = json_grammar({"type": "array"})
    assert matches(grammar, b"[" * 200 + b"]" * 200)
    assert not matches(grammar, b"[" * 20_000 + b"]" * 20_000)


def test_a_mask_that_costs_too_much_allows_nothing(vocabulary):
    constraint, rng = (
        Constraint(regex_grammar(r"((\w{0,9}\s?){1,30}){1,30}"), vocabulary),
        random.Random(1),
    )
    for _ in range(400):
        allowed = torch.nonzero(constraint.allowed())[:, 0].tolist()
        if not allowed:
            break
        constraint.advance(rng.choice(allowed))
    assert not allowed
