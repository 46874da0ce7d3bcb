"""Constrained output: what is accepted, what is refused in one line, and what it may cost."""

import copy
import json
import random
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401  (puts the root on the path)

from common import UserError
from engine import grammar as engine_grammar
from engine.grammar import Constraint, Vocabulary, json_grammar, regex_grammar
from engine.sampler import Sampling, SamplingRow, draw_tokens
from tokenizer import Tokenizer

BYTES = SimpleNamespace(vocab_size=256, eos_id=None, token_bytes=lambda i: bytes([i]))


@pytest.fixture
def no_trial(monkeypatch):
    """Grammars that mean no harm need no process of their own."""
    monkeypatch.setattr(engine_grammar, "fault_found", lambda grammar: "")


@pytest.fixture(scope="module")
def vocabulary():
    text = (
        'name {"a": [1, 2.5], "city": "Zürich"} true false null 😀 the quick brown fox, "x": "y"} '
        * 20
    )
    return Vocabulary(Tokenizer.train([text], 400, special_tokens=["<|endoftext|>"]))


def allowed_ids(constraint):
    bits = np.frombuffer(constraint.mask(), np.uint8)
    bits = np.unpackbits(bits, count=constraint.size, bitorder="little")
    return np.flatnonzero(bits).tolist()


def matches(constraint, data):
    """Whether a whole byte string is allowed, byte by byte, and then complete."""
    constraint = copy.copy(constraint)
    for byte in data:
        if byte not in allowed_ids(constraint):
            return False
        constraint.advance(byte)
    return constraint.complete


def matcher(grammar):
    constraint = Constraint(grammar, Vocabulary(BYTES))
    return lambda text: matches(constraint, text.encode())


def sample(constraint, vocabulary, rng, limit):
    """What a random model that likes to close brackets writes -> (bytes, whether whole)."""
    constraint = copy.copy(constraint)
    out = b""
    for _ in range(limit):
        if constraint.done or (constraint.complete and rng.random() < 0.3):
            break
        ids = allowed_ids(constraint)
        if not ids:
            break
        closing = [i for i in ids if vocabulary.spelled[i] in (b'"', b"}", b"]")]
        token = rng.choice(closing if closing and rng.random() < 0.3 else ids)
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
        r"^a{3}|b+?$",
        r"[\w-]+@[a-z]+",
        r"(?:)",
    ],
)
def test_a_regex_accepts_what_re_fullmatch_accepts(pattern, no_trial):
    accepts, rng = matcher(regex_grammar(pattern)), random.Random(1)
    alphabet = "abcx019.é@- \nyesno maybeαω😀😆"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(7))) for _ in range(300)]
    texts += ["yes maybe", "no", "aaa", "12.34", "ab@abc", "α😀x", "aé"]
    verdicts = [bool(re.fullmatch(pattern, text, re.ASCII)) for text in texts]
    assert [accepts(text) for text in texts] == verdicts
    assert any(verdicts)


def test_what_a_random_model_writes_under_a_regex_matches_it(vocabulary, no_trial):
    rng = random.Random(2)
    for pattern in (
        r"[A-Z][a-z]{2,8} is \d{1,3} years old\.",
        r"(\w{1,9} ){3}end",
        r"[^\"x]{5}",
        r"\D\S\W",
        r"a/b\/c\n",
    ):
        constraint = Constraint(regex_grammar(pattern), vocabulary)
        for _ in range(20):
            out, complete = sample(constraint, vocabulary, rng, 200)
            assert complete, out
            assert re.fullmatch(pattern, out.decode(), re.ASCII | re.DOTALL), out


@pytest.mark.parametrize("lo, hi", [(0, 0), (3, 7), (-5, 5), (7, 1234), (-120, -7), (99, 100)])
def test_an_integer_range_is_exact(lo, hi, no_trial):
    accepts = matcher(json_grammar({"type": "integer", "minimum": lo, "maximum": hi}))
    tried = {*range(-150, 150), *range(1000, 1300, 7), 1233, 1234, 1235}
    assert {n for n in tried if accepts(str(n))} == {n for n in tried if lo <= n <= hi}
    assert not accepts("03")
    assert not accepts("-")


