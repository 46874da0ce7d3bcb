"""Output that must match a regular expression or a JSON schema: which tokens may come next.

    vocabulary = Vocabulary(tok)                                   # once per tokenizer
    constraint = Constraint(json_grammar(schema), vocabulary)      # once per request; None as schema: any JSON value
    constraint.allowed(remaining=100)     # (V,) bool, of the next token; then constraint.advance(token), until constraint.done

Top to bottom: expressions over bytes; regular expressions and JSON schemas as expressions; the automaton; tokens.
An expression is a tuple: ("lit", bytes), ("set", bytes allowed as a frozenset), ("seq", [...]), ("alt", [...]),
("rep", expression, least, most or None), ("ref", rule name). Rules that refer to each other make JSON's nesting possible.
"""

import json
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from common import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        from re import _parser as sre  # the standard library's own parser of regular expressions
    except ImportError:  # Python 3.10
        import sre_parse as sre

WORK = 1_000_000  # states and positions that a grammar may cost, and then again its masks, each of which adds a tenth: a second
EMPTY = ("lit", b"")
ANYTHING = [(0, 0x10FFFF)]


def lit(text):
    return ("lit", text.encode() if isinstance(text, str) else text)


def seq(*parts):
    return ("seq", parts)


def alt(*parts):
    return ("alt", parts)


def optional(part):
    return ("rep", part, 0, 1)


# --------------------------------------------------------------------------- characters and regexes
def between(lo, hi, low, high):
    """Two byte strings of one length -> all of that length from one to the other, whose bytes after the first are from low to
    high: numbers, and the UTF-8 of characters."""
    if not lo:
        return EMPTY
    rest = len(lo) - 1
    bottom, top, digit = (
        bytes([low]) * rest,
        bytes([high]) * rest,
        ("set", frozenset(range(low, high + 1))),
    )
    if lo[0] == hi[0]:
        return seq(lit(lo[:1]), between(lo[1:], hi[1:], low, high))
    parts, a, b = [], lo[0], hi[0]
    if lo[1:] != bottom:
        parts, a = [seq(lit(lo[:1]), between(lo[1:], top, low, high))], a + 1
    if hi[1:] != top:
        parts, b = [*parts, seq(lit(hi[:1]), between(bottom, hi[1:], low, high))], b - 1
    return alt(*parts, seq(("set", frozenset(range(a, b + 1))), ("rep", digit, rest, rest)))


def characters(ranges):
    """Sorted code point ranges [(lo, hi)] -> the expression of their UTF-8 bytes; surrogates are no characters."""
    lengths = (
        (0, 0x7F),
        (0x80, 0x7FF),
        (0x800, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x10FFFF),
    )  # 1, 2, 3, 3 and 4 bytes
    cut = [(max(lo, a), min(hi, b)) for lo, hi in ranges for a, b in lengths]
    return alt(*(between(chr(a).encode(), chr(b).encode(), 0x80, 0xBF) for a, b in cut if a <= b))


def complement(ranges, last=0x10FFFF):
    out, at = [], 0
    for lo, hi in sorted(ranges):
        if at < lo:
            out.append((at, min(lo - 1, last)))
        at = max(at, hi + 1)
    return [*out, (at, last)] if at <= last else out


CLASSES = {
    "DIGIT": [(48, 57)],
    "SPACE": [(9, 13), (32, 32)],
    "WORD": [(48, 57), (65, 90), (95, 95), (97, 122)],
}  # ASCII's
PLAIN = complement(
    [(0, 31), (34, 34), (92, 92), (127, 127)]
)  # what a JSON string holds without a backslash


def regex(pattern, in_json=False):
    """A regular expression (of all of the text) as an expression. Look-around, back references and \\b are refused.

    \\d, \\w and \\s are ASCII's. in_json: of the content of a JSON string, where it may begin and end anywhere unless anchored, and
    where quotes and backslashes are written with a backslash.
    """
    if len(pattern) > 10_000:
        raise UserError(f"a regular expression of {len(pattern):,} characters: at most 10,000")
    try:
        parsed = list(sre.parse(pattern))
    except Exception as error:
        raise UserError(f"regular expression {pattern!r}: {error}") from None
    anywhere = ("rep", ("ref", "character"), 0, None)
    begin = parsed[:1] in ([(sre.AT, sre.AT_BEGINNING)], [(sre.AT, sre.AT_BEGINNING_STRING)])
    end = parsed[-1:] in ([(sre.AT, sre.AT_END)], [(sre.AT, sre.AT_END_STRING)])
    body = regex_sequence(parsed[begin : len(parsed) - end], in_json, pattern)
    return seq(EMPTY if begin else anywhere, body, EMPTY if end else anywhere) if in_json else body


