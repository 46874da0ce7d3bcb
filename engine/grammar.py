"""Output that must match a regular expression or a JSON schema: which tokens may come next.

    vocabulary = Vocabulary(tok)                               # once per tokenizer
    constraint = Constraint(json_grammar(schema), vocabulary)  # once per request; None: any object
    constraint.allowed(remaining=100)                # (V,) bool: what the next token may be
    constraint.advance(token)                        # and again, until constraint.done

The idea is the derivative of an expression by a byte: what may still come once the byte is read
(Brzozowski 1964). Of (ab|ac)* by "a" it is (b|c)(ab|ac)*, of that by "c" it is (ab|ac)* again,
and by "a" it is nothing: after "a" only "b" and "c" are allowed. We keep a derivative as the set
of its alternatives (Antimirov 1996), here b(ab|ac)* and c(ab|ac)*; equal sets are one state of an
automaton that is made as it is walked. A token is allowed if all its bytes are.

Top to bottom: expressions over bytes; regular expressions and JSON schemas as expressions; the
automaton; tokens. An expression is a tuple: ("set", frozenset of bytes allowed), ("seq", [...]),
("alt", [...]), ("rep", expression, least, most or None), ("ref", rule's name).
Rules that refer to each other make JSON's nesting possible.
"""

import json
import math
import re
from dataclasses import dataclass, field

import numpy as np
import torch

from common import STUMBLES, UserError

# The standard library's own parser of regular expressions; the second name is Python 3.10's.
sre = re._parser if hasattr(re, "_parser") else re.sre_parse

# States and positions that building a grammar may cost, and then its masks once more, of which
# each new one adds a tenth: about a second of work.
WORK = 1_000_000


def one_of(values):
    return "set", frozenset(values)


def concat(*parts):
    return "seq", parts


def either(*parts):
    return "alt", parts


def literal(text):
    return "seq", [one_of([byte]) for byte in text.encode()]


EMPTY = literal("")


# --------------------------------------------------------------------------- characters and regexes
def between(low, high, digits):
    """All byte strings from `low` to `high`, both of one length, whose bytes after the first are in
    the range `digits`: decimal numbers, and the UTF-8 of characters."""
    if not low:
        return EMPTY
    rest = len(low) - 1
    if low[0] == high[0]:
        return concat(one_of(low[:1]), between(low[1:], high[1:], digits))
    smallest, largest = bytes([digits[0]]) * rest, bytes([digits[-1]]) * rest
    first, last = low[0], high[0]
    parts = []
    if low[1:] != smallest:  # the lowest first byte has not all of what may follow, so it is apart
        parts.append(concat(one_of(low[:1]), between(low[1:], largest, digits)))
        first += 1
    if high[1:] != largest:
        parts.append(concat(one_of(high[:1]), between(smallest, high[1:], digits)))
        last -= 1
    middle = one_of(range(first, last + 1))
    return either(*parts, concat(middle, ("rep", one_of(digits), rest, rest)))


def overlap(ranges, others):
    """What lies in both of two lists of ranges [(low, high)]."""
    pairs = [(max(a, c), min(b, d)) for a, b in ranges for c, d in others]
    return [(low, high) for low, high in pairs if low <= high]


def complement(ranges, last=0x10FFFF):
    """What lies in none of the ranges, from 0 to `last`."""
    gaps, at = [], 0
    for low, high in [*sorted(ranges), (last + 1, last + 1)]:
        if at < low:
            gaps.append((at, low - 1))
        at = max(at, high + 1)
    return gaps


# Code points whose UTF-8 has 1, 2, 3, 3 and 4 bytes; surrogates, between the two 3s, are none.
UTF8_LENGTHS = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
# Ranges of ASCII: dialects of regular expressions differ in what else is a digit or a letter.
CLASSES = {
    "DIGIT": [(48, 57)],
    "SPACE": [(9, 13), (32, 32)],
    "WORD": [(48, 57), (65, 90), (95, 95), (97, 122)],
}
# What a JSON string holds without a backslash: no control characters, quotes and backslashes.
UNESCAPED = [(32, 33), (35, 91), (93, 126), (128, 0x10FFFF)]


