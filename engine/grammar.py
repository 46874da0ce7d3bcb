"""Output that must match a JSON schema or a regular expression: which tokens may come next.

    vocabulary = Vocabulary(tok)                               # once per tokenizer
    constraint = Constraint(json_grammar(schema), vocabulary)  # once per request; None: any object
    constraint.mask()                # bytes with a bit for each token: what may come next
    constraint.advance(token)        # and again, until constraint.done

llguidance (Rust) does the work: a parser (Earley 1970) over lexemes that are derivatives of regular
expressions (Brzozowski 1964) walks the vocabulary as a tree. Ours is what a schema may ask for, and
that nobody can ask for too much: all work is bounded, and a new grammar is first built by

    python -m engine.grammar < grammar

a process that may run out of time, memory or stack where this one must not.
"""

import functools
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from common import UserError

# A mask costs at most some 3 ms, the automaton of a request 30 MB. A new grammar may take
# TRIAL_SECONDS of one core and TRIAL_BYTES to build.
LIMITS = LLParserLimits(
    step_lexer_fuel=20_000,
    step_max_items=2_000,
    max_lexer_states=30_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
LONGEST = 200_000  # characters of a grammar
TRIAL_SECONDS = 2
TRIAL_BYTES = 1 << 30
BUILT = b"built "  # what the process of a trial says if it lives
# Between the tokens of JSON. It is bounded, so that no model stalls in white space.
WHITE_SPACE = " |\n {0,16}"
# What llguidance applies. Most others it refuses, but it ignores those that it does not know.
SUBSCHEMA = {"items", "additionalProperties"}
SUBSCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
SUBSCHEMA_DICTS = {"properties", "patternProperties", "$defs", "definitions"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
OTHERS = set(
    "type required minItems maxItems enum const $ref minLength maxLength pattern format multipleOf "
    "minProperties maxProperties".split()
)
KEYWORDS = SUBSCHEMA | SUBSCHEMA_LISTS | SUBSCHEMA_DICTS | BOUNDS | OTHERS
ANNOTATIONS = set(  # they bind nothing
    "title description default examples $comment deprecated strict readOnly writeOnly".split()
)


# ---------------------------------------------------------------------------------------- grammars
def regex_grammar(pattern):
    r"""A regular expression of the whole text -> grammar. \d, \w and \s are ASCII."""
    try:
        return f"/{regex_to_lark(pattern, 'dws')}/"
    except UnicodeEncodeError as error:
        raise UserError(f"regular expression {pattern!r}: {error}") from None


def json_grammar(schema=None, before="", after=""):
    """A JSON schema (a dict; None: any JSON object) -> grammar. before and after: fixed text around
    the value. Raises UserError for a schema that cannot be honoured."""
    if schema is None:
        schema = {"type": "object"}
    try:
        text = json.dumps(schema, allow_nan=False)
        check_length(text)
        json.loads(text, parse_int=check_number, parse_float=check_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"this JSON schema cannot be used: {error}") from None
    check_schema(schema)
    text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})
    return f"{json.dumps(before)} %json {text} {json.dumps(after)}"


def check_schema(root):
    """Raise UserError, with the place, for what llguidance would ignore."""
    todo = [("#", root)]
    places = set()
    references = []
    while todo:
        where, schema = todo.pop()
        places.add(where)
        if where.count("/") > 100:
            refuse_schema(f"{where[:60]}...", "nested more than 100 deep")
        if isinstance(schema, bool) and where != "#":
            continue
        if not isinstance(schema, dict):
            refuse_schema(where, f"{schema!r} is not a schema")
        check_interval(schema, where)
        for key, value in schema.items():
            inner = f"{where}/{key}"
            if key in SUBSCHEMA:
                todo.append((inner, value))
            elif key in SUBSCHEMA_LISTS and isinstance(value, list):
                todo += [(f"{inner}/{i}", item) for i, item in enumerate(value)]
            elif key in SUBSCHEMA_DICTS and isinstance(value, dict):
                for name, item in value.items():
                    name = name.replace("~", "~0").replace("/", "~1")  # RFC 6901, JSON Pointer
                    todo.append((f"{inner}/{name}", item))
            elif key in SUBSCHEMA_LISTS | SUBSCHEMA_DICTS:
                refuse_schema(inner, f"{value!r} has no schemas in it")
            elif key == "$ref":
                references.append((where, value))
            elif key in BOUNDS and isinstance(value, bool):
                refuse_schema(inner, f"{value} is not a number")
            elif key == "minProperties" and value not in (0, 1):
                refuse_schema(where, "minProperties above 1 is not supported, as names may repeat")
            elif key not in KEYWORDS | ANNOTATIONS and inner not in ("#/$schema", "#/$id"):
                refuse_schema(where, f"{key} is not supported")
    for where, reference in references:
        if unquote(str(reference)) not in places:
            refuse_schema(where, f"$ref {reference!r} leads nowhere in this schema (#/$defs/...)")


def check_length(text):
    if len(text) > LONGEST:
        raise UserError(f"{len(text):,} characters of schema or pattern: at most {LONGEST:,}")