def regex_sequence(items, in_json, pattern):
    parts = []
    for op, value in items:
        op = str(op)
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            parts.append(regex_characters(op, value, in_json))
        elif op == "BRANCH":
            parts.append(alt(*(regex_sequence(branch, in_json, pattern) for branch in value[1])))
        elif op == "SUBPATTERN" and not value[1] and not value[2]:
            parts.append(regex_sequence(value[3], in_json, pattern))
        elif op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = value
            most = None if most == sre.MAXREPEAT else most
            if max(least, most or 0) > 1000:
                raise UserError(
                    f"regular expression {pattern!r}: at most 1,000 repetitions, not {max(least, most or 0):,}"
                )
            parts.append(("rep", regex_sequence(inner, in_json, pattern), least, most))
        else:
            raise UserError(
                f"regular expression {pattern!r}: {op.lower()} is not supported (only what describes the text itself)"
            )
    return seq(*parts)


def regex_characters(op, value, in_json):
    ranges, negate, limit = [], op == "NOT_LITERAL", 0x10FFFF
    for kind, what in {"IN": value, "ANY": [("RANGE", (10, 10))]}.get(op, [("LITERAL", value)]):
        kind = str(kind)
        if kind == "NEGATE":
            negate = True
        elif kind == "LITERAL":
            ranges.append((what, what))
        elif kind == "RANGE":
            ranges.append(what)
        else:  # CATEGORY_DIGIT, CATEGORY_NOT_DIGIT, ...: whether they mean ASCII differs between dialects, so nothing else is made
            name, limit = str(what).rsplit("_", 1)[1], 0x7F
            ranges += complement(CLASSES[name], 0x7F) if "NOT" in str(what) else CLASSES[name]
    ranges = complement(ranges, limit) if negate or op == "ANY" else sorted(ranges)
    if not in_json:
        return characters(ranges)
    plain = [(max(a, c), min(b, d)) for a, b in ranges for c, d in PLAIN if max(a, c) <= min(b, d)]
    escaped = [lit("\\" + chr(c)) for c in (34, 92) if any(a <= c <= b for a, b in ranges)]
    return alt(characters(plain), *escaped)


# ------------------------------------------------------------------------------------- JSON schemas
# one character of a string's content: as it is, or escaped (RFC 8259, section 7); no half surrogate pairs
CHARACTER = (
    r'[^\x00-\x1f"\\\x7f]|\\["\\/bfnrt]|\\u([0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}|'
    r"[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
SPACE = ("ref", "space")
FORMATS = {
    "date": r"^(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])$",
    "time": r"^([01]\d|2[0-3]):[0-5]\d:[0-5]\d(Z|[+-]0\d:[0-5]\d)$",
    "date-time": r"^(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(Z|[+-]0\d:[0-5]\d)$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "email": r"^[a-z0-9]+([._][a-z0-9]+){0,3}@[a-z0-9]+(\.[a-z0-9]+){0,2}\.[a-z]{2,6}$",
    "ipv4": r"^((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)$",
}
KNOWN = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "nullable",
}
NOTES = {
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "deprecated",
    "strict",
    "readOnly",
    "writeOnly",
}


def integers(lo, hi):
    """All integers from lo to hi, without leading zeros."""
    parts = []
    if lo < 0:
        parts.append(seq(lit("-"), integers(max(1, -hi), -lo)))
    for n in range(len(str(max(lo, 0))), len(str(max(hi, 0))) + 1):
        a, b = max(lo, 0 if n == 1 else 10 ** (n - 1)), min(hi, 10**n - 1)
        if a <= b:
            parts.append(between(str(a).encode(), str(b).encode(), 48, 57))
    return alt(*parts)


