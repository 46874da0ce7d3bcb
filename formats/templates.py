"""Other people's chat templates: a folder's chat_template (Jinja) runs in a sandbox and is
believed.

`chat.render` opens this file for a folder whose template is not our own ChatML."""

import contextlib
import re
from dataclasses import replace
from datetime import datetime
from functools import lru_cache

from chat import FORMATS, Piece, json_text, marker_pattern, named_pieces
from common import UserError

# Unicode noncharacters, which no text contains: the first two stand around what {% generation %}
# encloses, the third inside the name of a marker that somebody typed.
OPEN, CLOSE, GUARD = "\ufdd0", "\ufdd1", "\ufdd2"
BARE = {ord(c): None for c in (OPEN, CLOSE, GUARD)}


def pieces_of_template(tok, chat, template):
    """A chat through its folder's template -> (pieces, whether they know who said what).

    The template renders this very conversation, and so does each format of chat.py. The one that
    gives the same text knows who said which part of it: nothing is guessed, and a template that
    merely resembles a known one is never taken for it. Failing that, a template's own {% generation
    %} says who spoke. Failing that there are ids but no mask."""
    text = run_template(template, chat).translate(BARE)
    for name in FORMATS:
        with contextlib.suppress(UserError):
            pieces = named_pieces(name, tok, chat)
            if "".join(piece.text for piece in pieces) == text:
                return pieces, True
    markers = marker_pattern(tuple(tok.special))
    messages, tools = defused(chat.messages, markers), defused(chat.tools, markers)
    rendered = run_template(template, replace(chat, messages=messages, tools=tools))
    pieces, said = [], False
    for part in re.split(f"([{OPEN}{CLOSE}])", rendered):
        if part in (OPEN, CLOSE):
            said = part == OPEN
            continue
        for text in markers.split(part):
            pieces.append(Piece(text.replace(GUARD, ""), said, template=text in tok.special))
    return pieces, any(piece.said for piece in pieces)


def defused(value, markers):
    """The same JSON value, each marker in its strings broken by GUARD, so that it stays text."""
    if isinstance(value, str):
        return markers.sub(lambda m: m[0][0] + GUARD + m[0][1:], value.translate(BARE))
    if isinstance(value, dict):
        return {defused(k, markers): defused(v, markers) for k, v in value.items()}
    if isinstance(value, list):
        return [defused(v, markers) for v in value]
    return value


def run_template(template, chat):
    """The text a template makes of a chat. What it refuses ("roles must alternate"): UserError."""
    import jinja2

    names = {"bos_token": chat.bos, "eos_token": chat.eos}
    try:
        return compile_template(template).render(
            messages=chat.messages,
            tools=chat.tools,
            documents=None,
            add_generation_prompt=chat.prompt,
            **{key: name for key, name in names.items() if name},
        )
    # It is a program from outside: whatever it stumbles over is about this conversation.
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        raise UserError(f"the folder's chat_template refuses this conversation: {e}") from None


@lru_cache(maxsize=8)
def compile_template(template):
    """A chat_template as transformers compiles it: its sandbox, whitespace rules and extras."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %}: what the assistant says."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            block = jinja2.nodes.CallBlock(self.call_method("enclose"), [], [], body)
            return block.set_lineno(line)

        def enclose(self, caller):
            return OPEN + caller() + CLOSE

    def refuse(message):
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = json_text
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(template)