def check_number(text):
    """llguidance computes with doubles, and might ask for a number near this one."""
    if abs(float(text)) >= 1 << 53:
        raise ValueError(f"{text} is not below 2^53, up to which numbers are exact")


def check_interval(schema, where):
    """Between bounds less than 1 apart llguidance lets an exclusive one be reached."""
    bounds = {key: schema[key] for key in BOUNDS if type(schema.get(key)) in (int, float)}
    low = max(bounds.get("minimum", -math.inf), bounds.get("exclusiveMinimum", -math.inf))
    high = min(bounds.get("maximum", math.inf), bounds.get("exclusiveMaximum", math.inf))
    if high < low + 1 and not bounds.keys() <= {"minimum", "maximum"}:
        refuse_schema(where, f"bounds {low} and {high}, one exclusive, must be 1 apart")


def refuse_schema(where, why):
    raise UserError(f"JSON schema at {where!r}: {why}"[:400])


# ------------------------------------------------------------------------------------- constraints
class Vocabulary:
    """A tokenizer's tokens by their bytes."""

    def __init__(self, tok):
        if tok is None:
            raise UserError("a schema or a pattern needs a tokenizer; this model folder has none")
        spelled = [tok.token_bytes(i) for i in range(tok.vocab_size)]
        if tok.eos_id is not None:
            spelled[tok.eos_id] = b""  # nothing of a text
        tokens = SimpleNamespace(
            is_tokenizer_wrapper=True,
            tokens=spelled,
            special_token_ids=[],
            bos_token_id=None,
            eos_token_id=None,  # one is appended: which ids end a turn is the caller's matter
        )
        self.spelled = spelled
        self.tokenizer = LLTokenizer(tokens)


def build(tokenizer, grammar):
    # Without forcing, all tokens that fit are allowed, not only those that encode() would choose.
    grammar = f'%llguidance {{"no_forcing": true}}\nstart: {grammar}'
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


class Constraint:
    """One answer's place in a grammar. UserError for a grammar that nothing can match, or that
    costs too much."""

    def __init__(self, grammar, vocabulary):
        check_length(grammar)
        fault = fault_found(grammar)
        if not fault:
            self.size = len(vocabulary.spelled)
            self.matcher = build(vocabulary.tokenizer, grammar)
            self.bits = self.matcher.compute_bitmask()
            fault = self.matcher.get_error()
        if fault:
            raise UserError(f"this schema or pattern cannot be used: {readable(fault)}")

    def __copy__(self):
        copy = object.__new__(Constraint)
        vars(copy).update(vars(self), matcher=self.matcher.deep_copy())
        return copy

    def mask(self):
        """What may come next: a bit for each of `size` tokens, the lowest bits first."""
        if self.bits is None:
            self.bits = self.matcher.compute_bitmask()
            if self.error:
                self.bits = bytes(len(self.bits))
        return self.bits

    def advance(self, token):
        """Take a token that was allowed."""
        self.matcher.consume_token(token)
        self.bits = None

    @property
    def error(self):
        """What went wrong since it was made, such as a mask that costs too much; or None."""
        return readable(self.matcher.get_error()) if self.matcher.is_error() else None

    @property
    def complete(self):
        """Complete, though more may follow: the turn may end here."""
        return self.matcher.is_accepting()

    @property
    def done(self):
        """Complete, and nothing can follow."""
        return self.matcher.is_stopped() and not self.matcher.is_error()


def readable(fault):
    """llguidance's message in one line, without the grammar's text and its own state."""
    if "NoExtension" in fault:
        return "no text of this model's tokens matches"
    fault = re.split(r"\n   1 \||\n<", fault)[0]
    fault = re.sub(r"^at \d+\(\d+\): |regex parse error:.*error: ", "", fault, flags=re.DOTALL)
    fault = " ".join(fault.split())
    return fault if len(fault) < 400 else f"{fault[:200]} ... {fault[-200:]}"


# ------------------------------------------------------------------------------ trial of a grammar
@functools.lru_cache(256)
def fault_found(grammar):
    """What a process of its own finds wrong with a grammar, or ""."""
    try:
        trial = subprocess.run(
            [sys.executable, "-m", "engine.grammar"],
            input=grammar.encode(),
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            timeout=5 * TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"this schema or pattern was not built in {5 * TRIAL_SECONDS} s: simplify it, or try "
            "again when this machine is less busy"
        ) from None
    if trial.stdout.startswith(BUILT):
        return trial.stdout.removeprefix(BUILT).decode()
    most = f"{TRIAL_SECONDS} s, {TRIAL_BYTES >> 20:,} MB"
    return f"it needs over {most} or too deep a stack to build: simplify it"


def try_grammar():
    """Build the grammar on stdin within the limits, and print what is wrong with it."""
    if sys.platform == "linux":
        import os
        import resource

        os.nice(10)
        resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_SECONDS, TRIAL_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
    matcher = build(LLTokenizer("byte"), sys.stdin.buffer.read().decode())
    matcher.compute_bitmask()
    sys.stdout.buffer.write(BUILT + matcher.get_error().encode())


if __name__ == "__main__":
    # Where it is built later, the stack is larger than here.
    threading.stack_size(1 << 20)
    thread = threading.Thread(target=try_grammar)
    thread.start()
    thread.join()