class Schema:
    """A JSON schema being turned into rules; `where` in errors is the place in it."""

    def __init__(self, root):
        self.root, self.rules = root, {}

    def ref(self, name, make):
        """A reference to rule `name`, made now if it is new; by name, so that a schema may contain itself."""
        if name not in self.rules:
            self.rules[name] = EMPTY
            self.rules[name] = make()
        return ("ref", name)

    def value(self, schema, where="#", via=()):
        """What matches the schema -> expression; via: the references that led to it, with nothing in between. A keyword that cannot
        be honoured is refused, not ignored."""
        if schema is True or schema == {} or schema is None:
            return self.ref("any", self.anything)
        if not isinstance(schema, dict):
            raise UserError(f"JSON schema at {where}: {schema!r} is not a schema")
        if unknown := [k for k in schema if k not in KNOWN | NOTES]:
            raise UserError(
                f"JSON schema at {where}: {', '.join(unknown)} is not supported; there are {', '.join(sorted(KNOWN))}"
            )
        if "$ref" in schema:
            name = schema["$ref"]
            if name in via:
                raise UserError(
                    f"JSON schema at {where}: $ref {name!r} leads back to itself with nothing in between"
                )
            return self.ref(name, lambda: self.value(self.resolve(name, where), name, (*via, name)))
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                if key == "allOf" and len(schema[key]) != 1:
                    raise UserError(
                        f"JSON schema at {where}: allOf of {len(schema[key])} is not supported, only of one"
                    )
                return alt(
                    *(self.value(s, f"{where}/{key}/{i}", via) for i, s in enumerate(schema[key]))
                )
        if "const" in schema or "enum" in schema:
            choices = schema.get("enum", [schema.get("const")])
            return alt(*(lit(json.dumps(c, ensure_ascii=False)) for c in choices))
        kinds = schema.get("type") or (
            "object" if "properties" in schema else "array" if "items" in schema else None
        )
        if kinds is None:
            text = schema.keys() & {"pattern", "format", "minLength", "maxLength"}
            kinds = "string" if text else ["number", "string", "object", "array", "boolean", "null"]
        kinds = list(kinds) if isinstance(kinds, list) else [kinds]
        makers = {
            "object": self.object,
            "array": self.array,
            "string": self.string,
            "number": self.number,
            "integer": self.number,
            "boolean": lambda *_: regex("true|false"),
            "null": lambda *_: lit("null"),
        }
        if bad := [k for k in kinds if k not in makers]:
            raise UserError(f"JSON schema at {where}: unknown type {bad[0]!r}")
        return alt(
            *(makers[k](schema, where, k) for k in kinds + ["null"] * bool(schema.get("nullable")))
        )

    def resolve(self, ref, where):
        at = self.root
        for key in ref.removeprefix("#").strip("/").split("/") if ref.strip("#/") else []:
            at = at.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(at, dict) else None
        if not ref.startswith("#") or at is None:
            raise UserError(
                f"JSON schema at {where}: $ref {ref!r} leads nowhere (only within the schema: #/$defs/...)"
            )
        return at

    def anything(self):
        return alt(
            *(
                self.value({"type": t})
                for t in ("object", "array", "string", "number", "boolean", "null")
            )
        )

    def string(self, schema, where, _):
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if "pattern" in schema or schema.get("format") in FORMATS:
            if least or most is not None:
                raise UserError(
                    f"JSON schema at {where}: give a pattern or lengths, not both (write the lengths into the pattern)"
                )
            return seq(
                lit('"'),
                regex(schema.get("pattern") or FORMATS[schema["format"]], in_json=True),
                lit('"'),
            )
        if max(least, most or 0) > 4096:
            raise UserError(
                f"JSON schema at {where}: string lengths up to 4,096, not {max(least, most or 0):,}"
            )
        return seq(lit('"'), ("rep", ("ref", "character"), least, most), lit('"'))

    def number(self, schema, where, kind):
        """Integers of up to 15 digits, which every reader keeps exactly; numbers also with a fraction, which stays inside."""
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        low = max(low, schema.get("exclusiveMinimum", -math.inf) + (1 if kind == "integer" else 0))
        high = min(high, schema.get("exclusiveMaximum", math.inf) - (1 if kind == "integer" else 0))
        lo, hi = math.ceil(max(low, 1 - 10**15)), math.floor(min(high, 10**15 - 1))
        lo += kind == "number" and lo == schema.get("exclusiveMinimum")
        hi -= kind == "number" and hi == schema.get("exclusiveMaximum")
        fraction = regex(r"\.[0-9]{1,15}")
        parts = [integers(lo, hi)] if lo <= hi else []
        if kind == "number":
            if max(lo, 0) <= hi - 1:  # k.f is in [k, k + 1)
                parts.append(seq(integers(max(lo, 0), hi - 1), fraction))
            if lo + 1 <= min(hi, 0):  # -k.f is in (-k - 1, -k]
                parts.append(seq(lit("-"), integers(max(-hi, 0), -lo - 1), fraction))
        if not parts:
            raise UserError(
                f"JSON schema at {where}: no {kind} lies between {low} and {high} that can be written here"
            )
        return alt(*parts)

    def array(self, schema, where, _):
        first = [
            self.value(s, f"{where}/prefixItems/{i}")
            for i, s in enumerate(schema.get("prefixItems", []))
        ]
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if max(least, most or 0) > 1000 or (most is not None and most < least):
            raise UserError(
                f"JSON schema at {where}: {least} to {most} items cannot be made (at most 1,000)"
            )
        item, comma = self.value(schema.get("items"), f"{where}/items"), seq(lit(","), SPACE)
        if schema.get("items") is False:
            most = min(len(first), math.inf if most is None else most)
        body, n = EMPTY, len(first)
        if (
            most is None or most > n
        ):  # from the last item to the first, for what follows depends on there being one
            more = (
                "rep",
                seq(comma, item),
                max(0, least - n - (not n)),
                None if most is None else most - n - (not n),
            )
            body = more if n else (seq(item, more) if least else optional(seq(item, more)))
        for i in reversed(range(min(n, math.inf if most is None else most))):
            body = seq(comma if i else EMPTY, first[i], body)
            body = body if least > i else optional(body)
        return seq(lit("["), SPACE, body, SPACE, lit("]"))

    def object(self, schema, where, _):
        """Declared properties in their order, the optional ones or not; further ones only where none are declared."""
        declared, required = schema.get("properties", {}), schema.get("required", [])
        members = {
            name: self.value(s, f"{where}/properties/{name}") for name, s in declared.items()
        }
        members |= {name: self.value(None) for name in required if name not in declared}
        comma, colon = seq(lit(","), SPACE), seq(lit(":"), SPACE)
        if not members:
            more = schema.get("additionalProperties", True)
            if more is False:
                return lit("{}")
            value = self.value(more, f"{where}/additionalProperties")
            pair = seq(lit('"'), ("rep", ("ref", "character"), 0, 64), lit('"'), colon, value)
            return seq(
                lit("{"),
                SPACE,
                optional(seq(pair, ("rep", seq(comma, pair), 0, None))),
                SPACE,
                lit("}"),
            )
        names = list(members)
        must = next((i for i, name in enumerate(names) if name in required), len(names))
        for i, name in enumerate(
            [*names, None]
        ):  # rules: the members from the i-th on, after others (started) or as the first
            for started in (True, False)[i == 0 : 1 + (i <= must)]:
                take = (
                    seq(
                        comma if started else EMPTY,
                        lit(json.dumps(name, ensure_ascii=False)),
                        colon,
                        members[name],
                        ("ref", f"{where} {i + 1} True"),
                    )
                    if name is not None
                    else EMPTY
                )
                leave = (
                    []
                    if name in required or name is None
                    else [("ref", f"{where} {i + 1} {started}")]
                )
                self.rules[f"{where} {i} {started}"] = alt(take, *leave)
        return seq(lit("{"), SPACE, ("ref", f"{where} 0 False"), SPACE, lit("}"))