def characters(ranges, in_json=False):
    """Ranges of code points -> the expression of their UTF-8; in_json: as a JSON string has them,
    where quotes and backslashes are written with a backslash."""
    escaped = []
    if in_json:
        for character in '"\\':
            if overlap(ranges, [(ord(character), ord(character))]):
                escaped.append(literal("\\" + character))
        ranges = overlap(ranges, UNESCAPED)
    cut = overlap(ranges, UTF8_LENGTHS)
    tails = range(0x80, 0xC0)
    return "alt", [between(chr(a).encode(), chr(b).encode(), tails) for a, b in cut] + escaped


def regex_tree(pattern, in_json=False):
    """A regular expression, of all of the text, as an expression. Raises UserError for what does
    not describe the text itself: look-around, back references, word boundaries.

    in_json: of the content of a JSON string, within which it may begin and end anywhere unless it
    is anchored, as JSON Schema has it."""
    if len(pattern) > 10_000:
        raise UserError(f"a regular expression of {len(pattern):,} characters: at most 10,000")
    try:
        items = list(sre.parse(pattern))
        begin = str(items[:1]).startswith("[(AT, AT_BEGINNING")  # with or without _STRING
        end = str(items[-1:]).startswith("[(AT, AT_END")
        body = regex_sequence(items[begin : len(items) - end], in_json)
    except Exception as error:  # of the parser, which raises many kinds, or ours
        raise UserError(f"regular expression {pattern!r}: {error}") from None
    if not in_json:
        return body
    anywhere = "rep", ANY_CHARACTER, 0, None
    return concat(EMPTY if begin else anywhere, body, EMPTY if end else anywhere)


def regex_sequence(items, in_json):
    """The standard library's parse of a regular expression -> an expression."""
    parts = []
    for op, value in items:
        op = str(op)
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            parts.append(characters(code_points(op, value), in_json))
        elif op == "BRANCH":
            parts.append(("alt", [regex_sequence(branch, in_json) for branch in value[1]]))
        elif op == "SUBPATTERN" and not value[1] and not value[2]:  # a group without flags
            parts.append(regex_sequence(value[3], in_json))
        elif op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = value
            most = None if most == sre.MAXREPEAT else most
            parts.append(("rep", regex_sequence(inner, in_json), least, most))
        else:
            raise UserError(f"{op.lower()} is not supported (only what describes the text itself)")
    return concat(*parts)


def code_points(op, value):
    """One character of a parsed regular expression -> the ranges that it may be in."""
    if op == "ANY":
        return complement([(10, 10)])
    ranges, negated, last = [], op == "NOT_LITERAL", 0x10FFFF
    for kind, what in value if op == "IN" else [("LITERAL", value)]:
        kind = str(kind)
        if kind == "NEGATE":
            negated = True
        elif kind == "LITERAL":
            ranges.append((what, what))
        elif kind == "RANGE":
            ranges.append(what)
        else:  # CATEGORY_DIGIT, CATEGORY_NOT_DIGIT, ...: nothing is made whose meaning differs
            last = 0x7F
            known = CLASSES[str(what).rsplit("_", 1)[1]]
            ranges += complement(known, last) if "NOT" in str(what) else known
    return complement(ranges, last) if negated else ranges


# ------------------------------------------------------------------------------------- JSON schemas
# One character of a string's content: as it is, or escaped (RFC 8259, section 7); half surrogate
# pairs are none.
CHARACTER = (
    r'[^\x00-\x1f"\\\x7f]|\\["\\/bfnrt]|\\u([0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}|'
    r"[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])"
TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(Z|[+-]0\d:[0-5]\d)"
OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
STRING_FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": r"[a-z0-9]+([._][a-z0-9]+){0,3}@[a-z0-9]+(\.[a-z0-9]+){0,2}\.[a-z]{2,6}",
    "ipv4": rf"({OCTET}\.){{3}}{OCTET}",
}
KEYWORDS = set(
    "type properties required additionalProperties items prefixItems minItems maxItems enum const "
    "anyOf oneOf allOf $ref minLength maxLength pattern format minimum maximum exclusiveMinimum "
    "exclusiveMaximum "
    # and those that bind nothing
    "title description default examples $schema $id $comment $defs definitions deprecated strict "
    "readOnly writeOnly".split()
)
TYPES = "object array string number boolean null".split()
# A schema without a type, but with one of these, has this type.
TYPE_OF_KEYWORD = {"properties": "object", "items": "array"}
TYPE_OF_KEYWORD |= dict.fromkeys("pattern format minLength maxLength".split(), "string")
# Two rules of every schema.
ANY_CHARACTER = "ref", "character"
WHITE_SPACE = "ref", "space"
COMMA = concat(literal(","), WHITE_SPACE)
COLON = concat(literal(":"), WHITE_SPACE)