def test_any_json_is_accepted_and_nothing_else(no_trial):
    accepts = matcher(json_grammar({"anyOf": [{}]}))
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
        for indent in (None, 2):
            assert accepts(json.dumps(value, ensure_ascii=False, indent=indent)), value
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
        " {}",
        "{  }",
        "[\n\n1]",
        f"[\n{' ' * 17}1]",
    ):
        assert not accepts(text), text


def test_members_come_in_order_and_others_only_where_they_may(no_trial):
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
        "required": ["b"],
        "additionalProperties": False,
    }
    accepts = matcher(json_grammar(schema))
    assert all(map(accepts, ['{"b":2}', '{"a":1,"b":2}', '{"b":2,"c":3}', '{"a": 1, "b": 2}']))
    assert not any(map(accepts, ["{}", '{"a":1}', '{"b":2,"a":1}', '{"b":2,}', '{"b":2,"d":4}']))
    accepts = matcher(json_grammar(schema | {"additionalProperties": {"type": "null"}}))
    assert accepts('{"b":2,"d":null}')
    assert not accepts('{"b":2,"d":4}')
    assert not accepts('{"b":2,"a":null}')


def test_arrays_count_their_items(no_trial):
    schema = {"type": "array", "items": {"const": 0}, "minItems": 2, "maxItems": 3}
    accepts = matcher(json_grammar(schema))
    assert [n for n in range(6) if accepts(json.dumps([0] * n))] == [2, 3]
    prefix = {"prefixItems": [{"const": "x"}, {"const": "y"}], "items": {"type": "boolean"}}
    accepts = matcher(json_grammar({"type": "array", "minItems": 1, **prefix}))
    assert all(accepts(json.dumps(v)) for v in (["x"], ["x", "y"], ["x", "y", True, False]))
    assert not any(accepts(json.dumps(v)) for v in ([], ["y"], ["x", True], ["x", "y", 1]))


def test_keywords_beside_anyof_bind_and_patterns_may_match_anywhere(no_trial):
    schema = {
        "type": "object",
        "properties": {"action": {"const": "go"}, "target": {"type": "integer"}},
        "required": ["action"],
        "additionalProperties": False,
        "anyOf": [{"required": ["target"]}, {"required": ["action"]}],
    }
    accepts = matcher(json_grammar(schema))
    assert accepts('{"action":"go"}')
    assert not any(map(accepts, ["7", "{}", '{"target":7}', '{"action":"go","x":1}']))
    accepts = matcher(json_grammar({"type": "string", "pattern": "[0-9]{2}"}))
    assert accepts('"a12b"')
    assert not accepts('"a1b2"')


def test_texts_around_a_value_are_fixed(no_trial):
    choices = [json_grammar({"const": 1}, "<f>\n", "\n</f>"), json_grammar({"const": 2}, "é", "")]
    accepts = matcher(" | ".join(choices))
    assert accepts("<f>\n1\n</f>")
    assert accepts("é2")
    assert not any(map(accepts, ["1", "<f>\n2\n</f>", "é1", "<f>1</f>"]))


def test_tokens_of_every_kind_of_tokenizer_are_allowed_by_their_bytes(no_trial):
    pieces = {"<0x41>": 3, "A": 4, "▁A": 5, "B": 6, "é": 7, "<0xC3>": 8, "<0xA9>": 9}
    tok = Tokenizer("pieces", pieces, {}, special={"<s>": 0, "</s>": 1}, added={"<AB>": 2})
    tok.config["eos_token"] = "<AB>"  # an end that is not among the special tokens
    constraint = Constraint(regex_grammar("A(B|é)|<AB>|<s>"), Vocabulary(tok))
    assert allowed_ids(constraint) == [3, 4]  # both spell A; no token spells < but <AB>, the end
    constraint.advance(4)
    assert allowed_ids(constraint) == [6, 7, 8]
    constraint.advance(8)
    assert allowed_ids(constraint) == [9]
    assert not constraint.complete
    constraint.advance(9)
    assert constraint.complete
    assert constraint.done
    constraint = Constraint(regex_grammar("[ab]+"), Vocabulary(Tokenizer.char("abc")))
    assert allowed_ids(constraint) == [0, 1]


def test_without_a_tokenizer_nothing_can_be_constrained():
    with pytest.raises(UserError, match="needs a tokenizer"):
        Vocabulary(None)