def json_grammar(schema=None, before="", after=""):
    """A JSON schema (a dict; None: any JSON object) -> Grammar; before and after: fixed text around the value."""
    maker = Schema(schema or {})
    maker.rules |= {
        "character": regex(CHARACTER),
        "space": regex(r" ?|\n {0,16}"),
    }  # bounded: no model stalls in white space
    try:
        return Grammar(
            seq(lit(before), maker.value(schema or {"type": "object"}), lit(after)), maker.rules
        )
    except RecursionError:
        raise UserError("this JSON schema is nested too deeply") from None


def regex_grammar(pattern):
    return Grammar(regex(pattern), {})


# ------------------------------------------------------------------------------------ the automaton
@dataclass(eq=False, slots=True)
class Part:
    """An expression in a grammar, where equal ones are one object; a literal is a sequence of sets."""

    kind: str
    what: object  # frozenset, tuple of Parts, Part, or a rule's name
    least: int = 0
    most: int | None = None
    shortest: float = math.inf  # bytes of the shortest text that matches
    size: int = 0  # what it costs where repetitions are written out


@dataclass(eq=False, slots=True)
class Position:
    """What is still to come: a part, and the position after it."""

    part: Part
    after: object
    shortest: float  # bytes to the end of everything
    depth: int  # rules that are not at their end