def integers(low, high):
    """All integers from low to high, without leading zeros."""
    parts = []
    if low < 0:
        parts.append(concat(literal("-"), integers(max(1, -high), -low)))
    for length in range(len(str(max(low, 0))), len(str(max(high, 0))) + 1):
        smallest = 10 ** (length - 1) if length > 1 else 0
        a, b = max(low, smallest), min(high, 10**length - 1)
        if a <= b:
            parts.append(between(str(a).encode(), str(b).encode(), range(48, 58)))
    return either(*parts)


def refuse_schema(where, why):
    raise UserError(f"JSON schema at {where}: {why}")


class Schema:
    """Turns a JSON schema into rules. `where` is the place in it, for errors."""

    def __init__(self, root):
        self.root = root
        self.rules = {
            "character": regex_tree(CHARACTER),
            "space": regex_tree(r" ?|\n {0,16}"),  # bounded: no model stalls in white space
        }

    def rule(self, name, make, *args):
        """A reference to the rule `name`, which is made if it is new; it may contain itself."""
        if name not in self.rules:
            self.rules[name] = EMPTY
            self.rules[name] = make(*args)
        return "ref", name

    def value(self, schema, where="#", via=()):
        """What matches the schema -> expression. A keyword that cannot be honoured is refused, not
        ignored. via: the references that led here with nothing in between."""
        if schema is True or schema == {} or schema is None:
            return self.rule("any", self.value, {"type": TYPES})
        if not isinstance(schema, dict):
            refuse_schema(where, f"{schema!r} is not a schema")
        for key in schema:
            if key not in KEYWORDS:
                refuse_schema(where, f"{key} is not supported")
        if "$ref" in schema:
            name = schema["$ref"]
            if name in via:
                refuse_schema(where, f"$ref {name!r} leads back to itself with nothing in between")
            return self.rule(name, self.value, self.resolve(name, where), name, (*via, name))
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                count = len(schema[key])
                if key == "allOf" and count != 1:
                    refuse_schema(where, f"allOf of {count} is not supported, only of one")
                choices = enumerate(schema[key])
                return "alt", [self.value(s, f"{where}/{key}/{i}", via) for i, s in choices]
        if "const" in schema or "enum" in schema:
            choices = schema.get("enum", [schema.get("const")])
            return "alt", [literal(json.dumps(choice, ensure_ascii=False)) for choice in choices]
        return self.typed(schema, where)

    def typed(self, schema, where):
        """A schema that says what type its values have, or lets one tell by its keywords."""
        kinds = schema.get("type")
        if not kinds:
            told = [TYPE_OF_KEYWORD[key] for key in TYPE_OF_KEYWORD if key in schema]
            kinds = told[:1] or TYPES
        kinds = kinds if isinstance(kinds, list) else [kinds]
        makers = {
            "object": self.object,
            "array": self.array,
            "string": self.string,
            "number": self.number,
            "integer": self.number,
            "boolean": lambda *_: either(literal("true"), literal("false")),
            "null": lambda *_: literal("null"),
        }
        for kind in kinds:
            if kind not in makers:
                refuse_schema(where, f"unknown type {kind!r}")
        return "alt", [makers[kind](schema, where, kind) for kind in kinds]

    def resolve(self, ref, where):
        """The schema that a $ref leads to."""
        at = self.root if ref.startswith("#") else None
        for key in filter(None, ref[1:].split("/")):
            key = key.replace("~1", "/").replace("~0", "~")
            at = at.get(key) if isinstance(at, dict) else None
        if at is None:
            refuse_schema(where, f"$ref {ref!r} leads nowhere in this schema (#/$defs/...)")
        return at

    def string(self, schema, where, _):
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        pattern = schema.get("pattern")
        if not pattern and schema.get("format") in STRING_FORMATS:
            pattern = f"^{STRING_FORMATS[schema['format']]}$"
        if pattern is not None:
            if least or most is not None:
                refuse_schema(where, "give a pattern or lengths, not both")
            content = regex_tree(pattern, in_json=True)
        else:
            longest = max(least, most or 0)
            if longest > 4096:
                refuse_schema(where, f"string lengths up to 4,096, not {longest:,}")
            content = "rep", ANY_CHARACTER, least, most
        return concat(literal('"'), content, literal('"'))

    def number(self, schema, where, kind):
        """Integers of up to 15 digits, which every reader keeps exactly; numbers also with a
        fraction, which stays between the integers at both ends."""
        limit = 10**15
        low = max(
            1 - limit,
            math.ceil(schema.get("minimum", -limit)),
            math.floor(schema.get("exclusiveMinimum", -limit)) + 1,
        )
        high = min(
            limit - 1,
            math.floor(schema.get("maximum", limit)),
            math.ceil(schema.get("exclusiveMaximum", limit)) - 1,
        )
        parts = [integers(low, high)] if low <= high else []
        if kind == "number":
            fraction = regex_tree(r"\.[0-9]{1,15}")
            if max(low, 0) <= high - 1:  # k.f is in [k, k + 1)
                parts.append(concat(integers(max(low, 0), high - 1), fraction))
            if low + 1 <= min(high, 0):  # -k.f is in (-k - 1, -k]
                parts.append(concat(literal("-"), integers(max(-high, 0), -low - 1), fraction))
        if not parts:
            refuse_schema(where, f"no {kind} lies between {low} and {high}")
        return either(*parts)

    def array(self, schema, where, _):
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most is not None and most < least:
            refuse_schema(where, f"{least} to {most} items cannot be made")
        first = []
        for i, prefix in enumerate(schema.get("prefixItems", [])):
            first.append(self.value(prefix, f"{where}/prefixItems/{i}"))
        item = self.value(schema.get("items"), f"{where}/items")
        first = first or [item]  # there is one, so that what follows has a comma before it
        first = first[:most]
        body = EMPTY
        if most is None or most > len(first):
            others = max(0, least - len(first)), most and most - len(first)
            body = "rep", concat(COMMA, item), *others
        # From the last item to the first, because who leaves one out leaves out all after it.
        for i in reversed(range(len(first))):
            body = concat(COMMA if i else EMPTY, first[i], body)
            if i >= least:
                body = "rep", body, 0, 1
        return concat(literal("["), WHITE_SPACE, body, WHITE_SPACE, literal("]"))

    def object(self, schema, where, _):
        """Declared properties come in their order, the optional ones or not; further ones only
        where none are declared."""
        members = dict(schema.get("properties", {}))
        required = schema.get("required", [])
        for name in required:
            members.setdefault(name)  # None: any value
        more = schema.get("additionalProperties", True)
        if members:
            content = self.members(members, required, where)
        elif more is False:
            return literal("{}")
        else:
            name = concat(literal('"'), ("rep", ANY_CHARACTER, 0, 64), literal('"'))
            pair = concat(name, COLON, self.value(more, f"{where}/additionalProperties"))
            pairs = concat(pair, ("rep", concat(COMMA, pair), 0, None))
            content = "rep", pairs, 0, 1
        return concat(literal("{"), WHITE_SPACE, content, WHITE_SPACE, literal("}"))

    def members(self, members, required, where):
        """Two rules for each i: the members from the i-th on, after others (True: with a comma) or
        as the first (False)."""
        for i, (name, schema) in enumerate(members.items()):
            value = self.value(schema, f"{where}/properties/{name}")
            name_text = literal(json.dumps(name, ensure_ascii=False))
            for started in (False, True):
                comma = COMMA if started else EMPTY
                choices = [concat(comma, name_text, COLON, value, ("ref", f"{where} {i + 1} True"))]
                if name not in required:
                    choices.append(("ref", f"{where} {i + 1} {started}"))
                self.rules[f"{where} {i} {started}"] = either(*choices)
        for started in (False, True):
            self.rules[f"{where} {len(members)} {started}"] = EMPTY
        return "ref", f"{where} 0 False"