def test_copies_of_a_constraint_go_their_own_ways(vocabulary, no_trial):
    constraint = Constraint(regex_grammar("ab|cd"), Vocabulary(BYTES))
    other = copy.copy(constraint)
    constraint.advance(ord("a"))
    other.advance(ord("c"))
    assert allowed_ids(constraint) == [ord("b")]
    assert allowed_ids(other) == [ord("d")]


@pytest.mark.parametrize("ends", [{99}, {99, 100}, {99, 104}, set()])
def test_a_turn_ends_where_the_text_is_complete_and_long_enough(ends, no_trial):
    """Among the ends is an ordinary token (c). The model has more rows than the tokenizer has ids,
    and they never come."""
    constraint = Constraint(regex_grammar("ab(cb)*"), Vocabulary(BYTES))

    def drawn(text, min_tokens=0):
        at = copy.copy(constraint)
        for token in text:
            at.advance(token)
        sampling = Sampling(temperature=0, min_tokens=min_tokens, constraint=at)
        row = SamplingRow(sampling, text, [], frozenset(ends), at)
        found = set()
        logits = torch.zeros(1, 300)
        while True:
            tokens, failed = draw_tokens(logits.clone(), [row], torch.zeros(1))
            if failed:
                return found
            found.add(tokens.item())
            logits[0, tokens.item()] = -torch.inf

    assert drawn(b"") == {97}
    assert drawn(b"ab") == {99} | ends
    assert drawn(b"ab", min_tokens=3) == {99} - ends
    assert drawn(b"abc") == {98}


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "object", "minProperties": 2}, "minProperties above 1 is not supported"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported"),
        ({"type": "integer", "minimun": 3}, "minimun is not supported"),
        ({"items": {"not": {}}}, "at '#/items': not is not supported"),
        ({"exclusiveMinimum": True}, "True is not a number"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": {}}, "type must be a string or array"),
        ({"enum": 5}, "enum must be an array"),
        ({"enum": []}, "empty"),
        ({"required": 5}, "Expected array for 'required'"),
        ({"minimum": float("nan")}, "not JSON compliant"),
        ({"minimum": "a"}, "'minimum'"),
        ({"const": 2**53}, "9007199254740992 is not below 2^53"),
        ({"const": [2.5e300]}, "is not below 2^53"),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "bounds 0 and 0.5"),
        ({"$ref": 5}, "$ref 5 leads nowhere"),
        ({"$ref": {}}, "$ref {} leads nowhere"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "#/default", "default": {"not": {}}}, "leads nowhere"),
        (  # where llguidance finds what nobody has checked
            {
                "$ref": "#/$defs/a/default",
                "$defs": {"a": {"default": {"not": {}}}, "a/default": {}},
            },
            "leads nowhere",
        ),
        ({"$ref": "#"}, "no text of this model's tokens matches"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum (5) is greater"),
        ({"type": "string", "format": "thing"}, "Unknown format: thing"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "const": "\ud800"}, "hex escape"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"properties": {"a": 3}}, "'#/properties/a': 3 is not a schema"),
        ({"properties": [3]}, "'#/properties': [3] has no schemas in it"),
        ({"items": [{}] * 10_000}, "'#/items': [{}, {}, "),
        (True, "True is not a schema"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_in_one_line(schema, words, no_trial):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        Constraint(json_grammar(schema), Vocabulary(BYTES))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("(", "unclosed group"),
        ("(?!a)b", "look-around"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\ba", "lookarounds"),
        ("[^\\s\\S]", "no text of this model's tokens matches"),
        ("\ud800", "surrogates"),
        ("(" * 5000 + ")" * 5000, "regex"),
    ],
)
def test_a_pattern_that_cannot_be_honoured_is_refused_in_one_line(
    pattern, words, vocabulary, no_trial
):
    with pytest.raises(UserError, match=words) as caught:
        Constraint(regex_grammar(pattern), vocabulary)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name, pointer", [("a/b", "a~1b"), ("a~b", "a~0b"), ("a b", "a%20b")])
def test_a_reference_is_a_json_pointer(name, pointer, no_trial):
    schema = {"$ref": f"#/$defs/{pointer}", "$defs": {name: {"type": "boolean"}}}
    accepts = matcher(json_grammar(schema))
    assert accepts("true") and not accepts("1")