class Grammar:
    """Expressions as an automaton whose states are what is still to come (derivatives: Brzozowski 1964, Antimirov 1996).

    What may happen next depends on the set of all positions that the bytes so far can have led to. Positions, such sets, and the
    steps between them are made as they are met. Who writes a schema may mean harm: all work is counted, and what is over a million
    bytes when repetitions are written out, or parts and positions, is refused.
    """

    def __init__(self, expression, rules):
        self.left, self.parts, self.positions, self.rules = WORK, {}, {}, {}
        for name in reversed(rules):  # what a rule refers to mostly comes after it
            self.rules[name] = self.intern(rules[name])
        first, changed = self.intern(expression), True
        self.spend(sum(part.size for part in (first, *self.rules.values())))
        while changed:  # the least fixed point, as rules may refer to each other
            changed = False
            self.spend(len(self.parts))
            for part in self.parts.values():
                now = self.shortest(part)
                part.shortest, changed = now, changed or now < part.shortest
        if math.isinf(first.shortest):
            raise UserError(
                "this schema asks for something infinite: a value that must contain itself"
            )
        self.left, self.numbers, self.sets, self.opens, self.steps, self.needs, self.masks = (
            WORK,
            {},
            [],
            [],
            {},
            [],
            {},
        )
        self.end = Position(self.part("set", frozenset()), None, 0.0, 0)
        self.start = self.number(self.closure([self.position(first, self.end)]))
        self.left = WORK

    def spend(self, work):
        self.left -= work
        if self.left < 0:
            raise UserError(
                "this schema or regular expression asks for too much work: write it with fewer repetitions and choices"
            )

    def intern(self, expression):
        kind, what, *counts = expression
        if kind == "lit":
            kind, what = "seq", tuple(self.part("set", frozenset([byte])) for byte in what)
        elif kind in ("seq", "alt"):
            what = tuple(map(self.intern, what))
        elif kind == "rep":
            what = self.intern(what)
        return self.part(kind, what, *counts)

    def part(self, *key):
        if key not in self.parts:
            part = self.parts[key] = Part(*key)
            inner = (
                part.what
                if part.kind in ("seq", "alt")
                else (part.what,)
                if part.kind == "rep"
                else ()
            )
            part.size = 5 + max(1, part.least, part.most or 0) * sum(p.size for p in inner)
            part.shortest = self.shortest(part)
        return self.parts[key]

    def shortest(self, part):
        if part.kind == "set":
            return 1.0 if part.what else math.inf
        if part.kind == "rep":
            return part.least * part.what.shortest if part.least else 0.0
        if part.kind == "ref":
            return self.rules[part.what].shortest if part.what in self.rules else math.inf
        return (
            sum(p.shortest for p in part.what)
            if part.kind == "seq"
            else min((p.shortest for p in part.what), default=math.inf)
        )

    def position(self, part, after, depth=0):
        key = part, after
        if key not in self.positions:
            self.positions[key] = Position(
                part, after, part.shortest + after.shortest, max(depth, after.depth)
            )
        return self.positions[key]

    def closure(self, positions):
        """All positions that can be had without reading a byte, as far as they begin with one or are the end."""
        seen, todo, keep = set(), list(positions), set()
        while todo:
            at = todo.pop()
            if at in seen or math.isinf(at.shortest):
                continue
            seen.add(at)
            self.spend(4)
            part, after = at.part, at.after
            if part.kind == "set":
                keep.add(at)
            elif part.kind == "seq":
                for p in reversed(part.what):
                    after = self.position(p, after, at.depth)
                todo.append(after)
            elif part.kind == "alt":
                todo += [self.position(p, after, at.depth) for p in part.what]
            elif part.kind == "ref":
                if after.depth < 500:  # what is nested as deeply may be ended, but not nested more
                    todo.append(self.position(self.rules[part.what], after, after.depth + 1))
            else:
                if part.least == 0:
                    todo.append(after)
                if part.most != 0:
                    others = self.part(
                        "rep", part.what, max(part.least - 1, 0), part.most and part.most - 1
                    )
                    todo.append(self.position(part.what, self.position(others, after, at.depth)))
        return frozenset(keep)

    def number(self, positions):
        if positions not in self.numbers:
            self.numbers[positions] = len(self.sets)
            self.sets.append(positions)
            self.needs.append(min((p.shortest for p in positions), default=math.inf))
            self.opens.append(frozenset().union(*(p.part.what for p in positions)))
        return self.numbers[positions]

    def step(self, at, byte):
        """Number of a set of positions, a byte -> the number of the next, or -1 if the byte may not come (and stays so)."""
        if at < 0 or byte not in self.opens[at]:
            return -1
        if (at, byte) not in self.steps:
            self.spend(len(self.sets[at]))
            self.steps[at, byte] = self.number(
                self.closure([p.after for p in self.sets[at] if byte in p.part.what])
            )
        return self.steps[at, byte]

    def accepts(self, at):
        return self.end in self.sets[at]

    def matches(self, data):
        """Whether a whole byte string matches: the plain twin of what Constraint does token by token."""
        at, self.left = self.start, WORK
        for byte in data:
            if (at := self.step(at, byte)) < 0:
                return False
        return self.accepts(at)