def json_grammar(schema=None, before="", after=""):
    """A JSON schema (a dict; None: any JSON object) -> Grammar. before and after: fixed text around
    the value. Raises UserError for a schema that cannot be honoured."""
    maker = Schema(schema or {})
    try:
        value = maker.value(schema or {"type": "object"})
        return Grammar(concat(literal(before), value, literal(after)), maker.rules)
    except RecursionError:
        raise UserError("this JSON schema is nested too deeply") from None
    except UserError:
        raise
    except STUMBLES as error:
        raise UserError(f"this is no JSON schema: {type(error).__name__} {error}") from None


def regex_grammar(pattern):
    return Grammar(regex_tree(pattern), {})


# ------------------------------------------------------------------------------------ the automaton
@dataclass(eq=False, slots=True)
class Term:
    """An expression in a grammar, where equal ones are one object; a literal is a sequence."""

    kind: str  # "set", "seq", "alt", "rep" or "ref"
    what: object  # frozenset, tuple of Terms, Term, or a rule's name
    least: int = 0
    most: int | None = None
    shortest: float = math.inf  # bytes of the shortest text that matches
    size: int = 5  # what it costs where repetitions are written out


@dataclass(eq=False, slots=True)
class Position:
    """What is still to come: a term, and the position after it."""

    term: Term
    after: object
    shortest: float  # bytes to the end of everything
    depth: int  # rules that are not at their end