def nested(schema, depth):
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_large_schemas_are_built_and_nesting_has_an_end(no_trial):
    names = {f"p{i}": {"type": "string"} for i in range(1000)}
    accepts = matcher(json_grammar({"type": "object", "properties": names, "required": [*names]}))
    assert accepts(json.dumps(dict.fromkeys(names, "x")))
    accepts = matcher(json_grammar({"type": "array"}))
    assert accepts("[" * 200 + "]" * 200)
    with pytest.raises(UserError, match="nested more than 100 deep"):
        json_grammar(nested({}, 101))
    with pytest.raises(UserError, match="recursion"):
        json_grammar({"const": nested({}, 10_000)})
    with pytest.raises(UserError, match="300,000 characters of schema or pattern: at most 200,000"):
        Constraint(regex_grammar("a" * 299_998), Vocabulary(BYTES))
    with pytest.raises(UserError, match="at most 200,000"):
        json_grammar({"enum": ["x" * 300_000]})


def test_a_schema_of_shared_parts_takes_no_time():
    """Its parts, written out as a tree, are 2^40."""
    before = time.process_time()
    constraint = Constraint(json_grammar(nested({"type": "integer"}, 40)), Vocabulary(BYTES))
    assert time.process_time() - before < 0.5
    assert matches(constraint, b"[" * 40 + b"1" + b"]" * 40)


def test_a_grammar_that_would_end_the_process_is_refused():
    """3,000 references in a row overflow the stack of whoever reads them."""
    definitions = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(3000)}
    definitions["a3000"] = {"type": "null"}
    grammar = json_grammar({"$ref": "#/$defs/a0", "$defs": definitions})
    with pytest.raises(UserError, match="too deep a stack"):
        Constraint(grammar, Vocabulary(BYTES))


@pytest.mark.slow
def test_a_grammar_that_takes_minutes_to_build_is_refused_after_seconds():
    patterns = [{"pattern": f"a{i}|b.{{{i}}}c"} for i in range(200)]
    grammar = json_grammar({"type": "string", "allOf": patterns})
    before = time.monotonic()
    with pytest.raises(UserError, match="needs over 2 s"):
        Constraint(grammar, Vocabulary(BYTES))
    assert time.monotonic() - before < 11


@pytest.mark.parametrize(
    "grammar",
    [
        regex_grammar(".{0,1000}[x].{0,990}"),
        regex_grammar("(a*)*b"),
        regex_grammar("((a{1,100}){1,100}){1,100}"),
        regex_grammar("(.*e.{100}){5}.*"),
        regex_grammar(r"(\w+\s*)+x"),
        json_grammar({"anyOf": [{"type": "array", "minItems": i} for i in range(40)]}),
    ],
)
def test_masks_of_32_hostile_answers_cost_less_than_50_ms_of_a_step(grammar, no_trial):
    rng = random.Random(1)
    letters = "etaoinshrdlux "
    words = {"".join(rng.choices(letters, k=rng.randrange(1, 9))).encode() for _ in range(32_000)}
    words = [*(bytes([i]) for i in range(256)), *sorted(words)]
    tok = SimpleNamespace(vocab_size=len(words), eos_id=None, token_bytes=words.__getitem__)
    first = Constraint(grammar, Vocabulary(tok))
    answers = [copy.copy(first) for _ in range(32)]
    steps = []
    for _ in range(20):
        for answer in answers:
            answer.ids = allowed_ids(answer)
        before = time.thread_time()
        for answer in answers:
            if answer.ids and not answer.done:
                answer.advance(rng.choice(answer.ids))
                answer.mask()
        steps.append(time.thread_time() - before)
    assert max(steps) < 0.05, steps


def test_a_mask_that_costs_too_much_allows_nothing_and_says_so(vocabulary, no_trial):
    constraint = Constraint(regex_grammar(r"x((\p{L}{0,9}\s?){1,30}){1,30}"), vocabulary)
    constraint.advance(vocabulary.spelled.index(b"x"))
    assert allowed_ids(constraint) == []
    assert not constraint.complete
    assert not constraint.done
    assert "too many expressions" in constraint.error
    assert "\n" not in constraint.error