# ------------------------------------------------------------------------------------------- tokens
class Vocabulary:
    """A tokenizer's tokens as a tree over their bytes, so that a dead beginning is walked once, not once per token."""

    def __init__(self, tok):
        self.tree = ({}, [])  # a node: ({byte: node}, ids of the tokens that end here)
        self.ends = {i for i in (tok.eos_id, *tok.special.values()) if i is not None}
        self.spelled = [
            tok.token_bytes(i) if i not in self.ends else b"" for i in range(tok.vocab_size)
        ]
        for i, spelled in enumerate(self.spelled):
            node = self.tree
            for byte in spelled:
                node = node[0].setdefault(byte, ({}, []))
            if spelled:
                node[1].append(i)


class Constraint:
    """One request's place in a grammar. A grammar may serve many requests one after the other; what it learned is kept."""

    def __init__(self, grammar, vocabulary):
        self.grammar, self.vocabulary, self.at = grammar, vocabulary, grammar.start

    @property
    def done(self):
        """Complete, and nothing can follow."""
        return self.grammar.sets[self.at] == {self.grammar.end}

    @property
    def complete(self):
        """Complete, though more may follow: the turn may end here."""
        return self.grammar.accepts(self.at)

    def needs(self):
        """(V,) float32: the fewest bytes that must still follow each token; infinite for one that may not come."""
        if self.at not in self.grammar.masks:
            self.grammar.left = min(WORK, self.grammar.left + WORK // 10)
            needs, todo = (
                np.full(len(self.vocabulary.spelled), np.inf, np.float32),
                [(self.vocabulary.tree, self.at)],
            )
            while todo:
                (children, _), at = todo.pop()
                for byte, node in children.items():
                    if (after := self.grammar.step(at, byte)) >= 0:
                        needs[node[1]] = self.grammar.needs[after]
                        todo.append((node, after))
            self.grammar.masks[self.at] = torch.from_numpy(needs)
        return self.grammar.masks[self.at]

    def allowed(self, remaining=None):
        """(V,) bool: the tokens that may come next; an end-of-turn token is the caller's to allow when `complete`.

        remaining: how many tokens may still be made, this one included. A byte costs at most a token, so of all that fits the
        grammar only what can still be brought to its end in time is allowed: an answer is never cut off half way. Nothing is
        allowed where the grammar asks for too much work.
        """
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