@dataclass(eq=False, slots=True)
class State:
    """All positions that a text may have led to."""

    positions: frozenset
    opens: frozenset  # the bytes that may come
    needs: float  # the fewest bytes to the end
    steps: dict = field(default_factory=dict)  # {byte: State}, as they are met
    mask: torch.Tensor | None = None  # see Constraint.needs


class Grammar:
    """An expression and its rules as an automaton, whose states are sets of positions.

    Positions, states, and the steps between them are made as they are met. Who writes a schema may
    mean harm: all work is counted, and what asks for more than WORK is refused."""

    def __init__(self, expression, rules):
        self.left = WORK  # work that may still be done
        self.terms = {}  # {what it is made of: Term}
        self.positions = {}  # {(term, position after it): Position}
        self.rules = {}  # {name: Term}
        for name in reversed(rules):  # what a rule refers to mostly comes after it
            self.rules[name] = self.intern(rules[name])
        first = self.intern(expression)
        self.spend(sum(term.size for term in (first, *self.rules.values())))
        self.find_shortest()
        if math.isinf(first.shortest):
            raise UserError("this schema asks for something infinite, which contains itself")
        self.left = WORK
        self.states = {}  # {set of positions: State}
        self.masks = 0  # states that have one
        self.end = Position(self.term("set", frozenset()), None, 0.0, 0)
        self.dead = self.state([])  # nothing may come
        self.start = self.state([self.position(first, self.end)])
        self.left = WORK

    def spend(self, work):
        self.left -= work
        if self.left < 0:
            raise UserError("this schema or regular expression asks for too much work: simplify it")

    def intern(self, expression):
        """An expression -> its Term."""
        kind, what, *counts = expression
        if kind in ("seq", "alt"):
            what = tuple(map(self.intern, what))
        elif kind == "rep":
            what = self.intern(what)
        return self.term(kind, what, *counts)

    def term(self, *key):
        if key not in self.terms:
            term = self.terms[key] = Term(*key)
            if term.kind in ("seq", "alt"):
                term.size += sum(inner.size for inner in term.what)
            elif term.kind == "rep":
                term.size += max(1, term.least, term.most or 0) * term.what.size
            term.shortest = self.shortest(term)
        return self.terms[key]

    def shortest(self, term):
        """Bytes of the shortest text that matches, as far as those of its terms are known."""
        if term.kind == "set":
            return 1.0 if term.what else math.inf
        if term.kind == "rep":
            return term.least * term.what.shortest if term.least else 0.0
        if term.kind == "ref":
            return self.rules[term.what].shortest if term.what in self.rules else math.inf
        lengths = [inner.shortest for inner in term.what]
        return sum(lengths) if term.kind == "seq" else min(lengths, default=math.inf)

    def find_shortest(self):
        """Rules may refer to each other: repeat until nothing changes (the least fixed point)."""
        changed = True
        while changed:
            changed = False
            self.spend(len(self.terms))
            for term in self.terms.values():
                length = self.shortest(term)
                if length < term.shortest:
                    changed = True
                    term.shortest = length

    def position(self, term, after, depth=0):
        key = term, after
        if key not in self.positions:
            shortest = term.shortest + after.shortest
            self.positions[key] = Position(term, after, shortest, max(depth, after.depth))
        return self.positions[key]

    def state(self, positions):
        """The state of all positions that can be had from these without reading a byte, as far as
        they begin with a set of bytes; the end does, with an empty one."""
        seen, todo, found = set(), list(positions), set()
        while todo:
            at = todo.pop()
            if at in seen or math.isinf(at.shortest):
                continue
            seen.add(at)
            self.spend(4)
            term, after = at.term, at.after
            if term.kind == "set":
                found.add(at)
            elif term.kind == "seq":
                for inner in reversed(term.what):
                    after = self.position(inner, after, at.depth)
                todo.append(after)
            elif term.kind == "alt":
                todo += [self.position(inner, after, at.depth) for inner in term.what]
            elif term.kind == "ref":
                if after.depth < 500:  # what is nested as deeply may be ended, but not nested more
                    todo.append(self.position(self.rules[term.what], after, after.depth + 1))
            else:
                if term.least == 0:
                    todo.append(after)
                if term.most != 0:
                    most = term.most and term.most - 1
                    others = self.term("rep", term.what, max(term.least - 1, 0), most)
                    todo.append(self.position(term.what, self.position(others, after, at.depth)))
        found = frozenset(found)
        if found not in self.states:
            opens = frozenset().union(*(at.term.what for at in found))
            needs = min((at.shortest for at in found), default=math.inf)
            self.states[found] = State(found, opens, needs)
        return self.states[found]

    def step(self, state, byte):
        """The state after a byte: the derivative. A text matches if the end is among the positions
        of the state after its last byte."""
        if byte not in state.opens:
            return self.dead
        if byte not in state.steps:
            self.spend(len(state.positions))
            after = [at.after for at in state.positions if byte in at.term.what]
            state.steps[byte] = self.state(after)
        return state.steps[byte]


# ------------------------------------------------------------------------------------------- tokens
class Vocabulary:
    """A tokenizer's tokens as a tree over their bytes, so that a beginning which may not come is
    walked once, not once per token."""

    def __init__(self, tok):
        self.tree = ({}, [])  # a node: ({byte: node}, ids of the tokens that end here)
        self.ends = {i for i in (tok.eos_id, *tok.special.values()) if i is not None}
        self.spelled = []  # the bytes of each token, none for those that end a turn
        for i in range(tok.vocab_size):
            spelled = b"" if i in self.ends else tok.token_bytes(i)
            self.spelled.append(spelled)
            node = self.tree
            for byte in spelled:
                node = node[0].setdefault(byte, ({}, []))
            if spelled:
                node[1].append(i)


class Constraint:
    """One request's place in a grammar. Requests share a grammar, and what it has learned."""

    def __init__(self, grammar, vocabulary):
        self.grammar = grammar
        self.vocabulary = vocabulary
        self.at = grammar.start

    @property
    def done(self):
        """Complete, and nothing can follow."""
        return self.at.positions == {self.grammar.end}

    @property
    def complete(self):
        """Complete, though more may follow: the turn may end here."""
        return self.grammar.end in self.at.positions

    def needs(self):
        """(V,) float32: the fewest bytes that must still follow each token; infinite for one that
        may not come."""
        grammar = self.grammar
        if self.at.mask is None:
            grammar.left = min(WORK, grammar.left + WORK // 10)
            needs = np.full(len(self.vocabulary.spelled), np.inf, np.float32)
            todo = [(self.vocabulary.tree, self.at)]
            while todo:
                (children, _), state = todo.pop()
                for byte, node in children.items():
                    after = grammar.step(state, byte)
                    if after.positions:
                        needs[node[1]] = after.needs
                        todo.append((node, after))
            self.at.mask = torch.from_numpy(needs)
            grammar.masks += 1
        return self.at.mask

    def allowed(self, remaining=None):
        """(V,) bool: the tokens that may come next; one that ends the turn is the caller's to allow
        when `complete`.

        remaining: how many tokens may still be made, this one included. A byte costs at most a
        token, so only what can still be brought to its end in time is allowed: an answer is never
        cut off half way. Nothing is allowed where the grammar asks for too much work."""
        try:
            needs = self.needs()
        except UserError:
            return torch.zeros(len(self.vocabulary.spelled), dtype=torch.bool)
        if remaining is None:
            return torch.isfinite(needs)
        return torch.isfinite(needs) & (needs <= max(remaining - 1, float(needs.min())))

    def advance(self, token):
        """Take a token that was allowed."""
        for byte in self.vocabulary.spelled[token]:
            self.at = self.grammar.step(self.at, byte)
